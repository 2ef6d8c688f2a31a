"""Whatever happens to a run, going on gives what an undisturbed run gives: kills, full disks, damaged shards."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_runs import curve, small_run, weights_of

from nanochat_hf import pretrain, pretrain_checkpoint
from nanochat_hf.data.shards import BadShardError

RUN = Path(__file__).with_name("small_runs.py")


@pytest.fixture
def make_run(tmp_path, tiny_tokenizer):
    return partial(small_run, tmp_path, tiny_tokenizer)


def start(run_dir: Path, settings: dict, *arguments: str) -> subprocess.Popen:
    """The run in a process of its own."""
    path = run_dir / "settings.json"
    path.write_text(json.dumps(settings))
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # the order of sums must be the same
    command = [sys.executable, str(RUN), str(path), *arguments]
    with open(run_dir / "errors.txt", "w") as errors:  # no pipe: an unread one fills up and blocks the run
        return subprocess.Popen(command, env=environment, stderr=errors, stdout=subprocess.DEVNULL)


def assert_same_run(run_dir: Path, whole_dir: Path) -> None:
    for figure in ("loss", "val_bpb"):
        assert curve(run_dir, figure) == curve(whole_dir, figure)
    ours, theirs = weights_of(run_dir), weights_of(whole_dir)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_killed_while_saving(make_run):
    whole_dir, *whole = make_run("whole", save_every_steps=2)
    pretrain.pretrain(*whole)
    run_dir, config, settings = make_run("killed", save_every_steps=2)
    process = start(run_dir, settings, "2")
    assert process.wait() == -signal.SIGKILL, (run_dir / "errors.txt").read_text()[-2000:]
    checkpoints = run_dir / "checkpoints" / "base"
    assert {path.name for path in checkpoints.iterdir()} == {"step-000002", "step-000004.partial"}
    assert sorted(curve(run_dir, "loss")) == [1, 2, 3, 4]
    with open(run_dir / "logs" / "base.jsonl", "a") as log:
        log.write('{"step": 5, "lo')  # a kill can come in the middle of a line, too
    pretrain.pretrain(config, settings)
    assert_same_run(run_dir, whole_dir)


@pytest.mark.slow
def test_ten_kills_at_random_moments(make_run):
    changes = {"num_steps": 60, "save_every_steps": 2, "eval_every_steps": 20}
    whole_dir, *whole = make_run("whole", **changes)
    started = time.monotonic()
    pretrain.pretrain(*whole)
    step_seconds = (time.monotonic() - started) / changes["num_steps"]  # saves and evaluations included
    run_dir, config, settings = make_run("killed", **changes)
    rng, log = random.Random(0), run_dir / "logs" / "base.jsonl"
    for _ in range(10):
        process = start(run_dir, settings)
        before = log.stat().st_mtime if log.exists() else 0
        while process.poll() is None and (not log.exists() or log.stat().st_mtime == before):
            time.sleep(0.01)  # until it has rewound or written its curve, so that it trains
        time.sleep(rng.uniform(0, 4) * step_seconds)
        process.kill()
        process.wait()
    assert not (run_dir / "base").exists(), "the kills came too late to show anything"
    pretrain.pretrain(config, settings)
    assert_same_run(run_dir, whole_dir)


def test_a_full_disk_leaves_the_last_checkpoint(make_run, monkeypatch):
    run_dir, config, settings = make_run("full", save_every_steps=2)
    save = torch.save

    def until_full(state, path):
        save(state, path)
        if state["step"] == 4:
            os.truncate(path, 100)
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pretrain_checkpoint.torch, "save", until_full)
        with pytest.raises(OSError, match="step 4 could not be written .*No space left.*step-000002 is whole.*resume"):
            pretrain.pretrain(config, settings)
    assert [path.name for path in (run_dir / "checkpoints" / "base").iterdir()] == ["step-000002"]
    pretrain.pretrain(config, settings)
    assert sorted(curve(run_dir, "loss")) == [1, 2, 3, 4, 5, 6]


def test_a_damaged_shard_stops_the_run_or_is_counted(make_run, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(3):
        table = pa.table({"text": [f"Shard {i}, document {j}. " + "four five six " * (j % 9) for j in range(80)]})
        pq.write_table(table, folder / f"shard_{i}.parquet")
    whole = (folder / "shard_1.parquet").read_bytes()
    (folder / "shard_1.parquet").write_bytes(whole[: len(whole) // 2])
    changes = {"dataset": str(folder), "num_steps": 2, "eval_every_steps": 0}
    _, config, settings = make_run("stops", **changes)
    with pytest.raises(BadShardError, match="shard_1.parquet.*on_bad_shard"):
        pretrain.pretrain(config, settings)
    run_dir, config, settings = make_run("skips", on_bad_shard="skip", **changes)
    pretrain.pretrain(config, settings)
    assert json.loads((run_dir / "eval" / "base.json").read_text())["results"]["num_skipped_shards"] >= 1
