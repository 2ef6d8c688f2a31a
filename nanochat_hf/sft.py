"""Midtraining and supervised fine-tuning: one stage on TRL's SFTTrainer, two recipes.

Conversations are encoded here, segment by segment, so that ids and masks are exact; TRL packs, batches and trains.
Midtraining wraps them into one stream and learns every token; SFT packs whole conversations that do not see each
other (`packing_strategy: bfd`) and learns the assistant's tokens only (`assistant_only_loss`).

    accelerate launch --config_file accelerate_configs/cpu.yaml scripts/sft.py --config recipes/tiny/sft.yaml
"""

import shutil
from pathlib import Path

import datasets
import torch
from trl import SFTConfig, SFTTrainer

from .checkpoint import atomic_folder, save_model
from .configs import SFTStageConfig
from .data.conversation_rows import describe_counts, encode_mixture, pack_rows, padded_batches
from .data.conversations import build_mixture
from .evaluation.bpb import evaluate_bpb
from .stage import Stage
from .tokenizer import token_byte_lengths
from .trl_stage import (
    ValidationCallback,
    load_start,
    prepare_arguments,
    read_curve,
    stage_optimizer,
    stage_schedule,
    train_stage,
)


class StageSFTTrainer(SFTTrainer):
    """SFTTrainer with our optimizer, our schedule and the model's own loss.

    TRL's fused head projects masked positions too and computes the head's gradients in fp32 on a CPU, for an entropy
    nobody reads here: it halves the speed of a tiny model.
    """

    def __init__(self, config: SFTStageConfig, **kwargs):
        self.stage_config = config
        super().__init__(**kwargs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        self.optimizer = stage_optimizer(model or self.model, self.stage_config)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> torch.optim.lr_scheduler.LRScheduler:
        warmup_steps = self.args.get_warmup_steps(num_training_steps)
        self.lr_scheduler = stage_schedule(self.optimizer, num_training_steps, warmup_steps, self.stage_config)
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, use_cache=False, skip_logits=True, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        if num_items_in_batch is not None:  # it counts every process's targets, and gradients are averaged over them
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def run_sft(config: SFTStageConfig, training_args: SFTConfig, settings: dict) -> None:
    """Run a midtraining or SFT stage: from `start_from` to `run_dir/stage`, with its record and curve.

    Args:
        config: the stage's own settings.
        training_args: TRL's settings from the same recipe; `assistant_only_loss` chooses the targets.
        settings: what recipe and command line said, for the record.

    Raises:
        ValueError: bad settings, a starting model that is not there, a mixture without a conversation that fits.
    """
    stage = Stage(config.run_dir, config.stage, settings)
    if stage.finished:
        print(f"{config.stage}: finished before, nothing to do")
        return
    checkpoints = Path(config.run_dir) / "checkpoints" / config.stage
    prepare_arguments(training_args, settings, checkpoints)
    # The rows below carry labels already; TRL's flag would ask for raw conversations.
    assistant_only, training_args.assistant_only_loss = training_args.assistant_only_loss, False
    training_args.dataset_kwargs = {"skip_prepare_dataset": True}
    training_args.include_num_input_tokens_seen = "non_padding"

    with stage:
        model, tokenizer = load_start(config.run_dir, config.start_from)
        train, train_counts = load_conversations(config, training_args, tokenizer, "train")
        validation, validation_counts = load_conversations(config, training_args, tokenizer, "test")
        strategy = training_args.packing_strategy if training_args.packing else None
        packing = (training_args.max_length, strategy, assistant_only)
        rows = pack_rows(train, *packing)
        trainer = StageSFTTrainer(
            config,
            model=model,
            args=training_args,
            train_dataset=rows,
            eval_dataset=pack_rows(validation, *packing),
            processing_class=tokenizer,
        )
        validation_curve = ValidationCallback(
            stage, lambda: bits_per_byte(trainer, validation, tokenizer, assistant_only), config.eval_every_steps
        )
        figures = train_stage(trainer, stage, "loss", validation_curve)
        if trainer.is_world_process_zero():
            with atomic_folder(Path(config.run_dir) / config.stage) as partial:
                save_model(trainer.accelerator.unwrap_model(trainer.model), tokenizer, partial)
            shutil.rmtree(checkpoints, ignore_errors=True)
        curve = read_curve(stage)
        stage.results |= {
            "train_mixture": train_counts,
            "validation_mixture": validation_counts,
            "num_rows": len(train),
            "num_packed_rows": len(rows),
            **figures,
            "train_loss": [line["loss"] for line in curve if "loss" in line][-1],
            "val_loss": trainer.evaluate()["eval_loss"],
            **validation_curve.last,
            "min_val_bpb": min(line["val_bpb"] for line in curve if "val_bpb" in line),
            "before": validation_curve.first,
        }


def load_conversations(
    config: SFTStageConfig, training_args: SFTConfig, tokenizer, split: str
) -> tuple[datasets.Dataset, dict]:
    """The stage's mixture, encoded, and its counts, which are printed as well."""
    skipped: dict = {}
    mixture = build_mixture(mixture_sources(config), split, training_args.seed, config.on_bad_row, skipped)
    if split == "test":
        mixture = mixture.select(range(min(len(mixture), config.validation_rows)))
    encoded, counts = encode_mixture(mixture, tokenizer, training_args.max_length, config.overlong)
    counts["skipped_bad"] = sum(count["skipped"] for count in skipped.values())
    print(describe_counts(f"{config.stage}, {split}", counts))
    return encoded, counts


def mixture_sources(config: SFTStageConfig) -> list[dict]:
    """The recipe's sources and those that `chat_data` and `eval_data` add."""
    sources = list(config.mixture)
    if config.chat_data:
        sources.append({"source": "messages", "dataset": config.chat_data, "rows": config.data_rows})
    if config.eval_data:
        for kind, name in (("gsm8k", "gsm8k"), ("arc", "arc_easy"), ("arc", "arc_challenge")):
            dataset = str(Path(config.eval_data) / f"{name}_train.jsonl")
            sources.append({"source": kind, "dataset": dataset, "rows": config.data_rows})
    return sources


def bits_per_byte(trainer: SFTTrainer, encoded: datasets.Dataset, tokenizer, assistant_only: bool) -> dict:
    """Bits per byte of conversations, each alone in its row.

    `val_bpb` is over this stage's targets; `val_bpb_assistant` and `val_bpb_all` compare between stages.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    byte_lengths = token_byte_lengths(tokenizer).to(model.device)
    model.eval()
    figures = {}
    with trainer.accelerator.autocast():
        for name in ("assistant", "all"):
            batches = padded_batches(encoded, tokenizer.pad_token_id, name == "assistant", model.device)
            figures[f"val_bpb_{name}"] = evaluate_bpb(model, batches, byte_lengths)
    model.train()
    return {"val_bpb": figures["val_bpb_assistant" if assistant_only else "val_bpb_all"], **figures}
