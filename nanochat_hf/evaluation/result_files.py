"""Reading scores: lm-eval's results files with their samples, and the evaluation records of a run.

A run's record (`eval/core.json`) is a results file of lm-eval's with a few keys more, the flags of the items among
them; lm-eval itself writes those to `samples_<task>_<date>.jsonl` beside `results_<date>.json` (`--log_samples`).
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from .json_lines import read_json_lines

ADVICE = "give a results file of lm-eval's (--output_path DIR --log_samples), its folder, a run's folder or eval/*.json"


@dataclass
class TaskScore:
    """One task of one model.

    Attributes:
        metric: what `value` is, e.g. `acc`.
        stderr: nan where unknown.
        baseline: score of guessing, None for a task that is no task of ours.
        items: item -> its score, for pairing; empty where no samples were kept.
    """

    metric: str
    value: float
    stderr: float
    num_items: int
    baseline: float | None = None
    items: dict[str, float] = field(default_factory=dict)


@dataclass
class ModelScores:
    """What one argument of `compare.py` holds; `groups` are mean centered scores with the tasks they are of."""

    name: str
    tasks: dict[str, TaskScore]
    groups: dict[str, tuple[float, list[str]]]


def read_scores(path: str | Path) -> ModelScores:
    """Scores of a results file, of the newest one below a folder, or of a run.

    Raises:
        ValueError: nothing there, or nothing of lm-eval's in it.
    """
    path = Path(path)
    if path.is_dir():
        files = newest_results(path)
        if not files:
            raise ValueError(f"{path} holds no results_*.json and no eval/*.json; {ADVICE}")
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(f"no file or folder {path}; {ADVICE}")
    scores = ModelScores(str(path), {}, {})
    for file in files:
        _add_file(scores, file)
    return scores


def newest_results(folder: Path) -> list[Path]:
    """The newest results_*.json below a folder; of a run its CORE record and its last model's chat record."""
    files = sorted(folder.rglob("results_*.json"), key=lambda file: (file.stat().st_mtime, file.name))
    if files:
        return files[-1:]
    chat = [folder / "eval" / f"chatcore_{stage}.json" for stage in ("rl", "sft", "mid")]
    found = [file for file in chat if file.is_file()][:1]
    core = folder / "eval" / "core.json"
    return [core, *found] if core.is_file() else found


def _add_file(scores: ModelScores, path: Path) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); {ADVICE}") from error
    if not isinstance(content, dict) or not {"results", "configs"} <= content.keys():
        raise ValueError(f"{path} is no results file of lm-eval's: it has no `results` and `configs`; {ADVICE}")
    groups = content.get("groups", {})
    for name, figures in content["results"].items():
        if name not in groups and (task := _task(content, path, name, figures)) is not None:
            scores.tasks[name] = task
    for name, figures in groups.items():
        mean = figures.get("centered,none")
        if mean is not None and not math.isnan(mean):
            scores.groups[name] = (mean, content.get("group_subtasks", {}).get(name, []))


def _task(content: dict, path: Path, name: str, figures: dict) -> TaskScore | None:
    """The task's first metric (accuracy before others); None for a task without a score, e.g. for want of data."""
    keys = [key for key, value in figures.items() if "," in key and isinstance(value, (int, float))]
    keys = [key for key in sorted(keys, key=lambda key: key != "acc,none") if "_stderr," not in key]
    if not keys or math.isnan(figures[keys[0]]):
        return None
    metric, _, kind = keys[0].partition(",")
    stderr = figures.get(f"{metric}_stderr,{kind}")
    num_items = content.get("n-samples", {}).get(name, {}).get("effective") or figures.get("sample_len", 0)
    baseline = (content["configs"].get(name, {}).get("metadata") or {}).get("baseline")
    stderr = stderr if isinstance(stderr, float) else math.nan
    items = _items(content, path, name, metric, kind)
    return TaskScore(metric, figures[keys[0]], stderr, num_items, baseline, items)


def _items(content: dict, path: Path, name: str, metric: str, kind: str) -> dict[str, float]:
    """Scores of the single items: of the record itself, else of lm-eval's samples beside the file.

    lm-eval has a sample for each of a task's filters, `kind` the one that counts, and for metrics of a whole task
    (perplexity, F1) no number an item: then there is nothing to pair.
    """
    recorded = content.get("summary", {}).get("tasks", {}).get(name, {}).get("correct")
    if recorded is not None:
        return {str(index): flag for index, flag in enumerate(recorded)}
    date = path.stem.rpartition("_")[2]
    samples = path.with_name(f"samples_{name}_{date}.jsonl")
    if not samples.is_file():
        return {}
    kept = [sample for _, sample in read_json_lines(samples) if sample.get("filter", kind) == kind]
    if not all(isinstance(sample.get(metric), (int, float)) for sample in kept):
        return {}
    return {str(sample["doc_id"]): float(sample[metric]) for sample in kept}
