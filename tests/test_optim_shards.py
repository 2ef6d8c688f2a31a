"""Several processes are one: accumulation, two processes that share the optimizer's work, and FSDP2 change nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from ten_steps import STEPS, ten_steps

GENERATIONS = ("2026-07", "2025-10")


@pytest.fixture(scope="module")
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes with 16 of the 32 rows each made of the ten steps."""
    path = tmp_path_factory.mktemp("two") / "out.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(Path(__file__).with_name("ten_steps.py")), str(path)]
    environment = os.environ | {"FSDP_VERSION": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(path, weights_only=True)


def assert_same(ours: dict, theirs: dict) -> None:
    """Within 1e-5: losses in nats, each parameter by norm (AdamW scales up rounding where single gradients cancel)."""
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
    for name, weights in theirs["weights"].items():
        assert (ours["weights"][name] - weights).norm() <= 1e-5 * weights.norm(), name


@pytest.mark.parametrize("architecture", GENERATIONS)
def test_four_batches_of_eight_are_one_of_thirty_two(accelerator, architecture):
    whole = ten_steps(accelerator, architecture, num_batches=1)
    assert whole["losses"][-1] < whole["losses"][0]
    assert_same(ten_steps(accelerator, architecture, num_batches=4), whole)


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole copies", "FSDP2"])
@pytest.mark.parametrize("architecture", GENERATIONS)
def test_two_processes_are_one(accelerator, two_processes, architecture, in_pieces):
    whole, shared = ten_steps(accelerator, architecture, num_batches=1), two_processes[architecture, in_pieces]
    assert_same(shared, whole)
    num_matrices = 3 * 6 + (2 if architecture == "2026-07" else 0)  # q, k, v, o, fc1, fc2; gates of value embeddings
    assert whole["num_orthogonalized"] == shared["num_orthogonalized"] == STEPS * num_matrices
    assert shared["own_orthogonalized"] < 0.7 * whole["own_orthogonalized"], "the work is not shared"
    assert shared["state_numel"] < 0.7 * whole["state_numel"], "the optimizer's state is not shared"
