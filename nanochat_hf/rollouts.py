"""Beside the RL loop: which tokens of a rollout count, groups that teach nothing, pass@k, and where vLLM can serve."""

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Sequence
from math import comb
from statistics import fmean

import datasets
import torch
from accelerate.utils import gather_object
from transformers import PreTrainedConfig

from .generation import Completion, generate_completions
from .tokenizer import encode_prompt

PASS_SEED = 10**6  # apart from the seeds of training rollouts


def trained_tokens(completion: Completion, end_token_ids: list[int]) -> list[int]:
    """1 for each token of a completion that the policy gradient sees: sampled, and not the end of the turn."""
    pairs = zip(completion.token_ids, completion.sampled, strict=True)
    return [int(sampled and token not in end_token_ids) for token, sampled in pairs]


def empty_groups(env_mask: list[list[int]], group_size: int) -> float:
    """The share of questions none of whose answers has a token to train: every sample ended at once.

    Groups whose rewards are all equal teach nothing either; TRL logs their share as `frac_reward_zero_std`.
    """
    groups = [env_mask[start : start + group_size] for start in range(0, len(env_mask), group_size)]
    return fmean(not any(map(any, group)) for group in groups)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The chance that k of the samples, drawn without putting back, hold a right one (arXiv 2107.03374)."""
    return 1 - comb(num_samples - num_right, k) / comb(num_samples, k)


def score_problems(trainer, problems: datasets.Dataset, rewards: Sequence[Callable], num_samples: int) -> dict:
    """Answer held-out problems several times, as rollouts are sampled: always with the same random numbers. Processes
    share the problems.

    The first reward decides whether an answer is right: 1 or more.

    Args:
        rewards: as the trainer calls them.

    Returns:
        `pass@1` to `pass@num_samples`, `mean/<reward>` of every reward, and with several sources `pass@1/<source>`.
    """
    args, tokenizer, accelerator = trainer.args, trainer.processing_class, trainer.accelerator
    problems = problems.select(range(accelerator.process_index, len(problems), accelerator.num_processes))
    repeated = [row for row in problems for _ in range(num_samples)]
    with accelerator.autocast():
        completions = generate_completions(
            accelerator.unwrap_model(trainer.model),
            tokenizer,
            [encode_prompt(tokenizer, row["prompt"]) for row in repeated],
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_k=args.top_k or None,
            seed=PASS_SEED + args.seed * accelerator.num_processes + accelerator.process_index,
        )
    columns = {name: [row[name] for row in repeated] for name in problems.column_names if name != "prompt"}
    columns |= {"prompts": [row["prompt"] for row in repeated]}
    token_ids = [completion.token_ids for completion in completions]
    texts = [tokenizer.decode(ids) for ids in token_ids]
    values = [reward(completions=texts, completion_ids=token_ids, **columns) for reward in rewards]
    # Per problem: its source, how many answers were right, and the mean of each reward.
    scored = []
    for number, source in enumerate(problems["source"]):
        own = slice(number * num_samples, (number + 1) * num_samples)
        scored.append((source, sum(value >= 1 for value in values[0][own]), [fmean(each[own]) for each in values]))
    scored = gather_object(scored)
    by_source = defaultdict(list)
    for source, num_right, _ in scored:
        by_source[source].append(num_right / num_samples)
    figures = {
        f"pass@{k}": fmean(pass_at_k(num_samples, num_right, k) for _, num_right, _ in scored)
        for k in range(1, num_samples + 1)
    }
    if len(by_source) > 1:
        figures |= {f"pass@1/{source}": fmean(shares) for source, shares in sorted(by_source.items())}
    means = [fmean(each) for each in zip(*(means for _, _, means in scored), strict=True)]
    return figures | {f"mean/{reward.__name__}": mean for reward, mean in zip(rewards, means, strict=True)}


def check_vllm(config: PreTrainedConfig) -> None:
    """Say why vLLM cannot generate here, before it fails on its own.

    Raises:
        ValueError: an architecture that vLLM has no model of, no GPU, or no vLLM.
    """
    if config.model_type != "nanochat":
        way = (
            "convert the starting model (python scripts/convert.py to_transformers) and start from that"
            if getattr(config, "architecture", None) == "2025-10"
            else "only 2025-10 models become transformers' native `nanochat`; leave use_vllm out, our rollouts serve"
        )
        raise ValueError(f"use_vllm: vLLM knows transformers' native `nanochat` type, not {config.model_type}: {way}")
    if not torch.cuda.is_available():
        raise ValueError("use_vllm: vLLM needs a GPU, and this machine has none; leave it out")
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("use_vllm: vllm is not installed; `pip install vllm`, or leave use_vllm out")
