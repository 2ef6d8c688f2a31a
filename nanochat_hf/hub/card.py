"""The model card: what the model is, what it scored, how to load it, what it was trained on, what to beware of."""

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}"{revision}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{repo_id}"{revision}, trust_remote_code=True)
messages = [{{"role": "user", "content": "Who are you?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

`trust_remote_code` runs the two model files of this repository; read them first. `generate` writes calculator calls but
does not run them; nanochat-hf's `python scripts/chat.py --model {repo_id}` does.
In `tokenizer(text)` a typed `<|bos|>` becomes the special token; with `split_special_tokens=True` it stays text.

lm-evaluation-harness:

    lm_eval --model hf --model_args pretrained={repo_id},trust_remote_code=True --tasks hellaswag

TRL trains it on, as any model of transformers (`dataset`: rows of `messages`):

```python
import torch
from trl import SFTConfig, SFTTrainer

arguments = SFTConfig("tuned", use_cpu=not torch.cuda.is_available())
SFTTrainer(model=model, processing_class=tokenizer, args=arguments, train_dataset=dataset).train()
```
"""

LIMITS = """A small model trained on little text: it states falsehoods fluently, counts badly without its calculator,
and knows nothing after its training text. It was not aligned for safety. Use it to study how such models are made.

No GGUF, MLX or ONNX copy exists: llama.cpp's converter does not know this model; `torch.onnx.export` takes it."""


def model_card(run_dir: Path, stage: str, stages: list[str], repo_id: str, metrics: dict) -> str:
    """The card of one stage's model as Markdown with metadata.

    Args:
        stage: the stage whose weights lie beside this card.
        stages: every published stage, first to last.
        metrics: the run's metrics.json; empty when no report was built.
    """
    data = ModelCardData(
        license="mit",
        library_name="transformers",
        pipeline_tag="text-generation",
        language="en",
        tags=["nanochat", "nanochat_hf", "custom_code"],
        model_name=repo_id.split("/")[1],
        eval_results=[result for of_stage, result in evaluation_results(metrics) if of_stage == stage] or None,
    )
    others = ", ".join(f"`{name}`" for name in stages)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo_id.split('/')[1]}",
        f"The model after stage `{stage}` of a [nanochat](https://github.com/karpathy/nanochat)-style run from scratch "
        f"on the HuggingFace stack. Branches hold the model after each stage ({others}); `main` is the last.",
        size_text(run_dir / stage / "config.json", metrics),
        "## Use\n\n" + USAGE.format(repo_id=repo_id, revision="" if stage == stages[-1] else f', revision="{stage}"'),
        "## Results\n\n" + results_text(metrics),
        "## Training data\n\n" + training_data(run_dir, stages),
        "## Limits\n\n" + LIMITS,
    ]
    if (run_dir / "report.md").is_file():
        parts.append("## Report\n\n[report.md](report.md) has every setting and figure of the run.")
    parts += [f"![{path.stem}](plots/{path.name})" for path in sorted((run_dir / "plots").glob("*.png"))]
    return "\n\n".join(parts) + "\n"


def size_text(config_path: Path, metrics: dict) -> str:
    """How large the model is and how much it reads, as its configuration and the report say."""
    config = json.loads(config_path.read_text()) if config_path.is_file() else {}
    said = {
        "architecture": config.get("architecture"),
        "layers": config.get("num_hidden_layers"),
        "width": config.get("hidden_size"),
        "vocabulary": config.get("vocab_size"),
        "context, tokens": config.get("max_position_embeddings"),
        "parameters": metrics.get("base", {}).get("num_parameters"),
    }
    texts = {name: f"{value:,}" if isinstance(value, int) else value for name, value in said.items()}
    return "; ".join(f"{name}: {text}" for name, text in texts.items() if text) or "Its size: config.json."


def evaluation_results(metrics: dict) -> list[tuple[str, EvalResult]]:
    """Scores for the Hub's widget, each with its stage and how many items it is of; only what was measured.

    A mean of the embedded mini tasks alone is no CORE and no ChatCORE: it is named `core_mini`, `chatcore_mini`.

    Raises:
        ValueError: figures of an older report, without the numbers of items.
    """
    found = []
    for group in ("core", "chatcore"):
        figures = metrics.get(group, {})
        if figures and "num_items" not in figures:
            raise ValueError("metrics.json does not say how many items a score is of; build the report again")
        num_items, stage = figures.get("num_items", {}), figures.get("stage", "base")
        real = [task for task in num_items if not task.startswith(f"{group}_mini_")]
        if figures.get(group) is not None:
            name = group if real else f"{group}_mini"
            total = sum(num_items[task] for task in real or num_items)
            result = _result(name, figures[group], "mean centered accuracy", total, figures.get(f"{group}_stderr"))
            found.append((stage, result))
        metric = "centered accuracy" if group == "core" else "accuracy"
        found += [(stage, _result(task, figures[task], metric, num_items[task])) for task in num_items]
    return found


def _result(name: str, value: float, metric: str, num_items: int, stderr: float | None = None) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=name,
        dataset_name=name,
        dataset_args={"num_items": num_items} | ({} if stderr is None else {"stderr": round(stderr, 4)}),
        metric_type=metric.replace(" ", "_"),
        metric_name=metric,
        metric_value=round(value, 4),
    )


def results_text(metrics: dict) -> str:
    """The scores as a list; a line that says so where nothing was measured."""
    lines = []
    for stage, result in evaluation_results(metrics):
        error = f" ± {result.dataset_args['stderr']:.4f}" if "stderr" in result.dataset_args else ""
        items = f"{result.dataset_args['num_items']} items"
        score = f"{result.metric_value:.4f}{error} ({result.metric_name}, {items}; model after `{stage}`)"
        lines.append(f"- {result.dataset_name}: {score}")
    if (bpb := metrics.get("base", {}).get("val_bpb")) is not None:
        lines.insert(0, f"- base model, validation: {bpb:.4f} bits per byte")
    if any("_mini" in line for line in lines):
        lines.append(
            "\n`mini` tasks are nanochat-hf's own small ones; four choices give 0.25 to a guess, 0 when centered."
        )
    return "\n".join(lines) or "This run was not evaluated."


def training_data(run_dir: Path, stages: list[str]) -> str:
    """Text source and conversation sources, as the stage records say."""
    lines = []
    for stage in stages:
        path = run_dir / "eval" / f"{stage}.json"
        settings = json.loads(path.read_text())["settings"] if path.is_file() else {}
        if "dataset" in settings:
            lines.append(f"- {stage}: text from {public_name(settings['dataset'])}")
        sources = [
            public_name(source.get("dataset") or source.get("source", "?")) for source in settings.get("mixture") or []
        ]
        if sources:
            lines.append(f"- {stage}: {', '.join(sources)}")
    return "\n".join(lines) or "The stage records of this run are not at hand."


def public_name(dataset: str) -> str:
    """A data set's name without the path of the machine that held it."""
    if dataset == "embedded":
        return "the documentation and source of the Python standard library"
    return Path(dataset).name if dataset.startswith(("/", ".", "~")) else dataset
