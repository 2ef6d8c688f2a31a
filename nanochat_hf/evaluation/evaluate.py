"""The recipe's evaluation: CORE of the base model and ChatCORE of each chat model, through lm-eval.

    python scripts/evaluate.py --config recipes/tiny/eval.yaml     # with `accelerate launch`, processes share the items

Without data the embedded mini tasks are asked; with `core_data` the 22 CORE tasks instead, with `eval_data` nanochat's
five chat tasks beside them. Each model's record is a results file of lm-eval's, which its tools and
`scripts/compare.py` read, and has a `summary` beside: what the report needs, and one flag an item.
"""

import json
import math
import os
import shutil
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from ..configs import EvaluationConfig
from ..recipe import nearest
from ..stage import STAGES, Stage
from . import TASKS_DIR
from .lm_eval_model import NanoChatHFLM
from .noise import error_of_mean

HUMANEVAL = "chatcore_humaneval"


def evaluate(config: EvaluationConfig) -> None:
    """Score the models of a run and write the records `core` and `chatcore_<stage>`.

    Raises:
        ValueError: a stage that does not exist or has no model yet, a data folder that is none, a run folder of
            another recipe; all before the first model is loaded.
    """
    _check(config)
    for stage_name in config.stages:
        record = Stage(config.run_dir, _record_name(stage_name), _record_settings(config, stage_name))
        if record.finished:
            print(f"{record.name}: finished before, nothing to do")
            continue
        with record:
            folder, cache = Path(config.run_dir) / stage_name, record.path.with_suffix(".cache")
            record.results, record.results_file = evaluate_model(folder, config, cache, chat=stage_name != "base")
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(cache, ignore_errors=True)
            print(_table(record.name, record.results))


def _record_name(stage_name: str) -> str:
    return "core" if stage_name == "base" else f"chatcore_{stage_name}"


def _record_settings(config: EvaluationConfig, stage_name: str) -> dict:
    """What this record depends on."""
    if stage_name == "base":
        return {"stage": stage_name, "core_data": config.core_data, "limit": config.limit}
    settings = {
        "stage": stage_name,
        "eval_data": config.eval_data,
        "limit": config.limit,
        "run_unsafe_code": config.run_unsafe_code,
    }
    return settings | ({"gen_kwargs": config.gen_kwargs} if config.gen_kwargs else {})


def _check(config: EvaluationConfig) -> None:
    models = [name for name in STAGES if name != "tokenizer"]
    for name in config.stages:
        if name not in models:
            raise ValueError(
                f"stages: {name!r} is none of {', '.join(models)}; did you mean {nearest(name, models)!r}?"
            )
        if not (Path(config.run_dir) / name / "config.json").is_file():
            raise ValueError(f"{config.run_dir}/{name} holds no model yet; run the {name} stage first")
    for key in ("core_data", "eval_data"):
        folder = getattr(config, key)
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"{key}={folder}: no such folder")


def evaluate_model(folder: Path, config: EvaluationConfig, cache: Path, chat: bool) -> tuple[dict, dict]:
    """Results of one model folder: the summary `{core or chatcore: mean, tasks, missing}`, and lm-eval's own.

    Answers lie in the folder `cache` as soon as they are there, and an interrupted evaluation goes on from them. They
    are this model's alone: another state of its files gets another name.
    """
    answers = str(cache / str(max(file.stat().st_mtime_ns for file in folder.iterdir())))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm = NanoChatHFLM(str(folder), dtype="float32", device=device)
    metadata = {"pretrained": str(folder), "core_data_dir": config.core_data, "chatcore_data_dir": config.eval_data}
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False, metadata=metadata)
    if not chat:
        group = "core" if config.core_data else "core_mini"
        results = run_tasks(lm, manager, [group], config.limit if config.core_data else None, answers)
        return summarize(results, group, "core"), results_file(folder, results)
    mini_results = run_tasks(lm, manager, ["chatcore_mini"], None, answers)
    mini = summarize(mini_results, "chatcore_mini", "chatcore")
    if not config.eval_data:
        return mini, results_file(folder, mini_results)
    group = ["chatcore"]
    if not config.run_unsafe_code:
        group = [task for task in manager.load("chatcore")["group_map"]["chatcore"] if task != HUMANEVAL]
    real_results = run_tasks(lm, manager, group, config.limit, answers, config.gen_kwargs)
    real = summarize(real_results, "chatcore", "chatcore")
    if not config.run_unsafe_code:
        real["missing"].append(f"{HUMANEVAL} (needs run_unsafe_code)")
    # The mini tasks stay beside the real ones, so that stages compare on the same arithmetic whatever the data.
    summary = {**real, "tasks": real["tasks"] | mini["tasks"], "chatcore_mini": mini["chatcore"]}
    return summary, results_file(folder, real_results, mini_results)


def results_file(folder: Path, *all_results: dict) -> dict:
    """lm-eval's results of a model, those of several runs as if of one, as its own command line stores them."""
    merged: dict = {}
    for results in all_results:
        for key, value in results.items():
            if key != "samples":
                merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
    merged |= {"model_source": "nanochat_hf", "model_name": str(folder), "model_name_sanitized": folder.name}
    return json.loads(json.dumps(merged, default=handle_non_serializable))


def run_tasks(
    lm: NanoChatHFLM,
    manager: TaskManager,
    tasks: list[str],
    limit: int | None,
    cache: str | None = None,
    gen_kwargs: str | None = None,
) -> dict:
    """lm-eval's results of tasks or groups, items logged; of several processes only the first gets any.

    Args:
        cache: where to keep answers: a path to which lm-eval adds the process's rank.
    """
    results = simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=manager,
        limit=limit,
        gen_kwargs=gen_kwargs,
        bootstrap_iters=1,  # standard errors of means need no bootstrap; 0 would leave them out
        confirm_run_unsafe_code=True,  # HumanEval is among the tasks only when the recipe said run_unsafe_code
        log_samples=True,
        use_cache=cache,
        # Nothing here draws from the global generators, which a training around it may be using.
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    return results or {}


def summarize(results: dict, group: str, mean_name: str) -> dict:
    """lm-eval's results as a record's: figures and flags a task, and the group's mean centered score.

    Returns:
        `{mean_name: mean or None, mean_name_stderr: its standard error, "tasks": {name: {accuracy, stderr, centered,
        baseline, num_items, correct}}, "missing": names}`; a task whose data was missing is not in `tasks`, and the
        mean is then None, as it is where there are no results.
    """
    tasks, missing, errors = {}, [], []
    for name, samples in results.get("samples", {}).items():
        figures = results["results"][name]
        if math.isnan(figures["acc,none"]):
            missing.append(figures["alias"])
            continue
        stderr, centered_stderr = figures["acc_stderr,none"], figures["centered_stderr,none"]
        errors.append(math.nan if centered_stderr == "N/A" else centered_stderr)
        tasks[name] = {
            "accuracy": figures["acc,none"],
            "stderr": None if stderr == "N/A" else stderr,
            "centered": figures["centered,none"],
            "baseline": results["configs"][name]["metadata"]["baseline"],
            "num_items": len(samples),
            **({"format": figures["format,none"]} if "format,none" in figures else {}),
            "correct": [int(sample["acc"]) for sample in sorted(samples, key=lambda sample: sample["doc_id"])],
        }
    mean = results.get("groups", {}).get(group, {}).get("centered,none")
    if missing or mean is None:
        return {mean_name: None, f"{mean_name}_stderr": None, "tasks": tasks, "missing": missing}
    return {mean_name: mean, f"{mean_name}_stderr": error_of_mean(errors), "tasks": tasks, "missing": missing}


def _table(name: str, results: dict) -> str:
    """What the terminal shows of a record."""
    lines = [f"{name:<44}{'accuracy':>10}{'± s.e.':>9}{'centered':>10}{'items':>7}"]
    for task, figures in results["tasks"].items():
        stderr = "-" if figures["stderr"] is None else f"{figures['stderr']:.4f}"
        lines.append(
            f"{task:<44}{figures['accuracy']:>10.4f}{stderr:>9}{figures['centered']:>10.4f}{figures['num_items']:>7}"
        )
    mean = results.get("core", results.get("chatcore"))
    if mean is None:
        lines.append(f"mean centered score: not whole, missing {', '.join(results['missing'])}")
    else:
        stderr = results.get("core_stderr", results.get("chatcore_stderr"))
        lines.append(f"{'mean centered score':<54}{stderr:>9.4f}{mean:>10.4f}")
    return "\n".join(lines)
