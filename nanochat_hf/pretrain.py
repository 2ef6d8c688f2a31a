"""Pretraining: text rows in, a base model out, by a plain loop on Accelerate.

Not Trainer: the loop is what this project is about, so it is written to be read. One step is `total_batch_tokens`
whatever the number of devices; schedules, data position and weights resume exactly from `<run_dir>/checkpoints/base`.

    accelerate launch --config_file accelerate_configs/cpu.yaml scripts/pretrain.py --config recipes/tiny/pretrain.yaml
"""

import math
import signal
import time
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from . import NanoChatHFForCausalLM
from .attention import cached_attention
from .checkpoint import atomic_folder, save_model
from .configs import PretrainConfig
from .data.batches import BatchesAhead
from .data.corpus import load_corpus
from .data.packing import PackedDataset
from .evaluation.bpb import evaluate_bpb
from .evaluation.samples import sample_prompts
from .fsdp import load_whole_state, wants_fsdp, whole_model
from .hardware import Throughput
from .optim import MAX_GRAD_NORM, Schedule, build_optimizer
from .optim_state import save_optimizer_state
from .pretrain_checkpoint import Checkpoints, rewind_log
from .pretrain_estimate import describe_plan
from .pretrain_model import build_model
from .pretrain_plan import accumulation_steps, planned_vocab_size, scaling_plan
from .stage import Stage
from .tokenizer import load_tokenizer, token_byte_lengths
from .training_step import TrainingStep, make_accelerator

MAX_SKIPPED_STEPS = 3  # losses in a row that are not finite before the run gives up


def pretrain(config: PretrainConfig, settings: dict) -> None:
    """Train a base model into `<run_dir>/base`, with the records `base` and `base_loss`.

    Args:
        config: the recipe.
        settings: what was said explicitly, for the record.

    Raises:
        ValueError: settings that do not fit together, or a run folder of another recipe; before any work is done.
    """
    folder = Path(config.run_dir) / "tokenizer"
    if config.plan:
        print(describe_plan(config, planned_vocab_size(config, folder)))
        return
    stage = Stage(config.run_dir, "base", settings)
    if stage.finished:
        print("base: finished before, nothing to do")
        return
    planned_vocab_size(config, folder)
    tokenizer = load_tokenizer(folder)
    run = Pretraining(config, stage, tokenizer)
    with stage:
        run.train()
        run.finish()


class Pretraining:
    """A pretraining run: what is built once, and the loop.

    Args:
        config: the recipe.
        stage: the record to fill.
        tokenizer: of the run's tokenizer stage.
    """

    def __init__(self, config: PretrainConfig, stage: Stage, tokenizer):
        self.config, self.stage, self.tokenizer = config, stage, tokenizer
        self.plan = scaling_plan(config, len(tokenizer))
        self.accelerator = make_accelerator(log_with=config.tracker, project_dir=config.run_dir)
        num_batches = accumulation_steps(self.plan, config, self.accelerator.num_processes)
        set_seed(config.seed)
        self.model, should_compile = build_model(self.plan, config, tokenizer, self.accelerator)
        # Muon's decay and the batch's learning-rate scale come from the plan.
        self.optimizer = build_optimizer(
            self.model,
            self.plan.lr_scale,
            weight_decay=self.plan.weight_decay,
            learning_rates=config.learning_rates,
            max_grad_norm=MAX_GRAD_NORM[config.architecture],
            shares_work=self.accelerator.num_processes > 1,
        )
        schedule = Schedule(config.architecture, self.plan.num_steps)
        self.take_step = TrainingStep(
            self.accelerator, self.model, self.optimizer, schedule, num_batches, should_compile
        )
        self.dataset = self.rows("train")
        self.byte_lengths = token_byte_lengths(tokenizer).to(self.accelerator.device)
        folder = Path(config.run_dir) / "checkpoints" / "base"
        self.checkpoints = Checkpoints(self.accelerator, folder, config.save_total_limit)
        self.throughput = Throughput(self.plan, self.accelerator.device, self.accelerator.num_processes)
        if config.core_every_steps:
            from .evaluation.core_score import core_scorer  # lm-eval takes seconds to import, and few runs need it

            self.core_of = core_scorer(Path(config.run_dir) / "tokenizer", config.core_max_per_task, self.accelerator)
        self.step, self.seconds_before, self.waiting_batches = 0, 0.0, []
        self.validations: list[float] = []
        self._validation_batches: list[dict] | None = None

    def rows(self, split: str) -> PackedDataset:
        """This process's rows of a split: training repeats for ever, and so does validation when it is short."""
        corpus = load_corpus(
            self.config.dataset,
            split,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            epochs=None,
            num_shards=self.config.num_shards,
            on_bad_shard=self.config.on_bad_shard,
        )
        packing = "best_fit" if self.config.architecture == "2026-07" else "flat"
        return PackedDataset(corpus, self.tokenizer, self.config.sequence_length, packing=packing)

    def train(self) -> None:
        """The loop: resume, then evaluate, save and step until the plan is done."""
        config, plan = self.config, self.plan
        self.resume()
        if config.tracker:
            self.accelerator.init_trackers("nanochat-hf", config=vars(config))
        previous_handlers = {s: signal.signal(s, self.request_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        is_silent = not self.accelerator.is_main_process
        bar = tqdm(total=plan.num_steps, initial=self.step, desc="base", disable=is_silent, mininterval=1)
        num_batches = (plan.num_steps - self.step) * self.take_step.num_batches
        device = self.accelerator.device
        self.batches = BatchesAhead(
            self.dataset, config.device_batch_size, device, num_batches, waiting=self.waiting_batches
        )
        self.model.train()
        num_bad = 0
        while self.step < plan.num_steps:
            if self.step == 0 or (config.eval_every_steps and self.step % config.eval_every_steps == 0):
                self.validate()
            if self.step and config.core_every_steps and self.step % config.core_every_steps == 0:
                self.score_core()
            started = time.perf_counter()
            loss = self.take_step(self.batches, self.step)
            self.step += 1
            self.throughput.count_step(time.perf_counter() - started)
            num_bad = 0 if math.isfinite(loss) else num_bad + 1
            if num_bad == MAX_SKIPPED_STEPS:
                raise FloatingPointError(
                    f"the loss was not finite in {num_bad} steps in a row, the last is {self.step}; the newest "
                    f"checkpoint in {self.checkpoints.folder} is from before: lower the learning rates and run again"
                )
            self.report_step(loss, bar)
            if config.save_every_steps and (self.step % config.save_every_steps == 0 or self.step == plan.num_steps):
                self.save_checkpoint()  # before the validation of this step
            if self.take_step.is_stopping:
                self.save_checkpoint()
                raise KeyboardInterrupt(f"stopped at step {self.step}; run the same command again to resume there")
        self.validate()
        if config.core_every_steps:
            self.score_core()
        bar.close()
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)

    def report_step(self, loss: float, bar: tqdm) -> None:
        """Progress bar every step; the curve every `log_every_steps`."""
        bar.update(1)
        throughput, mfu = self.throughput.tokens_per_second, self.throughput.mfu
        bar.set_postfix_str(f"loss {loss:.4f}, {throughput:,.0f} tok/s" + (f", MFU {mfu:.1%}" if mfu else ""))
        if self.step % self.config.log_every_steps == 0 or self.step == self.plan.num_steps:
            factor = self.take_step.schedule.lr_factor(self.step - 1)
            tokens = self.step * self.plan.total_batch_tokens
            self.log(step=self.step, tokens=tokens, loss=loss, lr_factor=factor, tokens_per_second=throughput)

    def log(self, **figures) -> None:
        """A line of the curve, on the main process, and to the tracker if there is one."""
        if self.accelerator.is_main_process:
            self.stage.log(**figures)
        if self.config.tracker:
            self.accelerator.log({k: v for k, v in figures.items() if k != "step"}, step=figures["step"])

    def score(self, batches: list[dict]) -> float:
        """Bits per byte of the model as it is, over all processes."""
        self.model.eval()
        with self.accelerator.autocast():
            bpb = evaluate_bpb(self.model, batches, self.byte_lengths)
        self.model.train()
        return bpb

    def validation_batches(self, split: str = "validation") -> list[dict]:
        """The same rows at every call: `eval_tokens` tokens from the beginning of a split."""
        batch_tokens = self.config.device_batch_size * self.config.sequence_length * self.accelerator.num_processes
        count = max(1, self.config.eval_tokens // batch_tokens)
        rows = DataLoader(self.rows(split), self.config.device_batch_size)
        return [batch for batch, _ in zip(rows, range(count), strict=False)]

    def validate(self) -> None:
        """Bits per byte on validation, and the samples when they are due."""
        if self._validation_batches is None:
            self._validation_batches = self.validation_batches()
        self.validations.append(self.score(self._validation_batches))
        self.log(step=self.step, val_bpb=self.validations[-1])
        if self.accelerator.is_main_process:
            tqdm.write(f"step {self.step:,}: validation {self.validations[-1]:.4f} bits per byte")
        every = self.config.sample_every_steps
        if every and self.step % every == 0 and 0 < self.step < self.plan.num_steps:
            self.accelerator.print(*self.samples(), sep="\n")

    def score_core(self) -> None:
        """CORE of the model as it is, on the curve."""
        core = self.core_of(self.model, self.tokenizer)
        self.log(step=self.step, core=core)
        self.accelerator.print(f"step {self.step:,}: CORE {core:.4f}")

    def samples(self) -> list[str]:
        """The seven prompts, continued greedily, on the main process; a model in pieces needs all of them."""
        if not (self.accelerator.is_main_process or wants_fsdp(self.accelerator)):
            return []
        self.model.eval()
        with cached_attention(self.model), self.accelerator.autocast():  # FSDP2's layers speak bf16
            texts = sample_prompts(self.model, self.tokenizer)
        self.model.train()
        return texts

    def request_stop(self, signal_number: int, frame) -> None:
        """SIGTERM or Ctrl-C: finish the step, save, stop; all processes after the same step."""
        self.take_step.stop_requested = True

    def save_checkpoint(self) -> None:
        """Write a resumable checkpoint."""
        state = {
            "step": self.step,
            "seconds": self.seconds_before + time.time() - self.stage.started,
            "num_skipped": self.take_step.num_skipped,
            "validations": self.validations,
            "optimizer": self.optimizer.state_dict(),
            "data": self.batches.state_dict(),
        }
        self.checkpoints.save(self.step, whole_model(self.model), self.tokenizer, state)

    def resume(self) -> None:
        """Continue from the newest checkpoint of this run, if there is one."""
        if found := self.checkpoints.load_last():
            folder, state = found
            saved = NanoChatHFForCausalLM.from_pretrained(folder, dtype=torch.float32)
            load_whole_state(self.model, saved.state_dict())
            self.optimizer.load_state_dict(state["optimizer"])
            self.dataset.load_state_dict(state["data"]["dataset"])
            self.waiting_batches = state["data"]["waiting"]
            self.step, self.take_step.num_skipped = state["step"], state["num_skipped"]
            self.validations, self.seconds_before = state["validations"], state["seconds"]
            self.accelerator.print(f"base: resuming at step {self.step} from {folder}")
        if self.accelerator.is_main_process:
            rewind_log(self.stage.log_path, self.step)

    def finish(self) -> None:
        """Write the model folder, the losses on both splits, the samples, and fill the record."""
        run_dir, plan = Path(self.config.run_dir), self.plan
        model = whole_model(self.model)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.accelerator.is_main_process:
            with atomic_folder(run_dir / "base") as folder:
                save_model(model, self.tokenizer, folder)
        if self.config.keep_optimizer_state:
            self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
            rank = self.accelerator.process_index
            save_optimizer_state(self.optimizer, self.model, self.checkpoints.folder, rank)
        train_bpb = self.score(self.validation_batches("train"))
        losses = Stage(run_dir, "base_loss", {})
        with losses:
            losses.results |= {"train_bpb": train_bpb, "val_bpb": self.validations[-1], "samples": self.samples()}
        self.stage.results |= {
            "num_parameters": plan.num_parameters,
            "parameters": plan.parameters,
            "flops_per_token": plan.flops_per_token,
            "num_steps": plan.num_steps,
            "tokens": plan.num_tokens,
            "tokens_per_parameter": plan.num_tokens / plan.scaling_parameters,
            "total_batch_tokens": plan.total_batch_tokens,
            **self.take_step.settings(),
            "world_size": self.accelerator.num_processes,
            "untrained_val_bpb": self.validations[0],
            "min_val_bpb": min(self.validations),
            "val_bpb": self.validations[-1],
            "mfu": self.throughput.mfu,
            "total_flops": plan.total_flops,
            "training_seconds": self.throughput.seconds_of(plan.num_tokens),
            "tokens_per_second": self.throughput.tokens_per_second,
            "num_skipped_steps": self.take_step.num_skipped,
            "num_documents": self.dataset.num_documents,
            "num_dropped_tokens": self.dataset.num_dropped_tokens,
            "num_skipped_shards": self.dataset.num_skipped_shards,
            "seconds_before_resume": self.seconds_before,
        }
