"""What the stages built on TRL's trainers share: the starting model, our optimizer, the curve.

TRL owns the loop; the optimizer's groups, the schedule and everything written to the run's folder are ours.
"""

import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
import transformers
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.trainer_utils import get_last_checkpoint

from .checkpoint import load_model
from .hardware import supports_bf16
from .optim import build_optimizer, warmdown_lambda
from .recipe import nearest
from .stage import STAGES, Stage

# Their values follow from the architecture and `lr_fraction`: a recipe that sets them expects what will not happen.
SETTINGS_WITHOUT_EFFECT = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "optim", "optim_args")


def load_start(run_dir: str, start_from: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The starting model, in fp32 whatever it was saved in (master weights), and its tokenizer.

    Args:
        start_from: a stage of this run, a model folder or a Hub id.

    Raises:
        ValueError: a stage that has not been made, or neither a stage nor a folder nor the form of a Hub id.
    """
    if start_from in STAGES:
        folder = Path(run_dir) / start_from
        if not (folder / "config.json").is_file():
            raise ValueError(f"start_from={start_from}: {folder} holds no model yet; run the {start_from} stage first")
        return load_model(folder)
    if not Path(start_from).is_dir() and start_from.count("/") != 1:
        raise ValueError(
            f"start_from={start_from!r} is no stage ({', '.join(STAGES)}), no folder and no Hub id (owner/name); "
            f"did you mean {nearest(start_from, STAGES)}?"
        )
    return load_model(start_from)


def prepare_arguments(training_args, settings: dict, checkpoint_dir: Path) -> None:
    """Fill in what recipes leave to us: where checkpoints go, and fp32 on a CPU without bf16.

    Raises:
        ValueError: a setting that would have no effect here.
    """
    for name in SETTINGS_WITHOUT_EFFECT:
        if name in settings:
            raise ValueError(
                f"`{name}` has no effect: rates and schedule follow from the architecture; scale them with "
                f"`lr_fraction`, shape them with `warmup_steps`, `warmdown_fraction` and `final_lr_fraction`"
            )
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    # TRL 1.16 reads the old name of `activation_checkpointing`, transformers 5.23 warns of it.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    training_args.output_dir = str(checkpoint_dir)
    training_args.logging_nan_inf_filter = False  # it would hide a NaN behind the mean of earlier losses
    if training_args.bf16 and training_args.use_cpu and not supports_bf16(torch.device("cpu")):
        print("this CPU is slow in bf16: training in fp32", file=sys.stderr)
        training_args.bf16, training_args.mixed_precision = False, "no"


def stage_optimizer(model: PreTrainedModel, config) -> torch.optim.Optimizer:
    """Muon and AdamW at the architecture's nominal rates times `lr_fraction`; Muon decays only in pretraining."""
    rates = config.learning_rates
    return build_optimizer(model, lr_fraction=config.lr_fraction, weight_decay=0.0, learning_rates=rates)


def stage_schedule(
    optimizer: torch.optim.Optimizer, num_steps: int, warmup_steps: int, config
) -> torch.optim.lr_scheduler.LambdaLR:
    """The factor on the rates over the stage's steps."""
    factor = warmdown_lambda(num_steps, warmup_steps, config.warmdown_fraction, config.final_lr_fraction)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class CurveCallback(TrainerCallback):
    """Writes each logged step to the stage's curve, shows one progress bar, and stops at a loss that is no number."""

    def __init__(self, stage: Stage, figure: str):
        self.stage, self.figure, self.bar, self.seconds = stage, figure, None, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.tokens_before = state.num_input_tokens_seen
        if state.is_world_process_zero:
            # An interrupted session may have logged steps beyond its last checkpoint: they are taken again.
            kept = [line for line in read_curve(self.stage) if line["step"] <= state.global_step > 0]
            self.stage.log_path.unlink(missing_ok=True)
            for line in kept:
                self.stage.log(**line)
            if not args.disable_tqdm:
                self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.stage.name, mininterval=1)

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.started
        control.should_log |= state.global_step == state.max_steps  # no curve without its end
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        figures = {key: float(value) for key, value in logs.items() if isinstance(value, (int, float))}
        if not math.isfinite(figures.get("loss", 0.0)):
            raise FloatingPointError(f"{self.stage.name}: the loss is {figures['loss']} at step {state.global_step}")
        if self.figure not in figures:  # the summary at the end, or an evaluation
            return
        if state.is_world_process_zero:
            self.stage.log(step=state.global_step, **figures)
        if self.bar is not None:
            self.bar.set_postfix({self.figure: f"{figures[self.figure]:.4f}"})

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


class ValidationCallback(TrainerCallback):
    """Scores the model before the first step, every so many steps (0 = never in between) and after the last.

    Args:
        score: gives the figures, among them `val_bpb`, which goes to the stage's curve.
    """

    def __init__(self, stage: Stage, score: Callable[[], dict], every_steps: int):
        self.stage, self.score, self.every_steps = stage, score, every_steps
        self.first: dict = {}
        self.last: dict = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._validate(state)

    def on_step_end(self, args, state, control, **kwargs):
        is_due = self.every_steps and state.global_step % self.every_steps == 0
        if is_due or state.global_step == state.max_steps:
            self._validate(state)

    def _validate(self, state) -> None:
        self.last = self.score()
        self.first = self.first or self.last
        if state.is_world_process_zero:
            self.stage.log(step=state.global_step, val_bpb=self.last["val_bpb"])


def read_curve(stage: Stage) -> list[dict]:
    """The lines logged so far, one dict each."""
    if not stage.log_path.is_file():
        return []
    return [json.loads(line) for line in stage.log_path.read_text().splitlines()]


def train_stage(trainer, stage: Stage, figure: str, *callbacks: TrainerCallback) -> dict:
    """Train, from this stage's newest checkpoint if it was interrupted.

    Args:
        figure: what the progress bar shows and every line of the curve has: `loss`, `reward`.
        callbacks: more of them, called after the curve's own.

    Returns:
        What every record has: steps, tokens, and this session's seconds (of steps alone) and tokens a second.
    """
    curve = CurveCallback(stage, figure)
    for printing in (ProgressCallback, PrinterCallback):  # they would print every log line
        trainer.remove_callback(printing)
    for callback in (curve, *callbacks):
        trainer.add_callback(callback)
    checkpoint = get_last_checkpoint(trainer.args.output_dir)
    if checkpoint is not None:
        print(f"{stage.name}: resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    tokens = int(trainer.state.num_input_tokens_seen)
    return {
        "num_steps": trainer.state.global_step,
        "tokens": tokens,
        "tokens_per_second": (tokens - curve.tokens_before) / curve.seconds,
        "training_seconds": curve.seconds,
        "world_size": trainer.args.world_size,
    }
