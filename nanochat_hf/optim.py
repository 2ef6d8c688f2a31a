"""The optimizer of both generations: which parameter belongs to which group, at which rate, by which schedule.

What a step does to a parameter is in `muon.py`, who does it where there are several processes in `optim_shards.py`.

    optimizer = build_optimizer(model)
    schedule = Schedule("2026-07", num_steps=1000)
    for step in range(1000):
        schedule.apply(optimizer, step)
        ...
        optimizer.step()
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .hardware import supports_bf16
from .muon import MuonAdamW
from .scaling import MATRIX_WEIGHT_DECAY


@dataclass(frozen=True)
class GroupSettings:
    """Nominal settings of one AdamW group: learning rate at width 768 if `by_width`, else at every width."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    by_width: bool = False
    by_batch: bool = True


ADAMW_GROUPS = {
    "2026-07": {
        "lm_head": GroupSettings(0.008, (0.8, 0.96), 0.01, by_width=True),
        "embedding": GroupSettings(0.3, (0.8, 0.995), 0.001, by_width=True),
        "value_embedding": GroupSettings(0.15, (0.8, 0.995), 0.01, by_width=True),
        "residual": GroupSettings(0.005, (0.8, 0.95), 0.05),
        "x0": GroupSettings(0.5, (0.96, 0.95), 0.0),
        "smear": GroupSettings(0.2, (0.8, 0.95), 0.0, by_batch=False),
    },
    "2025-10": {
        "lm_head": GroupSettings(0.004, (0.8, 0.95), 0.0, by_width=True),
        "embedding": GroupSettings(0.2, (0.8, 0.95), 0.0, by_width=True),
    },
}
MATRIX_LR = 0.02
MAX_GRAD_NORM = {"2026-07": None, "2025-10": 1.0}


def learning_rates_of(
    architecture: str, hidden_size: int, lr_scale: float = 1.0, nominal: dict[str, float] | None = None
) -> dict[str, float]:
    """Learning rate of each group at the top of the schedule.

    Args:
        hidden_size: width of the model: lm_head and embeddings learn by (width / 768) ** -0.5.
        lr_scale: factor of every rate but smear and backout.
        nominal: rates by group instead of the architecture's.
    """
    rates, nominal = {}, {name: float(lr) for name, lr in (nominal or {}).items()}  # YAML reads 4e-2 as text
    for name, group in ADAMW_GROUPS[architecture].items():
        width_factor = (hidden_size / 768) ** -0.5 if group.by_width else 1.0
        rates[name] = nominal.get(name, group.lr) * width_factor * (lr_scale if group.by_batch else 1.0)
    return rates | {"matrix": nominal.get("matrix", MATRIX_LR) * lr_scale}


def group_of(name: str) -> str:
    """The optimizer group of a parameter, by its name in the model."""
    if "lm_head" in name:
        return "lm_head"
    if "embed_tokens" in name:
        return "embedding"
    if "value_embeds" in name:
        return "value_embedding"
    if "resid_lambdas" in name:
        return "residual"
    if "x0_lambdas" in name:
        return "x0"
    if "smear" in name or "backout" in name:
        return "smear"
    return "matrix"


def build_optimizer(
    model: torch.nn.Module,
    lr_scale: float = 1.0,
    lr_fraction: float = 1.0,
    weight_decay: float | None = None,
    learning_rates: dict[str, float] | None = None,
    dtype: torch.dtype | None = None,
    max_grad_norm: float | None = None,
    shares_work: bool = False,
    compile: bool = False,
) -> MuonAdamW:
    """The optimizer of a NanoChatHF model's architecture.

    Args:
        model: a NanoChatHFForCausalLM, or a wrapper whose `config` is its configuration.
        lr_scale: factor of every learning rate but smear and backout: sqrt(batch tokens / 2^19) in pretraining.
        lr_fraction: factor of every learning rate, for stages after pretraining.
        weight_decay: Muon's decay; the architecture's nominal value by default.
        learning_rates: nominal learning rates by group (`matrix`, `embedding`, ...) instead of the architecture's.
        dtype: dtype in which matrices are orthogonalised; bf16 where the model's device is fast in it, else fp32.
        max_grad_norm: clip the gradient to this norm; no clipping where None.
        shares_work: average gradients over the processes and share the work out (see `optim_shards.py`).
        compile: step through torch.compile, which takes seconds for each shape of parameter at the first step.

    Returns:
        An optimizer whose groups carry `name`, `kind` and `initial_lr`. Only parameters that need gradients are in it.

    Raises:
        ValueError: a group name in `learning_rates` that this model has not.
    """
    config = model.config
    if dtype is None:
        dtype = torch.bfloat16 if supports_bf16(next(model.parameters()).device) else torch.float32
    settings, learning_rates = ADAMW_GROUPS[config.architecture], dict(learning_rates or {})
    members = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[group_of(name) if parameter.ndim < 2 or group_of(name) in settings else "matrix"].append(parameter)
    unknown = learning_rates.keys() - members.keys()
    if unknown:
        raise ValueError(f"learning_rates names {sorted(unknown)}; this model's groups are {sorted(members)}")

    rates = learning_rates_of(config.architecture, config.hidden_size, lr_scale, learning_rates)
    groups = []
    for name, group in settings.items():
        if members[name]:
            lr = rates[name] * lr_fraction
            groups.append(
                dict(params=members[name], name=name, kind="adamw", lr=lr, betas=group.betas,
                     weight_decay=group.weight_decay)
            )  # fmt: skip
    if members["matrix"]:
        if weight_decay is None:
            weight_decay = MATRIX_WEIGHT_DECAY[config.architecture]
        lr = rates["matrix"] * lr_fraction
        groups.append(
            dict(params=members["matrix"], name="matrix", kind="muon", lr=lr, momentum=0.95, weight_decay=weight_decay)
        )
    for group in groups:
        group["initial_lr"], group["initial_weight_decay"] = group["lr"], group["weight_decay"]
    return MuonAdamW(groups, config.architecture == "2026-07", dtype, max_grad_norm, shares_work, compile)


def warmdown_lambda(
    num_steps: int, warmup_steps: int = 0, warmdown_fraction: float = 1.0, final_fraction: float = 0.0
) -> Callable[[int], float]:
    """A learning-rate factor by step, as LambdaLR takes it: warmup, constant, then linear to `final_fraction`.

    Args:
        num_steps: steps of the whole run.
        warmup_steps: the factor is (step + 1) / warmup_steps before.
        warmdown_fraction: share of the run over which it falls, at its end.
        final_fraction: factor at step `num_steps`.
    """
    warmdown_steps = round(warmdown_fraction * num_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if step <= num_steps - warmdown_steps:
            return 1.0
        left = (num_steps - step) / warmdown_steps
        return left + (1 - left) * final_fraction

    return factor


class Schedule:
    """Learning rate, Muon momentum and Muon decay of pretraining, by step, of one generation.

    Args:
        architecture: `2026-07` or `2025-10`.
        num_steps: optimizer steps of the whole run.
    """

    def __init__(self, architecture: str, num_steps: int):
        self.architecture, self.num_steps = architecture, num_steps
        newest = architecture == "2026-07"
        self.warmup_steps, self.warmdown_fraction, self.final_fraction = (40, 0.65, 0.05) if newest else (0, 0.2, 0.0)
        self.warmdown_steps = round(self.warmdown_fraction * num_steps)
        self.lr_factor = warmdown_lambda(num_steps, self.warmup_steps, self.warmdown_fraction, self.final_fraction)

    def momentum(self, step: int) -> float:
        """Muon's momentum at a step; in a short run the warmup wins over the warmdown, as upstream."""
        if self.architecture == "2025-10":
            return 0.85 + 0.10 * min(step / 300, 1.0)
        if step < 400:
            return 0.85 + 0.12 * step / 400
        warmdown_start = self.num_steps - self.warmdown_steps
        if step < warmdown_start:
            return 0.97
        return 0.97 - 0.07 * (step - warmdown_start) / self.warmdown_steps

    def decay_factor(self, step: int) -> float:
        """Factor of Muon's weight decay: a cosine to 0."""
        return 0.5 * (1 + math.cos(math.pi * step / self.num_steps))

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set a step's values in the optimizer's groups."""
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.lr_factor(step)
            if group["kind"] == "muon":
                group["momentum"] = self.momentum(step)
                group["weight_decay"] = group["initial_weight_decay"] * self.decay_factor(step)
