"""Pretraining: our step, compiled or not, beside a plain eager fp32 loop and a bare PyTorch loop.

Every side starts from the same weights and takes the same batches of random tokens through the same optimizer:

- plain: eager, fp32, whole logits, `F.cross_entropy`: what one writes first, and what the speedups divide by
- bare: our model, precision, fused loss and optimizer in a loop without Accelerate
- eager, compiled: the step that `scripts/pretrain.py` takes, without and with torch.compile
- fp8: the compiled step with the layers' matrices in fp8, on a GPU that has it, when asked for

On a GPU the bare loop is compiled, as real runs are; on a CPU that comparison is worth no second compilation.

    python scripts/benchmark.py pretrain --depth 4 --output pretrain.json
    python scripts/benchmark.py pretrain --depth 20 --head_dim 128 --window_pattern SSSL --sequence_length 2048 \
        --device_batch_size 16 --vocab_size 65536 --num_batches 16 --sides bare compiled
"""

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain, repeat
from statistics import median

import torch

from .. import NanoChatHFConfig, NanoChatHFForCausalLM
from ..attention import use_row_attention
from ..configs import PretrainBenchmarkConfig
from ..fp8 import convert_to_fp8
from ..hardware import peak_flops, supports_bf16
from ..optim import MAX_GRAD_NORM, MuonAdamW, Schedule, build_optimizer
from ..scaling import ScalingPlan
from ..training_step import TrainingStep, make_accelerator
from .memory import PeakMemory

CONFIG = PretrainBenchmarkConfig
NUM_WARMUP_STEPS = 2
MAX_LOSS_DIFFERENCE = 0.05  # nats: beyond, the sides do not do the same work
SIDES = ("plain", "bare", "eager", "compiled", "fp8")
PARTS = ("data", "forward", "backward", "optimizer")
TakeStep = Callable[[Iterator[dict], int], float]


class Side:
    """One loop of the comparison, with a model of its own.

    Args:
        take_step: of the batches still to come and the step's number; returns the loss.
        device: where it runs.
    """

    def __init__(self, take_step: TakeStep, batches: list[dict], device: torch.device):
        self.take_step, self.device = take_step, device
        self.batches = iter(batches)
        self.losses: list[float] = []
        self.round_seconds: list[float] = []
        self.first_seconds = 0.0
        self.part_seconds: dict[str, float] = {}
        self.memory: dict[str, float] = {}

    def run(self, num_steps: int) -> float:
        """Take steps; returns seconds, the device's work included."""
        self.wait()
        started = time.perf_counter()
        for _ in range(num_steps):
            self.losses.append(self.take_step(self.batches, len(self.losses)))
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def run_with_clock(self, step: TrainingStep, num_steps: int) -> None:
        """Take steps with a clock that waits for the device after each part, which is why this round does not count."""
        seconds, last = defaultdict(float), [0.0]

        def lap(part: str) -> None:
            self.wait()
            now = time.perf_counter()
            seconds[part] += now - last[0]
            last[0] = now

        step.lap = lap
        last[0] = started = time.perf_counter()
        self.run(num_steps)
        whole = time.perf_counter() - started
        del step.lap
        self.part_seconds = {part: seconds[part] / num_steps for part in PARTS}
        self.part_seconds["other"] = whole / num_steps - sum(self.part_seconds.values())


def bare_step(
    model: torch.nn.Module, optimizer: MuonAdamW, schedule: Schedule, num_batches: int, is_plain: bool
) -> TakeStep:
    """A loop by torch alone: what our step does, or `is_plain`, in eager fp32 with whole logits."""
    device = next(model.parameters()).device
    forward = torch.compile(model) if device.type == "cuda" and not is_plain else model
    has_autocast = supports_bf16(device) and not is_plain

    def take_step(batches: Iterator[dict], step: int) -> float:
        schedule.apply(optimizer, step)
        total = 0.0
        with torch.autocast(device.type, torch.bfloat16) if has_autocast else nullcontext():
            for _ in range(num_batches):
                loss = forward(**next(batches), use_cache=False, skip_logits=not is_plain).loss / num_batches
                with torch.autocast(device.type, enabled=False):
                    loss.backward()
                total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return take_step


def run(config: PretrainBenchmarkConfig) -> tuple[dict, str]:
    """Measure all sides; returns the figures and their table."""
    if min(config.steps, config.rounds, config.num_batches) < 1:
        raise ValueError(
            f"steps={config.steps}, rounds={config.rounds}, num_batches={config.num_batches} must be 1 or more"
        )
    if unknown := set(config.sides) - set(SIDES):
        raise ValueError(f"sides are some of {', '.join(SIDES)}; got {', '.join(sorted(unknown))}")
    accelerator = make_accelerator()
    device = accelerator.device
    tokens = config.num_batches * config.device_batch_size * config.sequence_length
    num_steps = NUM_WARMUP_STEPS + config.steps * (config.rounds + 1)
    plan = ScalingPlan.from_depth(
        config.depth, config.vocab_size, config.sequence_length, architecture=config.architecture,
        head_dim=config.head_dim, window_pattern=config.window_pattern, total_batch_tokens=tokens, num_steps=num_steps,
    )  # fmt: skip
    shape = num_steps * config.num_batches, config.device_batch_size, config.sequence_length + 1
    rows = torch.randint(config.vocab_size, shape)
    batches = [{"input_ids": row[:, :-1].to(device), "shift_labels": row[:, 1:].to(device)} for row in rows]

    def take_step_of(side: str) -> TakeStep:
        torch.manual_seed(0)
        model = NanoChatHFForCausalLM(
            NanoChatHFConfig(
                architecture=config.architecture, vocab_size=plan.vocab_size, hidden_size=plan.hidden_size,
                num_hidden_layers=plan.depth, num_attention_heads=plan.num_heads,
                max_position_embeddings=plan.sequence_length, window_pattern=config.window_pattern,
                bos_token_id=0, eos_token_id=1, pad_token_id=0,
            )
        ).to(device)  # fmt: skip
        is_plain = side == "plain"
        if not is_plain:
            use_row_attention(model)
        if side == "fp8":
            convert_to_fp8(model, device)
        optimizer = build_optimizer(
            model, plan.lr_scale, weight_decay=plan.weight_decay, dtype=torch.float32 if is_plain else None,
            max_grad_norm=MAX_GRAD_NORM[config.architecture],
        )  # fmt: skip
        parts = model, optimizer, Schedule(config.architecture, num_steps), config.num_batches
        if side in ("plain", "bare"):
            return bare_step(*parts, is_plain)
        return TrainingStep(accelerator, *parts, should_compile=side != "eager")

    sides = {side: Side(take_step_of(side), batches, device) for side in SIDES if side in config.sides}
    measure(sides, config)

    figures = {name: side_figures(side, config.steps * tokens, plan) for name, side in sides.items()}
    speeds = {name: figure["tokens_per_second"] for name, figure in figures.items()}
    ours = "compiled" if device.type == "cuda" else "eager"
    results = {
        "speedup": ratio(speeds, "compiled", "plain"),
        "speedup_eager": ratio(speeds, "eager", "plain"),
        "speedup_over_bare": ratio(speeds, ours, "bare"),
        "loss_difference": max(max(each) - min(each) for each in zip(*(s.losses for s in sides.values()), strict=True)),
        "compile_seconds": figures.get("compiled", {}).get("compile_seconds"),
        "tokens_per_step": tokens,
        "num_parameters": plan.num_parameters,
        "flops_per_token": plan.flops_per_token,
        "sides": figures,
    }
    return results, table(results, ours)


def measure(sides: dict[str, Side], config: PretrainBenchmarkConfig) -> None:
    """Warm up, then rounds in which every side takes its turn, then memory and the split of the time."""
    for side in sides.values():
        side.first_seconds = side.run(1)
        side.run(NUM_WARMUP_STEPS - 1)
    gc.collect()
    names = list(sides)
    for i in range(config.rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            sides[name].round_seconds.append(sides[name].run(config.steps))
    for side in sides.values():
        memory = PeakMemory(side.device)
        if isinstance(side.take_step, TrainingStep):
            side.run_with_clock(side.take_step, config.steps)
        else:
            side.run(config.steps)
        side.memory = memory.read()


def side_figures(side: Side, tokens_a_round: int, plan: ScalingPlan) -> dict:
    seconds = median(side.round_seconds)
    speed, peak = tokens_a_round / seconds, peak_flops(side.device)
    num_steps = tokens_a_round / plan.total_batch_tokens
    return {
        "tokens_per_second": speed,
        "tokens_per_second_by_round": [tokens_a_round / s for s in side.round_seconds],
        "flops_per_second": speed * plan.flops_per_token,
        "mfu": speed * plan.flops_per_token / peak if peak else None,
        "compile_seconds": side.first_seconds - seconds / num_steps,
        "step_seconds": seconds / num_steps,
        "seconds_by_part": side.part_seconds,
        **side.memory,
        "losses": side.losses,
    }


def ratio(speeds: dict[str, float], one: str, other: str) -> float | None:
    return speeds[one] / speeds[other] if one in speeds and other in speeds else None


def table(results: dict, ours: str) -> str:
    """The figures as Markdown."""
    head = ["", "tok/s", "MFU", "GFLOP/s", "peak MiB", "step MiB", *chain(PARTS, ["other"]), "loss"]
    lines = [head, ["---"] + ["--:" for _ in head[1:]]]
    for name, side in results["sides"].items():
        split = side["seconds_by_part"]
        whole = sum(split.values())
        lines.append(
            [
                name,
                f"{side['tokens_per_second']:,.0f}",
                f"{side['mfu']:.1%}" if side["mfu"] else "-",
                f"{side['flops_per_second'] / 1e9:,.0f}",
                f"{side['peak_memory_mib']:,.0f}",
                f"{side['step_memory_mib']:,.0f}",
                *([f"{seconds / whole:.1%}" for seconds in split.values()] or repeat("-", 5)),
                f"{side['losses'][-1]:.4f}",
            ]
        )
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    shown = [
        ("compiled over plain", results["speedup"], "x"),
        ("eager over plain", results["speedup_eager"], "x"),
        (f"{ours} over bare", results["speedup_over_bare"], "x"),
        ("largest difference of a step's loss", results["loss_difference"], f" nats (at most {MAX_LOSS_DIFFERENCE})"),
        ("compile time", results["compile_seconds"], " s"),
    ]
    lines = [f"{what}: {value:.4g}{unit}" for what, value, unit in shown if value is not None]
    return text + "\n\n" + "\n".join(lines) + "\nstep MiB: what a step needs beside weights and optimizer state"
