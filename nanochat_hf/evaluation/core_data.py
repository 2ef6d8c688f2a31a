"""Fetching CORE's task files: the official bundle, from the web, a zip file or an unpacked folder.

    python scripts/get_core_data.py --output DIR         # then: export CORE_DATA_DIR=DIR

The bundle lists its tasks in `core.yaml` (`label`, `dataset_uri`); each file is checked row by row and stored under the
name our task of that label reads. A download that breaks off goes on where it stopped.
"""

import hashlib
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import yaml
from tqdm import tqdm

from ..configs import CoreDataConfig
from . import TASKS_DIR
from .core_prompts import read_rows

CHUNK_BYTES = 2**20
TIMEOUT_SECONDS = 60


def get_core_data(config: CoreDataConfig) -> None:
    """Fill `config.output` with the 22 tasks' files.

    Raises:
        ValueError: a source that is none, a broken or altered download, a bundle without its list, a broken row.
    """
    output = Path(config.output).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    source = config.source
    if Path(source).is_dir():
        return _store(Path(source), output)
    if source.startswith(("http://", "https://")):
        archive = output / "bundle.zip"
        download(source, archive)
    elif Path(source).is_file():
        archive = Path(source)
    else:
        raise ValueError(f"source={source}: neither a URL nor a zip file nor a folder")
    _check(archive, config.sha256)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        with zipfile.ZipFile(archive) as bundle:
            bundle.extractall(folder)
        _store(Path(folder), output)
    if archive == output / "bundle.zip":
        archive.unlink()


def download(url: str, path: Path) -> None:
    """Download to `path`; what an earlier try has left in `path`.partial is not fetched again."""
    partial = path.with_name(path.name + ".partial")
    have = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            resumed = answer.status == 206
            length = int(answer.headers.get("Content-Length") or 0)
            start = have if resumed else 0
            with (
                open(partial, "ab" if resumed else "wb") as file,
                tqdm(total=start + length, initial=start, unit="B", unit_scale=True, desc=path.name) as progress,
            ):
                while chunk := answer.read(CHUNK_BYTES):
                    file.write(chunk)
                    progress.update(len(chunk))
        if length and partial.stat().st_size != start + length:
            raise ValueError(f"{url} broke off at {partial.stat().st_size:,} of {start + length:,} bytes; run it again")
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:  # 416: nothing is left to fetch
            raise ValueError(f"{url}: {error}; give --source a zip file or a folder instead") from error
    except OSError as error:
        raise ValueError(f"{url}: {error}; run it again to go on, or give --source a zip file or a folder") from error
    partial.replace(path)


def _check(archive: Path, sha256: str | None) -> None:
    if not zipfile.is_zipfile(archive):
        raise ValueError(f"{archive} is no zip file; delete it and fetch it again")
    with zipfile.ZipFile(archive) as bundle:
        if broken := bundle.testzip():
            raise ValueError(f"{archive}: {broken} in it is damaged; delete the archive and fetch it again")
    digest = hashlib.sha256()
    with open(archive, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    if sha256 is not None and digest.hexdigest() != sha256.lower():
        raise ValueError(f"{archive} has sha256 {digest.hexdigest()}, expected {sha256}: it is another file")
    print(f"{archive.name}: sha256 {digest.hexdigest()}")


def _store(bundle: Path, output: Path) -> None:
    """Copy each listed task's file under our name for it, whole or not at all."""
    lists = sorted(bundle.rglob("core.yaml"))
    if not lists:
        raise ValueError(f"{bundle} holds no core.yaml, so it is no CORE bundle")
    listed = {task["label"]: task["dataset_uri"] for task in yaml.safe_load(lists[0].read_text())["icl_tasks"]}
    missing = []
    for path in sorted((TASKS_DIR / "core").glob("core_*.yaml")):
        # The YAML's `class: !function ...` is lm-eval's own tag; the three keys needed here are plain.
        task = yaml.safe_load(path.read_text().replace("!function ", ""))
        uri = listed.get(task["task"].removeprefix("core_"))
        # The bundle keeps its files in eval_data/; a folder of flat files has them beside the list.
        places = [lists[0].parent / "eval_data" / uri, lists[0].parent / uri] if uri else []
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            missing.append(task["task"])
            continue
        num_rows = len(read_rows(found, task["core_type"]))
        partial = output / (task["data_file"] + ".partial")
        shutil.copyfile(found, partial)
        partial.replace(output / task["data_file"])
        print(f"{task['task']}: {num_rows:,} rows")
    if missing:
        raise ValueError(f"the bundle has no data of {', '.join(missing)}; the other tasks' files are in {output}")
    print(f"export CORE_DATA_DIR={output}")
