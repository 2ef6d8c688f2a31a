"""The run's figures for machines: `metrics.json`, one object, a key a stage; stages that did not run are not in it."""

import math

from ..evaluation.noise import error_of_share, sign_test
from .run_records import RunRecords

# What metrics.json names -> the chatcore task it comes from.
CHAT_ACCURACIES = {
    "multiple_choice_accuracy": "multiple_choice",
    "arithmetic_accuracy": "arithmetic",
    "letter_counting_accuracy": "letter_counting",
}
CHAT_STAGES = ("mid", "sft", "rl")


def build_metrics(records: RunRecords, total_seconds: float) -> dict:
    """All figures of a run: each stage's results with `seconds` and `peak_memory_mib`, and `total_seconds`.

    `core` and `chatcore` hold their mean with its standard error and one score a task (centered for CORE, accuracy for
    ChatCORE, there of the last stage that was evaluated), and `num_items`, a number a task; `sft` and `rl` hold the
    accuracies of their own chat evaluation.
    """
    metrics: dict = {}
    for name in ("tokenizer", "base", "mid", "sft", "rl"):
        if name in records:
            metrics[name] = scalars(records.results(name)) | records.cost(name)
    if "base" in metrics and "base_loss" in records:
        metrics["base"] |= {k: v for k, v in scalars(records.results("base_loss")).items() if k.endswith("_bpb")}
    for stage in CHAT_STAGES:
        if f"chatcore_{stage}" in records:
            metrics.setdefault(stage, {}).update(chat_accuracies(records, stage))
    if "rl" in metrics and (paired := compare_arithmetic(records, "sft", "rl")):
        metrics["rl"]["paired_test_sft_to_rl"] = paired
    if "core" in records:
        centered = {name: task["centered"] for name, task in tasks_of(records, "core").items()}
        metrics["core"] = mean_of(records, "core", "core") | centered | records.cost("core")
    evaluated = [stage for stage in CHAT_STAGES if f"chatcore_{stage}" in records]
    if evaluated:
        name = f"chatcore_{evaluated[-1]}"
        accuracy = {task: figures["accuracy"] for task, figures in tasks_of(records, name).items()}
        mean = mean_of(records, name, "chatcore")
        metrics["chatcore"] = mean | accuracy | {"stage": evaluated[-1]} | records.cost(name)
    return metrics | {"total_seconds": total_seconds}


def mean_of(records: RunRecords, name: str, group: str) -> dict:
    """The mean centered score of a record, its standard error, and how many items each task had."""
    results, keys = records.results(name), (group, f"{group}_stderr")
    num_items = {task: figures.get("num_items") for task, figures in tasks_of(records, name).items()}
    return {key: results.get(key) for key in keys} | {"num_items": num_items}


def scalars(results: dict) -> dict:
    """The figures among a stage's results: no lists, tables or text."""
    return {
        key: value for key, value in results.items() if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def tasks_of(records: RunRecords, name: str) -> dict[str, dict]:
    """Evaluated tasks of a record: name -> `accuracy`, `centered`, `num_items`, perhaps `correct` (0 or 1 an item)."""
    return records.results(name).get("tasks", {})


def find_task(records: RunRecords, name: str, kind: str) -> dict | None:
    """The task of an evaluation whose name says it is of this kind: `arithmetic` matches `chatcore_mini_arithmetic`."""
    return next((task for key, task in tasks_of(records, name).items() if key.endswith(kind)), None)


def chat_accuracies(records: RunRecords, stage: str) -> dict:
    """The embedded tasks' accuracies of a stage with their standard errors, and its ChatCORE."""
    figures = {}
    for key, kind in CHAT_ACCURACIES.items():
        if task := find_task(records, f"chatcore_{stage}", kind):
            figures[key] = task["accuracy"]
            figures[key.replace("_accuracy", "_stderr")] = error_of_share(task["accuracy"], task["num_items"])
            figures["num_" + key.replace("_accuracy", "_problems")] = task["num_items"]
    return figures | {"chatcore": records.results(f"chatcore_{stage}").get("chatcore")}


def compare_arithmetic(records: RunRecords, before: str, after: str) -> dict | None:
    """Exact paired test (McNemar) of two stages on the same arithmetic problems; None where either did not run.

    Only problems on which the two differ say anything: were the stages equally good, each such problem would go either
    way like a coin. `p_value` is the two-sided binomial probability of a split at least as uneven.

    Raises:
        ValueError: the two stages were not evaluated on the same number of problems.
    """
    flags = []
    for stage in (before, after):
        task = find_task(records, f"chatcore_{stage}", "arithmetic")
        if task is None or "correct" not in task:
            return None
        flags.append([bool(flag) for flag in task["correct"]])
    first, second = flags
    if len(first) != len(second):
        raise ValueError(
            f"{before} was scored on {len(first)} arithmetic problems and {after} on {len(second)}: a paired test "
            f"needs the same ones; delete eval/chatcore_{before}.json and eval/chatcore_{after}.json and evaluate again"
        )
    pairs = list(zip(first, second, strict=True))
    only_before, only_after = pairs.count((True, False)), pairs.count((False, True))
    return {
        "num_problems": len(pairs),
        "both_right": pairs.count((True, True)),
        f"only_{before}_right": only_before,
        f"only_{after}_right": only_after,
        "both_wrong": pairs.count((False, False)),
        "difference": (only_after - only_before) / max(len(pairs), 1),
        "difference_stderr": paired_standard_error(only_before, only_after, len(pairs)),
        "p_value": sign_test(only_before, only_after),
    }


def paired_standard_error(losses: int, wins: int, num_problems: int) -> float:
    """Standard error of the mean difference (wins - losses) / num_problems of the same problems scored twice."""
    if num_problems < 2:
        return math.nan
    return math.sqrt((losses + wins - (wins - losses) ** 2 / num_problems) / (num_problems - 1) / num_problems)
