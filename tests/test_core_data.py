import functools
import hashlib
import http.server
import json
import threading
import zipfile
from pathlib import Path

import pytest
import yaml

from nanochat_hf.configs import CoreDataConfig
from nanochat_hf.evaluation import TASKS_DIR
from nanochat_hf.evaluation.core_data import get_core_data

ROWS = {
    "multiple_choice": {"query": "q", "choices": ["a", "b"], "gold": 0},
    "schema": {"context_options": ["a", "b"], "continuation": "c", "gold": 1},
    "language_modeling": {"context": "a", "continuation": "b"},
}


def tasks():
    for path in sorted((TASKS_DIR / "core").glob("core_*.yaml")):
        yield yaml.safe_load(path.read_text().replace("!function ", ""))


@pytest.fixture
def bundle(tmp_path):
    """A folder laid out as the official bundle, one row a task."""
    root = tmp_path / "unpacked" / "eval_bundle"
    listed = []
    for task in tasks():
        uri = f"some_kind/{task['data_file']}"
        (root / "eval_data" / "some_kind").mkdir(parents=True, exist_ok=True)
        (root / "eval_data" / uri).write_text(json.dumps(ROWS[task["core_type"]]) + "\n")
        listed.append({"label": task["task"].removeprefix("core_"), "dataset_uri": uri})
    (root / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": listed}))
    return root.parent


@pytest.fixture
def archive(bundle, tmp_path):
    path = tmp_path / "bundle.zip"
    with zipfile.ZipFile(path, "w") as file:
        for member in bundle.rglob("*"):
            file.write(member, member.relative_to(bundle))
    return path


def assert_whole(output):
    wanted = {task["data_file"] for task in tasks()}
    assert {path.name for path in output.iterdir()} == wanted
    assert len(wanted) == 21, "two tasks share a file"


def test_from_a_folder_and_from_a_zip(bundle, archive, tmp_path, capsys):
    get_core_data(CoreDataConfig(output=str(tmp_path / "a"), source=str(bundle)))
    assert_whole(tmp_path / "a")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    get_core_data(CoreDataConfig(output=str(tmp_path / "b"), source=str(archive), sha256=digest))
    assert_whole(tmp_path / "b")
    assert digest in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"has sha256 {digest}, expected 00"):
        get_core_data(CoreDataConfig(output=str(tmp_path / "c"), source=str(archive), sha256="00"))


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves ranges; `asked` collects them, and the first answer stops half-way when `breaks`."""

    asked: list = []
    breaks = False

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        asked = self.headers.get("Range")
        type(self).asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if type(self).breaks:
            type(self).breaks = False
            self.wfile.write(data[start : start + len(data) // 2])
            self.close_connection = True
            return
        self.wfile.write(data[start:])


@pytest.fixture
def url(archive):
    RangeHandler.asked, RangeHandler.breaks = [], False
    handler = functools.partial(RangeHandler, directory=str(archive.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/{archive.name}"
        server.shutdown()


def test_a_download_goes_on_where_it_broke_off(url, archive, tmp_path):
    RangeHandler.breaks = True
    config = CoreDataConfig(output=str(tmp_path / "out"), source=url)
    with pytest.raises(ValueError, match="run it again"):
        get_core_data(config)
    get_core_data(config)
    assert_whole(tmp_path / "out")
    assert RangeHandler.asked == [None, f"bytes={archive.stat().st_size // 2}-"]


def test_bad_sources_are_refused(bundle, tmp_path, url):
    output = str(tmp_path / "out")
    with pytest.raises(ValueError, match="neither a URL nor a zip file nor a folder"):
        get_core_data(CoreDataConfig(output=output, source=str(tmp_path / "nothing.zip")))
    with pytest.raises(ValueError, match="404.*give --source"):
        get_core_data(CoreDataConfig(output=output, source=url + "x"))
    (tmp_path / "text.zip").write_text("not a zip")
    with pytest.raises(ValueError, match="is no zip file"):
        get_core_data(CoreDataConfig(output=output, source=str(tmp_path / "text.zip")))
    with pytest.raises(ValueError, match="holds no core.yaml"):
        get_core_data(CoreDataConfig(output=output, source=str(TASKS_DIR / "core_mini")))
    (bundle / "eval_bundle" / "eval_data" / "some_kind" / "copa.jsonl").unlink()
    with pytest.raises(ValueError, match="no data of core_copa; the other"):
        get_core_data(CoreDataConfig(output=output, source=str(bundle)))
    (bundle / "eval_bundle" / "eval_data" / "some_kind" / "boolq.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="boolq.jsonl, line 1: `query` must be str"):
        get_core_data(CoreDataConfig(output=output, source=str(bundle)))


def test_flat_real_files_are_a_bundle_too(shared_data, tmp_path):
    get_core_data(CoreDataConfig(output=str(tmp_path), source=str(shared_data / "core")))
    assert_whole(tmp_path)
