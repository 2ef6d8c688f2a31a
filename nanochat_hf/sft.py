"""Midtraining and supervised fine-tuning: one stage on TRL's SFTTrainer, recipes of both nanochat generations.

Conversations are encoded here, segment by segment, so that ids and masks are exact; TRL batches and trains.

- midtraining (2025-10): `packing_strategy: wrapped`, one stream, every token a target
- SFT (2025-10): `packing: false`, one conversation a row, padded; or `packing_strategy: bfd`, whole conversations that
  do not see each other. `assistant_only_loss`: the assistant's tokens are the targets
- the one stage of 2026-07: `best_fit_packing` and `keep_optimizer_state`

    accelerate launch --config_file accelerate_configs/cpu.yaml scripts/sft.py --config recipes/tiny/sft.yaml
"""

from functools import partial
from pathlib import Path

import datasets
import torch
from trl import SFTConfig, SFTTrainer

from .chat_templates import encode_with_template, set_chat_template
from .configs_post_training import SFTStageConfig
from .data.conversation_rows import describe_counts, encode_mixture, pack_rows, padded_batches
from .data.conversations import build_mixture
from .evaluation.bpb import evaluate_bpb
from .evaluation.samples import answer_questions
from .optim_state import load_optimizer_state
from .stage import Stage
from .tokenizer import encode_conversation, token_byte_lengths
from .trl_callbacks import ScoreCallback, read_curve
from .trl_stage import StageOptimizer, load_start, lora_config, prepare_arguments, save_stage, train_stage


class StageSFTTrainer(StageOptimizer, SFTTrainer):
    """SFTTrainer with our optimizer, our schedule and the model's own loss.

    TRL's fused head projects masked positions too and computes the head's gradients in fp32 on a CPU, for an entropy
    nobody reads here: it halves the speed of a tiny model.
    """

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.stage_config.keep_optimizer_state:
            folder = Path(self.stage_config.run_dir) / "checkpoints" / self.stage_config.start_from
            load_optimizer_state(optimizer, self.model, folder)
        return optimizer

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
    check_settings(config, training_args)
    prepare_arguments(config, training_args, settings, Path(config.run_dir) / "checkpoints" / config.stage)
    # The rows below carry labels already; TRL's flag would ask for raw conversations.
    assistant_only, training_args.assistant_only_loss = training_args.assistant_only_loss, False
    training_args.dataset_kwargs = {"skip_prepare_dataset": True}
    training_args.include_num_input_tokens_seen = "non_padding"
    strategy = training_args.packing_strategy if training_args.packing else None
    packing = (training_args.max_length, "best_fit" if config.best_fit_packing else strategy, assistant_only)

    with stage:
        model, tokenizer = load_start(config.run_dir, config.start_from)
        if config.chat_template:
            set_chat_template(tokenizer, config.chat_template)
        train, train_counts = load_conversations(config, training_args, tokenizer, "train")
        validation, validation_counts = load_conversations(config, training_args, tokenizer, "test")
        rows = pack_rows(train, *packing)
        trainer = StageSFTTrainer(
            config,
            model=model,
            args=training_args,
            train_dataset=rows,
            eval_dataset=pack_rows(validation, *packing),
            processing_class=tokenizer,
            peft_config=lora_config(config),
        )
        validate = partial(score, trainer, validation, tokenizer, assistant_only)
        validation_curve = ScoreCallback(stage, validate, "val_bpb", config.eval_every_steps)
        callbacks = [validation_curve]
        if config.chatcore_every_steps:
            chatcore = partial(sample_chat_score, trainer, tokenizer)
            callbacks.append(ScoreCallback(stage, chatcore, "chatcore", config.chatcore_every_steps, at_start=False))
        figures = train_stage(trainer, stage, "loss", *callbacks)
        save_stage(trainer, tokenizer, config.run_dir, config.stage)
        curve = read_curve(stage)
        stage.results |= {
            "train_mixture": train_counts,
            "validation_mixture": validation_counts,
            "num_rows": len(train),
            "num_packed_rows": len(rows),
            **figures,
            "train_loss": [line["loss"] for line in curve if "loss" in line][-1],
            "val_loss": trainer.evaluate()["eval_loss"],
            **{key: value for callback in callbacks for key, value in callback.last.items() if key != "chats"},
            "min_val_bpb": min(line["val_bpb"] for line in curve if "val_bpb" in line),
            "before": {key: value for key, value in validation_curve.first.items() if key != "chats"},
        }
        before, after = validation_curve.first["val_bpb"], validation_curve.last["val_bpb"]
        print(f"{config.stage}: {before:.4f} -> {after:.4f} bits per byte of the targets in held-out conversations")


def check_settings(config: SFTStageConfig, training_args: SFTConfig) -> None:
    """Refuse combinations of settings in which one would have no effect, before anything is loaded.

    Raises:
        ValueError: which, and what to change.
    """
    if config.best_fit_packing and training_args.packing:
        raise ValueError("best_fit_packing packs by itself, without TRL's: set `packing: false` beside it")
    if config.keep_optimizer_state and (config.start_from != "base" or config.optimizer != "muon" or config.peft):
        raise ValueError(
            "keep_optimizer_state goes on with pretraining's own optimizer on all weights: it needs `start_from: base` "
            "and `optimizer: muon`, without `peft`"
        )


def load_conversations(
    config: SFTStageConfig, training_args: SFTConfig, tokenizer, split: str
) -> tuple[datasets.Dataset, dict]:
    """The stage's mixture, encoded, and its counts, which are printed as well."""
    skipped: dict = {}
    mixture = build_mixture(mixture_sources(config), split, training_args.seed, config.on_bad_row, skipped)
    if split == "test":
        mixture = mixture.select(range(min(len(mixture), config.validation_rows)))
    encode = encode_with_template if config.chat_template else encode_conversation
    encoded, counts = encode_mixture(mixture, tokenizer, training_args.max_length, config.overlong, encode)
    counts["skipped_bad"] = sum(count["skipped"] for count in skipped.values())
    print(describe_counts(f"{config.stage}, {split}", counts))
    return encoded, counts


def mixture_sources(config: SFTStageConfig) -> list[dict]:
    """The recipe's sources and those that `chat_data` and `eval_data` add."""
    sources = list(config.mixture)
    if config.chat_data:
        sources.append({"source": "messages", "dataset": config.chat_data, "max_rows": config.data_rows})
    if config.eval_data:
        for kind, name in (("gsm8k", "gsm8k"), ("arc", "arc_easy"), ("arc", "arc_challenge")):
            dataset = str(Path(config.eval_data) / f"{name}_train.jsonl")
            sources.append({"source": kind, "dataset": dataset, "max_rows": config.data_rows})
    return sources


def score(trainer: StageSFTTrainer, encoded: datasets.Dataset, tokenizer, assistant_only: bool) -> dict:
    """Bits per byte of held-out conversations, each alone in its row; after the first step example chats as well.

    `val_bpb` is over this stage's targets; `val_bpb_assistant` and `val_bpb_all` compare between stages.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    byte_lengths = token_byte_lengths(tokenizer).to(model.device)
    model.eval()
    figures: dict = {}
    with trainer.accelerator.autocast():
        for name in ("assistant", "all"):
            batches = padded_batches(encoded, tokenizer.pad_token_id, name == "assistant", model.device)
            figures[f"val_bpb_{name}"] = evaluate_bpb(model, batches, byte_lengths)
        questions = trainer.stage_config.sample_questions
        if trainer.state.global_step and questions and trainer.is_world_process_zero():
            figures["chats"] = answer_questions(model, tokenizer, questions)
    model.train()
    return {"val_bpb": figures["val_bpb_assistant" if assistant_only else "val_bpb_all"], **figures}


def sample_chat_score(trainer: StageSFTTrainer, tokenizer) -> dict:
    """ChatCORE on a sample."""
    from .evaluation.chat_sample import sample_chatcore  # lm-eval takes seconds to import

    config = trainer.stage_config
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = getattr(model, "get_base_model", lambda: model)()  # an adapter works inside it
    path = Path(config.run_dir) / config.start_from
    return sample_chatcore(
        model, tokenizer, path if path.is_dir() else config.start_from, config.eval_data, config.chatcore_rows
    )
