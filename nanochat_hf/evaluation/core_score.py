"""CORE as flags and one number, without lm-eval's reporting: what training scores itself with, and benchmarks time.

tasks = load_core(tokenizer_folder)
flags = score_tasks(NanoChatHFLM(model, tokenizer=tokenizer), tasks, limit=500)
core = mean_centered(tasks, {name: sum(each) / len(each) for name, each in flags.items()})
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attention import cached_attention
from ..fsdp import wants_fsdp
from . import TASKS_DIR
from .core import CoreTask
from .lm_eval_model import NanoChatHFLM

Flags = dict[str, list[int]]


def load_core(pretrained: str, core_data: str | None = None) -> dict[str, CoreTask]:
    """The 22 tasks by name; one whose file is missing has `missing` set.

    Args:
        pretrained: folder or Hub id of the model, or of its tokenizer alone.
        core_data: folder of the task files; CORE_DATA_DIR by default.

    Raises:
        ValueError: none of the files is there.
    """
    metadata = {"pretrained": pretrained, "core_data_dir": core_data}
    tasks = TaskManager(include_path=str(TASKS_DIR), include_defaults=False, metadata=metadata).load("core")["tasks"]
    if all(task.missing for task in tasks.values()):
        raise ValueError("none of CORE's task files is at hand; set CORE_DATA_DIR to their folder")
    return tasks


def build_requests(tasks: dict[str, CoreTask], limit: int, rank: int = 0, world_size: int = 1) -> list[Instance]:
    """What an lm-eval model is asked: of each task the first `limit` items, of these every world_size-th."""
    requests = []
    for task in tasks.values():
        task.build_all_requests(limit=limit, rank=rank, world_size=world_size)
        requests += task.instances
    return requests


def score_tasks(lm: LM, tasks: dict[str, CoreTask], limit: int, rank: int = 0, world_size: int = 1) -> Flags:
    """1 (right) or 0, item by item, of the tasks that have data, in one call of the model for all of them."""
    tasks = {name: task for name, task in tasks.items() if not task.missing}
    requests = build_requests(tasks, limit, rank, world_size)
    answers = iter(lm.loglikelihood(requests, disable_tqdm=True))
    flags: Flags = {}
    for name, task in tasks.items():
        docs, results = task.test_docs(), {}
        for instance in task.instances:
            results.setdefault(instance.doc["index"], []).append(next(answers))
        flags[name] = [int(task.score(docs[index], each)) for index, each in results.items()]
    return flags


def mean_centered(tasks: dict[str, CoreTask], accuracies: dict[str, float]) -> float | None:
    """CORE: the mean over the tasks of (accuracy - baseline) / (1 - baseline); None unless all tasks were scored."""
    if accuracies.keys() != tasks.keys():
        return None
    return sum((accuracies[n] - task.baseline) / (1 - task.baseline) for n, task in tasks.items()) / len(tasks)


def core_scorer(tokenizer_folder: Path, limit: int, accelerator: Accelerator) -> Callable[..., float]:
    """What gives the CORE of a model in training: `score_model` on tasks that are loaded now.

    Raises:
        ValueError: a task's file is missing, or a model in pieces, whose processes cannot each score items of their
            own; before the first step, when it costs nothing.
    """
    if wants_fsdp(accelerator):
        raise ValueError("core_every_steps needs the whole model in every process: set it to 0 with FSDP")
    tasks = load_core(str(tokenizer_folder))
    if missing := [task.missing for task in tasks.values() if task.missing]:
        raise ValueError(f"no {', '.join(missing)}; set CORE_DATA_DIR to the folder of CORE's task files")
    return partial(score_model, tasks, limit, accelerator)


def score_model(
    tasks: dict[str, CoreTask],
    limit: int,
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> float | None:
    """CORE of a model in training; every process scores its share of the items, and all get the number."""
    was_training = model.training
    lm = NanoChatHFLM(model, tokenizer=tokenizer)
    with cached_attention(model), accelerator.autocast():
        flags = score_tasks(lm, tasks, limit, accelerator.process_index, accelerator.num_processes)
    model.train(was_training)
    counts = torch.tensor([[sum(each), len(each)] for each in flags.values()], device=accelerator.device)
    right, total = accelerator.reduce(counts, "sum").T
    return mean_centered(tasks, dict(zip(flags, (right / total).tolist(), strict=True)))
