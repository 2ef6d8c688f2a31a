import json
import random
from pathlib import Path

import pytest
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval_runs import expected_of, flags, golden_folder, run, save, token_losses
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanochat_hf.evaluation import TASKS_DIR, core_prompts
from nanochat_hf.evaluation.core_prompts import fewshot_rows, read_rows, render_prompts, scored_starts, shuffled
from nanochat_hf.evaluation.core_requests import RequestBuilder
from nanochat_hf.evaluation.lm_eval_model import NanoChatHFLM
from nanochat_hf.tokenizer import encode_documents

CHOICE = {"query": "Q: sky?", "choices": ["blue", "green"], "gold": 0}
SCHEMA = {
    "context_options": ["Ann slept because Ann", "Ann slept because Bob"],
    "continuation": "was tired.",
    "gold": 0,
}
MODELING = {"context": " two and two is ", "continuation": "four"}
NAMES = ["apples", "long grass", "12", "7 birds", "stone", "a very old house", "é", "x"]


def choice_rows(num_rows):
    """Choices of different lengths, some with common beginnings, some starting with a digit."""
    rng = random.Random(0)
    return [
        {
            "query": f"Question {i}: what has {rng.choice(NAMES)}?\nAnswer:",
            "choices": rng.sample(NAMES, 3),
            "gold": i % 3,
        }
        for i in range(num_rows)
    ]


def schema_rows(num_rows):
    rng = random.Random(1)
    return [
        {"context_options": rng.sample(NAMES, 2), "continuation": f"of {rng.choice(NAMES)} number {i}", "gold": i % 2}
        for i in range(num_rows)
    ]


def modeling_rows(num_rows):
    return [{"context": f"the number after {i} is", "continuation": str(i + 1)} for i in range(num_rows)]


ROWS = {"multiple_choice": choice_rows, "schema": schema_rows, "language_modeling": modeling_rows}


def write_task(folder: Path, task_type: str, num_rows: int = 12, num_fewshot: int = 2, delimiter: str = " ") -> str:
    """A CORE task of our own in `folder`: its data file and its YAML."""
    name = f"core_test_{task_type}"
    folder.mkdir(exist_ok=True)
    rows = ROWS[task_type](num_rows)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "task": name,
        "core_type": task_type,
        "data_file": f"{name}.jsonl",
        "num_fewshot": num_fewshot,
        "target_delimiter": delimiter,
        "baseline": 0.25,
    }
    text = yaml.safe_dump(settings) + "class: !function nanochat_hf.evaluation.core.CoreTask\n"
    (folder / f"{name}.yaml").write_text(text)
    return name


def test_prompts_are_nanochats():
    shots = [{"query": "Q: grass?", "choices": ["red", "green"], "gold": 1}]
    assert render_prompts(CHOICE, shots, "multiple_choice", "\nAnswer: ") == [
        "Q: grass?\nAnswer: green\n\nQ: sky?\nAnswer: blue",
        "Q: grass?\nAnswer: green\n\nQ: sky?\nAnswer: green",
    ]
    assert render_prompts(SCHEMA, [], "schema", " ") == [
        "Ann slept because Ann was tired.",
        "Ann slept because Bob was tired.",
    ]
    # Contexts lose their outer blanks in shots and in the item; the prompt without the answer loses its last blank too.
    assert render_prompts(MODELING, [MODELING], "language_modeling", " ") == [
        "two and two is four\n\ntwo and two is",
        "two and two is four\n\ntwo and two is four",
    ]


def test_shuffle_then_crop_then_draw():
    rows = [{"number": i} for i in range(30)]
    order = list(range(30))
    random.Random(1337).shuffle(order)
    assert [row["number"] for row in shuffled(rows)] == order
    others = [j for j in range(10) if j != 4]
    drawn = [rows[j] for j in random.Random(1234 + 4).sample(others, 3)]
    assert fewshot_rows(rows[:10], 4, 3) == drawn
    assert len(fewshot_rows(rows[:3], 0, 10)) == 2, "a small crop gives what it has"


def test_where_scoring_starts():
    assert scored_starts([[9, 1, 2, 3], [9, 1, 2, 4, 5]], "multiple_choice") == [3, 3]
    assert scored_starts([[9, 1, 7, 8], [9, 1, 2, 7, 8]], "schema") == [2, 3]
    assert scored_starts([[9, 1], [9, 1, 5]], "language_modeling") == [2]
    with pytest.raises(ValueError, match="not a token prefix"):
        scored_starts([[9, 1], [9, 2, 5]], "language_modeling")


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("multiple_choice", CHOICE | {"choices": ["blue", "blue"]}, "all choices are the same tokens"),
        ("schema", SCHEMA | {"context_options": ["Ann slept", "Ann slept"]}, "all contexts are the same tokens"),
        ("language_modeling", MODELING | {"context": "two", "continuation": "\x00"}, "adds no token"),
    ],
)
def test_an_item_with_nothing_to_score_is_named(tmp_path, tiny_tokenizer, monkeypatch, kind, row, message):
    monkeypatch.setenv("CORE_DATA_DIR", str(tmp_path))
    name = write_task(tmp_path, kind, num_fewshot=0, delimiter="")
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    # A tokenizer that drops what it does not know.
    file = tmp_path / "tokenizer" / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["normalizer"] = {"type": "Replace", "pattern": {"String": "\x00"}, "content": ""}
    file.write_text(json.dumps(settings))
    metadata = {"pretrained": str(tmp_path / "tokenizer")}
    task = TaskManager(include_path=str(tmp_path), include_defaults=False, metadata=metadata).load([name])["tasks"][
        name
    ]
    with pytest.raises(ValueError, match=f"{name}, item 0: .*{message}"):
        task.build_all_requests()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "q", "choices": ["a", "b"]', "line 2 is not JSON"),
        ('["query"]', "found list instead of an object"),
        ('{"query": "q", "choices": ["a", "b"], "gold": "1"}', "`gold` must be int"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', r"gold=2 names none of the 2 options \(0 to 1\)"),
        ('{"query": "q", "choices": ["a", "b"], "gold": -1}', "gold=-1 names none"),
        ('{"query": "q", "choices": ["a"], "gold": 0}', "at least two options"),
        ('{"query": "q", "choices": ["a", " "], "gold": 0}', "a continuation is blank"),
    ],
)
def test_broken_rows_are_named(tmp_path, line, message):
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps(CHOICE) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(path, "multiple_choice")
    assert "task.jsonl, line 2" in str(caught.value)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        read_rows(path, "multiple_choice")


def test_only_line_feeds_end_a_row_and_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "task.jsonl"
    row = CHOICE | {"query": "a\u2028b\u2029c\u0085d"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert read_rows(path, "multiple_choice") == [row]
    path.write_bytes(path.read_bytes() + b'{"query": "\xff"}\n')
    with pytest.raises(ValueError, match="task.jsonl, line 2 is not JSON .*decode"):
        read_rows(path, "multiple_choice")


def expected_flag(model, tokenizer, task_type, row, examples, delimiter) -> int:
    """nanochat's verdict on an item, from tokens alone, one plain forward a prompt."""
    prompts = render_prompts(row, examples, task_type, delimiter)
    sequences = encode_documents(tokenizer, prompts)
    starts = scored_starts(sequences, task_type)
    if task_type == "language_modeling":
        ids, (start,) = sequences[1], starts
        import torch

        with torch.no_grad():
            best = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].argmax(-1)
        return int(best[start - 1 : -1].tolist() == ids[start:])
    means = [token_losses(model, ids)[start - 1 :].mean().item() for ids, start in zip(sequences, starts, strict=True)]
    return int(means.index(min(means)) == row["gold"])


@pytest.mark.parametrize("model_class", [HFLM, NanoChatHFLM])
@pytest.mark.parametrize("task_type", ROWS)
def test_flags_equal_scoring_by_hand(tmp_path, tiny_model, tiny_tokenizer, monkeypatch, model_class, task_type):
    folder = save(tiny_model, tiny_tokenizer, tmp_path / "model")
    name = write_task(tmp_path / "tasks", task_type)
    monkeypatch.setenv("CORE_DATA_DIR", str(tmp_path / "tasks"))
    lm = model_class(folder, device="cpu", max_length=10_000)
    results = run(lm, [name], include_path=tmp_path / "tasks", limit=8)
    rows = shuffled(ROWS[task_type](12))[:8]
    by_hand = [
        expected_flag(tiny_model, tiny_tokenizer, task_type, row, fewshot_rows(rows, i, 2), " ")
        for i, row in enumerate(rows)
    ]
    assert flags(results, name) == by_hand
    accuracy = sum(by_hand) / 8
    assert results["results"][name]["acc,none"] == pytest.approx(accuracy)
    assert results["results"][name]["centered,none"] == pytest.approx((accuracy - 0.25) / 0.75)


def test_blanks_that_lm_eval_moves_are_taken_off_again(tiny_tokenizer):
    item = RequestBuilder(tiny_tokenizer).build(["It is 5", "It is 77 birds"], "multiple_choice")
    # A digit takes no blank before it, so the blank is common to both choices, and lm-eval scores it with them.
    assert item.exact and item.requests == [("It is ", "5"), ("It is", " "), ("It is ", "77 birds")]
    answers = [(-5.0, False), (-2.0, False), (-9.0, False)]
    num_tokens = len(encode_documents(tiny_tokenizer, ["77 birds"])[0]) - 1
    assert item.mean_losses(answers) == [3.0, 7.0 / num_tokens]


def test_a_choice_without_tokens_of_its_own_has_no_loss(tiny_tokenizer):
    item = RequestBuilder(tiny_tokenizer).build(["It is 12", "It is 123"], "multiple_choice")
    assert item.option_requests == [None, 0]
    losses = item.mean_losses([(-1.0, False)])
    assert losses[0] != losses[0] and losses[1] > 0


def plain_tokenizer(**special):
    """A byte-level tokenizer that, like GPT-2's, opens no text by itself."""
    vocab = {character: i for i, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_a_tokenizer_that_opens_nothing_gets_its_token_spelled_out():
    item = RequestBuilder(plain_tokenizer(eos_token="<|end|>")).build(["a b", "a c"], "multiple_choice")
    assert item.requests == [("<|end|>a ", "b"), ("<|end|>a", " "), ("<|end|>a ", "c")]
    with pytest.raises(ValueError, match="neither a bos nor an eos token"):
        RequestBuilder(plain_tokenizer())


def test_a_missing_file_is_named_and_core_is_not_whole(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    folder = save(tiny_model, tiny_tokenizer, tmp_path / "model")
    tasks = tmp_path / "tasks"
    here, gone = write_task(tasks, "schema"), write_task(tasks, "multiple_choice")
    (tasks / f"{gone}.jsonl").unlink()
    group = {"group": "both", "task": [here, gone], "in_group": True}
    group["aggregate_metric_list"] = [{"metric": "centered", "weight_by_size": False}]
    (tasks / "both.yaml").write_text(yaml.safe_dump(group))
    monkeypatch.setenv("CORE_DATA_DIR", str(tasks))
    lm = NanoChatHFLM(folder, device="cpu")
    results = run(lm, ["both"], include_path=tasks, limit=4)
    assert results["results"][here]["acc,none"] >= 0
    assert results["results"][gone]["acc,none"] != results["results"][gone]["acc,none"]  # nan
    assert results["results"][gone]["alias"] == f"{gone} (no {gone}.jsonl)"
    assert results["groups"]["both"]["centered,none"] != results["groups"]["both"]["centered,none"]
    with pytest.raises(ValueError, match=f"{gone}: no file .*{gone}.jsonl; set CORE_DATA_DIR"):
        run(lm, [gone], include_path=tasks)
    monkeypatch.setenv("CORE_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        run(lm, ["both"], include_path=tasks)


@pytest.fixture
def choice_task(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    """A model of lm-eval's, a task of our own, and the folder with its file."""
    monkeypatch.setenv("CORE_DATA_DIR", str(tmp_path / "tasks"))
    name = write_task(tmp_path / "tasks", "multiple_choice")
    return NanoChatHFLM(save(tiny_model, tiny_tokenizer, tmp_path / "model"), device="cpu"), name, tmp_path / "tasks"


def test_cached_requests_are_those_of_the_same_rows(choice_task, tmp_path, monkeypatch):
    lm, name, tasks = choice_task
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "cache"))

    def contexts():
        samples = run(lm, [name], include_path=tasks, cache_requests=True, limit=2)["samples"][name]
        return [sample["arguments"][0][0] for sample in samples]

    first = contexts()
    assert contexts() == first and len(list((tmp_path / "cache").iterdir())) == 1
    rows = [row | {"query": "Another question:"} for row in choice_rows(12)]
    (tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert all("Another question:" in context for context in contexts())


def test_more_processes_than_items_are_refused_in_all_of_them(choice_task):
    lm, name, tasks = choice_task
    manager = TaskManager(include_path=str(tasks), include_defaults=False, metadata={"pretrained": lm.pretrained})
    task = manager.load([name])["tasks"][name]
    for rank in (0, 1):
        with pytest.raises(ValueError, match=f"{name}: 2 processes have 1 items to share"):
            task.build_all_requests(limit=1, rank=rank, world_size=2)


def test_a_chat_template_on_core_is_announced_once(choice_task, caplog):
    lm, name, tasks = choice_task
    for _ in range(2):
        run(lm, [name], include_path=tasks, limit=2, apply_chat_template=True)
    assert caplog.text.count("--apply_chat_template does not change them") == 1


def test_the_22_tasks_are_cores(shared_data):
    listed = yaml.safe_load((shared_data / "core" / "core.yaml").read_text())["icl_tasks"]
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False)
    loaded = manager.task_index
    assert loaded["core"].cfg["task"] == [f"core_{task['label']}" for task in listed]
    assert len(list((TASKS_DIR / "core").glob("core_*.yaml"))) == len(listed) == 22
    for task in listed:
        ours = loaded[f"core_{task['label']}"].cfg
        assert ours["core_type"] == task["icl_task_type"]
        assert ours["data_file"] == task["dataset_uri"]
        assert ours["num_fewshot"] == task["num_fewshot"][0]
        assert ours["target_delimiter"] == task["continuation_delimiter"]
        assert ours["baseline"] == pytest.approx(task["random_baseline"] / 100)


def test_an_unknown_kind_is_refused(tmp_path):
    name = write_task(tmp_path / "tasks", "schema")
    path = tmp_path / "tasks" / f"{name}.yaml"
    path.write_text(path.read_text().replace("core_type: schema", "core_type: schemas"))
    with pytest.raises(ValueError, match="core_type='schemas' is none of multiple_choice, schema"):
        TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False).load([name])


@pytest.fixture(scope="module")
def golden_model(golden, tmp_path_factory):
    return golden_folder(golden, tmp_path_factory.mktemp("golden") / "model")


def assert_golden(lm, tasks, golden, shared_data, monkeypatch, limit=None):
    monkeypatch.setenv("CORE_DATA_DIR", str(shared_data / "core"))
    expected = expected_of(golden, "expected.json")
    for name in tasks:
        if name not in expected or not (shared_data / "core").is_dir():
            pytest.skip(f"no expected flags or data of {name}")
    # The pool of shots is the crop, so a smaller limit is another question: only tasks without shots may shrink.
    results = run(lm, [f"core_{name}" for name in tasks], limit=limit or expected[tasks[0]]["limit"])
    for name in tasks:
        wanted = [int(flag) for flag in expected[name]["correct"]][:limit]
        assert flags(results, f"core_{name}") == wanted, name
    return results


@pytest.mark.parametrize("name", ["copa", "winograd", "bigbench_qa_wikidata"])
def test_one_task_of_each_kind_equals_the_golden_flags(golden, shared_data, golden_model, monkeypatch, name):
    assert_golden(NanoChatHFLM(golden_model, device="cpu"), [name], golden, shared_data, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [NanoChatHFLM, HFLM])
def test_every_item_of_every_task_equals_the_golden_flags(golden, shared_data, golden_model, monkeypatch, model_class):
    lm = model_class(golden_model, device="cpu", batch_size=8)
    expected = expected_of(golden, "expected.json")
    monkeypatch.setenv("CORE_DATA_DIR", str(shared_data / "core"))
    results = run(lm, ["core"], limit=max(task["limit"] for task in expected.values()))
    for name, task in expected.items():
        assert flags(results, f"core_{name}") == [int(flag) for flag in task["correct"]], name
        assert results["results"][f"core_{name}"]["centered,none"] == pytest.approx(task["centered"])
    mean = sum(task["centered"] for task in expected.values()) / len(expected)
    assert results["groups"]["core"]["centered,none"] == pytest.approx(mean)


def test_mini_tasks_are_of_all_three_kinds_and_held_out():
    from nanochat_hf.data.embedded_text import embedded_documents
    from nanochat_hf.evaluation import mini_tasks

    training = "\n".join(embedded_documents("train"))
    kinds = {
        "multiple_choice": mini_tasks.next_line_rows,
        "language_modeling": mini_tasks.last_word_rows,
        "schema": mini_tasks.which_module_rows,
    }
    for kind, make in kinds.items():
        rows = make()
        assert len(rows) == mini_tasks.NUM_CORE_ROWS and rows == make()
        assert not [problem for row in rows if (problem := core_prompts.row_problem(row, kind))]
        texts = [row.get("query") or row.get("context") or row["continuation"] for row in rows]
        # Boilerplate recurs from module to module; whole passages do not.
        assert sum(text in training for text in texts) <= 0.05 * len(texts)
        if kind != "language_modeling":
            assert 0.1 < sum(row["gold"] == 0 for row in rows) / len(rows) < 0.7
