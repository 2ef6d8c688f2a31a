"""From depth to everything else: widths, parameters, FLOPs, tokens, batch, learning-rate scale, weight decay.

One dial, as in nanochat: a recipe says `depth: 20` and this file derives the rest. Pure arithmetic, no torch.

    plan = ScalingPlan.from_depth(20, vocab_size=65536, architecture="2025-10")
    plan.num_parameters, plan.flops_per_token, plan.num_steps
"""

import math
from dataclasses import dataclass

ASPECT_RATIO = 64  # width per layer
HEAD_DIM = 128
REFERENCE_DEPTH = 12  # batch and weight decay are tuned at this depth
REFERENCE_BATCH_TOKENS = 2**19
BATCH_EXPONENT = 0.383  # the best batch grows as tokens ** 0.383
TOKENS_PER_PARAMETER = {"2026-07": 12.0, "2025-10": 20.0}
MATRIX_WEIGHT_DECAY = {"2026-07": 0.28, "2025-10": 0.0}
SMEAR_CHANNELS = 24
VALUE_GATE_CHANNELS = 12


@dataclass(frozen=True)
class ScalingPlan:
    """Every number of a pretraining run.

    Attributes:
        parameters: counts by group: embedding, value_embedding, lm_head, matrix, scalar.
        window_sizes: keys to the left a query sees, layer by layer.
        flops_per_token: of forward and backward, attention included.
        scaling_parameters: what the horizon counts: matrix + lm_head (2026-07) or all (2025-10).
        total_batch_tokens: tokens of one optimizer step.
        num_tokens: tokens of the run, a whole number of steps.
        lr_scale: sqrt(batch / 2^19), for every learning rate but smear and backout (2025-10: 1).
        weight_decay: Muon's, before its schedule.
    """

    architecture: str
    depth: int
    vocab_size: int
    sequence_length: int
    hidden_size: int
    head_dim: int
    num_heads: int
    parameters: dict[str, int]
    window_sizes: tuple[int, ...]
    flops_per_token: int
    scaling_parameters: int
    total_batch_tokens: int
    num_steps: int
    lr_scale: float
    weight_decay: float

    @classmethod
    def from_depth(
        cls,
        depth: int,
        vocab_size: int,
        sequence_length: int = 2048,
        architecture: str = "2026-07",
        head_dim: int = HEAD_DIM,
        window_pattern: str | None = None,
        tokens_per_parameter: float | None = None,
        total_batch_tokens: int | None = None,
        num_steps: int | None = None,
    ) -> "ScalingPlan":
        """Derive a plan; what is None follows the architecture's rule.

        Args:
            depth: number of layers.
            vocab_size: rows of the embedding.
            sequence_length: T, tokens of a row.
            head_dim: width of a head.
            window_pattern: letters S and L tiled over the layers (2026-07; the last is always L).
            tokens_per_parameter: horizon in tokens per scaling parameter.
            total_batch_tokens: tokens of one optimizer step.
            num_steps: steps of the run instead of the horizon; weight decay still follows the horizon, as upstream.

        Raises:
            ValueError: an unknown architecture or a depth below 1.
        """
        if architecture not in TOKENS_PER_PARAMETER:
            raise ValueError(f"architecture={architecture!r} is unknown; valid: {', '.join(TOKENS_PER_PARAMETER)}")
        if depth < 1:
            raise ValueError(f"depth={depth}: a model needs at least one layer")
        newest = architecture == "2026-07"
        width, heads = model_width(depth, head_dim, architecture)
        parameters = count_parameters(depth, width, heads, vocab_size, architecture)
        windows = window_sizes(depth, sequence_length, (window_pattern or "SSSL") if newest else "L")
        ratio = TOKENS_PER_PARAMETER[architecture] if tokens_per_parameter is None else tokens_per_parameter
        scaling = parameters["matrix"] + parameters["lm_head"] if newest else sum(parameters.values())

        reference_width, reference_heads = model_width(REFERENCE_DEPTH, head_dim, architecture)
        reference = count_parameters(REFERENCE_DEPTH, reference_width, reference_heads, vocab_size, architecture)
        size = scaling / (reference["matrix"] + reference["lm_head"]) if newest else 1.0
        if total_batch_tokens is None:
            exponent = math.log2(REFERENCE_BATCH_TOKENS) + BATCH_EXPONENT * math.log2(size)
            total_batch_tokens = 2 ** round(exponent)
        lr_scale = math.sqrt(total_batch_tokens / REFERENCE_BATCH_TOKENS) if newest else 1.0
        return cls(
            architecture=architecture,
            depth=depth,
            vocab_size=vocab_size,
            sequence_length=sequence_length,
            hidden_size=width,
            head_dim=width // heads,
            num_heads=heads,
            parameters=parameters,
            window_sizes=windows,
            flops_per_token=count_flops_per_token(parameters, windows, width, newest),
            scaling_parameters=scaling,
            total_batch_tokens=total_batch_tokens,
            num_steps=num_steps if num_steps is not None else max(1, int(ratio * scaling) // total_batch_tokens),
            lr_scale=lr_scale,
            weight_decay=MATRIX_WEIGHT_DECAY[architecture] * lr_scale / size,
        )

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def num_tokens(self) -> int:
        return self.num_steps * self.total_batch_tokens

    @property
    def total_flops(self) -> float:
        return float(self.num_tokens) * self.flops_per_token


def model_width(depth: int, head_dim: int, architecture: str) -> tuple[int, int]:
    """Width of the residual stream and number of heads at a depth."""
    width = ASPECT_RATIO * depth
    if architecture == "2025-10":
        # The older rule keeps the width and lets the heads be narrower.
        heads = -(-width // head_dim)
        while width % heads:
            heads += 1
        return width, heads
    width = -(-width // head_dim) * head_dim
    return width, width // head_dim


def window_sizes(depth: int, sequence_length: int, pattern: str) -> tuple[int, ...]:
    """Keys to the left that each layer's queries see: ceil(T/4/128)*128 for S, T for L and for the last layer."""
    letters = (pattern * depth)[: depth - 1] + "L"
    short = -(-sequence_length // 512) * 128
    return tuple(short if letter == "S" else sequence_length for letter in letters)


def count_parameters(
    depth: int, width: int, heads: int, vocab_size: int, architecture: str, num_kv_heads: int | None = None
) -> dict[str, int]:
    """Parameters by group; as many key/value heads as heads unless said otherwise, as in nanochat's own runs."""
    newest, num_kv_heads = architecture == "2026-07", num_kv_heads or heads
    value_layers = (depth + 1) // 2 if newest else 0
    kv_width = width // heads * num_kv_heads
    return {
        "embedding": vocab_size * width,
        "value_embedding": value_layers * vocab_size * kv_width,
        "lm_head": vocab_size * width,
        "matrix": depth * (10 * width**2 + 2 * width * kv_width) + value_layers * VALUE_GATE_CHANNELS * num_kv_heads,
        "scalar": 2 * depth + SMEAR_CHANNELS + 2 if newest else 0,
    }


def count_flops_per_token(parameters: dict[str, int], windows: tuple[int, ...], width: int, newest: bool) -> int:
    """FLOPs of forward and backward of one token: 6 a matmul weight, 12 a query-key pair and head channel."""
    smear_gate = SMEAR_CHANNELS if newest else 0
    sequence_length = windows[-1]  # a short window may be longer than the sequence, the last layer is always full
    return 6 * (parameters["matrix"] + parameters["lm_head"] + smear_gate) + sum(
        12 * width * min(window, sequence_length) for window in windows
    )
