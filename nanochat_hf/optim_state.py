"""The optimizer's state by parameter name, for another stage to go on with (nanochat's SFT of 2026-07 does).

Pretraining on several processes holds each parameter's state in parts (`optim_shards.py`); a stage on TRL holds it
whole in every process. So each process writes a file of what it has, and the reader puts the parts together.
"""

from pathlib import Path

import torch

FILE = "optimizer-{rank:03d}.pt"


def save_optimizer_state(optimizer: torch.optim.Optimizer, model: torch.nn.Module, folder: Path, rank: int) -> None:
    """Write this process's part into an existing folder."""
    state = {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if optimizer.state.get(p)}
    torch.save(state, folder / FILE.format(rank=rank))


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: torch.nn.Module, folder: Path) -> None:
    """Read all parts into the state of an optimizer that has not stepped yet.

    Raises:
        ValueError: no parts there, or those of another model.
    """
    files = sorted(folder.glob("optimizer-*.pt"))
    if not files:
        raise ValueError(
            f"no optimizer state in {folder}: pretrain with keep_optimizer_state: true, or leave it out of the "
            f"SFT recipe to start with fresh moments"
        )
    parts = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = {name: p for name, p in model.named_parameters() if id(p) in stepped}
    for name in named.keys() ^ set().union(*parts):
        raise ValueError(f"the optimizer state in {folder} is another model's: `{name}` is in one of them only")
    for name, parameter in named.items():
        held = [part[name] for part in parts if name in part]
        optimizer.state[parameter] = {key: _whole([state[key] for state in held], parameter) for key in held[0]}


def _whole(values: list[torch.Tensor], parameter: torch.Tensor) -> torch.Tensor:
    """One tensor of the parts: pieces of a parameter in the order of their processes, or copies of the whole."""
    first = values[0]
    is_piece = first.ndim and first.shape != parameter.shape
    if is_piece and len(values) > 1 and sum(value.numel() for value in values) == parameter.numel():
        first = torch.cat(values).view_as(parameter)
    return first.to(parameter.device)
