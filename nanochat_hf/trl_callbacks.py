"""What is written while a stage on TRL trains: its curve, its progress bar, its scores before, during and after."""

import json
import math
import time
from collections.abc import Callable

from tqdm.auto import tqdm
from transformers import TrainerCallback

from .stage import Stage


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


class ScoreCallback(TrainerCallback):
    """Scores the model every so many steps (0 = never in between) and after the last; and before the first step.

    Args:
        score: gives what goes to the stage's curve: figures, and perhaps texts. Called by every process.
        mark: a key that every answer of `score` has; it tells its lines in the curve from other lines.
        at_start: whether it is called before the first step, too.

    Attributes:
        first: the answer before the first step, of this session or of the one that began the stage.
        last: the newest answer.
    """

    def __init__(self, stage: Stage, score: Callable[[], dict], mark: str, every_steps: int, at_start: bool = True):
        self.stage, self.score, self.mark = stage, score, mark
        self.every_steps, self.at_start = every_steps, at_start
        self.first: dict = {}
        self.last: dict = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0 and self.at_start:
            self._score(state)
            self.first = self.last
        elif found := [line for line in read_curve(self.stage) if self.mark in line]:
            self.first = {key: value for key, value in found[0].items() if key != "step"}
            self.last = {key: value for key, value in found[-1].items() if key != "step"}

    def on_step_end(self, args, state, control, **kwargs):
        is_due = self.every_steps and state.global_step % self.every_steps == 0
        if is_due or state.global_step == state.max_steps:
            self._score(state)

    def _score(self, state) -> None:
        self.last = self.score()
        if state.is_world_process_zero:
            self.stage.log(step=state.global_step, **self.last)


def read_curve(stage: Stage) -> list[dict]:
    """The lines logged so far, one dict each; a last line that a kill cut short is left out."""
    if not stage.log_path.is_file():
        return []
    lines = []
    for line in stage.log_path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
