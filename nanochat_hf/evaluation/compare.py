"""Models side by side, with standard errors and, against the first, paired differences.

    python scripts/compare.py runs/a runs/b            # runs, results files of lm-eval's, or folders of such files

Two models that answered the same items are compared item by item: what both find easy or hard drops out, so much
smaller differences show. A difference that equally good models would show more than once in twenty times is noise.
"""

from collections.abc import Sequence

from .noise import Difference, error_of_mean, mean_difference, paired_difference, unpaired_difference
from .result_files import ModelScores, TaskScore, read_scores


def compare(paths: Sequence[str]) -> str:
    """The table of several models as Markdown.

    Raises:
        ValueError: fewer than two models, a path without results, no task that two models share.
    """
    if len(paths) < 2:
        raise ValueError("give two models or more: python scripts/compare.py A B")
    models = [read_scores(path) for path in paths]
    names = list(dict.fromkeys(name for model in models for name in model.tasks))
    first, others = models[0], models[1:]
    if not any(name in first.tasks and name in other.tasks for name in names for other in others):
        raise ValueError(f"{first.name} shares no task with the others; evaluate them on the same tasks")
    letters = [chr(ord("A") + i) for i in range(len(models))]
    head = ["task", "items", *letters, *(f"{letter} - A" for letter in letters[1:])]
    lines = [f"{letter}: {model.name}" for letter, model in zip(letters, models, strict=True)]
    lines += ["", row(head), row(["---"] + ["--:"] * (len(head) - 1))]
    differences: list[dict[str, Difference]] = [{} for _ in others]
    for name in names:
        scores = [model.tasks.get(name) for model in models]
        num_items = "/".join(dict.fromkeys(str(score.num_items) for score in scores if score))
        cells = [name, num_items, *map(score_text, scores)]
        for i, other in enumerate(scores[1:]):
            if scores[0] is None or other is None:
                cells.append("-")
                continue
            differences[i][name] = difference_of(name, scores[0], other)
            cells.append(difference_text(differences[i][name]))
        lines.append(row(cells))
    for group in dict.fromkeys(name for model in models for name in model.groups):
        lines.append(row(group_cells(group, models, differences)))
    if any(not difference.is_paired for each in differences for difference in each.values()):
        lines.append("\nunpaired: not every item's score is at hand (lm-eval keeps them with --log_samples)")
    return "\n".join(lines)


def difference_of(name: str, before: TaskScore, after: TaskScore) -> Difference:
    """One task of two models; paired when both kept their items.

    Raises:
        ValueError: other items, or another metric: such scores do not compare.
    """
    if before.metric != after.metric:
        raise ValueError(f"{name}: one model has {before.metric}, the other {after.metric}; evaluate with one lm-eval")
    if not before.items or not after.items:
        return unpaired_difference(before.value, before.stderr, after.value, after.stderr)
    if before.items.keys() != after.items.keys():
        raise ValueError(
            f"{name}: the models answered other items ({len(before.items)} and {len(after.items)}); evaluate both with "
            f"the same --limit"
        )
    return paired_difference(list(before.items.values()), [after.items[item] for item in before.items])


def group_cells(group: str, models: Sequence[ModelScores], differences: Sequence[dict[str, Difference]]) -> list[str]:
    """A group's row: its mean centered score, and the differences of its tasks put together."""
    cells = [f"**{group}**", ""]
    for model in models:
        mean, tasks = model.groups.get(group, (None, []))
        if mean is None:
            cells.append("-")
            continue
        errors = [centered(model.tasks[name].stderr, model.tasks[name]) for name in tasks]
        cells.append(f"{mean:.4f} ± {error_of_mean(errors):.4f}")
    tasks = next(model.groups[group][1] for model in models if group in model.groups)
    for model, of_task in zip(models[1:], differences, strict=True):
        if group not in models[0].groups or group not in model.groups or not set(tasks) <= of_task.keys():
            cells.append("-")
            continue
        scales = [centered(1.0, model.tasks[name]) for name in tasks]
        cells.append(difference_text(mean_difference([of_task[name] for name in tasks], scales)))
    return cells


def centered(amount: float, task: TaskScore) -> float:
    """An amount of accuracy as one of centered score."""
    return amount / (1 - (task.baseline or 0.0))


def score_text(score: TaskScore | None) -> str:
    return "-" if score is None else f"{score.value:.4f} ± {score.stderr:.4f}"


def difference_text(difference: Difference) -> str:
    verdict = "inside the noise" if difference.is_noise else f"p {difference.p_value:.2g}"
    if difference.is_paired and difference.value == difference.stderr == 0:
        verdict = "the same items right"
    paired = "" if difference.is_paired else ", unpaired"
    return f"{difference.value:+.4f} ± {difference.stderr:.4f} ({verdict}{paired})"


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
