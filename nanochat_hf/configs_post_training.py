"""The dataclasses of the stages built on TRL: midtraining, SFT, DPO, RL. TRL's own settings stand in the same recipe.

One field, one setting, with its unit and meaning; see `configs.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

from .configs import SAMPLE_QUESTIONS


@dataclass
class PostTrainingConfig:
    """What midtraining, SFT, DPO and RL share, beside TRL's own settings in the same recipe."""

    run_dir: str = field(default="runs/tiny", metadata={"help": "folder of the whole run; stages are its sub-folders"})
    stage: str = field(
        default="sft", metadata={"help": "name of this stage and of the folder it writes: mid, sft, dpo, rl"}
    )
    start_from: str = field(
        default="base", metadata={"help": "starting model: a stage of this run, a model folder or a Hub id"}
    )
    total_batch_rows: int | None = field(
        default=None,
        metadata={
            "help": "rows of one optimizer step over all processes: TRL's gradient_accumulation_steps follows from it, "
            "and a step is the same on one GPU and on eight"
        },
    )
    on_bad_row: Literal["error", "skip"] = field(
        default="error", metadata={"help": "what a row that cannot be used does: stop the run, or be left out, counted"}
    )
    optimizer: Literal["muon", "adamw"] = field(
        default="muon",
        metadata={
            "help": "muon: Muon and AdamW at the architecture's rates, as lr_fraction and the settings after it say; "
            "adamw: plain AdamW, as TRL's learning_rate, lr_scheduler_type and weight_decay say"
        },
    )
    lr_fraction: float = field(
        default=1.0, metadata={"help": "factor on every nominal learning rate of the architecture"}
    )
    learning_rates: dict[str, float] | None = field(
        default=None,
        metadata={
            "help": "nominal learning rate by parameter group (matrix, embedding, ...) where the preset's is not"
        },
    )
    warmdown_fraction: float = field(
        default=1.0, metadata={"help": "share of the steps, at the end, over which the rates fall linearly"}
    )
    final_lr_fraction: float = field(default=0.0, metadata={"help": "what is left of the rates at the last step"})
    peft: dict | None = field(
        default=None,
        metadata={"help": "train a LoRA adapter with these settings of peft.LoraConfig; the stage's folder is merged"},
    )


@dataclass
class MixtureConfig(PostTrainingConfig):
    """A stage that learns from a mixture of conversations."""

    mixture: list[dict] = field(
        default_factory=list,
        metadata={"help": "sources of conversations, each {source, rows, epochs, dataset, name, split}"},
    )


@dataclass
class SFTStageConfig(MixtureConfig):
    """Midtraining and SFT."""

    chat_data: str | None = field(
        default=None, metadata={"help": "folder of .jsonl files with `messages`, one more source of the mixture"}
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "folder with gsm8k_train.jsonl and arc_*_train.jsonl, three more sources"}
    )
    data_rows: int = field(default=1000, metadata={"help": "most rows of each source that the two folders add"})
    validation_rows: int = field(default=200, metadata={"help": "most held-out conversations that validation scores"})
    eval_every_steps: int = field(
        default=0, metadata={"help": "steps between validations; 0 = only before the first step and after the last"}
    )
    chatcore_every_steps: int = field(
        default=0, metadata={"help": "steps between ChatCORE on a sample, which also comes at the end; 0 = never"}
    )
    chatcore_rows: int = field(default=40, metadata={"help": "items a task of that sample"})
    sample_questions: list[str] = field(
        default_factory=lambda: list(SAMPLE_QUESTIONS),
        metadata={"help": "asked at each validation after the first step; the answers go to the curve"},
    )
    overlong: Literal["truncate", "drop"] = field(
        default="truncate", metadata={"help": "what happens to a conversation longer than max_length tokens"}
    )
    best_fit_packing: bool = field(
        default=False,
        metadata={
            "help": "nanochat 2026-07's packing instead of TRL's: whole conversations, best fit first, the rest of a "
            "row padded; conversations of a row see each other"
        },
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "a .jinja file that renders conversations instead of nanochat's format; kept by the model"},
    )
    keep_optimizer_state: bool = field(
        default=False, metadata={"help": "go on with the optimizer state that pretraining kept (2026-07)"}
    )


@dataclass
class DPOStageConfig(PostTrainingConfig):
    """Preferences: of two answers, the better one."""

    stage: str = field(default="dpo", metadata={"help": "name of this stage and of the folder it writes"})
    start_from: str = field(
        default="sft", metadata={"help": "starting chat model: a stage of this run, a model folder or a Hub id"}
    )
    preferences: list[dict] = field(
        default_factory=list,
        metadata={"help": "sources of rows {prompt, chosen, rejected}, each {dataset, name, split, rows}"},
    )


@dataclass
class GRPOStageConfig(MixtureConfig):
    """RL on problems with a checkable answer."""

    rewards: list[str] = field(
        default_factory=lambda: ["nanochat_hf.rewards.exact_answer"],
        metadata={"help": "import paths of reward functions; TRL's reward_weights weighs several"},
    )
    eval_problems: int = field(
        default=0, metadata={"help": "held-out problems for pass@k before, during and after; 0 = none"}
    )
    eval_samples: int = field(default=8, metadata={"help": "answers to each of them: pass@1 to pass@this"})
    eval_every_steps: int = field(
        default=0, metadata={"help": "steps between pass@k; 0 = only before the first step and after the last"}
    )
