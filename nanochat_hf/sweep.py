"""A ladder of depths at fixed compute: which size makes the best of so many FLOPs (isoFLOP curves).

Every rung is a pretraining run of its own in `<run_dir>/flops-2e+12/d3`, resumable like any other; its number of steps
is what the FLOPs allow. The plot and `eval/sweep.json` come last.

    python scripts/sweep.py --config recipes/ladder/sweep.yaml
"""

import json
import math
from dataclasses import fields
from pathlib import Path

import numpy as np

from .configs import PretrainConfig, SweepConfig
from .pretrain_plan import planned_vocab_size, scaling_plan
from .stage import Stage

DERIVED = ("depth", "num_steps", "tokens_per_parameter")


def ladder(config: SweepConfig, settings: dict) -> list[tuple[PretrainConfig, dict]]:
    """A recipe and its explicit settings for every rung, smallest first, each with the sweep's tokenizer in its folder.

    Raises:
        ValueError: no depths or FLOPs, a setting that the sweep derives, or FLOPs too few for a single step.
    """
    if not config.depths or not config.flops or min(config.flops) <= 0:
        raise ValueError("a sweep needs depths and FLOPs: --depths 2 3 4 --flops 2e12 4e12")
    if said := [name for name in DERIVED if name in settings]:
        raise ValueError(f"{said[0]} is not to be set: a sweep derives it from `depths` and `flops`")
    tokenizer = Path(config.run_dir) / "tokenizer"
    vocab_size = planned_vocab_size(config, tokenizer)
    rungs = []
    for flops in sorted(config.flops):
        for depth in sorted(config.depths):
            said = {key: value for key, value in settings.items() if key not in ("depths", "flops")}
            said |= {"depth": depth, "run_dir": str(rung_folder(config, flops, depth))}
            plan = scaling_plan(recipe(config, said), vocab_size)
            said["num_steps"] = round(flops / (plan.flops_per_token * plan.total_batch_tokens))
            if not said["num_steps"]:
                raise ValueError(f"{flops:g} FLOPs are less than a step of depth {depth}: more, or a smaller batch")
            if not config.plan:
                share_tokenizer(Path(said["run_dir"]))
            rungs.append((recipe(config, said), said))
    return rungs


def recipe(config: SweepConfig, said: dict) -> PretrainConfig:
    """The sweep's own settings with a rung's put over them."""
    return PretrainConfig(**{f.name: said.get(f.name, getattr(config, f.name)) for f in fields(PretrainConfig)})


def rung_folder(config: SweepConfig, flops: float, depth: int) -> Path:
    return Path(config.run_dir) / f"flops-{flops:g}" / f"d{depth}"


def share_tokenizer(run_dir: Path) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        (run_dir / "tokenizer").symlink_to(Path("../../tokenizer"))
    except FileExistsError:
        pass  # resumed, or another process was first


def finish_sweep(config: SweepConfig, settings: dict) -> list[dict]:
    """Collect the rungs' figures into `eval/sweep.json` and draw `plots/isoflop.png`; returns the figures."""
    stage = Stage(config.run_dir, "sweep", settings)
    with stage:
        rows = []
        for flops in sorted(config.flops):
            for depth in sorted(config.depths):
                record = rung_folder(config, flops, depth) / "eval" / "base.json"
                results = json.loads(record.read_text())["results"]
                names = ("num_parameters", "tokens", "total_flops", "val_bpb")
                rows.append({"flops": flops, "depth": depth} | {name: results[name] for name in names})
        stage.results |= {"rungs": rows, "best_parameters": best_sizes(rows)}
        path = Path(config.run_dir) / "plots" / "isoflop.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(rows, stage.results["best_parameters"], path)
    print(f"{'FLOPs':>10} {'depth':>6} {'parameters':>12} {'tokens':>12} {'val bpb':>8}")
    for row in rows:
        print("{flops:>10.3g} {depth:>6} {num_parameters:>12,} {tokens:>12,} {val_bpb:>8.4f}".format(**row))
    print(f"\n{path}")
    return rows


def best_sizes(rows: list[dict]) -> dict[str, float | None]:
    """Parameters at the lowest point of a parabola in log(parameters), a budget of FLOPs each.

    None where fewer than three sizes were trained, or where the lowest point lies outside of them.
    """
    best = {}
    for flops in sorted({row["flops"] for row in rows}):
        points = [row for row in rows if row["flops"] == flops]
        sizes, losses = [math.log(row["num_parameters"]) for row in points], [row["val_bpb"] for row in points]
        lowest = None
        if len(sizes) >= 3:
            a, b, _ = np.polyfit(sizes, losses, 2)
            lowest = -b / (2 * a) if a > 0 else None
        inside = lowest is not None and min(sizes) <= lowest <= max(sizes)
        best[f"{flops:g}"] = math.exp(lowest) if inside else None
    return best


def draw(rows: list[dict], best: dict[str, float | None], path: Path) -> None:
    """Bits per byte over parameters, a curve a budget; a dotted line where the fitted best size lies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, flops in enumerate(sorted({row["flops"] for row in rows})):
        points = [row for row in rows if row["flops"] == flops]
        sizes, losses = [row["num_parameters"] for row in points], [row["val_bpb"] for row in points]
        axis.plot(sizes, losses, marker="o", color=f"C{i}", label=f"{flops:g} FLOPs")
        for row in points:
            axis.annotate(
                f"d{row['depth']}", (row["num_parameters"], row["val_bpb"]), (4, 4), textcoords="offset points"
            )
        if size := best[f"{flops:g}"]:
            axis.axvline(size, color=f"C{i}", linestyle=":", linewidth=1)
    axis.set(
        xscale="log", xlabel="parameters", ylabel="validation bits per byte", title="Best size for a compute budget"
    )
    axis.grid(color="#e6e8eb", linewidth=0.8)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
