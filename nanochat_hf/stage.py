"""One record per stage of a run: `<run_dir>/eval/<stage>.json`, written when the stage has finished.

Stages meet only through directories on disk. A record makes `run.sh` resumable (a stage whose record exists is done),
protects a run folder from another recipe, and is all the report reads. Curves go to `<run_dir>/logs/<stage>.jsonl`, and
the settings a stage was started with to `<run_dir>/logs/<stage>.settings.json`.

    stage = Stage(run_dir, "base", settings)
    if stage.finished:
        return stage.results
    with stage:
        stage.log(step=1, loss=9.0)
        stage.results["val_bpb"] = 1.2
"""

import json
import os
import resource
import time
from pathlib import Path

# Where a run lies, and goes to, is no setting of it: moved or published it is still the same run.
PLACES = {"run_dir", "push_to_hub", "hub_model_id", "hub_private_repo"}
STAGES = ("tokenizer", "base", "mid", "sft", "rl", "dpo")  # each a folder of the run that from_pretrained opens


class Stage:
    """A stage of a run, as a context manager that measures seconds and peak memory.

    Args:
        run_dir: the run's folder, e.g. `runs/tiny`.
        name: the record's name: a stage (`base`) or an evaluation (`core`).
        settings: what the recipe said, JSON-ready.

    Raises:
        ValueError: the record, or the checkpoints of an unfinished stage, were made with other settings, so this folder
            belongs to another recipe; or a folder of the stage's name is there that no stage has written.
    """

    def __init__(self, run_dir: str | Path, name: str, settings: dict):
        self.run_dir, self.name = Path(run_dir), name
        self.path = self.run_dir / "eval" / f"{name}.json"
        self.log_path = self.run_dir / "logs" / f"{name}.jsonl"
        self.settings = {k: v for k, v in json.loads(json.dumps(settings, default=str)).items() if k not in PLACES}
        self.started_path = self.run_dir / "logs" / f"{name}.settings.json"
        self.results: dict = {}
        self.results_file: dict = {}  # an evaluation's: lm-eval's own results, whose keys the record then has as well
        self.finished = False
        if self.path.is_file():
            record = json.loads(self.path.read_text())
            self._refuse_other_recipe(record["settings"])
            self.results = results_of(record)
            self.finished = name not in STAGES or (self.run_dir / name).is_dir()
        elif self.started_path.is_file():
            if any((self.run_dir / "checkpoints" / name).glob("*")):
                hint = f" To go on from its checkpoints all the same, delete {self.started_path}."
                self._refuse_other_recipe(json.loads(self.started_path.read_text()), hint)
        elif name in STAGES and (self.run_dir / name).is_dir():
            raise ValueError(
                f"{self.run_dir / name} is there already, and no stage of this run has written it: move it away, or "
                f"choose another folder (--run_dir, of run.sh --output_dir)"
            )

    def _refuse_other_recipe(self, theirs: dict, hint: str = "") -> None:
        differing = sorted(k for k in theirs.keys() | self.settings.keys() if theirs.get(k) != self.settings.get(k))
        if differing:
            key = differing[0]
            raise ValueError(
                f"{self.run_dir} belongs to another recipe: its stage `{self.name}` was made with "
                f"{key}={theirs.get(key)!r}, now {key}={self.settings.get(key)!r}. "
                f"Choose another folder (--run_dir, of run.sh --output_dir), or start over (run.sh --fresh).{hint}"
            )

    def __enter__(self) -> "Stage":
        self.started = time.time()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        if is_first_process():
            write_json(self.started_path, self.settings)
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is not None or not is_first_process():
            return
        finished = time.time()
        record = {
            "stage": self.name,
            "started": self.started,
            "finished": finished,
            "seconds": finished - self.started + self.results.pop("seconds_before_resume", 0.0),
            "peak_memory_mib": peak_memory_mib(),
            "settings": self.settings,
            "results": self.results,
        }
        if self.results_file:
            record = {**record, **self.results_file, "summary": self.results}
        write_json(self.path, record)
        if self.name in STAGES:
            print(f"{self.name}: saved to {self.run_dir / self.name}")

    def log(self, **figures) -> None:
        """Append one line of figures to the stage's curve."""
        with open(self.log_path, "a") as file:
            file.write(json.dumps(figures) + "\n")


def is_first_process() -> bool:
    """Whether this process is the one of several that writes."""
    return os.environ.get("RANK", "0") == "0"


def results_of(record: dict) -> dict:
    """A stage's results; an evaluation's record has lm-eval's under `results`, and its own under `summary`."""
    return record.get("summary", record["results"])


def write_json(path: str | Path, content: dict) -> None:
    """Write JSON so that a reader sees either the old file or the new one, never half of it; nan becomes null."""
    path, content = Path(path), json.loads(json.dumps(content), parse_constant=lambda _: None)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def peak_memory_mib() -> float:
    """Highest resident memory of this process in MiB; on a CUDA machine the device's highest allocation instead."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
