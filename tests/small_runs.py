"""Pretraining runs of a few thousand parameters: what the tests of pretraining share, and a process of their own.

python tests/small_runs.py SETTINGS.json [N]    # runs it; with N, SIGKILL comes in the middle of checkpoint N
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from nanochat_hf import pretrain, pretrain_checkpoint
from nanochat_hf.configs import PretrainConfig

SETTINGS = {
    "depth": 1,
    "sequence_length": 64,
    "head_dim": 32,
    "total_batch_tokens": 256,
    "device_batch_size": 2,
    "num_steps": 6,
    "eval_every_steps": 3,
    "eval_tokens": 256,
    "log_every_steps": 1,
    "save_every_steps": 0,
}


def small_run(folder: Path, tokenizer, name: str, **changes) -> tuple[Path, PretrainConfig, dict]:
    """A run folder with a tokenizer in it, its configuration and its settings, over a small corpus."""
    corpus = folder / "corpus.jsonl"
    lines = [json.dumps({"text": f"Document {i}: " + "one two three " * (i % 17)}) for i in range(200)]
    corpus.write_text("\n".join(lines))
    run_dir = folder / name
    tokenizer.save_pretrained(run_dir / "tokenizer")
    settings = {**SETTINGS, "dataset": str(corpus), "run_dir": str(run_dir), **changes}
    return run_dir, PretrainConfig(**settings), settings


def curve(run_dir: Path, figure: str) -> dict:
    """A figure by step, out of the run's curve; a step that is there twice is an error."""
    rows = [json.loads(line) for line in (run_dir / "logs" / "base.jsonl").open()]
    found = [(row["step"], row[figure]) for row in rows if figure in row]
    assert len(dict(found)) == len(found), f"steps written twice: {[step for step, _ in found]}"
    return dict(found)


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run_dir / "base" / "model.safetensors")


def kill_in_save(number: int) -> None:
    """Let SIGKILL come when half of this checkpoint's state has been written."""
    save, seen = torch.save, [0]

    def half_saved(state, path):
        save(state, path)
        seen[0] += 1
        if seen[0] == number:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    pretrain_checkpoint.torch.save = half_saved


if __name__ == "__main__":
    said = json.loads(Path(sys.argv[1]).read_text())
    if len(sys.argv) > 2:
        kill_in_save(int(sys.argv[2]))
    pretrain.pretrain(PretrainConfig(**said), said)
