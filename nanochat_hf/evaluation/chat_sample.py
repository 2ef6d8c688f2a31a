"""ChatCORE of a model that is still being trained, on the first items of each task."""

from pathlib import Path

import torch
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import TASKS_DIR
from .evaluate import HUMANEVAL, run_tasks, summarize
from .lm_eval_model import NanoChatHFLM


def sample_chatcore(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_path: str | Path,
    eval_data: str | None,
    num_rows: int,
) -> dict:
    """ChatCORE on `num_rows` items a task: nanochat's without HumanEval (it runs code), or the embedded mini tasks.

    Args:
        tokenizer_path: where lm-eval's tasks find the same tokenizer.
        eval_data: folder with the test rows; the mini tasks without it.

    Returns:
        `chatcore`, the mean centered score (None where a task's data is missing), and `tasks`, each one's accuracy.
        Every process of a training calls this; the first of a machine gets figures, the others None and no task.
    """
    was_training = model.training
    lm = NanoChatHFLM(pretrained=model, tokenizer=tokenizer)
    metadata = {"pretrained": str(tokenizer_path), "chatcore_data_dir": eval_data}
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False, metadata=metadata)
    group, tasks = "chatcore_mini", ["chatcore_mini"]
    if eval_data:
        group = "chatcore"
        tasks = [task for task in manager.load(group)["group_map"][group] if task != HUMANEVAL]
    with torch.no_grad():
        results = summarize(run_tasks(lm, manager, tasks, num_rows), group, "chatcore")
    model.train(was_training)
    centered = [task["centered"] for task in results["tasks"].values()]
    mean = None if results["missing"] or not centered else sum(centered) / len(centered)
    return {"chatcore": mean, "tasks": {name: task["accuracy"] for name, task in results["tasks"].items()}}
