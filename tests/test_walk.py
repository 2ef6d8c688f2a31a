"""Recipes for GPUs and the Hub, walked from end to end at depth 2: each stage line of run.sh, on local rows of the same
shapes, with the recipe's own YAML files; only sizes are cut down."""

import json
from pathlib import Path

import datasets
import pytest
import yaml
from test_recipes import LINE, dataclasses_of
from transformers import AutoModelForCausalLM

from nanochat_hf.data import rows as rows_module
from nanochat_hf.dpo import run_dpo
from nanochat_hf.evaluation import mini_tasks
from nanochat_hf.evaluation.evaluate import evaluate
from nanochat_hf.grpo import run_grpo
from nanochat_hf.pretrain import pretrain
from nanochat_hf.recipe import parse_recipe
from nanochat_hf.sft import run_sft
from nanochat_hf.tokenizer_training import train_tokenizer

ROOT = Path(__file__).parents[1]
RUN = {
    "train_tokenizer": lambda config, settings: train_tokenizer(config),
    "pretrain": pretrain,
    "sft": run_sft,
    "dpo": run_dpo,
    "grpo": run_grpo,
    "evaluate": lambda config, settings: evaluate(config),
}
ROWS = 24
TRL = {
    "max_steps": 2, "max_length": 192, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2,
    "logging_steps": 1, "save_strategy": "no", "total_batch_rows": 4, "use_cpu": True, "bf16": False,
}  # fmt: skip
SMALLER = {
    "train_tokenizer": {"vocab_size": 512, "max_chars": 300_000},
    "pretrain": {
        "depth": 2, "vocab_size": 512, "sequence_length": 192, "head_dim": 32, "total_batch_tokens": 384,
        "num_steps": 2, "eval_tokens": 384, "device_batch_size": 1, "compile": False,
        "eval_every_steps": 0, "save_every_steps": 0,
    },
    "sft": {**TRL, "validation_rows": 4, "eval_every_steps": 0, "chatcore_every_steps": 0},
    "dpo": {**TRL, "warmup_steps": 1},
    "grpo": {
        **TRL, "max_completion_length": 8, "num_generations": 2, "eval_problems": 2, "eval_samples": 2,
        "eval_every_steps": 0,
    },
    "evaluate": {},
}  # fmt: skip
del SMALLER["grpo"]["max_length"], SMALLER["grpo"]["per_device_eval_batch_size"]


def hub_rows(name: str, config: str | None) -> list[dict]:
    """A few rows shaped as that data set's on the Hub."""
    exchange = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello, what is new?"}]
    question = {"question": "Which is it?", "choices": ["a", "b", "c", "d"], "answer": 1}
    return {
        "HuggingFaceTB/smol-smoltalk": [{"messages": exchange, "source": "talk"}],
        "cais/mmlu": [{"train": question} if config == "auxiliary_train" else {**question, "subject": "x"}],
        "openai/gsm8k": [{"question": "What is 2+3?", "answer": "It is <<2+3=5>>5.\n#### 5"}],
        "allenai/ai2_arc": [
            {"id": "1", "question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
        ],
        "HuggingFaceH4/ultrafeedback_binarized": [
            {"prompt": "Hello?", "chosen": exchange, "rejected": [exchange[0], {**exchange[1], "content": "No."}]}
        ],
    }[name] * (2 * ROWS)


@pytest.fixture
def corpus(tmp_path):
    """Documents shaped as the corpus' rows."""
    from itertools import islice

    from nanochat_hf.data.corpus import load_corpus

    lines = [json.dumps({"text": text}) for text in islice(iter(load_corpus("embedded", "train")), 120)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    return tmp_path / "corpus.jsonl"


def smaller_sources(said: dict) -> dict:
    """The YAML's lists of sources with few rows."""
    cut = dict(said)
    for key in ("mixture", "preferences"):
        if key in said:
            cut[key] = [{**source, "rows": ROWS} for source in said[key]]
    return cut


@pytest.mark.parametrize("name", ["d12", "d20_2025_10", "d24"])
def test_the_recipe_runs_from_end_to_end(name, tmp_path, corpus, monkeypatch):
    def load_dataset(path, config, split):
        return datasets.Dataset.from_list(hub_rows(path, config))

    monkeypatch.setattr(rows_module.datasets, "load_dataset", load_dataset)
    for rows in ("NUM_CORE_ROWS", "NUM_ARITHMETIC_ROWS", "NUM_CHAT_ROWS"):
        monkeypatch.setattr(mini_tasks, rows, 2)
    run_dir = tmp_path / "run"
    lines = LINE.findall((ROOT / "recipes" / name / "run.sh").read_text())
    assert [script for script, _ in lines][:2] == ["train_tokenizer", "pretrain"]
    made = []
    for script, stem in lines:
        said = smaller_sources(yaml.safe_load((ROOT / "recipes" / name / f"{stem}.yaml").read_text()))
        for key in ("gradient_accumulation_steps", "tokens_per_parameter", "num_train_epochs", "save_steps"):
            said.pop(key, None)
        said |= SMALLER[script] | {"run_dir": str(run_dir)}
        if stem == "grpo_mixed":
            said["stage"] = "mixed"
        if "dataset" in said:
            said["dataset"] = str(corpus)
        (tmp_path / f"{stem}.yaml").write_text(yaml.safe_dump(said))
        RUN[script](*parse_recipe(*dataclasses_of(script), argv=["--config", str(tmp_path / f"{stem}.yaml")]))
        made.append(said.get("stage"))
    for stage in filter(None, made):
        assert json.loads((run_dir / "eval" / f"{stage}.json").read_text())["results"]["num_steps"] == 2
        model = AutoModelForCausalLM.from_pretrained(run_dir / stage)
        assert model.config.num_hidden_layers == 2
    if "evaluate" in dict(lines):
        assert (run_dir / "eval/core.json").is_file() and (run_dir / "eval/chatcore_rl.json").is_file()


def test_the_mixtures_have_nanochats_rows():
    """567,656 conversations of midtraining and 20,843 of SFT; the 2026-07 stage repeats MMLU and GSM8K."""

    def rows(path: str) -> int:
        mixture = yaml.safe_load((ROOT / "recipes" / path).read_text())["mixture"]
        return sum(source["rows"] * source.get("epochs", 1) for source in mixture)

    assert rows("d20_2025_10/midtrain.yaml") == 567_656
    assert rows("d20_2025_10/sft.yaml") == 20_843
    assert rows("d24/sft.yaml") == 460_341 + 3 * 99_842 + 4 * 7_473
