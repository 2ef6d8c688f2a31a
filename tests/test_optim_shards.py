"""Several processes are one: accumulation, and two gloo processes that share the optimizer's work, change nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_runs import curve, small_run
from ten_steps import STEPS, ten_steps

from nanochat_hf import pretrain

GENERATIONS = ("2026-07", "2025-10")


@pytest.fixture(scope="module")
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, tiny_tokenizer):
    """What two processes made of the ten steps, and the folder of a small run that they did together."""
    folder = tmp_path_factory.mktemp("two")
    run_dir, config, settings = small_run(folder, tiny_tokenizer, "run", num_steps=4, save_every_steps=2)
    (folder / "settings.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(Path(__file__).with_name("ten_steps.py")), str(folder / "out.pt"), str(folder / "settings.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "out.pt", weights_only=True), run_dir, config, settings


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


@pytest.mark.parametrize("architecture", GENERATIONS)
def test_two_processes_are_one(accelerator, two_processes, architecture):
    whole, shared = ten_steps(accelerator, architecture, num_batches=1), two_processes[0][architecture]
    assert_same(shared, whole)
    num_matrices = 3 * 6 + (2 if architecture == "2026-07" else 0)  # q, k, v, o, fc1, fc2; gates of value embeddings
    assert whole["num_orthogonalized"] == shared["num_orthogonalized"] == STEPS * num_matrices
    assert shared["own_orthogonalized"] < 0.7 * whole["own_orthogonalized"], "the work is not shared"
    assert shared["state_numel"] < 0.7 * whole["state_numel"], "the optimizer's state is not shared"


def test_a_run_of_two_processes(two_processes):
    _, run_dir, config, settings = two_processes
    record = json.loads((run_dir / "eval" / "base.json").read_text())["results"]
    assert record["world_size"] == 2 and sorted(curve(run_dir, "loss")) == [1, 2, 3, 4]
    checkpoint = run_dir / "checkpoints" / "base" / "step-000002"
    assert {path.name for path in checkpoint.glob("state-*.pt")} == {"state-0.pt", "state-1.pt"}
    (run_dir / "eval" / "base.json").unlink()
    with pytest.raises(ValueError, match="made by 2 processes, now there are 1.*Launch 2"):
        pretrain.pretrain(config, settings)
