"""Resumable checkpoints of pretraining: `<run_dir>/checkpoints/base/step-NNNNNN`, each whole or not there.

A checkpoint is a model folder that `from_pretrained` opens, and beside the weights one `state-RANK.pt` a process:
its optimizer shards, its position in the data, its random state, the counters. With several machines the run's folder
must be one that all of them see.
"""

import json
import os
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator

from .checkpoint import atomic_folder, last_checkpoint, save_model


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie.
        keep: how many of the newest are kept.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, keep: int):
        self.accelerator, self.folder, self.keep = accelerator, folder, keep
        self.last_step: int | None = None

    def save(self, step: int, model: torch.nn.Module | None, tokenizer, state: dict) -> None:
        """Write a checkpoint, in every process with its own state; older ones go when it is complete.

        Args:
            model: whole; the main process's counts.

        Raises:
            OSError: it could not be written (disk full); the previous one is as it was.
        """
        if step == self.last_step:
            return  # replacing a folder takes two renames: between them it has no name
        processes = self.accelerator
        folder = self.folder / f"step-{step:06d}"
        partial = folder.with_name(folder.name + ".partial")  # as atomic_folder names it on the main process
        try:
            with atomic_folder(folder) if processes.is_main_process else nullcontext(partial):
                processes.wait_for_everyone()
                if processes.is_main_process:
                    save_model(model, tokenizer, partial)
                torch.save(state | {"rng": random_state()}, partial / f"state-{processes.process_index}.pt")
                processes.wait_for_everyone()
        except Exception as error:  # safetensors, torch and the system each have their own for a full disk
            kept = last_checkpoint(self.folder)
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({error}); "
                + (f"{kept.name} is whole" if kept else "there is no earlier one")
                + ": free some space and run the same command again to resume"
            ) from error
        self.last_step = step
        if processes.is_main_process:
            last_checkpoint(self.folder, keep=self.keep)
        processes.wait_for_everyone()

    def load_last(self) -> tuple[Path, dict] | None:
        """The newest checkpoint's folder and this process's state; None where there is none.

        Raises:
            ValueError: it was made by another number of processes, or holds no state to resume from.
        """
        folder = last_checkpoint(self.folder)
        if folder is None:
            return None
        made_by, now = len(list(folder.glob("state-*.pt"))), self.accelerator.num_processes
        if not made_by:
            raise ValueError(f"{folder} holds no state-*.pt, so it is no checkpoint to resume from: delete it")
        if made_by != now:
            raise ValueError(
                f"{folder} was made by {made_by} processes, now there are {now}: optimizer shards and data positions "
                f"belong to a process each. Launch {made_by}, or start over (--fresh)"
            )
        state = torch.load(folder / f"state-{self.accelerator.process_index}.pt", map_location="cpu", weights_only=True)
        set_random_state(state["rng"])
        self.last_step = state["step"]
        return folder, state


def random_state() -> list[torch.Tensor]:
    """torch's random states: of the CPU and of each GPU this process sees."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def set_random_state(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) == 1 + torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states[1:])


def rewind_log(path: Path, step: int) -> None:
    """Take out of a curve what a run that goes on at `step` will write again, and a half-written last line.

    A checkpoint is saved before the validation of its step, which therefore runs once more.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] < step or (row["step"] == step and "loss" in row):
            kept.append(line + "\n")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)
