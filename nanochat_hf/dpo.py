"""Direct preference optimisation, an optional last stage on TRL's DPOTrainer: of two answers, the better one.

Beyond nanochat, which ends with RL. Answers are encoded as in SFT; what a tool said in them is not judged. Rates: DPO
moves a chat model a little, so recipes take plain AdamW at a small rate, or a small `lr_fraction`.

    accelerate launch scripts/dpo.py --config recipes/d24/dpo.yaml --start_from sft
"""

from itertools import islice
from pathlib import Path

import torch
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from .configs_post_training import DPOStageConfig
from .data.preferences import build_pairs, encode_pairs
from .stage import Stage
from .tokenizer import special_ids
from .trl_callbacks import ScoreCallback
from .trl_stage import (
    StageOptimizer,
    load_start,
    lora_config,
    prepare_arguments,
    refuse_base_model,
    save_stage,
    train_stage,
)


class StageDPOTrainer(StageOptimizer, DPOTrainer):
    """DPOTrainer on ids that are ready, with our optimizer and schedule."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class PairCollator(DataCollatorForPreference):
    """TRL's collator, tool output taken out of what is judged.

    Args:
        output_tokens: ids of `<|output_start|>` and `<|output_end|>`.
    """

    def __init__(self, output_tokens: tuple[int, int], **kwargs):
        super().__init__(**kwargs)
        self.output_tokens = output_tokens

    def torch_call(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = super().torch_call(examples)
        start, end = (batch["input_ids"] == token for token in self.output_tokens)  # (batch, time) each
        is_inside = start.cumsum(1) > end.cumsum(1)
        batch["completion_mask"] = batch["completion_mask"] * ~(is_inside | end)
        return batch


def run_dpo(config: DPOStageConfig, training_args: DPOConfig, settings: dict) -> None:
    """Run the stage: from `start_from` to `run_dir/stage`, with its record and curve.

    The record's `margin` is the mean difference of the implicit rewards (beta times the log-ratio to the starting
    model) of chosen and rejected held-out answers, `accuracy` the share of pairs where it is above 0.

    Args:
        config: the stage's own settings.
        training_args: TRL's settings from the same recipe.
        settings: what recipe and command line said, for the record.

    Raises:
        ValueError: bad settings, a starting model that is not there or is no chat model, a bad row.
    """
    stage = Stage(config.run_dir, config.stage, settings)
    if stage.finished:
        print(f"{config.stage}: finished before, nothing to do")
        return
    prepare_arguments(config, training_args, settings, Path(config.run_dir) / "checkpoints" / config.stage)
    training_args.include_num_input_tokens_seen = "non_padding"

    with stage:
        model, tokenizer = load_start(config.run_dir, config.start_from)
        peft = lora_config(config)
        sets, counts = {}, {}
        for split in ("train", "test"):
            pairs, counts[split] = build_pairs(config.preferences, split, training_args.seed, config.on_bad_row)
            if split == "train":
                answered = [row["prompt"] + row["chosen"] for row in islice(pairs, 8)]
                refuse_base_model(model, tokenizer, answered, config.start_from)
            sets[split], counts[split]["dropped_overlong"] = encode_pairs(pairs, tokenizer, training_args.max_length)
            print(f"{config.stage}, {split}: {len(sets[split]):,} pairs; {counts[split]}")
        special = special_ids(tokenizer)
        trainer = StageDPOTrainer(
            config,
            model=model,
            ref_model=None if peft else load_start(config.run_dir, config.start_from)[0],
            args=training_args,
            data_collator=PairCollator(
                (special["<|output_start|>"], special["<|output_end|>"]), pad_token_id=tokenizer.pad_token_id
            ),
            train_dataset=sets["train"],
            eval_dataset=sets["test"],
            processing_class=tokenizer,
            peft_config=peft,
        )

        def score() -> dict:
            figures = trainer.evaluate()
            trainer.model.train()  # TRL files the step's own metrics by the mode it finds
            names = {"val_loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
            return {ours: figures[f"eval_{theirs}"] for ours, theirs in names.items()}

        callback = ScoreCallback(stage, score, "margin", every_steps=0, at_start=False)
        figures = train_stage(trainer, stage, "loss", callback)
        save_stage(trainer, tokenizer, config.run_dir, config.stage)
        stage.results |= {
            "num_pairs": len(sets["train"]),
            "counts": counts["train"],
            "validation_counts": counts["test"],
            **figures,
            **callback.last,
        }
