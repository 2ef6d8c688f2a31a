"""Generation: the tokens of decoding without a cache and of `generate`, tools in the loop, rows that come and go."""

import pytest
import torch
from scripted import scripted
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, NanoChatConfig, NanoChatForCausalLM

from nanochat_hf import NanoChatHFConfig, NanoChatHFForCausalLM
from nanochat_hf.decode_step import DecodeStep, can_step
from nanochat_hf.generation import generate_completions
from nanochat_hf.kv_cache import growing_cache
from nanochat_hf.tokenizer import encode_prompt, encode_text, special_ids

NEW_TOKENS = 24


@pytest.fixture
def special(tiny_tokenizer):
    return {token.strip("<|>"): i for token, i in special_ids(tiny_tokenizer).items()}


@pytest.fixture
def prompts(tiny_tokenizer):
    texts = ["Hi", "What is 3 + 4?", "Name the opposite of hot, please.", "def f(x):\n    return " + "x + " * 60]
    return [encode_prompt(tiny_tokenizer, [{"role": "user", "content": text}]) for text in texts]


def naive_greedy(model, prompt, ends, max_new_tokens):
    """The whole sequence through the model for every token, no cache."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def other_models(vocab_size):
    sizes = {"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    yield NanoChatHFForCausalLM(NanoChatHFConfig(architecture="2025-10", **sizes))
    yield NanoChatForCausalLM(NanoChatConfig(intermediate_size=64, num_key_value_heads=2, **sizes))
    yield LlamaForCausalLM(LlamaConfig(intermediate_size=64, num_key_value_heads=1, **sizes))


def test_greedy_equals_recomputation_and_generate(tiny_model, tiny_tokenizer, special, prompts):
    """A padded batch, longer than the short window (129 tokens), token for token."""
    assert len(prompts[-1]) > tiny_model.config.sliding_window
    completions = generate_completions(tiny_model, tiny_tokenizer, prompts, NEW_TOKENS, use_calculator=False)
    ends = [special["bos"], special["assistant_end"]]
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.token_ids == naive_greedy(tiny_model, prompt, ends, NEW_TOKENS)
        generated = tiny_model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ends
        )
        assert generated[0, len(prompt) :].tolist() == completion.token_ids


@pytest.mark.parametrize("number", range(3))
def test_greedy_with_other_architectures(number, tiny_tokenizer, special, prompts):
    model = list(other_models(len(tiny_tokenizer)))[number].eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    completions = generate_completions(model, tiny_tokenizer, prompts, NEW_TOKENS, use_calculator=False)
    ends = [special["bos"], special["assistant_end"]]
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.token_ids == naive_greedy(model, prompt, ends, NEW_TOKENS)


def test_the_fast_step_gives_the_forward_passes_logits(tiny_model, tiny_tokenizer, prompts):
    """Padded rows, windows, both generations; and not where a layer was replaced or hooked."""
    for model in [tiny_model, next(other_models(len(tiny_tokenizer))).eval()]:
        assert can_step(model)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        cache = growing_cache(model.config)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits[:, -1]
            model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=position_ids[:, :-1], past_key_values=cache)
            logits = DecodeStep(model)(ids[:, -1], position_ids[:, -1], cache, mask)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert not can_step(model)
    handle.remove()
    model.lm_head = type("LoRA", (torch.nn.Linear,), {})(model.config.hidden_size, model.config.vocab_size, bias=False)
    assert not can_step(model)


def test_calculator_result_is_forced_and_marked(tiny_tokenizer, special, prompts):
    call = [special["python_start"], *encode_text(tiny_tokenizer, "12*(3+4)"), special["python_end"]]
    script = [
        *encode_text(tiny_tokenizer, "It is "),
        *call,
        *encode_text(tiny_tokenizer, "84."),
        special["assistant_end"],
    ]
    model = scripted(tiny_tokenizer, lambda prompt: script)
    [completion] = generate_completions(model, tiny_tokenizer, prompts[:1], 99)
    output = [special["output_start"], *encode_text(tiny_tokenizer, "84"), special["output_end"]]
    at = script.index(special["python_end"]) + 1
    assert completion.token_ids == script[:at] + output + script[at:]
    forced = range(at, at + len(output))
    assert [i for i, sampled in enumerate(completion.sampled) if not sampled] == list(forced)
    assert all(completion.logprobs[i] == 0.0 for i in forced)
    assert len(completion.logprobs) == len(completion.token_ids) and completion.finished


@pytest.mark.parametrize("expression, use_calculator", [("import os", True), ("1/0", True), ("1+1", False)])
def test_no_output_when_the_calculator_declines_or_is_off(expression, use_calculator, tiny_tokenizer, special, prompts):
    script = [special["python_start"], *encode_text(tiny_tokenizer, expression), special["python_end"]]
    script += [*encode_text(tiny_tokenizer, "Well."), special["assistant_end"]]
    model = scripted(tiny_tokenizer, lambda prompt: script)
    [completion] = generate_completions(model, tiny_tokenizer, prompts[:1], 99, use_calculator=use_calculator)
    assert completion.token_ids == script and all(completion.sampled)


def test_rows_leave_as_they_end_and_keep_their_own_cache(tiny_tokenizer, special, prompts):
    """Short, long, tool-calling and never-ending answers in one batch, two samples each."""
    call = [special["python_start"], *encode_text(tiny_tokenizer, "6*7"), special["python_end"]]
    bodies = [[], encode_text(tiny_tokenizer, "seven"), [*call, *encode_text(tiny_tokenizer, "forty-two")]]
    scripts = {len(prompt): [*body, special["assistant_end"]] for prompt, body in zip(prompts, bodies, strict=False)}
    scripts[len(prompts[3])] = encode_text(tiny_tokenizer, "on and on " * 20)
    model = scripted(tiny_tokenizer, lambda prompt: scripts[len(prompt)])
    completions = generate_completions(model, tiny_tokenizer, [p for p in prompts for _ in range(2)], 40)
    texts = [tiny_tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
    assert texts[:6] == ["", "", "seven", "seven", "6*742forty-two", "6*742forty-two"]
    assert [c.finished for c in completions] == [True] * 6 + [False] * 2
    assert len(completions[6].token_ids) == 40
    assert model.batch_sizes[0] == 4  # each different prompt is read once
    assert model.batch_sizes[-1] == 2 and model.batch_sizes[1:] == sorted(model.batch_sizes[1:], reverse=True)


def test_batch_size_does_not_change_the_text(tiny_model, tiny_tokenizer, prompts):
    def sample(**settings):
        completions = generate_completions(
            tiny_model, tiny_tokenizer, prompts * 3, 16, temperature=1.0, top_k=50, seed=4, **settings
        )
        return [c.token_ids for c in completions]

    together = sample()
    assert sample(max_batch_size=1) == together and sample(max_batch_size=5) == together


def test_samples_of_a_prompt_differ_from_the_first_token_and_repeat_with_the_seed(tiny_model, tiny_tokenizer, prompts):
    def sample(seed):
        completions = generate_completions(
            tiny_model, tiny_tokenizer, prompts[:1] * 16, 8, temperature=1.0, top_k=50, seed=seed
        )
        return [c.token_ids for c in completions]

    first = sample(seed=1)
    assert len({ids[0] for ids in first}) > 8
    assert sample(seed=1) == first != sample(seed=2)


def test_logprobs_are_those_of_the_models_own_forward(tiny_model, tiny_tokenizer, prompts):
    settings = {"temperature": 0.8, "top_k": 5, "seed": 3}
    completions = generate_completions(tiny_model, tiny_tokenizer, prompts, 12, with_logprobs=True, **settings)
    without = generate_completions(tiny_model, tiny_tokenizer, prompts, 12, **settings)
    assert [c.token_ids for c in without] == [c.token_ids for c in completions] and set(without[0].logprobs) == {0.0}
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion.token_ids])
        with torch.no_grad():
            expected = (tiny_model(input_ids=ids, use_cache=False).logits / 0.8).log_softmax(-1)[0, :-1]
        expected = expected.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        sampled = torch.tensor(completion.sampled)
        torch.testing.assert_close(torch.tensor(completion.logprobs)[sampled], expected[sampled], atol=1e-4, rtol=1e-4)


def test_repetition_penalty_equals_generate(tiny_model, tiny_tokenizer, special, prompts):
    completions = generate_completions(
        tiny_model, tiny_tokenizer, prompts, NEW_TOKENS, repetition_penalty=1.4, use_calculator=False
    )
    for prompt, completion in zip(prompts, completions, strict=True):
        generated = tiny_model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=1.4,
            eos_token_id=[special["bos"], special["assistant_end"]],
        )  # fmt: skip
        assert generated[0, len(prompt) :].tolist() == completion.token_ids


def test_training_mode_and_gradients_are_as_before(tiny_model, tiny_tokenizer, prompts):
    tiny_model.train()
    generate_completions(tiny_model, tiny_tokenizer, prompts[:1], 2)
    assert tiny_model.training and torch.is_grad_enabled()


def test_a_plain_dynamic_cache_serves_as_well(tiny_model, tiny_tokenizer, prompts, monkeypatch):
    expected = generate_completions(tiny_model, tiny_tokenizer, prompts, 12)
    monkeypatch.setattr("nanochat_hf.generation.growing_cache", lambda config: DynamicCache(config=config))
    assert generate_completions(tiny_model, tiny_tokenizer, prompts, 12) == expected


def test_nothing_to_do(tiny_model, tiny_tokenizer):
    assert generate_completions(tiny_model, tiny_tokenizer, [], 4) == []
    assert generate_completions(tiny_model, tiny_tokenizer, [], 4, temperature=1.0) == []


@pytest.mark.parametrize(
    "prompts, settings, named",
    [
        ([[]], {}, "bos"),
        ([[5, 512]], {}, "512"),
        ([[-1]], {}, "-1"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[5]], {"max_batch_size": 0}, "max_batch_size"),
        ([[5]], {"temperature": -0.1}, "temperature"),
    ],
)
def test_bad_input_is_refused_by_name(prompts, settings, named, tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match=named):
        generate_completions(tiny_model, tiny_tokenizer, prompts, **{"max_new_tokens": 4} | settings)
