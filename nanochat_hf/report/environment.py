"""Where a run happened: git state, hardware, software, and how much code there is ("bloat").

Measured once after the last stage and kept in `<run_dir>/environment.json`, so that a report rebuilt on another machine
still describes the machine that did the work.
"""

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

from ..hardware import cpu_name
from ..stage import write_json

ROOT = Path(__file__).resolve().parents[2]  # the repository, where the package is installed editable
PACKAGES = ("torch", "transformers", "accelerate", "trl", "datasets", "tokenizers", "lm_eval", "huggingface_hub")
CODE_SUFFIXES = (".py", ".md", ".sh", ".yaml", ".yml", ".toml", ".jinja", ".html", ".js", ".css")


def read_environment(run_dir: Path, newest_record_time: float) -> dict[str, dict]:
    """The environment of a run: what was kept, unless a stage has finished since; then this machine is measured.

    Args:
        run_dir: the run's folder.
        newest_record_time: when the last stage finished, seconds since 1970.
    """
    path = run_dir / "environment.json"
    if path.is_file() and path.stat().st_mtime >= newest_record_time:
        return json.loads(path.read_text())
    environment = {
        "Git Information": describe_git(ROOT),
        "Hardware": describe_hardware(),
        "Software": describe_software(),
        "Bloat": measure_bloat(ROOT),
    }
    write_json(path, environment)
    return environment


def describe_git(root: Path) -> dict[str, str]:
    """Branch, commit (dirty when tracked files differ) and the commit's subject; "-" outside a repository."""
    commit = _git(root, "rev-parse", "--short", "HEAD")
    if commit is None:
        return {"Branch": "-", "Commit": "-", "Message": "-"}
    dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {
        "Branch": _git(root, "rev-parse", "--abbrev-ref", "HEAD") or "-",
        "Commit": f"{commit} ({'dirty' if dirty else 'clean'})",
        "Message": (_git(root, "log", "-1", "--format=%s") or "-")[:80],
    }


def describe_hardware() -> dict[str, str]:
    """CPU, memory and GPUs of this machine."""
    import psutil
    import torch

    hardware = {
        "Platform": platform.system(),
        "CPU": cpu_name(),
        "CPUs": f"{psutil.cpu_count(logical=False) or '-'} cores ({psutil.cpu_count()} logical)",
        "Memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
    }
    if not torch.cuda.is_available():
        return hardware | {"GPUs": "none"}
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return hardware | {
        "GPUs": f"{len(devices)}x {devices[0].name}",
        "GPU Memory": f"{sum(device.total_memory for device in devices) / 1e9:.1f} GB total",
        "CUDA Version": torch.version.cuda or "-",
    }


def describe_software() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a run computes."""
    software = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            software[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            software[package] = "not installed"
    return software


def measure_bloat(root: Path) -> dict[str, str]:
    """Size of the project's own code and text: the files git tracks, or those of the package outside a repository."""
    listed = _git(root, "ls-files")
    if listed is None:
        paths = [path for path in (root / "nanochat_hf").rglob("*") if path.is_file()]
    else:
        paths = [root / line for line in listed.splitlines()]
    texts = [path.read_text(errors="replace") for path in paths if path.suffix in CODE_SUFFIXES and path.is_file()]
    num_characters = sum(map(len, texts))
    constraints = root / "constraints.txt"
    pins = [line for line in constraints.read_text().splitlines() if "==" in line] if constraints.is_file() else []
    return {
        "Characters": f"{num_characters:,}",
        "Lines": f"{sum(text.count(chr(10)) for text in texts):,}",
        "Files": f"{len(texts):,}",
        "Tokens (approx)": f"{num_characters // 4:,}",
        "Dependencies (constraints.txt lines)": f"{len(pins):,}" if pins else "-",
    }


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command in `root`, None where that is no work tree or git is missing."""
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
