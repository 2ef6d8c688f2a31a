"""Muon for the matrices, AdamW for the rest, in one torch optimizer; the groups and schedules of both generations.

Muon orthogonalises the momentum of each matrix, all matrices of one shape in one batch. The 2026-07 variant adds row
equilibration (arXiv 2603.28254), Polar Express (2505.16932), Frobenius renormalisation (2602.21545), NorMuon's variance
reduction (2510.05491) and cautious weight decay; 2025-10 is plain Muon with Newton-Schulz.

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
from torch.optim.adamw import adamw

from .scaling import MATRIX_WEIGHT_DECAY

ADAM_EPS = 1e-10
NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


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
    dtype: torch.dtype = torch.bfloat16,
) -> "MuonAdamW":
    """The optimizer of a NanoChatHF model's architecture.

    Args:
        model: a NanoChatHFForCausalLM, or a wrapper whose `config` is its configuration.
        lr_scale: factor of every learning rate but smear and backout: sqrt(batch tokens / 2^19) in pretraining.
        lr_fraction: factor of every learning rate, for stages after pretraining.
        weight_decay: Muon's decay; the architecture's nominal value by default.
        learning_rates: nominal learning rates by group (`matrix`, `embedding`, ...) instead of the architecture's.
        dtype: dtype in which matrices are orthogonalised.

    Returns:
        An optimizer whose groups carry `name`, `kind` and `initial_lr`. Only parameters that need gradients are in it.

    Raises:
        ValueError: a group name in `learning_rates` that this model has not.
    """
    config = model.config
    settings, learning_rates = ADAMW_GROUPS[config.architecture], dict(learning_rates or {})
    members = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[group_of(name) if parameter.ndim < 2 or group_of(name) in settings else "matrix"].append(parameter)
    unknown = learning_rates.keys() - members.keys()
    if unknown:
        raise ValueError(f"learning_rates names {sorted(unknown)}; this model's groups are {sorted(members)}")

    groups = []
    for name, group in settings.items():
        if members[name]:
            lr = learning_rates.get(name, group.lr) * lr_fraction
            lr *= (config.hidden_size / 768) ** -0.5 if group.by_width else 1.0
            lr *= lr_scale if group.by_batch else 1.0
            groups.append(
                dict(params=members[name], name=name, kind="adamw", lr=lr, betas=group.betas,
                     weight_decay=group.weight_decay)
            )  # fmt: skip
    if members["matrix"]:
        if weight_decay is None:
            weight_decay = MATRIX_WEIGHT_DECAY[config.architecture]
        lr = learning_rates.get("matrix", MATRIX_LR) * lr_scale * lr_fraction
        groups.append(
            dict(params=members["matrix"], name="matrix", kind="muon", lr=lr, momentum=0.95, weight_decay=weight_decay)
        )
    for group in groups:
        group["initial_lr"], group["initial_weight_decay"] = group["lr"], group["weight_decay"]
    return MuonAdamW(groups, normalize=config.architecture == "2026-07", dtype=dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Steps each group by its `kind`: `adamw` or `muon`.

    Args:
        groups: parameter groups with `kind`, `lr`, `weight_decay` and `betas` or `momentum`.
        normalize: Muon as in 2026-07 (see the module's docstring) instead of plain Muon.
        dtype: dtype of the orthogonalisation.
    """

    def __init__(self, groups: list[dict], normalize: bool = True, dtype: torch.dtype = torch.bfloat16):
        super().__init__(groups, defaults={})
        self.normalize, self.dtype = normalize, dtype
        self.num_orthogonalized = 0  # matrices since the start: shows that Muon really ran

    @torch.no_grad()
    def step(self, closure=None):
        """One step; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["kind"] == "adamw":
                self._step_adamw(group, params)
            else:
                by_shape = defaultdict(list)
                for p in params:
                    by_shape[p.shape].append(p)
                for same_shape in by_shape.values():
                    self._step_muon(group, same_shape)
        return loss

    def _step_adamw(self, group: dict, params: list[torch.Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p].update(
                    step=torch.zeros((), dtype=torch.float32, device=p.device),
                    exp_avg=torch.zeros_like(p),
                    exp_avg_sq=torch.zeros_like(p),
                )
        if params:
            states = [self.state[p] for p in params]
            adamw(
                params, [p.grad for p in params], [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states],
                [], [s["step"] for s in states], fused=True, amsgrad=False, beta1=group["betas"][0],
                beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"], eps=ADAM_EPS,
                maximize=False,
            )  # fmt: skip

    def _step_muon(self, group: dict, params: list[torch.Tensor]) -> None:
        """Muon on n matrices of one shape (rows, columns)."""
        rows, columns = params[0].shape
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
                if self.normalize:
                    self.state[p]["second_moment"] = p.new_zeros((rows, 1) if rows >= columns else (1, columns))
        momenta, grads = [self.state[p]["momentum"] for p in params], [p.grad for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        update = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))  # Nesterov, (n, rows, columns)
        if self.normalize:
            update = equilibrate_rows(update)
            update = orthogonalize(update.to(self.dtype), POLAR_EXPRESS, margin=1.01, eps=1e-6).float()
            update = with_norm(update, math.sqrt(min(rows, columns)))
            second_moments = [self.state[p]["second_moment"] for p in params]
            mean_square = update.square().mean(dim=-1 if rows >= columns else -2, keepdim=True)
            torch._foreach_lerp_(second_moments, list(mean_square), 1 - 0.9)
            norm = update.norm(dim=(-2, -1), keepdim=True)
            update = with_norm(update * torch.stack(second_moments).clamp(min=1e-10).rsqrt(), norm)
        else:
            update = orthogonalize(update.to(self.dtype), NEWTON_SCHULZ, margin=1.0, eps=1e-7).float()
        self.num_orthogonalized += len(params)
        lr = group["lr"] * math.sqrt(max(1.0, rows / columns))
        for p, u in zip(params, update, strict=True):
            if group["weight_decay"]:
                p.sub_(p * (u * p >= 0), alpha=lr * group["weight_decay"])  # cautious: only where decay and step agree
            p.sub_(u, alpha=lr)


def orthogonalize(x: torch.Tensor, coefficients: list[tuple], margin: float, eps: float) -> torch.Tensor:
    """Approximate each matrix's nearest orthogonal one by odd polynomials of it, in the dtype of x.

    Args:
        x: (n, rows, columns); the product is taken on the shorter side.
        coefficients: one (a, b, c) an iteration: x <- a x + b (x x') x + c (x x')^2 x.
        margin, eps: x is first divided by margin * its Frobenius norm + eps.
    """
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (margin * x.norm(dim=(-2, -1), keepdim=True) + eps)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def equilibrate_rows(x: torch.Tensor) -> torch.Tensor:
    """Give each row of each matrix the root mean square of the matrix's row norms."""
    norms = x.norm(dim=-1, keepdim=True)
    return x * (norms.square().mean(dim=-2, keepdim=True).sqrt() / norms.clamp(min=1e-6))


def with_norm(x: torch.Tensor, norm: float | torch.Tensor) -> torch.Tensor:
    """Scale each matrix of (n, rows, columns) to a Frobenius norm."""
    return x * (norm / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))


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
        warmup_steps, warmdown_fraction, final_fraction = (40, 0.65, 0.05) if newest else (0, 0.2, 0.0)
        self.warmdown_steps = round(warmdown_fraction * num_steps)
        self.lr_factor = warmdown_lambda(num_steps, warmup_steps, warmdown_fraction, final_fraction)

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
