"""RL: advantages, loss and gradient against arithmetic by hand, masks of rollouts, rewards by path, the whole stage."""

import json
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import pytest
import torch
from scripted import scripted
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from nanochat_hf import grpo
from nanochat_hf.checkpoint import save_model
from nanochat_hf.configs_post_training import GRPOStageConfig
from nanochat_hf.data.conversations import build_mixture
from nanochat_hf.grpo import StageGRPOTrainer, build_problems, rollout, run_grpo
from nanochat_hf.recipe import load_function
from nanochat_hf.tokenizer import encode_prompt, encode_text, special_ids

QUESTIONS = [
    [{"role": "user", "content": text}] for text in ("What is 2+3?", "Mia has 4 cups and buys 3. How many now?")
]


def share_of_e(completions, **columns):
    """A reward that a tiny untrained model can learn within a few steps."""
    return [text.count("e") / (len(text) + 1) for text in completions]


def arguments(**changes) -> GRPOConfig:
    settings = dict(
        num_generations=4, per_device_train_batch_size=8, max_completion_length=12, max_steps=2, temperature=1.0,
        top_k=50, beta=0.0, num_iterations=1, scale_rewards="none", loss_type="bnpo", logging_steps=1,
        max_grad_norm=0.0, weight_decay=0.0, save_strategy="no", use_cpu=True, bf16=False,
        activation_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    return GRPOConfig(**settings | changes)


@pytest.fixture
def run_dir(tmp_path, tiny_model, tiny_tokenizer):
    (tmp_path / "sft").mkdir()
    save_model(tiny_model, tiny_tokenizer, tmp_path / "sft")
    return tmp_path


def stage_config(run_dir, **changes) -> GRPOStageConfig:
    settings = dict(
        run_dir=str(run_dir), stage="rl", start_from="sft", mixture=[{"source": "arithmetic", "rows": 40}],
        rewards=["test_grpo.share_of_e"], lr_fraction=0.1,
    )  # fmt: skip
    return GRPOStageConfig(**settings | changes)


def tool_completion(tokenizer, result):
    """`2+3` through the calculator, then the result as the answer: (ids, sampled)."""
    special = {name.strip("<|>"): token for name, token in special_ids(tokenizer).items()}
    call = [special["python_start"], *encode_text(tokenizer, "2+3"), special["python_end"]]
    output = [special["output_start"], *encode_text(tokenizer, "5"), special["output_end"]]
    answer = [*encode_text(tokenizer, f"#### {result}"), special["assistant_end"]]
    return call + output + answer, [True] * len(call) + [False] * len(output) + [True] * len(answer)


def test_advantages_loss_and_gradient_are_nanochats(run_dir, tiny_model, tiny_tokenizer):
    """Advantage r - mean of the group, no clipping, no KL, the mean over sampled tokens that are not the turn's end."""
    results = ["5", "6", "7", "8", "5", "5", "9", "5"]  # the right answer is 5: 1 of 4, then 3 of 4

    def fixed_rollout(prompts, trainer):
        completions = [tool_completion(tiny_tokenizer, result) for result in results]
        items = [SimpleNamespace(token_ids=ids, sampled=sampled) for ids, sampled in completions]
        return {
            "prompt_ids": [encode_prompt(tiny_tokenizer, prompt) for prompt in prompts],
            "completion_ids": [item.token_ids for item in items],
            "logprobs": [[0.0] * len(item.token_ids) for item in items],
            "env_mask": [grpo.trained_tokens(item, trainer.eos_token_ids) for item in items],
        }

    rows = [{"prompt": question, "answer": "5"} for question in QUESTIONS]
    trainer = StageGRPOTrainer(
        stage_config(run_dir),
        model=tiny_model,
        args=arguments(output_dir=str(run_dir / "out")),
        reward_funcs=[grpo.checked(load_function("nanochat_hf.rewards.exact_answer", "reward"), tiny_tokenizer.decode)],
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer,
        rollout_func=fixed_rollout,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._generate_and_score_completions([dict(row) for row in rows for _ in range(4)])
    by_hand = torch.tensor([0.75, -0.25, -0.25, -0.25, 0.25, 0.25, -0.75, 0.25])
    torch.testing.assert_close(inputs["advantages"], by_hand)
    assert "old_per_token_logps" not in inputs and "ref_per_token_logps" not in inputs  # on-policy, no reference

    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}

    trainer.model.zero_grad()
    total, num_tokens, value = 0.0, 0, 0.0
    for i, result in enumerate(results):
        prompt = encode_prompt(tiny_tokenizer, QUESTIONS[i // 4])
        ids, sampled = tool_completion(tiny_tokenizer, result)
        log_probs = trainer.model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        for j, (token, chosen) in enumerate(zip(ids[:-1], sampled[:-1], strict=True)):  # the last one ends the turn
            if chosen:
                total = total - by_hand[i] * log_probs[len(prompt) + j - 1, token]
                value -= by_hand[i].item()
                num_tokens += 1
    (total / num_tokens).backward()
    assert loss.item() == pytest.approx(value / num_tokens, abs=1e-6)
    for name, p in trainer.model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-6, msg=name)


def rollout_of(model, tokenizer, prompts, step=0, **changes):
    trainer = SimpleNamespace(
        args=arguments(**changes),
        processing_class=tokenizer,
        accelerator=SimpleNamespace(autocast=nullcontext, unwrap_model=lambda model: model),
        model=model,
        state=SimpleNamespace(global_step=step),
        _metrics={"train": defaultdict(list)},
        eos_token_ids=[special_ids(tokenizer)[name] for name in ("<|assistant_end|>", "<|bos|>")],
    )
    return rollout(prompts, trainer)


def test_tool_output_and_the_end_of_the_turn_are_not_trained(tiny_tokenizer):
    ids, sampled = tool_completion(tiny_tokenizer, "5")
    written = [token for token, chosen in zip(ids, sampled, strict=True) if chosen]
    model = scripted(tiny_tokenizer, lambda prompt: written)
    output = rollout_of(model, tiny_tokenizer, QUESTIONS[:1] * 2, max_completion_length=64)
    assert output["completion_ids"] == [ids, ids]
    assert output["env_mask"] == [[int(chosen) for chosen in sampled[:-1]] + [0]] * 2
    assert output["prompt_ids"] == [encode_prompt(tiny_tokenizer, QUESTIONS[0])] * 2
    assert [len(row) for row in output["logprobs"]] == [len(ids)] * 2


def test_samples_of_a_question_are_independent_and_repeatable(tiny_model, tiny_tokenizer):
    prompts = [question for question in QUESTIONS for _ in range(8)]
    first = rollout_of(tiny_model, tiny_tokenizer, prompts)
    assert len({row[0] for row in first["completion_ids"][:8]}) > 2  # upstream once drew one first token for all
    assert rollout_of(tiny_model, tiny_tokenizer, prompts) == first
    assert rollout_of(tiny_model, tiny_tokenizer, prompts, step=1)["completion_ids"] != first["completion_ids"]


def test_the_stage_raises_the_reward(run_dir, capsys):
    run_grpo(
        stage_config(run_dir, lr_fraction=0.5), arguments(max_steps=12, per_device_train_batch_size=32), {"stage": "rl"}
    )
    results = json.loads((run_dir / "eval" / "rl.json").read_text())["results"]
    curve = [json.loads(line) for line in (run_dir / "logs" / "rl.jsonl").read_text().splitlines()]
    rewards = [line["reward"] for line in curve]
    assert len(rewards) == results["num_steps"] == 12
    assert results["reward_first"] == pytest.approx(sum(rewards[:3]) / 3)
    assert results["reward_last"] == pytest.approx(sum(rewards[-3:]) / 3)
    assert results["reward_last"] > 2 * results["reward_first"]
    assert results["num_completions"] == 12 * 32 and results["num_problems"] == 40 and results["tokens"] > 0

    before = AutoModelForCausalLM.from_pretrained(run_dir / "sft").state_dict()
    after = AutoModelForCausalLM.from_pretrained(run_dir / "rl")
    assert after.config.model_type == "nanochat_hf" and len(after.generation_config.eos_token_id) == 2
    assert any(not torch.equal(weight, before[name]) for name, weight in after.state_dict().items())
    run_grpo(stage_config(run_dir), arguments(), {"stage": "rl"})
    assert "finished before" in capsys.readouterr().out


def test_problems_are_what_stands_before_the_answer(shared_data):
    problems = build_problems(build_mixture([{"source": "arithmetic", "rows": 5}]))
    assert [message["role"] for message in problems[0]["prompt"]] == ["user"]
    assert all(float(answer) >= 0 for answer in problems["answer"])
    gsm8k = {"source": "gsm8k", "dataset": str(shared_data / "eval" / "gsm8k_train.jsonl"), "rows": 20}
    assert len(build_problems(build_mixture([gsm8k]))) == 20


def test_a_problem_without_an_answer_is_named():
    with pytest.raises(ValueError, match=r"row 0 of the mixture \(source identity\) has no `#### answer`"):
        build_problems(build_mixture([{"source": "identity", "rows": 3}]))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nanochat_hf.rewards.exact_anwser", "did you mean exact_answer"),
        ("nanochat_hf.reward.exact_answer", "cannot import 'nanochat_hf.reward'"),
        ("exact_answer", "cannot import"),
    ],
)
def test_a_reward_that_is_not_there(path, message):
    with pytest.raises(ValueError, match=message):
        load_function(path, "reward")


def broken_reward(completions, **columns):
    return [float("nan")] * len(completions)


def test_a_reward_that_is_no_number_stops_the_stage(run_dir):
    with pytest.raises(ValueError, match="reward broken_reward gave nan"):
        run_grpo(stage_config(run_dir, rewards=["test_grpo.broken_reward"]), arguments(), {})
    assert not (run_dir / "rl").exists()


def test_a_missing_start_is_named(run_dir):
    with pytest.raises(ValueError, match="run the mid stage first"):
        run_grpo(stage_config(run_dir, start_from="mid"), arguments(), {})


def test_rollouts_are_sampled_as_the_recipe_says(tiny_model, tiny_tokenizer):
    """Temperature 1 over the whole vocabulary's log-probabilities, drawn from the 50 likeliest tokens."""
    output = rollout_of(tiny_model, tiny_tokenizer, QUESTIONS[:1] * 8, max_completion_length=6)
    for prompt, ids, logprobs in zip(
        *(output[key] for key in ("prompt_ids", "completion_ids", "logprobs")), strict=True
    ):
        with torch.no_grad():
            scores = tiny_model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        chosen = torch.tensor(ids)[:, None]
        torch.testing.assert_close(
            torch.tensor(logprobs), scores.log_softmax(-1).gather(1, chosen)[:, 0].float(), rtol=1e-3, atol=1e-4
        )
        assert (scores > scores.gather(1, chosen)).sum(1).max() < 50
    greedy = rollout_of(tiny_model, tiny_tokenizer, QUESTIONS[:1] * 2, max_completion_length=6, top_k=1)
    assert greedy["completion_ids"][0] == greedy["completion_ids"][1]


def test_a_turn_ends_where_a_chat_would_end_it(tiny_tokenizer):
    """At <|assistant_end|>, or at a <|bos|> that starts another document; neither is trained."""
    special = special_ids(tiny_tokenizer)
    text = encode_text(tiny_tokenizer, "So it is.")
    for end in ("<|assistant_end|>", "<|bos|>"):
        model = scripted(tiny_tokenizer, lambda prompt, end=end: [*text, special[end], *text])
        output = rollout_of(model, tiny_tokenizer, QUESTIONS[:1], max_completion_length=40)
        assert output["completion_ids"] == [[*text, special[end]]]
        assert output["env_mask"] == [[1] * len(text) + [0]]


def test_an_adapter_learns_by_reward_too(run_dir):
    peft = {"r": 4, "target_modules": ["q_proj", "fc1"]}
    run_grpo(stage_config(run_dir, peft=peft, optimizer="adamw"), arguments(max_steps=1, learning_rate=1e-2), {})
    before, after = (AutoModelForCausalLM.from_pretrained(run_dir / name).state_dict() for name in ("sft", "rl"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.split(".")[-2] in ("q_proj", "fc1") for name in changed)
