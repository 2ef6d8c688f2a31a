"""The report's plots as PNG: loss, bits per byte, learning rate, reward, CORE by task; none is drawn without data."""

from pathlib import Path

from ..evaluation.noise import error_of_share
from .metrics import tasks_of
from .published import CORE as PUBLISHED_CORE
from .published import NAME as PUBLISHED_NAME
from .run_records import RunRecords

# file stem -> (title, y label, stages, names a curve may have it under)
CURVES = {
    "loss": ("Training loss", "nats per target token", ("base", "mid", "sft"), ("loss",)),
    "bpb": ("Validation bits per byte", "bits per byte", ("base", "mid", "sft"), ("val_bpb",)),
    "learning_rate": (
        "Learning rate",
        "share of the peak",
        ("base", "mid", "sft", "rl"),
        ("lr_factor", "learning_rate"),
    ),
    "reward": ("Reward in RL", "mean reward of a step", ("rl",), ("reward",)),
}
LINE_COLOR, OTHER_COLOR = "#2a6fbb", "#b9bec6"


def draw_plots(records: RunRecords) -> dict[str, str]:
    """Draw what the run has figures for into `<run_dir>/plots`.

    Returns:
        Title -> path relative to the run's folder, in the report's order.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder = records.run_dir / "plots"
    folder.mkdir(exist_ok=True)
    drawn = {}
    for stem, (title, label, stages, names) in CURVES.items():
        curves = {stage: read_curve(records, stage, names) for stage in stages}
        curves = {stage: points for stage, points in curves.items() if len(points) > 1}
        if curves:
            draw_curves(folder / f"{stem}.png", title, label, curves)
            drawn[title] = f"plots/{stem}.png"
    tasks = tasks_of(records, "core")
    if tasks:
        draw_core(folder / "core_by_task.png", tasks)
        drawn["CORE by task"] = "plots/core_by_task.png"
    return drawn


def read_curve(records: RunRecords, stage: str, names: tuple[str, ...]) -> list[tuple[int, float]]:
    """(step, value) of the first of `names` that the stage logged."""
    rows = records.curve(stage)
    for name in names:
        points = [(row["step"], row[name]) for row in rows if "step" in row and isinstance(row.get(name), (int, float))]
        if points:
            peak = max(abs(value) for _, value in points) if name == "learning_rate" else 1
            return [(step, value / (peak or 1)) for step, value in points]
    return []


def draw_curves(path: Path, title: str, label: str, curves: dict[str, list[tuple[int, float]]]) -> None:
    """One panel a stage, side by side: their steps and scales differ."""
    import matplotlib.pyplot as plt

    size = min(4.5 * len(curves), 12), 3
    figure, axes = plt.subplots(1, len(curves), figsize=size, squeeze=False, layout="constrained")
    for axis, (stage, points) in zip(axes[0], curves.items(), strict=True):
        axis.plot(*zip(*points, strict=True), color=LINE_COLOR, linewidth=1.5, marker="o" if len(points) < 12 else "")
        axis.set(title=stage if len(curves) > 1 else title, xlabel="optimizer step")
        axis.grid(color="#e6e8eb", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(label)
    if len(curves) > 1:
        figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_core(path: Path, tasks: dict[str, dict]) -> None:
    """Centered score a task with its standard error, the published d20's beside ours where it is the same task."""
    import matplotlib.pyplot as plt

    names = sorted(tasks, key=lambda name: tasks[name]["centered"])
    scores = [tasks[name]["centered"] for name in names]
    errors = [
        error_of_share(task["accuracy"], task.get("num_items", 0)) / (1 - (task.get("baseline") or 0.0))
        for task in (tasks[name] for name in names)
    ]
    ours = {"color": LINE_COLOR, "xerr": errors, "error_kw": {"elinewidth": 0.8, "ecolor": "#60656d"}}
    published = {
        name: PUBLISHED_CORE[name.removeprefix("core_")]
        for name in names
        if name.removeprefix("core_") in PUBLISHED_CORE
    }
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.32 * len(names)), layout="constrained")
    rows = range(len(names))
    if published:
        axis.barh(
            [row - 0.2 for row in rows],
            [published.get(name, 0) for name in names],
            0.38,
            color=OTHER_COLOR,
            label=PUBLISHED_NAME,
        )
        axis.barh([row + 0.2 for row in rows], scores, 0.38, label="this run", **ours)
        axis.legend(frameon=False, loc="lower right")
    else:
        axis.barh(rows, scores, 0.6, **ours)
    axis.axvline(0, color="#60656d", linewidth=0.8)
    axis.set_yticks(list(rows), [name.removeprefix("core_") for name in names])
    axis.set(title="CORE by task", xlabel="centered score with its standard error: 0 = guessing, 1 = all right")
    axis.grid(axis="x", color="#e6e8eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
