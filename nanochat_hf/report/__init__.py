"""The report of a run: `report.md`, `report.html`, `metrics.json` and `plots/*.png` in the run's folder.

Everything is read from the stage records (`eval/*.json`) and curves (`logs/*.jsonl`), so a report can be built again
at any time; what a run has not done stands there as "-" or as a line that says so. Sections, their order and their
results are those of nanochat's training report, with its published d20 figures beside ours.

    python scripts/report.py --run_dir runs/tiny
"""

import time

from ..configs import ReportConfig
from ..stage import write_json
from . import sections
from .environment import read_environment
from .formatting import bullets, duration
from .metrics import build_metrics
from .page import report_page
from .plots import draw_plots
from .run_records import RunRecords
from .samples import answer_samples
from .summary import cost_table, sessions_table, summary_table


def build_report(config: ReportConfig) -> None:
    """Answer the sample questions, then write `report.md`, its page, `metrics.json` and the plots.

    Raises:
        ValueError: no run folder, no finished stage in it, or a damaged record.
    """
    records = RunRecords(config.run_dir)
    if config.questions:
        answer_samples(records, config.questions)
    environment = read_environment(records.run_dir, records.newest_time())
    plots = draw_plots(records)
    now = time.time()
    metrics = build_metrics(records, records.total_seconds(now))
    text = render(records, metrics, environment, plots, config.hourly_rate, now)
    (records.run_dir / "report.md").write_text(text, encoding="utf-8")
    (records.run_dir / "report.html").write_text(report_page(text, records.run_dir), encoding="utf-8")
    write_json(records.run_dir / "metrics.json", metrics)
    print(summary_table(records, metrics))
    for answer in records.results("samples").get("answers", []):
        print(f"\n> {answer['question']}\n{answer['answer']}")
    print(f"\n{records.run_dir}/report.md, total wall clock {duration(metrics['total_seconds'])}")


def render(
    records: RunRecords, metrics: dict, environment: dict, plots: dict, hourly_rate: float | None, now: float
) -> str:
    """The report as Markdown.

    Args:
        metrics: what `build_metrics` made of the records.
        environment: title -> {name: value}.
        plots: title -> path relative to the run's folder.
        hourly_rate: price of the machine in US dollars an hour, None = not known.
        now: seconds since 1970.
    """
    if hourly_rate is not None:
        environment["Hardware"] = environment["Hardware"] | {"Hourly Rate": f"${hourly_rate:.2f}/hour"}
    setting = [f"### {title}\n{bullets(values.items())}" for title, values in environment.items()]
    parts = [
        f"# nanochat-hf training report\n\nGenerated: {sections.timestamp(now)}",
        "\n\n".join(["## Environment", *setting, f"Run started: {sections.timestamp(records.first_time())}"]),
        "---",
        sections.stage_section(records, "Tokenizer training", "tokenizer"),
        sections.tokenizer_evaluation(records),
        sections.stage_section(records, "Base model training", "base"),
        sections.base_loss(records),
        sections.base_evaluation(records),
        sections.stage_section(records, "Midtraining", "mid"),
        sections.chat_evaluation(records, "mid"),
        sections.stage_section(records, "Chat SFT", "sft"),
        sections.chat_evaluation(records, "sft"),
        sections.stage_section(records, "Chat RL", "rl"),
        sections.chat_evaluation(records, "rl"),
        sections.paired_test(metrics.get("rl", {}).get("paired_test_sft_to_rl")),
        *([sections.stage_section(records, "Preferences (DPO)", "dpo")] if "dpo" in records else []),
        "## Plots\n\n"
        + ("\n\n".join(f"![{title}]({path})" for title, path in plots.items()) or "No curve was recorded."),
        sections.samples(records),
        f"## Summary\n\n{bullets(environment['Bloat'].items())}\n\n{summary_table(records, metrics)}",
        f"### Time and cost\n\n{cost_table(records, metrics, hourly_rate)}\n\n{sessions_table(records, now)}",
        f"Total wall clock time: {duration(metrics['total_seconds'])}",
    ]
    return "\n\n\n".join(parts) + "\n"
