"""The report's last tables: every score by stage beside the published d20's, time and cost, sessions."""

from . import published
from .formatting import duration, mebibytes, number, table
from .metrics import CHAT_STAGES, tasks_of
from .run_records import RunRecords

STAGES = ("base", "mid", "sft", "rl")


def summary_table(records: RunRecords, metrics: dict) -> str:
    """A row a metric, a column a stage, then the published d20's columns (it has no RL stage)."""
    core_row, chat_row = "CORE", "ChatCORE"
    if not any(task.removeprefix("core_") in published.CORE for task in tasks_of(records, "core")):
        core_row = "CORE (embedded mini tasks)"
    scores: dict[str, dict[str, float]] = {}
    for stage in CHAT_STAGES:
        for task, figures in tasks_of(records, f"chatcore_{stage}").items():
            scores.setdefault(published.row_name(task), {})[stage] = figures["accuracy"]
    if not scores.keys() & set(published.CHATCORE_TASKS):
        chat_row = "ChatCORE (embedded mini tasks)"
    ours: dict[str, dict[str, float | None]] = {"CORE": {}}
    ours |= {core_row: {"base": metrics.get("core", {}).get("core")}}
    ours |= {name: {} for name in published.CHATCORE_TASKS} | scores | {"ChatCORE": {}}
    ours |= {chat_row: {stage: metrics.get(stage, {}).get("chatcore") for stage in CHAT_STAGES}}
    ours["validation bits per byte"] = {stage: metrics.get(stage, {}).get("val_bpb") for stage in STAGES}
    header = ["Metric", *map(str.upper, STAGES), *(f"{published.NAME} {stage.upper()}" for stage in STAGES[:3])]
    rows = []
    for name, values in ours.items():
        theirs = published.SUMMARY.get(name, {})
        rows.append(
            [name, *(number(values.get(stage)) for stage in STAGES), *(number(theirs.get(s)) for s in STAGES[:3])]
        )
    return (
        table(header, rows)
        + "\n\nBits per byte are over a stage's own targets; with `assistant_only_loss`, answers alone."
    )


def cost_table(records: RunRecords, metrics: dict, hourly_rate: float | None) -> str:
    """Seconds, tokens, tokens a second and peak memory of every record; dollars where the machine's price is known."""
    theirs_too = [f"{published.NAME} wall clock", f"{published.NAME} tokens"]
    header = ["Step", "Wall clock", "Tokens", "Tokens/s", "Peak memory", *theirs_too]
    rows = []
    for name in sorted(records.records, key=lambda name: records.records[name].get("started", 0.0)):
        results, cost = records.results(name), records.cost(name)
        seconds, tokens = cost.get("seconds"), results.get("tokens")
        rate = results.get("tokens_per_second")
        their_seconds, their_tokens = published.COST.get(name, (None, None))
        rows.append(
            [
                name,
                duration(seconds),
                number(tokens),
                number(rate and round(rate)),
                mebibytes(cost.get("peak_memory_mib")),
                duration(their_seconds),
                number(their_tokens),
            ]
        )
    total = metrics["total_seconds"]
    rows.append(["total", duration(total), "-", "-", "-", duration(published.COST["total"][0]), "-"])
    text = table(header, rows)
    if hourly_rate is not None:
        text += f"\n\nCost at ${hourly_rate:.2f} an hour: ${hourly_rate * total / 3600:.2f}"
    return text


def sessions_table(records: RunRecords, now: float) -> str:
    """The calls of run.sh that make up the wall clock."""
    from .sections import timestamp

    sessions = records.sessions(now)
    if not sessions:
        return "The stages were started one by one: the total is the sum of their own times."
    rows = [
        [
            timestamp(session.started),
            duration(session.ended - session.started),
            session.commit,
            ", ".join(session.stages),
        ]
        for session in sessions
    ]
    header = ["Session started", "Wall clock", "Commit", "Stages"]
    return (
        table(header, rows)
        + "\n\nThe total is the sum of the sessions; installation and pauses between them are left out."
    )
