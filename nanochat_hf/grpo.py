"""Reinforcement learning on problems with a checkable answer: nanochat's simplified GRPO on TRL's GRPOTrainer.

Every question is answered several times with the calculator in the loop; an answer's advantage is its reward minus the
mean over its question. No reference model, no clipping in effect (each rollout is used once), loss per sampled token:
tool output and the end of the turn are not trained, as in nanochat. Rewards are plain functions by import path.

    accelerate launch --config_file accelerate_configs/cpu.yaml scripts/grpo.py --config recipes/tiny/grpo.yaml
"""

import os
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean

import datasets
import torch
from trl import GRPOConfig, GRPOTrainer

from .configs_post_training import GRPOStageConfig
from .data.conversations import build_mixture
from .generation import generate_completions
from .recipe import load_function
from .rewards import checked, extract_answer
from .rollouts import check_vllm, empty_groups, score_problems, trained_tokens
from .stage import Stage
from .tokenizer import encode_prompt
from .trl_callbacks import ScoreCallback, read_curve
from .trl_stage import (
    StageOptimizer,
    load_start,
    lora_config,
    prepare_arguments,
    refuse_base_model,
    save_stage,
    train_stage,
)

NUM_REWARD_STEPS = 3  # `reward_first` and `reward_last` are means over so many steps: one step alone is noise


class StageGRPOTrainer(StageOptimizer, GRPOTrainer):
    """GRPOTrainer with our optimizer and schedule, and on a CPU without TRL's fused head.

    Without Triton that head scores the prompt's positions too and computes its gradients in fp32: a tiny model's step
    takes twice as long.
    """

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, *args, compute_entropy=False, **kwargs
    ):
        if input_ids.device.type != "cpu":
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, compute_entropy=compute_entropy, **kwargs
            )
        with self.accelerator.autocast():
            kept = logits_to_keep + 1  # the last prompt token predicts the completion's first
            logits = model(input_ids, attention_mask=attention_mask, logits_to_keep=kept, use_cache=False).logits
        log_probs = (logits[:, :-1] / self.temperature).log_softmax(-1)  # (batch, completion, vocabulary)
        chosen = log_probs.gather(-1, input_ids[:, -logits_to_keep:, None]).squeeze(-1)
        with torch.no_grad():
            entropies = -(log_probs.exp() * log_probs).sum(-1) if compute_entropy else None
        return chosen, entropies, None


def run_grpo(config: GRPOStageConfig, training_args: GRPOConfig, settings: dict) -> None:
    """Run the RL stage: from `start_from` to `run_dir/stage`, with its record and reward curve.

    The record's `reward_first` and `reward_last` are the mean rewards of the first and the last three steps, over
    training problems; `pass@k` and its like `before` are of held-out ones.

    Args:
        config: the stage's own settings.
        training_args: TRL's settings from the same recipe.
        settings: what recipe and command line said, for the record.

    Raises:
        ValueError: bad settings, a starting model that is not there or is no chat model, a problem without an answer.
    """
    stage = Stage(config.run_dir, config.stage, settings)
    if stage.finished:
        print(f"{config.stage}: finished before, nothing to do")
        return
    prepare_arguments(config, training_args, settings, Path(config.run_dir) / "checkpoints" / config.stage)
    rewards = [load_function(path, "reward") for path in config.rewards]
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is marked experimental

    with stage:
        model, tokenizer = load_start(config.run_dir, config.start_from)
        if training_args.use_vllm:
            check_vllm(model.config)
            print(f"{config.stage}: vLLM generates; it does not run the calculator inside a turn")
        mixture, skipped = load_mixture(config, training_args.seed, "train")
        refuse_base_model(model, tokenizer, list(islice(mixture["messages"], 8)), config.start_from)
        problems = build_problems(mixture)
        # Rewards see the completion with its special tokens, which TRL's own text has lost.
        rewards = [checked(reward, tokenizer.decode) for reward in rewards]
        trainer = StageGRPOTrainer(
            config,
            model=model,
            args=training_args,
            reward_funcs=rewards,
            train_dataset=problems,
            processing_class=tokenizer,
            rollout_func=None if training_args.use_vllm else rollout,
            peft_config=lora_config(config),
        )
        callbacks = []
        if config.eval_problems:
            held_out, _ = load_mixture(config, training_args.seed, "test")
            held_out = build_problems(held_out.select(range(min(len(held_out), config.eval_problems))))
            pass_at_k = partial(score_problems, trainer, held_out, rewards, config.eval_samples)
            callbacks.append(ScoreCallback(stage, pass_at_k, "pass@1", config.eval_every_steps))
        figures = train_stage(trainer, stage, "reward", *callbacks)
        save_stage(trainer, tokenizer, config.run_dir, config.stage)
        curve = [line for line in read_curve(stage) if "reward" in line]
        mean_rewards = [line["reward"] for line in curve]
        stage.results |= {
            "num_problems": len(problems),
            "num_skipped_problems": skipped,
            "num_completions": trainer.state.global_step * completions_per_step(training_args),
            **figures,
            "reward_first": fmean(mean_rewards[:NUM_REWARD_STEPS]),
            "reward_last": fmean(mean_rewards[-NUM_REWARD_STEPS:]),
            "uniform_groups": fmean(line["frac_reward_zero_std"] for line in curve),
            "empty_groups": fmean(line.get("empty_groups", 0.0) for line in curve),
            "completion_tokens": fmean(line["completions/mean_length"] for line in curve[-NUM_REWARD_STEPS:]),
        }
        for callback in callbacks:
            stage.results |= {**callback.last, "before": callback.first}


def load_mixture(config: GRPOStageConfig, seed: int, split: str) -> tuple[datasets.Dataset, int]:
    """A split of the recipe's solved problems, and how many bad rows were left out; its counts are printed."""
    counts: dict = {}
    mixture = build_mixture(config.mixture, split, seed, config.on_bad_row, counts)
    told = ", ".join(f"{name} {count['rows']:,}" for name, count in counts.items())
    skipped = sum(count["skipped"] for count in counts.values())
    print(f"{config.stage}, {split}: {len(mixture):,} problems ({told}); {skipped} bad ones skipped")
    return mixture, skipped


def completions_per_step(training_args: GRPOConfig) -> int:
    """Completions behind one optimizer step, over all processes."""
    per_process = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    return per_process * training_args.world_size


def rollout(prompts: list, trainer: GRPOTrainer) -> dict[str, list]:
    """TRL's `rollout_func`: complete each prompt (a list of messages; TRL repeats it per generation).

    Returns:
        Per prompt its ids, the completion's ids and log-probabilities, and `env_mask`: 1 on tokens that are trained,
        0 on the calculator's forced output and on the end of the turn.
    """
    args, tokenizer = trainer.args, trainer.processing_class
    prompt_ids = [encode_prompt(tokenizer, messages) for messages in prompts]
    with trainer.accelerator.autocast():
        completions = generate_completions(
            trainer.accelerator.unwrap_model(trainer.model),
            tokenizer,
            prompt_ids,
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_k=args.top_k or None,
            seed=(args.seed + trainer.state.global_step) * args.world_size + args.process_index,
            with_logprobs=True,
        )
    env_mask = [trained_tokens(completion, trainer.eos_token_ids) for completion in completions]
    trainer._metrics["train"]["empty_groups"].append(empty_groups(env_mask, args.num_generations))
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": [completion.token_ids for completion in completions],
        "logprobs": [completion.logprobs for completion in completions],
        "env_mask": env_mask,
    }


def build_problems(mixture: datasets.Dataset) -> datasets.Dataset:
    """Turn solved conversations into problems: `prompt` (all before the last answer), `answer` after its `####`, and
    the columns that the sources keep for rewards (`test` and `entry_point` of `code`, whose rows need no answer).

    Raises:
        ValueError: a conversation whose last assistant turn states no `#### answer`, with its number.
    """
    rows = []
    for index, row in enumerate(mixture):
        *prompt, solution = row["messages"]
        text = solution["content"]
        if not isinstance(text, str):
            text = "".join(part["text"] for part in text)
        answer = extract_answer(text)
        if answer is None and not row["columns"]:
            raise ValueError(
                f"row {index} of the mixture (source {row['source']}) has no `#### answer` in its last turn: RL needs "
                f"problems with a checkable answer, such as the sources arithmetic, gsm8k and code"
            )
        rows.append({"prompt": prompt, "answer": answer, "source": row["source"], **row["columns"]})
    # Json: contents may be text or lists of parts, which Arrow's own types cannot mix.
    names = dict.fromkeys(name for row in rows for name in row)
    features = {name: datasets.Value("string") for name in names} | {"prompt": datasets.Json()}
    columns = {name: [row.get(name) for row in rows] for name in names}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
