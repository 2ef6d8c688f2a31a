"""Who steps which parameter on several processes: the owner computes, the others receive.

Where every process holds the whole model: for a unit of parameters, gradients are averaged to their owners
(reduce-scatter), each process steps its own pieces with optimizer state for them alone, and the new values go to
everyone (all-gather). The traffic is that of DDP, while state and work are divided by the number of processes. All
units' reductions start before the first step and all their gathers run beside later steps. Alone, a process owns
everything and nothing is sent. The model must not be wrapped in DDP as well, or gradients would be averaged twice.

Where the model is in pieces (FSDP2, `fsdp.py`) its gradients come averaged. AdamW steps the piece at hand; a matrix of
Muon's is put together at its owner, stepped whole, and taken apart again (all-to-all).
"""

from collections import defaultdict
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

SMALL_NUMEL = 4096  # below, sending a piece takes longer than stepping the whole


class Piece(NamedTuple):
    """What a process steps: `value`, a part of `parameter` or all of it, by `grad` of the same shape."""

    parameter: torch.Tensor
    value: torch.Tensor
    grad: torch.Tensor


def units_of(group: dict, shares_work: bool) -> list["Unit"]:
    """The units of a parameter group: a Muon group's matrices by shape; embeddings one by one, small ones together."""
    params = [p for p in group["params"] if p.grad is not None]
    in_pieces = any(isinstance(p, DTensor) for p in params)
    if group["kind"] == "muon":
        by_shape = defaultdict(list)
        for p in params:
            by_shape[p.shape].append(p)
        kind = MatricesInPieces if in_pieces else Matrices if shares_work else Unit
        return [kind(same_shape) for same_shape in by_shape.values()]
    if in_pieces:
        return [LocalPieces(params)]
    if not shares_work:
        return [Unit(params)] if params else []
    large = [p for p in params if p.numel() >= SMALL_NUMEL and p.numel() % dist.get_world_size() == 0]
    small = [p for p in params if not any(p is other for other in large)]
    return [Slices([p]) for p in large] + ([Copies(small)] if small else [])


class Unit:
    """Parameters stepped together; in this base class by the only process.

    Call `start`, then `pieces` (or first `square_norm`), `share` and `finish`.
    """

    counts_in_norm = True

    def __init__(self, params: list[torch.Tensor]):
        self.params, self.work, self._pieces = params, None, None

    def start(self) -> None:
        """Begin to average the gradients."""

    def pieces(self) -> list[Piece]:
        """What this process steps; waits for the averages at the first call."""
        if self._pieces is None:
            if self.work is not None:
                self.work.wait()
            self._pieces = self.receive()
        return self._pieces

    def receive(self) -> list[Piece]:
        return [Piece(p, p, p.grad) for p in self.params]

    def share(self) -> None:
        """Begin to send the new values."""

    def finish(self) -> None:
        """Wait for the others' new values."""

    def square_norm(self) -> torch.Tensor:
        """Sum of the squared gradients of the pieces, 0 where another process counts the same ones."""
        pieces = self.pieces() if self.counts_in_norm else []
        return sum((piece.grad.square().sum() for piece in pieces), torch.zeros((), device=self.params[0].device))


class Copies(Unit):
    """Small parameters, stepped whole and alike by every process."""

    def start(self) -> None:
        self.counts_in_norm = dist.get_rank() == 0
        self.flat = torch.cat([p.grad.flatten() for p in self.params])
        self.work = dist.all_reduce(self.flat, async_op=True)

    def receive(self) -> list[Piece]:
        grads = (self.flat / dist.get_world_size()).split([p.numel() for p in self.params])
        return [Piece(p, p, grad.view_as(p)) for p, grad in zip(self.params, grads, strict=True)]


class Slices(Unit):
    """One large parameter, of which each process steps an equal slice (AdamW works element by element)."""

    def start(self) -> None:
        grad = self.params[0].grad.flatten()
        self.grad = grad.new_empty(grad.numel() // dist.get_world_size())
        self.work = dist.reduce_scatter_tensor(self.grad, grad, async_op=True)

    def receive(self) -> list[Piece]:
        (parameter,) = self.params
        value = parameter.view(-1).chunk(dist.get_world_size())[dist.get_rank()]
        return [Piece(parameter, value, self.grad.div_(dist.get_world_size()))]

    def share(self) -> None:
        value = self.pieces()[0].value.clone()
        self.work = dist.all_gather_into_tensor(self.params[0].view(-1), value, async_op=True)

    def finish(self) -> None:
        self.work.wait()


class Matrices(Unit):
    """Matrices of one shape, of which each process steps the same number; the last process may have fewer."""

    def start(self) -> None:
        world_size, rank = dist.get_world_size(), dist.get_rank()
        self.num_each = -(-len(self.params) // world_size)
        self.num_padding = self.num_each * world_size - len(self.params)
        self.own = self.params[rank * self.num_each : (rank + 1) * self.num_each]
        grads = torch.stack([p.grad for p in self.params] + [torch.zeros_like(self.params[0])] * self.num_padding)
        self.grads = grads.new_empty(self.num_each, *grads.shape[1:])
        self.work = dist.reduce_scatter_tensor(self.grads, grads, async_op=True)

    def receive(self) -> list[Piece]:
        self.grads /= dist.get_world_size()
        return [Piece(p, p, grad) for p, grad in zip(self.own, self.grads, strict=False)]

    def share(self) -> None:
        own = self.grads  # its room is free now
        for i, p in enumerate(self.own):
            own[i].copy_(p)
        self.all = own.new_empty(self.num_each * dist.get_world_size(), *own.shape[1:])
        self.work = dist.all_gather_into_tensor(self.all, own, async_op=True)

    def finish(self) -> None:
        self.work.wait()
        torch._foreach_copy_(self.params, list(self.all[: len(self.params)]))


class LocalPieces(Unit):
    """Parameters in pieces, of which each process steps its own (AdamW works element by element)."""

    def receive(self) -> list[Piece]:
        pieces = (Piece(p, p.to_local(), p.grad.to_local()) for p in self.params)
        return [piece for piece in pieces if piece.value.numel()]


class MatricesInPieces(Unit):
    """Matrices of one shape in pieces of rows; each is put together at its owner, which steps it whole.

    Rows are dealt out as FSDP2 does, the same number to each process, the last ones fewer: here padded to that number.
    """

    def start(self) -> None:
        world_size = dist.get_world_size()
        self.rows, self.columns = self.params[0].shape
        self.num_each, self.rows_each = -(-len(self.params) // world_size), -(-self.rows // world_size)
        self.grads, grads_sent = self.exchange([p.grad.to_local() for p in self.params])
        self.values, values_sent = self.exchange([p.to_local() for p in self.params])
        self.sent = grads_sent, values_sent

    def exchange(self, pieces: list[torch.Tensor]) -> tuple[torch.Tensor, dist.Work]:
        """Send each matrix's piece to its owner; (senders, own matrices, rows_each, columns) arrive."""
        world_size = dist.get_world_size()
        sending = pieces[0].new_zeros(world_size * self.num_each, self.rows_each, self.columns)
        for place, piece in zip(sending, pieces, strict=False):
            place[: len(piece)] = piece
        received = torch.empty_like(sending)
        work = dist.all_to_all_single(received, sending, async_op=True)
        return received.view(world_size, self.num_each, self.rows_each, self.columns), work

    def receive(self) -> list[Piece]:
        for work in self.sent:
            work.wait()
        self.values, grads = (
            x.transpose(0, 1).reshape(self.num_each, -1, self.columns) for x in (self.values, self.grads)
        )
        first = dist.get_rank() * self.num_each
        own = self.params[first : first + self.num_each]
        rows = slice(self.rows)
        return [Piece(p, value[rows], grad[rows]) for p, value, grad in zip(own, self.values, grads, strict=False)]

    def share(self) -> None:
        self.pieces()  # a process that owns none has not asked for them
        shape = self.num_each, dist.get_world_size(), self.rows_each, self.columns
        sending = self.values.view(shape).transpose(0, 1).contiguous()
        self.values = torch.empty_like(sending)
        self.work = dist.all_to_all_single(self.values, sending, async_op=True)

    def finish(self) -> None:
        self.work.wait()
        for p, rows in zip(self.params, self.values.flatten(0, 1), strict=False):
            piece = p.to_local()
            piece.copy_(rows[: len(piece)])
