"""Muon for matrices and AdamW for the rest, in one torch optimizer.

Muon orthogonalises the momentum of each matrix, all matrices of one shape in one batch. The 2026-07 variant adds row
equilibration (arXiv 2603.28254), Polar Express (2505.16932), Frobenius renormalisation (2602.21545), NorMuon's variance
reduction (2510.05491) and cautious weight decay; 2025-10 is plain Muon with Newton-Schulz.
"""

import math
from functools import cache

import torch
from torch.optim.adamw import adamw

from .optim_shards import Piece, Unit, units_of

ADAM_EPS = 1e-10
NORMUON_BETA2 = 0.9  # of the second moment's running average
MAX_SHAPES = 256  # of parameters that one process may meet
NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


class MuonAdamW(torch.optim.Optimizer):
    """Steps each group by its `kind`: `adamw` or `muon`.

    Args:
        groups: parameter groups with `kind`, `lr`, `weight_decay` and `betas` or `momentum`.
        normalize: Muon as in 2026-07 (see the module's docstring) instead of plain Muon.
        dtype: dtype of the orthogonalisation.
        max_grad_norm: clip the gradient of all groups together to this norm.
        compile: through torch.compile, for each shape of parameter once.
        shares_work: several processes, each with its own gradients of the same parameters, act as one: gradients are
            averaged here, so they must not be averaged before (by DDP), and each process steps only its pieces.

    Attributes:
        num_orthogonalized: matrices since the start, in this process: shows that Muon really ran.
    """

    def __init__(
        self,
        groups: list[dict],
        normalize: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        max_grad_norm: float | None = None,
        shares_work: bool = False,
        compile: bool = False,
    ):
        super().__init__(groups, defaults={})
        self.normalize, self.dtype, self.max_grad_norm = normalize, dtype, max_grad_norm
        self.shares_work, self.compile, self.num_orthogonalized = shares_work, compile, 0

    @torch.no_grad()
    def step(self, closure=None):
        """One step; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        units = [(group, unit) for group in self.param_groups for unit in units_of(group, self.shares_work)]
        for _, unit in units:
            unit.start()
        if self.max_grad_norm:
            self._clip([unit for _, unit in units])
        for group, unit in units:
            if pieces := unit.pieces():
                (self._step_adamw if group["kind"] == "adamw" else self._step_muon)(group, pieces)
            unit.share()
        for _, unit in units:
            unit.finish()
        return loss

    def _clip(self, units: list[Unit]) -> None:
        square = sum((unit.square_norm() for unit in units), torch.zeros(()))
        if self.shares_work:
            torch.distributed.all_reduce(square)
        factor = (self.max_grad_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
        for unit in units:
            if pieces := unit.pieces():
                torch._foreach_mul_([piece.grad for piece in pieces], factor)

    def _step_adamw(self, group: dict, pieces: list[Piece]) -> None:
        states = [self.state[piece.parameter] for piece in pieces]
        for piece, state in zip(pieces, states, strict=True):
            if not state:
                state.update(
                    step=torch.zeros((), dtype=torch.float32, device=piece.value.device),
                    exp_avg=torch.zeros_like(piece.value),
                    exp_avg_sq=torch.zeros_like(piece.value),
                )
        if self.compile:
            numbers = _tensors(group["lr"], *group["betas"], group["weight_decay"])
            for piece, state in zip(pieces, states, strict=True):
                state["step"] += 1
                moments = state["exp_avg"], state["exp_avg_sq"]
                _compiled(adamw_update)(piece.value, piece.grad, state["step"], *moments, *numbers)
            return
        adamw(
            [p.value for p in pieces], [p.grad for p in pieces], [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states], fused=True, amsgrad=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
            eps=ADAM_EPS, maximize=False,
        )  # fmt: skip

    def _step_muon(self, group: dict, pieces: list[Piece]) -> None:
        """Muon on n matrices of one shape (rows, columns)."""
        rows, columns = pieces[0].value.shape
        states = [self.state[piece.parameter] for piece in pieces]
        for piece, state in zip(pieces, states, strict=True):
            if not state:
                state["momentum"] = torch.zeros_like(piece.value)
                if self.normalize:
                    shape = (rows, 1) if rows >= columns else (1, columns)
                    state["second_moment"] = piece.value.new_zeros(shape)
        names = ("momentum", "second_moment")[: 2 if self.normalize else 1]
        held = [[piece.value for piece in pieces], *([state[name] for state in states] for name in names)]
        stacked = [torch.stack(tensors) for tensors in held]
        numbers = group["momentum"], group["lr"] * max(1.0, rows / columns) ** 0.5, group["weight_decay"], NORMUON_BETA2
        update, numbers = (_compiled(muon_update), _tensors(*numbers)) if self.compile else (muon_update, numbers)
        update(torch.stack([piece.grad for piece in pieces]), *numbers, self.dtype, *stacked)
        for tensors, stack in zip(held, stacked, strict=True):
            torch._foreach_copy_(tensors, list(stack))
        self.num_orthogonalized += len(pieces)


# In both updates the numbers are floats, or scalar fp32 tensors where compiled. As nanochat's own updates are compiled,
# the order of operations decides the last bit: with it, the golden trajectory is reproduced exactly.


def adamw_update(value, grad, step, exp_avg, exp_avg_sq, lr, beta1, beta2, weight_decay) -> None:
    """AdamW on one parameter, in place; `step` counts from 1."""
    value.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.lerp_(grad.square(), 1 - beta2)
    scale = (exp_avg_sq / (1 - beta2**step)).sqrt() + ADAM_EPS
    value.add_(exp_avg / scale, alpha=-(lr / (1 - beta1**step)))


def muon_update(grad, momentum, lr, weight_decay, beta2, dtype, values, momenta, second_moments=None) -> None:
    """Muon on n matrices of one shape, all (n, rows, columns); values and moments change in place.

    Args:
        momentum: of the Nesterov average.
        beta2: of the second moments.
        dtype: of the orthogonalisation.
        second_moments: (n, rows, 1) or (n, 1, columns), the smaller one; None for plain Muon (2025-10).
    """
    momenta.lerp_(grad, 1 - momentum)
    update = grad.lerp_(momenta, momentum)
    if second_moments is None:
        update = orthogonalize(update.to(dtype), NEWTON_SCHULZ, margin=1.0, eps=1e-7).float()
    else:
        update = equilibrate_rows(update)
        update = orthogonalize(update.to(dtype), POLAR_EXPRESS, margin=1.01, eps=1e-6).float()
        update = update * (math.sqrt(min(update.shape[-2:])) / matrix_norm(update).clamp(min=1e-7))
        update = reduce_variance(update, second_moments, beta2)
    if isinstance(weight_decay, torch.Tensor) or weight_decay:
        # Cautious: only where decay and step agree.
        values.sub_(lr * update + lr * weight_decay * values * (update * values >= 0))
    else:
        values.sub_(lr * update)


def orthogonalize(x: torch.Tensor, coefficients: list[tuple], margin: float, eps: float) -> torch.Tensor:
    """Approximate each matrix's nearest orthogonal one by odd polynomials of it, in the dtype of x.

    Args:
        x: (n, rows, columns); the product is taken on the shorter side.
        coefficients: one (a, b, c) an iteration: x <- a x + b (x x') x + c (x x')^2 x.
        margin, eps: x is first divided by margin * its Frobenius norm + eps.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x / (matrix_norm(x) * margin + eps)
    for a, b, c in coefficients:
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = _add_product(gram, b, gram, gram, c)
        x = _add_product(x, a, x, polynomial) if tall else _add_product(x, a, polynomial, x)
    return x


def _add_product(x, x_factor: float, left, right, factor: float = 1.0) -> torch.Tensor:
    """`x_factor * x + factor * left @ right`, in one kernel where that is not the compiler's task."""
    if torch.compiler.is_compiling():
        return x_factor * x + factor * (left @ right)
    return torch.baddbmm(x, left, right, beta=x_factor, alpha=factor)


def equilibrate_rows(x: torch.Tensor) -> torch.Tensor:
    """Give each row of each matrix the root mean square of the matrix's row norms."""
    return x * (matrix_norm(x) / x.shape[-2] ** 0.5 / x.norm(dim=-1, keepdim=True).clamp(min=1e-6))


def reduce_variance(x: torch.Tensor, second_moments: torch.Tensor, beta2: float | torch.Tensor) -> torch.Tensor:
    """Divide rows (columns, in a wide matrix) by their running root mean square; the matrix norm is kept (NorMuon)."""
    dim = -1 if x.shape[-2] >= x.shape[-1] else -2
    num_averaged = x.shape[dim]
    mean_square = x.square().mean(dim=dim, keepdim=True)
    norm = (mean_square.sum(dim=(-2, -1), keepdim=True) * num_averaged).sqrt()
    second_moments.lerp_(mean_square, 1 - beta2)
    factor = second_moments.clamp(min=1e-10).rsqrt()
    new_norm = (mean_square * num_averaged * factor.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return x * (factor * (norm / new_norm.clamp(min=1e-10)))


def matrix_norm(x: torch.Tensor) -> torch.Tensor:
    """Frobenius norm of each matrix of (n, rows, columns), (n, 1, 1)."""
    return x.norm(dim=(-2, -1), keepdim=True)


def _tensors(*numbers: float) -> list[torch.Tensor]:
    """Numbers that change from step to step, as a compiled function takes them without compiling anew."""
    return [torch.tensor(number, dtype=torch.float32) for number in numbers]


@cache
def _compiled(update):
    """The update, compiled for each shape it meets; there are more shapes than dynamo expects of one function."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_SHAPES)
    return torch.compile(update, fullgraph=True, dynamic=False)
