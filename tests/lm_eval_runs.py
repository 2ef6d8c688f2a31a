"""What the tests of CORE, ChatCORE and the lm-eval model share: model folders, runs, scoring the slow way."""

import json
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from nanochat_hf.checkpoint import save_model
from nanochat_hf.evaluation import TASKS_DIR


def save(model, tokenizer, folder: Path) -> str:
    """A model folder as a stage writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, tokenizer, folder)
    return str(folder)


def golden_folder(golden: Path, output: Path) -> str:
    """The really trained golden model as a model folder."""
    source = golden / "core_eval"
    if not list(source.glob("model_*.pt")):
        pytest.skip(f"no checkpoint in {source}")
    from nanochat_hf.interop import from_nanochat

    from_nanochat(source, output)
    return str(output)


def expected_of(golden: Path, name: str) -> dict:
    """`expected.json` or `chat_expected.json`: task -> what nanochat itself found."""
    path = golden / "core_eval" / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    return json.loads(path.read_text())["tasks"]


def run(lm, tasks: list, include_path=TASKS_DIR, **options) -> dict:
    """lm-eval's results of a model of lm-eval's on our tasks."""
    metadata = {"pretrained": lm.pretrained} | options.pop("metadata", {})
    manager = TaskManager(include_path=str(include_path), include_defaults=False, metadata=metadata)
    return simple_evaluate(model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=1, **options)


def flags(results: dict, task: str) -> list[int]:
    """Right or wrong, item by item in evaluation order."""
    return [int(sample["acc"]) for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])]


@torch.no_grad()
def token_losses(model, ids: list[int]) -> torch.Tensor:
    """Loss of each token but the first, one plain forward: (len(ids) - 1,)."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:]), reduction="none")


@torch.no_grad()
def score_plainly(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-likelihood and greediness of a continuation, one plain forward."""
    logits = model(input_ids=torch.tensor([context + continuation[:-1]]), use_cache=False).logits[0].float()
    logits = logits[len(context) - 1 :]
    target = torch.tensor(continuation)
    likelihoods = logits.log_softmax(-1).gather(1, target[:, None])
    return likelihoods.sum().item(), bool((logits.argmax(-1) == target).all())
