"""Reading a run folder: stage records, curves, sessions, wall clock. The report knows a run only through this file."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..stage import results_of


@dataclass
class Session:
    """One call of run.sh. Times are seconds since 1970; `stages` are those that it finished or took further."""

    started: float
    ended: float
    commit: str
    stages: list[str]


class RunRecords:
    """The records of one run.

    Args:
        run_dir: a run's folder, with `eval/<record>.json`, `logs/<stage>.jsonl` and perhaps `sessions.jsonl`.

    Raises:
        ValueError: no such folder, no record in it, or a file in it that is not JSON.
    """

    def __init__(self, run_dir: str | Path):
        self.run_dir = Path(run_dir)
        if not self.run_dir.is_dir():
            raise ValueError(f"run_dir={run_dir}: no such folder; a run's folder is made by recipes/*/run.sh")
        self.reload()

    def reload(self) -> None:
        """Read the records from disk again."""
        self.records = {path.stem: _read_json(path) for path in sorted((self.run_dir / "eval").glob("*.json"))}
        for name, record in self.records.items():
            if not isinstance(record, dict) or "results" not in record:
                raise ValueError(f"{self.run_dir}/eval/{name}.json is no stage record: it has no `results`; delete it")
        if not self.records:
            raise ValueError(f"{self.run_dir} holds no finished stage (no eval/*.json); run a recipe first")

    def __contains__(self, name: str) -> bool:
        return name in self.records

    def settings(self, name: str) -> dict:
        """What the recipe said; empty for a stage that has not run."""
        return self.records.get(name, {}).get("settings", {})

    def results(self, name: str) -> dict:
        """What came out; empty for a stage that has not run."""
        return results_of(self.records[name]) if name in self.records else {}

    def cost(self, name: str) -> dict:
        """`seconds` and `peak_memory_mib` of a stage that ran."""
        return {
            key: self.records[name][key] for key in ("seconds", "peak_memory_mib") if key in self.records.get(name, {})
        }

    def newest_time(self) -> float:
        """When the last stage finished, seconds since 1970."""
        return max(record.get("finished", 0.0) for record in self.records.values())

    def first_time(self) -> float:
        """When the run began, seconds since 1970."""
        sessions = self.sessions(now=self.newest_time())
        return min(
            [record.get("started", float("inf")) for record in self.records.values()] + [s.started for s in sessions]
        )

    def curve(self, name: str) -> list[dict]:
        """The lines of a stage's curve in order; a half-written last line is left out."""
        path = self.run_dir / "logs" / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):
                    raise ValueError(f"{path}, line {number} is not JSON ({error}); delete that line") from error
        # A resumed stage writes the steps after its checkpoint again: of each step and kind of line the last counts.
        latest = {(row.get("step"), *sorted(row)): row for row in rows}
        return sorted(latest.values(), key=lambda row: row.get("step", 0))

    def sessions(self, now: float) -> list[Session]:
        """The calls of run.sh in which a stage was finished or saved; the one that is making this report ends `now`.

        A session that was killed outright ends with its last event: what it did after that is not counted. One that
        was refused, for a wrong setting say, is not counted at all.
        """
        path = self.run_dir / "sessions.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines() if line] if path.is_file() else []
        sessions: list[Session] = []
        for event in events:
            if event["event"] == "session_start":
                sessions.append(Session(event["time"], event["time"], event["name"], []))
            elif sessions:
                sessions[-1].ended = event["time"]
                if event["event"] in ("stage_end", "stage_saved"):
                    sessions[-1].stages.append(event["name"])
        if sessions and events[-1]["event"] == "report_start":
            sessions[-1].ended = now
        return [session for session in sessions if session.stages]

    def total_seconds(self, now: float) -> float:
        """Wall clock from raw text to this moment: all sessions, set-up and pauses between them excluded.

        Stages started by hand leave no session; then it is the sum of the stages' own seconds (`base_loss` is a part of
        `base`).
        """
        sessions = self.sessions(now)
        if sessions:
            return sum(session.ended - session.started for session in sessions)
        return sum(record.get("seconds", 0.0) for name, record in self.records.items() if name != "base_loss")


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it and run the recipe again") from error
