"""From a pretraining recipe to its plan, its model and its number of forward passes a step."""

from pathlib import Path

from . import NanoChatHFConfig
from .configs import PretrainConfig
from .scaling import ScalingPlan
from .tokenizer import load_tokenizer


def scaling_plan(config: PretrainConfig, vocab_size: int) -> ScalingPlan:
    """The plan of a recipe; what the recipe leaves at None is derived."""
    return ScalingPlan.from_depth(
        config.depth,
        vocab_size,
        config.sequence_length,
        architecture=config.architecture,
        head_dim=config.head_dim,
        window_pattern=config.window_pattern,
        tokens_per_parameter=config.tokens_per_parameter,
        total_batch_tokens=config.total_batch_tokens,
        num_steps=config.num_steps,
    )


def planned_vocab_size(config: PretrainConfig, tokenizer_folder: Path) -> int:
    """The vocabulary of the run's tokenizer; for `--plan`, which any run may precede, the recipe's if it names one.

    Raises:
        ValueError: neither is there, or they differ.
    """
    if config.plan and config.vocab_size is not None:
        return config.vocab_size
    if not tokenizer_folder.is_dir():
        raise ValueError(f"there is no {tokenizer_folder} yet: train the tokenizer first, or give --vocab_size")
    vocab_size = len(load_tokenizer(tokenizer_folder))
    if config.vocab_size not in (None, vocab_size):
        raise ValueError(
            f"vocab_size={config.vocab_size}, but the tokenizer in {tokenizer_folder} has {vocab_size} tokens: "
            f"make both recipes agree, tokenizer.yaml and pretrain.yaml"
        )
    return vocab_size


def accumulation_steps(plan: ScalingPlan, config: PretrainConfig, num_processes: int) -> int:
    """Forward passes of one optimizer step on each device.

    Raises:
        ValueError: the batch is not a whole number of forward passes; names the nearest that is.
    """
    if config.device_batch_size < 1:
        raise ValueError(f"device_batch_size must be 1 or more, got {config.device_batch_size}")
    tokens = config.device_batch_size * config.sequence_length * num_processes
    if plan.total_batch_tokens % tokens:
        near = max(1, round(plan.total_batch_tokens / tokens)) * tokens
        raise ValueError(
            f"total_batch_tokens={plan.total_batch_tokens} is no multiple of device_batch_size * sequence_length * "
            f"processes = {config.device_batch_size} * {config.sequence_length} * {num_processes} = {tokens}; "
            f"the nearest valid total_batch_tokens is {near}"
        )
    return plan.total_batch_tokens // tokens


def model_config(plan: ScalingPlan, config: PretrainConfig, tokenizer) -> NanoChatHFConfig:
    """The model a plan asks for."""
    return NanoChatHFConfig(
        architecture=config.architecture,
        vocab_size=plan.vocab_size,
        hidden_size=plan.hidden_size,
        num_hidden_layers=plan.depth,
        num_attention_heads=plan.num_heads,
        max_position_embeddings=config.sequence_length,
        window_pattern=config.window_pattern,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
