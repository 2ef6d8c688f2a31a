import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval_runs import save, score_plainly
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nanochat_hf import NanoChatHFConfig, NanoChatHFForCausalLM
from nanochat_hf.evaluation import lm_eval_model, scoring
from nanochat_hf.evaluation.lm_eval_model import NanoChatHFLM
from nanochat_hf.evaluation.scoring import score_continuations
from nanochat_hf.generation import generate_completions

VOCAB = 300
SCRIPT = Path(__file__).parents[1] / "scripts" / "evaluate.py"


def windowed_model():
    """The newest generation with short windows, every path alive; the window is smaller than the test's prompts."""
    config = NanoChatHFConfig(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=4, num_attention_heads=2, max_position_embeddings=64
    )
    config.sliding_window = 9
    model = NanoChatHFForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == 1 or parameter.std() < 0.01:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def llama_model():
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def gpt2_model():
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=128)).eval()


def some_requests(seed=0):
    """Items of CORE's shapes: shared contexts of many lengths, letters, single continuations, one item twice."""
    rng = random.Random(seed)

    def tokens(low, high):
        return [rng.randrange(VOCAB) for _ in range(rng.randint(low, high))]

    requests = []
    for _ in range(6):
        context = tokens(12, 60)
        requests += [(context, tokens(1, 9)) for _ in range(rng.randint(2, 4))]
    for _ in range(3):
        context = tokens(5, 40)
        requests += [(context, [letter]) for letter in (65, 66, 67, 68)]
    requests += [(tokens(1, 50), tokens(1, 12)) for _ in range(6)]
    short = tokens(3, 3)
    requests += [(short, tokens(2, 4)), (short, tokens(2, 4)), requests[0]]
    rng.shuffle(requests)
    return requests


@pytest.mark.parametrize("make_model", [windowed_model, llama_model, gpt2_model])
@pytest.mark.parametrize("max_batch_tokens", [1, 200, None, "old"])
def test_scores_equal_one_plain_forward_each(make_model, max_batch_tokens, monkeypatch):
    """Also with heads that take no mask, as in transformers 5.17."""
    if max_batch_tokens == "old":
        monkeypatch.setattr(scoring, "HEADS_TAKE_MASKS", False)
        max_batch_tokens = None
    model, requests = make_model(), some_requests()
    seen = []
    answers = score_continuations(
        model, requests, max_batch_tokens=max_batch_tokens, on_scored=lambda i, answer: seen.append((i, answer))
    )
    assert sorted(i for i, _ in seen) == list(range(len(requests)))
    assert all(answers[i] == answer for i, answer in seen)
    for request, (likelihood, greedy) in zip(requests, answers, strict=True):
        expected, expected_greedy = score_plainly(model, *request)
        assert likelihood == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


def test_greedy_continuations_are_recognised():
    model = windowed_model()
    context = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    best = []
    for _ in range(3):
        best.append(int(model(torch.tensor([context + best])).logits[0, -1].argmax()))
    wrong = [*best[:2], (best[2] + 1) % VOCAB]
    assert [greedy for _, greedy in score_continuations(model, [(context, best), (context, wrong)])] == [True, False]


def test_shared_contexts_run_once_and_only_scored_positions_reach_the_head():
    model = llama_model()
    num_inputs, num_logits = [], []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: num_inputs.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    model.lm_head.register_forward_hook(lambda _, __, output: num_logits.append(output[..., 0].numel()))
    context = list(range(100))
    letters = [(context, [letter]) for letter in range(4)]
    score_continuations(model, letters)
    assert (num_inputs, num_logits) == ([100], [1]), "four letters are one forward and one position"
    num_inputs.clear(), num_logits.clear()
    score_continuations(model, [(context, [1, 2, 3]), (context, [4, 5, 6])])
    # 99 shared tokens once, no further than the last layer; then, a row, the context's last token and the continuation
    # but for its last.
    assert (num_inputs, num_logits) == ([99, 6], [6])


def test_long_inputs_lose_tokens_on_the_left():
    model = llama_model()
    context, continuation = list(range(50)), [7, 8, 9]
    ((likelihood, _),) = score_continuations(model, [(context, continuation)], max_length=20)
    assert likelihood == pytest.approx(score_plainly(model, context[-17:], continuation)[0], abs=1e-4)


def test_bad_requests_are_named():
    model = llama_model()
    with pytest.raises(ValueError, match="request 1: context and continuation both need"):
        score_continuations(model, [([1], [2]), ([1], [])])
    with pytest.raises(ValueError, match="request 0: its 4 tokens to score leave no context in max_length=4"):
        score_continuations(model, [([1], [1, 2, 3, 4])], max_length=4)


def test_batches_keep_to_their_budgets(monkeypatch):
    monkeypatch.setattr(scoring, "MAX_LOGITS", 40 * VOCAB)
    families = scoring._families(some_requests(), None)
    batches = list(scoring._batches(families, 150, VOCAB))
    assert sum(map(len, batches)) == len(families)
    for batch in batches:
        assert len({bool(family.prefix) for family in batch}) == 1
        if len(batch) > 1:
            assert len(batch) * max(family.length for family in batch) <= 150
            assert sum(row.num_scored for family in batch for row in family.rows) <= 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    torch.manual_seed(0)
    config = NanoChatHFConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=tiny_tokenizer.bos_token_id,
    )
    model = NanoChatHFForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return save(model, tiny_tokenizer, tmp_path_factory.mktemp("lm") / "model")


def instances(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=("t", i, 1))
        for i, args in enumerate(arguments)
    ]


PAIRS = [
    ("The sky is", " blue"),
    ("The sky is", " blue and wide"),
    ("The sky is ", "blue"),  # lm-eval moves the blank
    ("", "A text of its own"),
    ("<|bos|>The sky is", " blue"),
    ("  ", "only blanks before"),
    ("Numbers: 1, 2,", " 3"),
]


@pytest.mark.parametrize("add_bos_token", [None, False])
def test_answers_are_those_of_lm_evals_own_model(folder, add_bos_token):
    requests = instances("loglikelihood", PAIRS if add_bos_token is None else PAIRS[:3])
    theirs = HFLM(folder, device="cpu", add_bos_token=add_bos_token).loglikelihood(requests, disable_tqdm=True)
    ours = NanoChatHFLM(folder, device="cpu", add_bos_token=add_bos_token).loglikelihood(requests, disable_tqdm=True)
    for (likelihood, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert likelihood == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


def test_our_models_are_not_cut_at_their_training_length(folder):
    long = instances("loglikelihood", [("word " * 60 + "one", " two")])
    whole = NanoChatHFLM(folder, device="cpu")
    cut = NanoChatHFLM(folder, device="cpu", max_length=32)
    theirs = HFLM(folder, device="cpu", max_length=31)  # inputs, where nanochat counts the last target as well
    assert whole.max_length == HFLM(folder, device="cpu").max_length == 320, "nanochat allows ten times the length"
    assert cut.loglikelihood(long)[0][0] == pytest.approx(theirs.loglikelihood(long)[0][0], abs=1e-4)
    assert whole.loglikelihood(long)[0][0] != pytest.approx(cut.loglikelihood(long)[0][0], abs=1e-4)


def test_generation_is_the_projects_own(folder):
    lm = NanoChatHFLM(folder, device="cpu", max_batch_size=2)
    contexts = ["<|bos|>One", "<|bos|>Another, longer", "<|bos|>Third"]
    settings = {"until": ["<|assistant_end|>"], "max_gen_toks": 12, "do_sample": False}
    texts = lm.generate_until(instances("generate_until", [(context, settings) for context in contexts]))
    prompts = [lm.tokenizer(context, add_special_tokens=False)["input_ids"] for context in contexts]
    completions = generate_completions(lm.model, lm.tokenizer, prompts, 12)
    for text, completion in zip(texts, completions, strict=True):
        ids = completion.token_ids[:-1] if completion.finished else completion.token_ids
        assert text == lm.tokenizer.decode(ids)
    stop = texts[1][4:6]
    (cut,) = lm.generate_until(instances("generate_until", [(contexts[1], settings | {"until": [stop]})]))
    assert cut == texts[1][: texts[1].index(stop)]


def test_every_sample_of_a_prompt_is_another(folder):
    lm = NanoChatHFLM(folder, device="cpu", max_batch_size=2)
    settings = {"until": [], "max_gen_toks": 12, "do_sample": True}
    texts = lm.generate_until(instances("generate_until", [("<|bos|>One", settings)] * 6))
    assert len(set(texts)) == 6


def test_a_prompt_needs_room(folder):
    lm = NanoChatHFLM(folder, device="cpu", max_length=16)
    with pytest.raises(ValueError, match="max_gen_toks=16 leaves no room .* 16 tokens: give --gen_kwargs"):
        lm.generate_until(instances("generate_until", [("<|bos|>One", {"until": [], "max_gen_toks": 16})]))


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="runs/nowhere is no model folder"):
        NanoChatHFLM("runs/nowhere")


def test_unknown_generation_settings_are_refused(folder):
    lm = NanoChatHFLM(folder, device="cpu")
    request = instances("generate_until", [("<|bos|>One", {"until": [], "max_gen_toks": 4, "num_beams": 2})])
    with pytest.raises(ValueError, match="num_beams.* unknown to --model nanochat_hf"):
        lm.generate_until(request)


def test_an_interrupted_run_goes_on_from_the_cache(folder, tmp_path, monkeypatch):
    requests = instances("loglikelihood", PAIRS)
    expected = NanoChatHFLM(folder, device="cpu").loglikelihood(requests)
    first = CachingLM(NanoChatHFLM(folder, device="cpu"), str(tmp_path / "cache.db"))
    score = scoring._read_answers

    def interrupted(logits, rows):
        answers = list(score(logits, rows))
        yield from answers[:4]
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "_read_answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.loglikelihood(requests)
    monkeypatch.undo()
    second = CachingLM(NanoChatHFLM(folder, device="cpu"), str(tmp_path / "cache.db"))
    asked = []
    score_all = lm_eval_model.score_continuations
    monkeypatch.setattr(
        lm_eval_model, "score_continuations", lambda *a, **k: asked.append(len(a[1])) or score_all(*a, **k)
    )
    assert [answer[0] for answer in second.loglikelihood(requests)] == pytest.approx(
        [answer[0] for answer in expected], abs=1e-4
    )
    assert asked == [len(PAIRS) - 4]


def test_lm_evals_command_line_gets_class_and_tasks(monkeypatch):
    seen = []
    monkeypatch.setattr(lm_eval_model, "cli_evaluate", lambda: seen.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", "nanochat_hf", "--tasks", "core"])
    lm_eval_model.run_lm_eval()
    assert seen == [["--model", "nanochat_hf", "--tasks", "core", "--include_path", str(lm_eval_model.TASKS_DIR)]]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", "nanochat_hf", "--include_path=mine"])
    lm_eval_model.run_lm_eval()
    assert seen[1][2:] == ["--include_path=mine"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "nanochat_hf"],
        ["--model=nanochat_hf"],
        ["-M", "nanochat_hf"],
        ["ls", "tasks"],
        ["run", "--tasks", "core"],
    ],
)
def test_the_script_knows_lm_evals_command_line(monkeypatch, arguments):
    seen = []
    monkeypatch.setattr(lm_eval_model, "run_lm_eval", lambda: seen.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    runpy.run_path(str(SCRIPT))["main"]()
    assert seen == [arguments]


@pytest.mark.slow
def test_lm_evals_command_line_prints_the_table(folder, monkeypatch, capsys, shared_data):
    monkeypatch.setenv("CORE_DATA_DIR", str(shared_data / "core"))
    arguments = [
        "--model",
        "nanochat_hf",
        "--model_args",
        f"pretrained={folder}",
        "--tasks",
        "core_copa",
        "--limit",
        "3",
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments, "--device", "cpu"])
    lm_eval_model.run_lm_eval()
    assert "|core_copa|" in capsys.readouterr().out
