"""Midtraining and supervised fine-tuning: one stage on TRL's SFTTrainer, two recipes.

Conversations are encoded here, segment by segment, so that ids and masks are exact; TRL packs, batches and trains.
Midtraining wraps them into one stream and learns every token; SFT packs whole conversations that do not see each
other (`packing_strategy: bfd`) and learns the assistant's tokens only (`assistant_only_loss`).

    accelerate launch --config_file accelerate_configs/cpu.yaml scripts/sft.py --config recipes/tiny/sft.yaml
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from trl import SFTConfig, SFTTrainer, pack_dataset

from .checkpoint import atomic_folder, save_model
from .configs import SFTStageConfig
from .data.conversations import build_mixture
from .evaluation.bpb import evaluate_bpb
from .stage import Stage
from .tokenizer import encode_conversation, token_byte_lengths
from .trl_stage import load_start, prepare_arguments, stage_optimizer, stage_schedule, train_stage, use_curve


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
        rows = pack_rows(train, training_args, assistant_only)
        trainer = StageSFTTrainer(
            config,
            model=model,
            args=training_args,
            train_dataset=rows,
            eval_dataset=pack_rows(validation, training_args, assistant_only),
            processing_class=tokenizer,
        )
        curve = use_curve(trainer, stage, "loss")
        before = bits_per_byte(trainer, validation, tokenizer, assistant_only)
        started = time.time()
        train_stage(trainer, stage)
        seconds = time.time() - started
        tokens = int(trainer.state.num_input_tokens_seen)
        stage.results |= {
            "train_mixture": train_counts,
            "validation_mixture": validation_counts,
            "num_rows": len(train),
            "num_packed_rows": len(rows),
            "num_steps": trainer.state.global_step,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "training_seconds": seconds,
            "train_loss": curve[-1]["loss"],
            "val_loss": trainer.evaluate()["eval_loss"],
            **bits_per_byte(trainer, validation, tokenizer, assistant_only),
            "before": before,
        }
        if trainer.is_world_process_zero():
            with atomic_folder(Path(config.run_dir) / config.stage) as partial:
                save_model(trainer.accelerator.unwrap_model(trainer.model), tokenizer, partial)
            shutil.rmtree(checkpoints, ignore_errors=True)


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
    """The recipe's sources and those that `chat_data` and `eval_data` add.

    Raises:
        ValueError: `eval_data` without the files that are looked for.
    """
    sources = list(config.mixture)
    if config.chat_data:
        sources.append({"source": "messages", "dataset": config.chat_data, "rows": config.data_rows})
    if config.eval_data:
        for kind, name in (("gsm8k", "gsm8k"), ("arc", "arc_easy"), ("arc", "arc_challenge")):
            dataset = str(Path(config.eval_data) / f"{name}_train.jsonl")
            sources.append({"source": kind, "dataset": dataset, "rows": config.data_rows})
    return sources


def encode_mixture(
    mixture: datasets.Dataset, tokenizer, max_tokens: int, overlong: str
) -> tuple[datasets.Dataset, dict]:
    """Encode conversations exactly and keep those that can be learned from.

    Args:
        mixture: columns `messages` and `source`.
        max_tokens: longest conversation that fits a row.
        overlong: `truncate` longer ones to `max_tokens`, or `drop` them.

    Returns:
        Columns `input_ids`, `labels` (the assistant's tokens, else -100) and `source`; and the counts: rows and tokens
        per source, truncated, dropped for length, dropped because no target was left (they could only give NaN).

    Raises:
        ValueError: a conversation that cannot be encoded (with its number), or none left to learn from.
    """

    def encode(row: dict, index: int) -> dict:
        try:
            ids, mask = encode_conversation(tokenizer, row["messages"])
        except ValueError as error:
            raise ValueError(f"row {index} of the mixture (source {row['source']}): {error}") from error
        labels = [token if trained else -100 for token, trained in zip(ids, mask, strict=True)][:max_tokens]
        return {
            "input_ids": ids[:max_tokens],
            "labels": labels,
            "overlong": len(ids) > max_tokens,
            "has_target": any(label != -100 for label in labels[1:]),  # nothing predicts a row's first token
        }

    encoded = mixture.map(encode, with_indices=True, remove_columns=["messages"])
    is_overlong, has_target = np.array(encoded["overlong"], bool), np.array(encoded["has_target"], bool)
    is_dropped = is_overlong & (overlong == "drop")
    kept = encoded.select(np.flatnonzero(has_target & ~is_dropped)).remove_columns(["overlong", "has_target"])
    if len(kept) == 0:
        raise ValueError(
            f"no conversation is left of {len(mixture)}: {int(is_dropped.sum())} were dropped as longer than "
            f"max_length={max_tokens}, the others have no assistant token within it; raise max_length"
        )
    lengths = np.array([len(ids) for ids in kept["input_ids"]])
    sources = np.array(kept["source"])
    counts = {
        "rows": {name: int((sources == name).sum()) for name in sorted(set(sources))},
        "tokens": {name: int(lengths[sources == name].sum()) for name in sorted(set(sources))},
        "truncated": int((is_overlong & has_target & ~is_dropped).sum()),
        "dropped_overlong": int(is_dropped.sum()),
        "dropped_without_target": int((~has_target & ~is_dropped).sum()),
    }
    return kept, counts


def describe_counts(title: str, counts: dict) -> str:
    """The mixture as a small table: rows, tokens and token share per source, then what was cut or dropped."""
    total = sum(counts["tokens"].values())
    lines = [f"{title}: {sum(counts['rows'].values()):,} conversations, {total:,} tokens"]
    for name, num_rows in counts["rows"].items():
        tokens = counts["tokens"][name]
        lines.append(f"  {name:<18}{num_rows:>8,} rows {tokens:>12,} tokens {tokens / total:>7.1%}")
    lines.append(
        f"  truncated {counts['truncated']}; dropped: {counts['dropped_overlong']} too long, "
        f"{counts['dropped_without_target']} without a target, {counts['skipped_bad']} bad"
    )
    return "\n".join(lines)


def pack_rows(encoded: datasets.Dataset, training_args: SFTConfig, assistant_only: bool) -> datasets.Dataset:
    """Rows as TRL's collator takes them: packed if the recipe packs; without `labels` every token is a target."""
    rows = encoded.select_columns(["input_ids", "labels"] if assistant_only else ["input_ids"])
    if training_args.packing:
        rows = pack_dataset(rows, training_args.max_length, training_args.packing_strategy)
        # The last row of a wrapped stream may be a single token, which predicts nothing.
        rows = rows.select(np.flatnonzero([len(ids) > 1 for ids in rows["input_ids"]]))
    return rows


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


def padded_batches(
    encoded: datasets.Dataset, pad_token_id: int, assistant_only: bool, device, batch_size: int = 16
) -> Iterator[dict[str, torch.Tensor]]:
    """Right-padded batches (B, T) of whole conversations, longest first, with `shift_labels` for `evaluate_bpb`."""
    rows = sorted(encoded, key=lambda row: -len(row["input_ids"]))
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        width = len(chunk[0]["input_ids"])
        input_ids = torch.full((len(chunk), width), pad_token_id)
        shift_labels = torch.full((len(chunk), width), -100)
        attention_mask = torch.zeros((len(chunk), width), dtype=torch.long)
        for i, row in enumerate(chunk):
            ids, labels = row["input_ids"], row["labels"] if assistant_only else row["input_ids"]
            input_ids[i, : len(ids)] = torch.tensor(ids)
            shift_labels[i, : len(ids) - 1] = torch.tensor(labels[1:])
            attention_mask[i, : len(ids)] = 1
        yield {
            "input_ids": input_ids.to(device),
            "shift_labels": shift_labels.to(device),
            "attention_mask": attention_mask.to(device),
        }
