"""Accelerate's configurations, launched as the documentation says, on two CPU processes that talk through gloo."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import curve, small_run, weights_of

from nanochat_hf import pretrain

ROOT = Path(__file__).parents[1]
STEPS = {"num_steps": 4, "save_every_steps": 2, "save_total_limit": 2}
pytestmark = pytest.mark.slow


def launch(run_dir: Path, settings: dict, configuration: str, *flags: str) -> subprocess.Popen:
    """`accelerate launch` of the pretraining script, as on GPUs but for ACCELERATE_USE_CPU."""
    recipe = run_dir.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "accelerate_configs" / f"{configuration}.yaml"), "--num_processes", "2", *flags]
    command += [str(ROOT / "scripts" / "pretrain.py"), "--config", str(recipe)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def finish(*processes: subprocess.Popen) -> str:
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(text[-3000:] for text in said)
    return said[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_tokenizer):
    """By configuration: a finished run of two processes, its folder, configuration and settings."""
    folder, made = tmp_path_factory.mktemp("launched"), {}

    def run(configuration: str) -> tuple:
        if configuration not in made:
            run_dir, config, settings = small_run(folder, tiny_tokenizer, configuration, **STEPS)
            finish(launch(run_dir, settings, configuration, "--main_process_port", free_port()))
            made[configuration] = run_dir, config, settings
        return made[configuration]

    return run


def assert_run_of_two(run_dir: Path) -> None:
    record = json.loads((run_dir / "eval" / "base.json").read_text())["results"]
    assert record["world_size"] == 2 and sorted(curve(run_dir, "loss")) == [1, 2, 3, 4]


def assert_close(run_dir: Path, other_dir: Path) -> None:
    assert list(curve(run_dir, "loss").values()) == pytest.approx(list(curve(other_dir, "loss").values()), abs=1e-5)
    ours, theirs = weights_of(run_dir), weights_of(other_dir)
    assert ours.keys() == theirs.keys()
    for name, weights in theirs.items():
        assert (ours[name] - weights).norm() <= 1e-4 * weights.norm(), name


def test_ddp_and_another_number_of_processes(runs):
    run_dir, config, settings = runs("ddp")
    assert_run_of_two(run_dir)
    checkpoint = run_dir / "checkpoints" / "base" / "step-000002"
    assert {path.name for path in checkpoint.glob("state-*.pt")} == {"state-0.pt", "state-1.pt"}
    record = run_dir / "eval" / "base.json"
    record.rename(record.with_suffix(".kept"))
    with pytest.raises(ValueError, match="made by 2 processes, now there are 1.*Launch 2"):
        pretrain.pretrain(config, settings)
    record.with_suffix(".kept").rename(record)


def test_fsdp2_equals_whole_copies_and_resumes_exactly(runs):
    run_dir, config, settings = runs("fsdp2")
    assert_run_of_two(run_dir)
    assert_close(run_dir, runs("ddp")[0])
    resumed_dir = run_dir.with_name("resumed")
    shutil.copytree(run_dir / "tokenizer", resumed_dir / "tokenizer")
    shutil.copytree(run_dir / "checkpoints", resumed_dir / "checkpoints")
    shutil.rmtree(resumed_dir / "checkpoints" / "base" / "step-000004")
    said = finish(
        launch(resumed_dir, settings | {"run_dir": str(resumed_dir)}, "fsdp2", "--main_process_port", free_port())
    )
    assert "resuming at step 2" in said and sorted(curve(resumed_dir, "loss")) == [3, 4]
    ours, theirs = weights_of(resumed_dir), weights_of(run_dir)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def stop_in_the_middle(process: subprocess.Popen, run_dir: Path, number: signal.Signals) -> str:
    """Send a signal once the run has logged a step; returns what it said, and asserts that it saved its work."""
    log = run_dir / "logs" / "base.jsonl"
    while process.poll() is None and not (log.exists() and '"loss"' in log.read_text()):
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=120)[0]
    stopped = int(re.search(r"stopped at step (\d+); run the same command again to resume there", said)[1])
    assert (run_dir / "checkpoints" / "base" / f"step-{stopped:06d}").is_dir() and not (run_dir / "base").exists()
    return said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_resume(tmp_path, tiny_tokenizer, number):
    run_dir, _, settings = small_run(tmp_path, tiny_tokenizer, "stopped", num_steps=5000, eval_every_steps=0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    command = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), "--config", str(recipe)]
    process = subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    said = stop_in_the_middle(process, run_dir, number)
    assert process.returncode == 130 and "Traceback" not in said


def test_sigterm_to_the_launcher_stops_both_processes_at_the_same_step(tmp_path, tiny_tokenizer):
    run_dir, _, settings = small_run(tmp_path, tiny_tokenizer, "stopped", num_steps=5000, eval_every_steps=0)
    process = launch(run_dir, settings, "ddp", "--main_process_port", free_port())
    stop_in_the_middle(process, run_dir, signal.SIGTERM)
    (folder,) = (run_dir / "checkpoints" / "base").iterdir()
    assert {path.name for path in folder.glob("state-*.pt")} == {"state-0.pt", "state-1.pt"}


def test_two_machines(runs, tmp_path, tiny_tokenizer):
    """Both are this one: each starts the same command with its own rank."""
    run_dir, _, settings = small_run(tmp_path, tiny_tokenizer, "machines", **STEPS)
    port = free_port()
    flags = ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    finish(*(launch(run_dir, settings, "multi_node", "--machine_rank", str(rank), *flags) for rank in (0, 1)))
    assert_run_of_two(run_dir)
    assert_close(run_dir, runs("ddp")[0])
