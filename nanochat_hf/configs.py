"""Every dataclass this project owns: one field, one setting, with its unit and meaning.

Defaults live here and nowhere else; what follows from `depth` is derived in `scaling.py`; choices are made in the
YAML files under `recipes/`. A field set to None means "derive it".
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class CorpusConfig:
    """Where text comes from."""

    dataset: str = field(
        default="embedded",
        metadata={
            "help": "embedded (docs and source of the Python installation), a Hub dataset id, a folder of parquet "
            "shards with a `text` column (last shard = validation) or a .jsonl file"
        },
    )
    run_dir: str = field(default="runs/tiny", metadata={"help": "folder of the whole run; stages are its sub-folders"})


@dataclass
class TokenizerConfig(CorpusConfig):
    """Tokenizer training."""

    vocab_size: int = field(
        default=32768, metadata={"help": "tokens in all: 256 bytes, merges, 9 special tokens; 265 at least"}
    )
    max_chars: int = field(default=2_000_000_000, metadata={"help": "stop reading the corpus after so many characters"})
    max_document_chars: int = field(
        default=10_000, metadata={"help": "characters read of each document, so that a few long ones do not dominate"}
    )


@dataclass
class PostTrainingConfig:
    """What midtraining, SFT and RL share, beside TRL's own settings in the same recipe."""

    run_dir: str = field(default="runs/tiny", metadata={"help": "folder of the whole run; stages are its sub-folders"})
    stage: str = field(default="sft", metadata={"help": "name of this stage and of the folder it writes: mid, sft, rl"})
    start_from: str = field(
        default="base", metadata={"help": "starting model: a stage of this run, a model folder or a Hub id"}
    )
    mixture: list[dict] = field(
        default_factory=list,
        metadata={"help": "sources of conversations, each {source, rows, epochs, dataset, name, split}"},
    )
    chat_data: str | None = field(
        default=None, metadata={"help": "folder of .jsonl files with `messages`, each a further source"}
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "folder with gsm8k_train.jsonl and arc_*_train.jsonl, each a further source"}
    )
    lr_fraction: float = field(
        default=1.0, metadata={"help": "factor on every nominal learning rate of the architecture"}
    )
    warmdown_fraction: float = field(
        default=1.0, metadata={"help": "share of the steps, at the end, over which the rates fall linearly"}
    )
    final_lr_fraction: float = field(default=0.0, metadata={"help": "what is left of the rates at the last step"})


@dataclass
class SFTStageConfig(PostTrainingConfig):
    """Midtraining and SFT."""

    overlong: Literal["truncate", "drop"] = field(
        default="truncate", metadata={"help": "what happens to a conversation longer than max_length tokens"}
    )


@dataclass
class GRPOStageConfig(PostTrainingConfig):
    """RL on problems with a checkable answer."""

    rewards: list[str] = field(
        default_factory=lambda: ["nanochat_hf.rewards.exact_answer"],
        metadata={"help": "import paths of reward functions; TRL's reward_weights weighs several"},
    )


@dataclass
class ReportConfig:
    """The report of a run."""

    run_dir: str = field(default="runs/tiny", metadata={"help": "the run's folder"})
    questions: list[str] = field(
        default_factory=lambda: [
            "Who are you?",
            "What does shutil.copyfile do?",
            'How many times does the letter "r" occur in "strawberry"?',
            "Maria has 14 apples. She buys 3 bags with 6 apples each. How many apples does she have now?",
            "What is the capital of France?",
        ],
        metadata={"help": "sample questions the last chat model answers in the report"},
    )
    hourly_rate: float | None = field(
        default=None, metadata={"help": "price of the machine in US dollars an hour; the report then states the cost"}
    )
