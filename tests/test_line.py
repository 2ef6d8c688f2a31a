"""The shell side of a recipe: flags, resuming without starting Python, starting over, and the times of a session."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

RUN = """#!/usr/bin/env bash
set -eo pipefail
recipe=recipes/toy
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/line.sh"
set_up_venv() { export PATH="PYTHON_DIR:$PATH"; }
start_line "$@"
stage one python scripts/fake.py one --config $recipe/one.yaml "${text[@]}"
stage two python scripts/fake.py two --config $recipe/two.yaml "${chat[@]}"
finish_line
"""

# A stage: refuses another recipe's folder as stage.py does, and fails when the file `broken` asks for it.
FAKE = """import json, pathlib, signal, sys, time
name, run = sys.argv[1], pathlib.Path(sys.argv[sys.argv.index("--run_dir") + 1])
settings = pathlib.Path(sys.argv[3]).read_text() + " ".join(sys.argv[4:-2])
record = run / "eval" / f"{name}.json"
with open("calls.log", "a") as log:
    log.write(name + "\\n")
if pathlib.Path("broken").is_file() and pathlib.Path("broken").read_text() == name:
    sys.exit(7)
if pathlib.Path("slow").is_file() and pathlib.Path("slow").read_text() == name:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pathlib.Path("running").touch()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.5)
        (run / "checkpoints" / name / "step-000001").mkdir(parents=True)
        with open("calls.log", "a") as log:
            log.write("saved\\n")
        sys.exit(130)
if record.is_file():
    sys.exit(0 if json.loads(record.read_text()) == settings else 2)
record.write_text(json.dumps(settings))
"""


@pytest.fixture
def toy(tmp_path):
    """A repository with a recipe of two stages that only leave records."""
    (tmp_path / "scripts").mkdir()
    for name in ("line.sh", "setup.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    shutil.copytree(ROOT / "accelerate_configs", tmp_path / "accelerate_configs")
    (tmp_path / "scripts" / "fake.py").write_text(FAKE)
    (tmp_path / "scripts" / "report.py").write_text("open('calls.log', 'a').write('report\\n')\n")
    recipe = tmp_path / "recipes" / "toy"
    recipe.mkdir(parents=True)
    (recipe / "run.sh").write_text(RUN.replace("PYTHON_DIR", str(Path(sys.executable).parent)))
    for name in ("one", "two"):
        (recipe / f"{name}.yaml").write_text("steps: 1\n")
    return tmp_path


def run(toy, *flags, cwd=None):
    (toy / "calls.log").unlink(missing_ok=True)
    command = ["bash", str(toy / "recipes" / "toy" / "run.sh"), *flags]
    done = subprocess.run(command, cwd=cwd or toy, capture_output=True, text=True)
    calls = (toy / "calls.log").read_text().split() if (toy / "calls.log").is_file() else []
    return done, calls


def test_a_second_call_starts_no_stage(toy):
    done, calls = run(toy)
    assert (done.returncode, calls) == (0, ["one", "two", "report"]), done.stderr
    done, calls = run(toy)
    assert (done.returncode, calls) == (0, ["report"])
    assert "== one: finished earlier" in done.stdout


def test_it_resumes_at_the_stage_that_failed(toy):
    (toy / "broken").write_text("two")
    done, calls = run(toy)
    assert (done.returncode, calls) == (7, ["one", "two"])
    assert "run the same command again to continue" in done.stderr
    (toy / "broken").unlink()
    done, calls = run(toy)
    assert (done.returncode, calls) == (0, ["two", "report"])


def test_ctrl_c_waits_for_the_stage_to_save(toy):
    """The stage runs below a launcher, as below Accelerate's, which would leave at once if it heard the signal."""
    launcher = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"
    (toy / "launcher.py").write_text(launcher)
    path = toy / "recipes" / "toy" / "run.sh"
    path.write_text(path.read_text().replace("python scripts/fake.py two", "python launcher.py scripts/fake.py two"))
    (toy / "slow").write_text("two")
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(["bash", str(path)], cwd=toy, start_new_session=True, **pipes) as line:
        while not (toy / "running").is_file():
            assert line.poll() is None
            time.sleep(0.05)
        os.killpg(line.pid, signal.SIGINT)
        assert line.wait(timeout=30) == 130
        assert (toy / "calls.log").read_text().split() == ["one", "two", "saved"]
        assert "stopped in stage two" in line.stderr.read()
    events = [json.loads(line) for line in (toy / "runs/toy/sessions.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events][-3:] == ["stage_start", "stage_saved", "session_end"]


def test_changed_settings_are_the_stages_to_judge(toy):
    run(toy)
    (toy / "recipes" / "toy" / "two.yaml").write_text("steps: 2\n")
    done, calls = run(toy)
    assert (done.returncode, calls) == (2, ["two"])
    done, calls = run(toy, "--dataset", "other/text")
    assert (done.returncode, calls) == (2, ["one"])
    done, calls = run(toy, "--dataset", "other/text", "--fresh")
    assert (done.returncode, calls) == (0, ["one", "two", "report"])


def test_sessions_are_timed_even_when_they_fail(toy):
    (toy / "broken").write_text("two")
    run(toy)
    events = [json.loads(line) for line in (toy / "runs/toy/sessions.jsonl").read_text().splitlines()]
    assert [(event["event"], event["name"]) for event in events[1:]] == [
        ("stage_start", "one"),
        ("stage_end", "one"),
        ("stage_start", "two"),
        ("session_end", ""),
    ]
    assert (events[0]["event"], events[0]["name"]) == ("session_start", "-")  # not a git repository
    assert all(isinstance(event["time"], int) for event in events)


def test_flags_reach_their_stages_and_paths_hold_from_anywhere(toy, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("else where")
    (elsewhere / "talk").mkdir()
    done, _ = run(toy, "--output_dir=my run", "--chat_data", "talk", "--dataset=owner/name", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    records = elsewhere / "my run" / "eval"
    assert json.loads((records / "one.json").read_text()).endswith("--dataset owner/name")
    assert json.loads((records / "two.json").read_text()).endswith(f"--chat_data {elsewhere / 'talk'}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--datset", "x"], "unknown flag --datset; valid are --output_dir --dataset"),
        (["runs/toy"], "unknown flag runs/toy"),
        (["--output_dir"], "--output_dir needs a value"),
        (["--chat_data", "nowhere"], "--chat_data nowhere: no such folder"),
        (["--output_dir", "scripts"], "scripts is not empty and is no run folder"),
        (["--output_dir", "scripts", "--fresh"], "--fresh deletes only run folders"),
    ],
)
def test_bad_flags_cost_nothing(toy, flags, message):
    done, calls = run(toy, *flags)
    assert (done.returncode, calls) == (2, [])
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert (toy / "scripts" / "line.sh").is_file()


def test_help_explains_every_flag(toy):
    done, calls = run(toy, "--help")
    assert (done.returncode, calls) == (0, [])
    for flag in ("--output_dir", "--dataset", "--chat_data", "--eval_data", "--core_data", "--fresh"):
        assert f"\n  {flag} " in done.stdout


def test_a_python_that_is_too_old_or_missing_is_named(toy):
    (toy / "pyproject.toml").touch()
    (toy / "constraints.txt").touch()
    command = f'source "{toy}/scripts/setup.sh"; set_up_venv train'
    done = subprocess.run(
        ["bash", "-c", command], env={"PATH": "/usr/bin:/bin", "PYTHON": "python9"}, capture_output=True
    )
    assert done.returncode == 2
    assert b"no python9 on PATH" in done.stderr
