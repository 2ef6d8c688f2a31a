"""The golden folder's models, whatever their number and shapes: each `model_*` sub-folder is one checkpoint."""

import functools
import json
import os
from pathlib import Path

import pytest
import torch

from nanochat_hf.interop_checkpoint import NanochatCheckpoint, read_checkpoint
from nanochat_hf.interop_verify import model_of

GOLDEN = Path(os.environ.get("NANOCHAT_HF_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))
FOLDERS = sorted({path.parent for path in GOLDEN.glob("model_*/model_*.pt")})


def golden_file(golden: Path, name: str) -> Path:
    """One file of the golden folder; the test is skipped where the folder lacks it."""
    if not (golden / name).is_file():
        pytest.skip(f"no {name} in {golden}")
    return golden / name


def per_model(*files: str):
    """Run a test once for each golden model that has these files beside its checkpoint."""
    folders = [folder for folder in FOLDERS if all((folder / file).is_file() for file in files)]
    if not folders:
        reason = f"no model_*/ with {', '.join(('model_*.pt', *files))} in {GOLDEN} (set NANOCHAT_HF_GOLDEN)"
        return pytest.mark.parametrize("folder", [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="none")])
    return pytest.mark.parametrize("folder", folders, ids=lambda folder: folder.name)


@functools.cache
def checkpoint_of(folder: Path) -> NanochatCheckpoint:
    return read_checkpoint(folder)


def model_from(folder: Path):
    """A fresh fp32 model in evaluation mode; its weights are its own."""
    read = checkpoint_of(folder)
    return model_of(read.config, {name: tensor.float().clone() for name, tensor in read.state_dict.items()})


@functools.cache
def expected_of(folder: Path) -> dict:
    return torch.load(folder / "expected.pt", weights_only=True)


def json_of(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())
