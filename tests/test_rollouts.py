"""Beside the RL loop: pass@k, empty groups, several rewards and sources, programs as problems, vLLM refused."""

import json

import pytest
import torch
from test_grpo import arguments, run_dir, share_of_e, stage_config  # noqa: F401

from nanochat_hf.checkpoint import save_model
from nanochat_hf.code_reward import tests_passed as passed_reward
from nanochat_hf.data.conversations import build_mixture
from nanochat_hf.grpo import build_problems, run_grpo
from nanochat_hf.rewards import exact_answer
from nanochat_hf.rollouts import empty_groups, pass_at_k

CODE = {
    "prompt": "import math\n\n\ndef area(r):\n    '''Area of a circle.'''\n",
    "canonical_solution": "    return math.pi * r * r\n",
    "test": "def check(candidate):\n    assert abs(candidate(1) - 3.14159) < 1e-3\n",
    "entry_point": "area",
}


@pytest.mark.parametrize(("right", "k", "chance"), [(0, 1, 0.0), (4, 4, 1.0), (1, 1, 0.25), (1, 2, 0.5), (2, 2, 5 / 6)])
def test_pass_at_k_by_hand(right, k, chance):
    """Four samples: of the six pairs of them, three hold the one right one, five one of two."""
    assert pass_at_k(4, right, k) == pytest.approx(chance)


def test_empty_groups_are_those_without_any_token_to_train():
    assert empty_groups([[0, 0], [0], [0], [1, 0], [], []], group_size=2) == pytest.approx(2 / 3)


def starts_with_e(completions, **columns):
    return [float("e" in text[:2]) for text in completions]


def test_pass_at_k_is_scored_before_during_and_after(run_dir):  # noqa: F811
    mixture = [{"source": "arithmetic", "rows": 40}, {"source": "letter_counting", "rows": 40}]
    config = stage_config(
        run_dir, mixture=mixture, rewards=["test_rollouts.starts_with_e", "test_grpo.share_of_e"], lr_fraction=0.5,
        eval_problems=4, eval_samples=3, eval_every_steps=2,
    )  # fmt: skip
    run_grpo(config, arguments(max_steps=5, reward_weights=[1.0, 0.5]), {})
    curve = [json.loads(line) for line in (run_dir / "logs/rl.jsonl").read_text().splitlines()]
    scores = {line["step"]: line for line in curve if "pass@1" in line}
    assert list(scores) == [0, 2, 4, 5]
    for line in scores.values():
        assert 0 <= line["pass@1"] <= line["pass@2"] <= line["pass@3"] <= 1 and 0 <= line["mean/share_of_e"] <= 1
        assert {"pass@1/arithmetic", "pass@1/letter_counting"} <= line.keys()
    results = json.loads((run_dir / "eval/rl.json").read_text())["results"]
    assert results["pass@1"] == scores[5]["pass@1"] and results["before"]["pass@3"] == scores[0]["pass@3"]
    steps = [line for line in curve if "reward" in line]
    for line in steps:  # weighed as the recipe says
        weighed = line["rewards/starts_with_e/mean"] + 0.5 * line["rewards/share_of_e/mean"]
        assert line["reward"] == pytest.approx(weighed, abs=1e-5)
        assert line["empty_groups"] == 0.0 and 0 <= line["frac_reward_zero_std"] <= 1
    assert results["empty_groups"] == 0.0 and 0 <= results["uniform_groups"] <= 1


def same_for_all(completions, **columns):
    return [1.0] * len(completions)


def test_groups_of_equal_rewards_are_counted_and_move_nothing(run_dir):  # noqa: F811
    from transformers import AutoModelForCausalLM

    run_grpo(stage_config(run_dir, rewards=["test_rollouts.same_for_all"]), arguments(), {})
    assert json.loads((run_dir / "eval/rl.json").read_text())["results"]["uniform_groups"] == 1.0
    before, after = (AutoModelForCausalLM.from_pretrained(run_dir / name).state_dict() for name in ("sft", "rl"))
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-3, atol=1e-3, msg=name)  # AdamW's decay alone


# Programs.


def test_programs_are_problems_with_their_tests(tmp_path):
    (tmp_path / "code.jsonl").write_text(json.dumps(CODE))
    mixture = build_mixture(
        [{"source": "code", "dataset": str(tmp_path / "code.jsonl")}, {"source": "arithmetic", "rows": 2}]
    )
    problems = build_problems(mixture)
    (row,) = [row for row in problems if row["source"] == "code:code"]
    assert row["prompt"] == [{"role": "user", "content": CODE["prompt"]}]
    assert (row["test"], row["entry_point"], row["answer"]) == (CODE["test"], "area", None)
    assert [row["test"] for row in problems].count(None) == 2


def test_a_code_row_without_tests_is_bad(tmp_path):
    (tmp_path / "code.jsonl").write_text(json.dumps({**CODE, "test": None}))
    with pytest.raises(ValueError, match="code.jsonl:1: no text in column `test`"):
        build_mixture([{"source": "code", "dataset": str(tmp_path / "code.jsonl")}])


def test_the_reward_runs_programs_confined():
    right = "```python\ndef area(r):\n    return math.pi * r ** 2\n```<|assistant_end|>"
    wrong = "def area(r):\n    return r"
    broken = "def area(r:"
    attack = "import socket\n\n\ndef area(r):\n    socket.socket()\n    return 3.14159"
    completions = [right, wrong, broken, attack, right]
    prompts = [[{"role": "user", "content": CODE["prompt"]}]] * 5
    tests, entry = [CODE["test"]] * 4 + [None], ["area"] * 4 + [None]
    rewards = passed_reward(completions=completions, prompts=prompts, test=tests, entry_point=entry)
    assert rewards == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert exact_answer(["#### 5", "#### 5"], answer=["5", None]) == [1.0, 0.0]


# What cannot be.


def test_vllm_says_why_it_cannot(run_dir):  # noqa: F811
    with pytest.raises(ValueError, match="native `nanochat` type, not nanochat_hf: only 2025-10"):
        run_grpo(stage_config(run_dir), arguments(use_vllm=True), {})


def test_vllm_with_a_model_it_could_serve_needs_a_gpu(monkeypatch):
    from types import SimpleNamespace

    from nanochat_hf.rollouts import check_vllm

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="vLLM needs a GPU"):
        check_vllm(SimpleNamespace(model_type="nanochat"))
    with pytest.raises(ValueError, match="convert.py to_transformers"):
        check_vllm(SimpleNamespace(model_type="nanochat_hf", architecture="2025-10"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="pip install vllm"):
        check_vllm(SimpleNamespace(model_type="nanochat"))


def test_a_base_model_is_refused(run_dir, tiny_model, tiny_tokenizer):  # noqa: F811
    with torch.no_grad():
        end = tiny_tokenizer.convert_tokens_to_ids("<|assistant_end|>")
        hidden = tiny_model.model(torch.arange(50)[None]).last_hidden_state.mean((0, 1))
        tiny_model.lm_head.weight[end] = -hidden
    (run_dir / "base").mkdir()
    save_model(tiny_model, tiny_tokenizer, run_dir / "base")
    with pytest.raises(ValueError, match="start_from=base is a base model"):
        run_grpo(stage_config(run_dir, start_from="base"), arguments(), {})
