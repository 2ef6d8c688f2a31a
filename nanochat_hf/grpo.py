"""Reinforcement learning on problems with a checkable answer: nanochat's simplified GRPO on TRL's GRPOTrainer.

Every question is answered several times with the calculator in the loop; an answer's advantage is its reward minus the
mean over its question. No reference model, no clipping in effect (each rollout is used once), loss per sampled token:
tool output and the end of the turn are not trained, as in nanochat. Rewards are plain functions by import path.

    accelerate launch --config_file accelerate_configs/cpu.yaml scripts/grpo.py --config recipes/tiny/grpo.yaml
"""

import importlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import datasets
import torch
from trl import GRPOConfig, GRPOTrainer

from .checkpoint import atomic_folder, save_model
from .configs import GRPOStageConfig
from .data.conversations import build_mixture
from .generation import generate_completions
from .recipe import nearest
from .rewards import checked, extract_answer
from .stage import Stage
from .tokenizer import encode_prompt
from .trl_stage import load_start, prepare_arguments, read_curve, stage_optimizer, stage_schedule, train_stage

NUM_REWARD_STEPS = 3  # `reward_first` and `reward_last` are means over so many steps: one step alone is noise


class StageGRPOTrainer(GRPOTrainer):
    """GRPOTrainer with our optimizer and schedule, and on a CPU without TRL's fused head.

    Without Triton that head scores the prompt's positions too and computes its gradients in fp32: a tiny model's step
    takes twice as long.
    """

    def __init__(self, config: GRPOStageConfig, **kwargs):
        self.stage_config = config
        super().__init__(**kwargs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        self.optimizer = stage_optimizer(model or self.model, self.stage_config)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> torch.optim.lr_scheduler.LRScheduler:
        warmup_steps = self.args.get_warmup_steps(num_training_steps)
        self.lr_scheduler = stage_schedule(self.optimizer, num_training_steps, warmup_steps, self.stage_config)
        return self.lr_scheduler

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
    training problems; scoring held-out problems is the evaluation's work.

    Args:
        config: the stage's own settings.
        training_args: TRL's settings from the same recipe.
        settings: what recipe and command line said, for the record.

    Raises:
        ValueError: bad settings, a starting model that is not there, a problem without an answer.
    """
    stage = Stage(config.run_dir, config.stage, settings)
    if stage.finished:
        print(f"{config.stage}: finished before, nothing to do")
        return
    checkpoints = Path(config.run_dir) / "checkpoints" / config.stage
    prepare_arguments(training_args, settings, checkpoints)
    rewards = [load_reward(path) for path in config.rewards]
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is marked experimental

    with stage:
        model, tokenizer = load_start(config.run_dir, config.start_from)
        problems = build_problems(build_mixture(config.mixture, "train", training_args.seed, config.on_bad_row))
        trainer = StageGRPOTrainer(
            config,
            model=model,
            args=training_args,
            # Rewards see the completion with its special tokens, which TRL's own text has lost.
            reward_funcs=[checked(reward, tokenizer.decode) for reward in rewards],
            train_dataset=problems,
            processing_class=tokenizer,
            rollout_func=rollout,
        )
        figures = train_stage(trainer, stage, "reward")
        if trainer.is_world_process_zero():
            with atomic_folder(Path(config.run_dir) / config.stage) as partial:
                save_model(trainer.accelerator.unwrap_model(trainer.model), tokenizer, partial)
            shutil.rmtree(checkpoints, ignore_errors=True)
        curve = read_curve(stage)
        mean_rewards = [line["reward"] for line in curve]
        stage.results |= {
            "num_problems": len(problems),
            "num_completions": trainer.state.global_step * completions_per_step(training_args),
            **figures,
            "reward_first": fmean(mean_rewards[:NUM_REWARD_STEPS]),
            "reward_last": fmean(mean_rewards[-NUM_REWARD_STEPS:]),
            "uniform_groups": fmean(line["frac_reward_zero_std"] for line in curve),
            "completion_tokens": fmean(line["completions/mean_length"] for line in curve[-NUM_REWARD_STEPS:]),
        }


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
        )
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": [completion.token_ids for completion in completions],
        "logprobs": [completion.logprobs for completion in completions],
        "env_mask": [trained_tokens(completion, trainer.eos_token_ids) for completion in completions],
    }


def trained_tokens(completion, end_token_ids: list[int]) -> list[int]:
    """1 for each token of a completion that the policy gradient sees: sampled, and not the end of the turn."""
    pairs = zip(completion.token_ids, completion.sampled, strict=True)
    return [int(sampled and token not in end_token_ids) for token, sampled in pairs]


def build_problems(mixture: datasets.Dataset) -> datasets.Dataset:
    """Turn solved conversations into problems: `prompt` (all before the last answer), `answer` after its `####`.

    Raises:
        ValueError: a conversation whose last assistant turn states no `#### answer`, with its number.
    """
    prompts, answers = [], []
    for index, row in enumerate(mixture):
        *prompt, solution = row["messages"]
        text = solution["content"]
        if not isinstance(text, str):
            text = "".join(part["text"] for part in text)
        answer = extract_answer(text)
        if answer is None:
            raise ValueError(
                f"row {index} of the mixture (source {row['source']}) has no `#### answer` in its last turn: RL needs "
                f"problems with a checkable answer, such as the sources arithmetic and gsm8k"
            )
        prompts.append(prompt)
        answers.append(answer)
    # Json: contents may be text or lists of parts, which Arrow's own types cannot mix.
    features = datasets.Features({"prompt": datasets.Json(), "answer": datasets.Value("string")})
    return datasets.Dataset.from_dict({"prompt": prompts, "answer": answers}, features=features)


def load_reward(path: str) -> Callable:
    """The reward function at an import path such as `nanochat_hf.rewards.exact_answer`.

    Raises:
        ValueError: no such module or function.
    """
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ValueError(f"reward {path!r}: cannot import {module_name!r} ({error})") from error
    if not callable(getattr(module, name, None)):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"reward {path!r}: {module_name} has no function {name!r}; did you mean {nearest(name, functions)}?"
        )
    return getattr(module, name)
