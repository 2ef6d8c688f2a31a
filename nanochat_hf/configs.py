"""Every dataclass this project owns: one field, one setting, with its unit and meaning.

Defaults live here and nowhere else; what follows from `depth` is derived in `scaling.py`; choices are made in the
YAML files under `recipes/`. A field set to None means "derive it". The stages on TRL: `configs_post_training.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

SAMPLE_QUESTIONS = (
    "Who are you?",
    "What does shutil.copyfile do?",
    'How many times does the letter "r" occur in "strawberry"?',
    "Maria has 14 apples. She buys 3 bags with 6 apples each. How many apples does she have now?",
    "What is the capital of France?",
)


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
    on_bad_shard: Literal["error", "skip"] = field(
        default="error",
        metadata={"help": "what a shard that cannot be read does: stop the run, or be left out from there on, counted"},
    )


@dataclass
class TokenizerConfig(CorpusConfig):
    """Tokenizer training."""

    vocab_size: int = field(
        default=32768, metadata={"help": "tokens in all: 256 bytes, merges, 9 special tokens; 265 at least"}
    )
    start_from: str | None = field(
        default=None,
        metadata={"help": "take this tokenizer instead of training one: its folder, or nanochat's tokenizer.pkl"},
    )
    max_chars: int = field(default=2_000_000_000, metadata={"help": "stop reading the corpus after so many characters"})
    max_document_chars: int = field(
        default=10_000, metadata={"help": "characters read of each document, so that a few long ones do not dominate"}
    )


@dataclass
class PretrainConfig(CorpusConfig):
    """Pretraining: one dial, `depth`; None means derived by `scaling.py`."""

    depth: int = field(default=20, metadata={"help": "number of layers; width, heads, tokens and rates follow"})
    architecture: Literal["2026-07", "2025-10"] = field(default="2026-07", metadata={"help": "nanochat generation"})
    sequence_length: int = field(default=2048, metadata={"help": "tokens of a row, T"})
    head_dim: int = field(default=128, metadata={"help": "width of an attention head"})
    window_pattern: str | None = field(
        default=None, metadata={"help": "letters S (short window) and L (full) tiled over the layers (2026-07: SSSL)"}
    )
    tokens_per_parameter: float | None = field(
        default=None, metadata={"help": "horizon: training tokens per scaling parameter (2026-07: 12, 2025-10: 20)"}
    )
    num_steps: int | None = field(default=None, metadata={"help": "optimizer steps, instead of the horizon"})
    total_batch_tokens: int | None = field(default=None, metadata={"help": "tokens of one optimizer step"})
    device_batch_size: int = field(default=16, metadata={"help": "rows of one forward pass on one device"})
    learning_rates: dict[str, float] | None = field(
        default=None,
        metadata={"help": "nominal rates by optimizer group instead of the architecture's: {matrix: 0.02}"},
    )
    eval_every_steps: int = field(default=250, metadata={"help": "steps between validations; 0 = first and last only"})
    eval_tokens: int = field(default=10_485_760, metadata={"help": "tokens of one validation"})
    core_every_steps: int = field(
        default=0, metadata={"help": "steps between CORE scores on the files of CORE_DATA_DIR; 0 = none"}
    )
    core_max_per_task: int = field(default=500, metadata={"help": "items of each CORE task"})
    sample_every_steps: int = field(default=0, metadata={"help": "steps between samples of the seven prompts; 0 = end"})
    save_every_steps: int = field(default=1000, metadata={"help": "steps between resumable checkpoints; 0 = none"})
    save_total_limit: int = field(default=1, metadata={"help": "checkpoints kept"})
    log_every_steps: int = field(default=10, metadata={"help": "steps between lines of the curve"})
    num_shards: int | None = field(default=None, metadata={"help": "use only the first so many training shards"})
    compile: bool | None = field(
        default=None, metadata={"help": "torch.compile the model; by default on a GPU, and on a CPU for long runs"}
    )
    fp8: bool = field(default=False, metadata={"help": "matrices of the layers in fp8 by torchao (H100 and newer)"})
    keep_optimizer_state: bool = field(
        default=False, metadata={"help": "write the optimizer's state beside the model, for an SFT that carries it on"}
    )
    tracker: Literal["trackio", "wandb"] | None = field(
        default=None, metadata={"help": "trackio or wandb, through Accelerate, if it is installed; off by default"}
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "publish the run when this stage has finished, to `hub_model_id`"}
    )
    hub_model_id: str | None = field(default=None, metadata={"help": "OWNER/NAME, as for scripts/publish.py"})
    seed: int = field(default=42, metadata={"help": "of the initialisation"})
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "size the tokenizer must have; --plan needs it where the tokenizer is not trained yet"},
    )
    plan: bool = field(default=False, metadata={"help": "print what the run will take, and train nothing"})


@dataclass
class SweepConfig(PretrainConfig):
    """A ladder of pretraining runs; `depth` and the number of steps are derived for each."""

    depths: list[int] = field(default_factory=list, metadata={"help": "depths of the ladder: 2 3 4"})
    flops: list[float] = field(
        default_factory=list, metadata={"help": "training FLOPs of a run, one or several budgets: 2e12 4e12"}
    )


@dataclass
class EvaluationConfig:
    """Evaluation of a run's models through lm-eval."""

    run_dir: str = field(default="runs/tiny", metadata={"help": "the run's folder"})
    stages: list[str] = field(
        default_factory=lambda: ["base", "mid", "sft", "rl"],
        metadata={"help": "models to score: base by CORE, mid, sft and rl by ChatCORE"},
    )
    core_data: str | None = field(
        default=None, metadata={"help": "folder with the 22 CORE task files; embedded mini tasks without it"}
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "folder with test rows of ARC, MMLU, GSM8K, HumanEval, beside the mini tasks"}
    )
    limit: int | None = field(default=None, metadata={"help": "items a real task; None = all"})
    gen_kwargs: str | None = field(
        default=None, metadata={"help": "lm-eval's, for eval_data: `repetition_penalty=1.2`; None = greedy as nanochat"}
    )
    run_unsafe_code: bool = field(
        default=False, metadata={"help": "run the programs models write for HumanEval, confined (code_sandbox.py)"}
    )


@dataclass
class CoreDataConfig:
    """Fetching CORE's task files."""

    output: str = field(
        default="~/.cache/nanochat_hf/core", metadata={"help": "folder for the files; CORE_DATA_DIR then names it"}
    )
    source: str = field(
        default="https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip",
        metadata={"help": "URL of the bundle, a zip file or an unpacked folder"},
    )
    sha256: str | None = field(default=None, metadata={"help": "refuse a zip file with another checksum"})


@dataclass
class ReportConfig:
    """The report of a run."""

    run_dir: str = field(default="runs/tiny", metadata={"help": "the run's folder"})
    questions: list[str] = field(
        default_factory=lambda: list(SAMPLE_QUESTIONS),
        metadata={"help": "sample questions the last chat model answers in the report"},
    )
    hourly_rate: float | None = field(
        default=None, metadata={"help": "price of the machine in US dollars an hour; the report then states the cost"}
    )


@dataclass
class ChatConfig:
    """A conversation in the terminal."""

    model: str = field(default="runs/tiny/rl", metadata={"help": "a model folder, or a Hub id (user/name)"})
    prompt: str | None = field(
        default=None, metadata={"help": "answer this and leave; piped standard input is answered in the same way"}
    )
    system: str | None = field(default=None, metadata={"help": "instructions put before the first message"})
    temperature: float = field(default=0.6, metadata={"help": "0 = always the likeliest token"})
    top_k: int = field(default=50, metadata={"help": "draw from the k likeliest tokens; 0 = from all"})
    top_p: float | None = field(
        default=None, metadata={"help": "draw from the likeliest tokens that together reach this probability"}
    )
    repetition_penalty: float = field(default=1.0, metadata={"help": "above 1, tokens seen before become less likely"})
    max_new_tokens: int = field(default=512, metadata={"help": "longest answer, in tokens"})
    seed: int | None = field(default=None, metadata={"help": "the same seed gives the same answers; none = by chance"})
    compile: bool = field(default=False, metadata={"help": "on a CPU: answers up to 3x as fast, after half a minute"})


@dataclass
class PublishConfig:
    """Publishing a run to the Hub."""

    run: str = field(default="runs/tiny", metadata={"help": "the run's folder"})
    repo_id: str = field(default="", metadata={"help": "model repository, OWNER/NAME"})
    public: bool = field(default=False, metadata={"help": "make a new repository public; private by default"})
    space: bool = field(default=False, metadata={"help": "publish the Gradio chat too, as a Space of the same name"})
    dry_run: bool = field(default=False, metadata={"help": "check everything and list what would go, send nothing"})


@dataclass
class ConvertConfig:
    """Conversion between nanochat's checkpoints, our folders and transformers' native `nanochat` type."""

    checkpoint: str | None = field(default=None, metadata={"help": "folder to read"})
    output: str | None = field(default=None, metadata={"help": "new folder to write"})
    step: int | None = field(
        default=None, metadata={"help": "from_nanochat: which checkpoint (the last); to_nanochat: its number (0)"}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "from_nanochat: folder of tokenizer.pkl, looked for beside the checkpoint"}
    )


@dataclass
class PretrainBenchmarkConfig:
    """`benchmark.py pretrain`: a model's shape, and how long to measure."""

    depth: int = field(default=4, metadata={"help": "number of layers; the width follows"})
    architecture: Literal["2026-07", "2025-10"] = field(default="2026-07", metadata={"help": "nanochat generation"})
    vocab_size: int = field(default=8192, metadata={"help": "rows of the embedding"})
    sequence_length: int = field(default=512, metadata={"help": "tokens of a row, T"})
    head_dim: int = field(default=64, metadata={"help": "width of an attention head"})
    window_pattern: str = field(default="L", metadata={"help": "letters S and L tiled over the layers"})
    device_batch_size: int = field(default=16, metadata={"help": "rows of a batch"})
    num_batches: int = field(default=1, metadata={"help": "batches of a step, their gradients added up"})
    sides: list[str] = field(
        default_factory=lambda: ["plain", "bare", "eager", "compiled"],
        metadata={"help": "what to measure: plain, bare, eager, compiled, fp8 (H100 and newer)"},
    )
    steps: int = field(default=2, metadata={"help": "steps of one side's turn"})
    rounds: int = field(default=3, metadata={"help": "turns of each side; the median counts"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})


@dataclass
class GRPOBenchmarkConfig:
    """`benchmark.py grpo`: a model, and the shape of a rollout."""

    model: str | None = field(
        default=None, metadata={"help": "model folder; by default an untrained one of the shape below"}
    )
    depth: int = field(default=4, metadata={"help": "number of layers of the untrained model"})
    architecture: Literal["2026-07", "2025-10"] = field(default="2026-07", metadata={"help": "nanochat generation"})
    head_dim: int = field(default=64, metadata={"help": "width of an attention head"})
    vocab_size: int = field(default=4096, metadata={"help": "of the untrained model and its tokenizer"})
    num_prompts: int = field(default=16, metadata={"help": "questions of a rollout"})
    num_generations: int = field(default=16, metadata={"help": "answers to each question"})
    max_completion_length: int = field(default=64, metadata={"help": "most tokens of an answer"})
    rounds: int = field(default=3, metadata={"help": "turns of each side; the median counts"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})


@dataclass
class DecodeBenchmarkConfig:
    """`benchmark.py decode`: a model, and how much it reads and writes."""

    model: str = field(default="runs/tiny/rl", metadata={"help": "a model folder"})
    prompt_tokens: int = field(default=50, metadata={"help": "tokens of each prompt"})
    new_tokens: int = field(default=128, metadata={"help": "tokens written after each prompt"})
    rounds: int = field(default=5, metadata={"help": "turns of each side; the median counts"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})


@dataclass
class CoreBenchmarkConfig:
    """`benchmark.py core`: a model, and how many items."""

    model: str | None = field(default=None, metadata={"help": "a model folder, or a Hub id (user/name)"})
    max_per_task: int = field(default=10, metadata={"help": "items of each of CORE's tasks"})
    core_data: str | None = field(
        default=None, metadata={"help": "folder with the task files; CORE_DATA_DIR by default"}
    )
    rounds: int = field(default=3, metadata={"help": "turns of each side; the median counts"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})


@dataclass
class AttentionBenchmarkConfig:
    """`benchmark.py attention`: the shape of a layer's attention."""

    batch_size: int = field(default=4, metadata={"help": "rows"})
    heads: int = field(default=6, metadata={"help": "heads, of queries and of keys"})
    head_dim: int = field(default=128, metadata={"help": "width of a head"})
    time: int = field(default=2048, metadata={"help": "tokens of a row, T"})
    window: int = field(default=513, metadata={"help": "keys that a query of a windowed layer sees, itself included"})
    rounds: int = field(default=5, metadata={"help": "passes of each backend; the median counts"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})


@dataclass
class PackingBenchmarkConfig:
    """`benchmark.py packing`: how long rows are, and over how much they are packed."""

    sequence_length: int = field(default=2048, metadata={"help": "tokens of a row, T"})
    num_documents: int = field(default=20_000, metadata={"help": "documents to pack, made up"})
    buffer_documents: int = field(default=1000, metadata={"help": "documents to choose from"})
    rounds: int = field(default=3, metadata={"help": "times each side is measured; the median counts"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})
