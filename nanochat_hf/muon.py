"""Muon for matrices and AdamW for the rest, in one torch optimizer.

Muon orthogonalises the momentum of each matrix, all matrices of one shape in one batch. The 2026-07 variant adds row
equilibration (arXiv 2603.28254), Polar Express (2505.16932), Frobenius renormalisation (2602.21545), NorMuon's variance
reduction (2510.05491) and cautious weight decay; 2025-10 is plain Muon with Newton-Schulz.
"""

import math

import torch
from torch.optim.adamw import adamw

from .optim_shards import Piece, Unit, units_of

ADAM_EPS = 1e-10
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
    ):
        super().__init__(groups, defaults={})
        self.normalize, self.dtype, self.max_grad_norm = normalize, dtype, max_grad_norm
        self.shares_work, self.num_orthogonalized = shares_work, 0

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
        adamw(
            [p.value for p in pieces], [p.grad for p in pieces], [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states], fused=True, amsgrad=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
            eps=ADAM_EPS, maximize=False,
        )  # fmt: skip

    def _step_muon(self, group: dict, pieces: list[Piece]) -> None:
        """Muon on n matrices of one shape (rows, columns)."""
        params, grads = [piece.value for piece in pieces], [piece.grad for piece in pieces]
        states = [self.state[piece.parameter] for piece in pieces]
        rows, columns = params[0].shape
        for p, state in zip(params, states, strict=True):
            if not state:
                state["momentum"] = torch.zeros_like(p)
                if self.normalize:
                    state["second_moment"] = p.new_zeros((rows, 1) if rows >= columns else (1, columns))
        momenta = [state["momentum"] for state in states]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        update = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))  # Nesterov, (n, rows, columns)
        if self.normalize:
            update = equilibrate_rows(update)
            update = orthogonalize(update.to(self.dtype), POLAR_EXPRESS, margin=1.01, eps=1e-6).float()
            update = with_norm(update, math.sqrt(min(rows, columns)))
            second_moments = [state["second_moment"] for state in states]
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
