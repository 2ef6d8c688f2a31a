"""What a pretraining recipe will take, before it is started: `scripts/pretrain.py --config RECIPE --plan`.

Parameters, tokens, steps and learning rates are those of the run. Memory is an estimate, hours and dollars follow from
two assumptions printed with them: a share of the peak (MFU) and a price.

Memory of a device: fp32 weights and gradients, optimizer state (divided among the devices), and the larger of what the
backward pass needs (activations, bf16 copies of the weights) and what the optimizer needs. What the eager model saves
under bf16 autocast was counted; how much of it torch.compile keeps (it recomputes some) was measured on one GPU.
"""

from dataclasses import dataclass

from .configs import PretrainConfig
from .optim import learning_rates_of
from .pretrain_plan import accumulation_steps, scaling_plan
from .scaling import ScalingPlan

ASSUMED_MFU = 0.45  # nanochat itself published 48.65% (2025-10, d20) and 47.7% (2026-07, d26), both on 8xH100
USABLE_MEMORY = 0.92  # the rest: CUDA context, communication buffers, fragmentation
LAYER_BYTES = {"2026-07": 48, "2025-10": 46}  # saved for the backward pass, a token, layer and channel of the width
# These two by peaks measured on one H200, 2026-11-26 (recipes/LOG.md): at d12, d20 and d24 they give 1% to 7% more.
COMPILED_SHARE = 0.85
OUTER_BYTES = {"2026-07": 22, "2025-10": 14}  # the same outside the layers
LOSS_CHUNK_BYTES = 8192 * 9  # a chunk of logits and its gradient, a row of the vocabulary
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """A machine to plan for; memory of one device in GiB, price of the whole machine in US dollars an hour."""

    name: str
    num_devices: int
    memory_gib: float
    peak_flops: float
    dollars_per_hour: float


MACHINES = (Machine("8xH100", 8, 79.6, 989e12, 24.0), Machine("1xH200", 1, 139.8, 989e12, 3.5))


def memory_bytes(
    plan: ScalingPlan, device_batch_size: int, num_devices: int, is_compiled: bool = True
) -> dict[str, float]:
    """Estimated peak memory of one device by purpose, in bytes."""
    total, matrix = plan.num_parameters, plan.parameters["matrix"]
    head, width = plan.parameters["lm_head"], plan.hidden_size
    tokens = device_batch_size * plan.sequence_length
    layers = LAYER_BYTES[plan.architecture] * plan.depth * (COMPILED_SHARE if is_compiled else 1.0)
    activations = tokens * width * (layers + OUTER_BYTES[plan.architecture])
    loss = 2 * tokens * width + 4 * head + LOSS_CHUNK_BYTES * plan.vocab_size
    # Muon's batch of the largest shape, fc1 or fc2 of all layers: the update in fp32 and its iterations in bf16.
    batch = 4 * plan.depth * width**2 * (4 + 4 + 3 * 2) / num_devices
    exchanged = 2 * 4 * matrix if num_devices > 1 else 0  # gradients stacked, new values received
    return {
        "weights and gradients": 8 * total,
        "optimizer state": (4 * matrix + 8 * (total - matrix)) / num_devices,
        "activations or optimizer step": max(activations + loss + 2 * (matrix + head), batch + exchanged),
    }


def largest_batch_that_fits(plan: ScalingPlan, machine: Machine, is_compiled: bool = True) -> int | None:
    """The largest number of rows, a power of two, that divides the batch and fits one device; None if not even one."""
    fitting = None
    size = 1
    while plan.total_batch_tokens % (size * plan.sequence_length * machine.num_devices) == 0:
        needed = sum(memory_bytes(plan, size, machine.num_devices, is_compiled).values())
        if needed > USABLE_MEMORY * machine.memory_gib * GIB:
            break
        fitting, size = size, 2 * size
    return fitting


def describe_plan(config: PretrainConfig, vocab_size: int) -> str:
    """The plan of a recipe as text.

    Raises:
        ValueError: settings that do not fit together.
    """
    plan = scaling_plan(config, vocab_size)
    rates = learning_rates_of(config.architecture, plan.hidden_size, plan.lr_scale, config.learning_rates)
    width = max(len(name) for name in (*plan.parameters, *rates))
    windows = ", ".join(
        f"{plan.window_sizes.count(size)} of {size:,} tokens" for size in sorted(set(plan.window_sizes))
    )
    lines = [
        f"Pretraining plan: depth {plan.depth}, architecture {plan.architecture}, vocabulary {vocab_size:,}",
        "",
        "Model",
        f"  width {plan.hidden_size:,}, {plan.num_heads} heads of {plan.head_dim}; rows of {plan.sequence_length:,}",
        f"  attention windows: {windows}",
        "",
        "Parameters",
        *(f"  {name:<{width}} {count:>14,}" for name, count in plan.parameters.items()),
        f"  {'all':<{width}} {plan.num_parameters:>14,}",
        "",
        "Training",
        f"  {plan.num_tokens:,} tokens ({plan.num_tokens / plan.scaling_parameters:.2f} a scaling parameter)",
        f"  {plan.num_steps:,} steps of {plan.total_batch_tokens:,} tokens",
        f"  {plan.flops_per_token:,} FLOPs a token, {plan.total_flops:.6e} in all",
        "",
        "Learning rates at their highest",
        *(f"  {name:<{width}} {rate:>14.6g}" for name, rate in rates.items()),
        f"  Muon's weight decay at the start: {plan.weight_decay:.6g}",
    ]
    for machine in MACHINES:
        lines += ["", *describe_machine(plan, config, machine)]
    lines += [
        "",
        f"Assumed, not measured: {ASSUMED_MFU:.0%} of a peak of 989 TFLOP/s; prices as shown. Training steps only:",
        "validation, samples and checkpoints come on top. Memory is an estimate.",
    ]
    return "\n".join(lines)


def describe_machine(plan: ScalingPlan, config: PretrainConfig, machine: Machine) -> list[str]:
    """Time, price, memory and whether it fits, on one machine."""
    hours = plan.total_flops / (ASSUMED_MFU * machine.peak_flops * machine.num_devices) / 3600
    lines = [
        f"{machine.name} (${machine.dollars_per_hour:g} an hour, {machine.memory_gib:g} GiB a device)",
        f"  {hours:,.2f} hours, ${hours * machine.dollars_per_hour:,.2f}",
    ]
    try:
        num_batches = accumulation_steps(plan, config, machine.num_devices)
        lines.append(f"  {num_batches} forward passes a step of {config.device_batch_size} rows a device")
    except ValueError as error:
        lines.append(f"  cannot start: {error}")
    is_compiled = config.compile is not False
    parts = memory_bytes(plan, config.device_batch_size, machine.num_devices, is_compiled)
    usable = USABLE_MEMORY * machine.memory_gib
    needed = sum(parts.values()) / GIB
    detail = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    lines.append(f"  memory of a device: {needed:.1f} GiB ({detail})")
    if needed <= usable:
        lines.append(f"  fits: {usable:.1f} GiB are usable")
    elif (fitting := largest_batch_that_fits(plan, machine, is_compiled)) is not None:
        lines.append(f"  does NOT fit in {usable:.1f} GiB: --device_batch_size {fitting} would")
    else:
        lines.append(
            f"  does NOT fit in {usable:.1f} GiB, not even with one row a device: FSDP2 or a smaller depth would"
        )
    return lines
