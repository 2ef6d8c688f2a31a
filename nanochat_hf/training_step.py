"""One optimizer step of pretraining: the forward and backward passes of its batches, then Muon and AdamW.

Apart from the loop, so that `scripts/benchmark.py pretrain` times exactly what `scripts/pretrain.py` runs. The model is
whole in every process and not wrapped in DDP: the optimizer itself averages gradients and shares the work out.
"""

import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env

from .hardware import supports_bf16
from .optim import MuonAdamW, Schedule


def make_accelerator(log_with: str | None = None, **settings) -> Accelerator:
    """Accelerate's handle on the machine: bf16 where it is fast; several processes on CPUs talk through gloo.

    Raises:
        ValueError: the tracker `log_with` is not installed; Accelerate itself would track nothing and not say so.
    """
    if log_with and find_spec(log_with) is None:
        raise ValueError(f"tracker: {log_with} is not installed: pip install {log_with}")
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    device = PartialState(cpu=on_cpu).device
    AcceleratorState._reset_state()  # the precision another stage chose in this process does not bind this one
    return Accelerator(
        cpu=on_cpu, mixed_precision="bf16" if supports_bf16(device) else "no", log_with=log_with, **settings
    )


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of matrix products under the accelerator's autocast."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


class TrainingStep:
    """Calling it takes one step.

    Args:
        model: a NanoChatHFForCausalLM on the accelerator's device.
        optimizer: of `build_optimizer`.
        schedule: its values by step.
        num_batches: batches of one step in this process.
        should_compile: through torch.compile; the first call then takes minutes.

    Attributes:
        num_skipped: steps left out because their loss was not finite.
        stop_requested: this process was asked to stop.
        is_stopping: some process was, before the last step's backward pass; equal in all of them.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: MuonAdamW,
        schedule: Schedule,
        num_batches: int,
        should_compile: bool,
    ):
        self.accelerator, self.model, self.optimizer, self.schedule = accelerator, model, optimizer, schedule
        self.forward = torch.compile(model) if should_compile else model
        self.num_batches, self.num_skipped = num_batches, 0
        self.stop_requested = self.is_stopping = False

    def __call__(self, batches: Iterator[dict], step: int) -> float:
        """Step number `step`; returns the mean loss over all processes in nats, and leaves out a step without one.

        Args:
            batches: {"input_ids", "shift_labels"}, each (B, T), on the device; `num_batches` of them are taken.
            step: counted from 0.
        """
        self.schedule.apply(self.optimizer, step)
        device = self.accelerator.device
        total = torch.zeros((), device=device)
        with self.accelerator.autocast():  # around all batches: it casts each weight once
            for i in range(self.num_batches):
                batch = next(batches)
                self.lap("data")
                loss = self.forward(**batch, use_cache=False, skip_logits=True).loss / self.num_batches
                total += loss.detach()
                self.lap("forward")
                if i == self.num_batches - 1:
                    figures = torch.stack((total, total.new_full((), float(self.stop_requested))))
                    read_figures = start_reading(self.accelerator.reduce(figures, "mean"))
                with torch.autocast(device.type, enabled=False):  # each operation goes back as it came
                    loss.backward()
                self.lap("backward")
        mean, stopping = read_figures()
        self.is_stopping = stopping > 0
        if math.isfinite(mean):
            self.optimizer.step()
        else:
            self.num_skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.lap("optimizer")
        return mean

    def settings(self) -> dict:
        """What a step does with the gradients, derived values included, for the record."""
        groups, schedule = self.optimizer.param_groups, self.schedule
        return {
            "learning_rates": {group["name"]: group["initial_lr"] for group in groups},
            "weight_decay": next((g["initial_weight_decay"] for g in groups if g["kind"] == "muon"), 0.0),
            "max_grad_norm": self.optimizer.max_grad_norm,
            "warmup_steps": schedule.warmup_steps,
            "warmdown_fraction": schedule.warmdown_fraction,
            "final_lr_fraction": schedule.final_fraction,
            "dtype": str(compute_dtype(self.accelerator)).removeprefix("torch."),
        }

    def lap(self, part: str) -> None:
        """A part of the step has ended; the benchmark puts its clock here."""


def start_reading(figures: torch.Tensor) -> Callable[[], list[float]]:
    """Start to copy a vector to the host; the function returned waits for that copy, not for work queued after it.

    The device is still busy with the backward pass when the loss arrives, so it never waits for the optimizer's launch.
    """
    if figures.device.type != "cuda":
        return figures.tolist
    host = torch.empty_like(figures, device="cpu", pin_memory=True)
    host.copy_(figures, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read
