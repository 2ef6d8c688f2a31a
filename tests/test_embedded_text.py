"""The embedded corpus: its order depends on nothing but the Python version, and no document stands in it twice."""

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_hf.data import embedded_text
from nanochat_hf.data.embedded_text import embedded_documents


def digest() -> str:
    both = embedded_documents("train") + embedded_documents("validation")
    return hashlib.sha256("\0".join(both).encode(errors="replace")).hexdigest()


def test_size_and_split():
    train, validation = embedded_documents("train"), embedded_documents("validation")
    assert sum(map(len, train)) > 5e6
    assert len(validation) == (len(train) + len(validation)) // 20
    assert len(set(train) | set(validation)) == len(train) + len(validation)  # no document twice, none in both
    assert all(document.strip() for document in train + validation)
    assert sorted(map(len, train))[int(0.99 * len(train))] < 4_000


def test_topics_pages_and_source_are_there():
    text = "\0".join(embedded_documents("train") + embedded_documents("validation"))
    assert 'The "with" statement is used to wrap the execution' in text.replace("\n", " ")
    assert "\0json.dumps(obj, *, " in text or "\n\njson.dumps(obj, *, " in text
    assert "# json\n" in text and "def dumps(" in text
    assert "str.strip(chars=None, /)\n\nReturn a copy of the string" in text


def test_docstrings_stand_once():
    text = "\0".join(embedded_documents("train") + embedded_documents("validation"))
    assert text.count("Serialize ``obj`` to a JSON formatted ``str``.") == 1


def test_same_order_in_another_process_with_another_hash_seed():
    code = "from test_embedded_text import digest; print(digest())"
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest()


def test_order_does_not_come_from_the_file_system(tmp_path, monkeypatch):
    for name in "abcdefgh":
        words = " ".join(f"{name}{i}" for i in range(2 * 10**5 // 8))
        (tmp_path / f"{name}.py").write_text(
            f'"""{words}"""\n\ndef f_{name}():\n    """Does {name}."""\n    return {name}\n'
        )
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text('"""left out"""')
    (tmp_path / "broken.py").write_text("def :")
    monkeypatch.setattr(embedded_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    rglob = Path.rglob
    orders = []
    for seed in (1, 2):
        shuffled = lambda self, pattern, seed=seed: random.Random(seed).sample(  # noqa: E731
            found := list(rglob(self, pattern)), len(found)
        )
        monkeypatch.setattr(Path, "rglob", shuffled)
        orders.append(embedded_text._read_all.__wrapped__())
    assert orders[0] == orders[1]
    text = "\0".join(orders[0][0] + orders[0][1])
    assert "left out" not in text
    assert "a.f_a()\n\nDoes a." in text and "def f_a():\n    return a" in text


def test_python_without_source_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(embedded_text, "_topics", lambda: iter(()))
    with pytest.raises(ValueError, match="needs the source of the standard library.*set `dataset`"):
        embedded_text._read_all.__wrapped__()


def test_long_text_is_cut_at_blank_lines_and_short_joined():
    paragraphs = [f"{i} " + "x" * 500 for i in range(10)]
    pieces = embedded_text._cut(["short", "", "\n\n".join(paragraphs), "end"])
    assert "\n\n".join(pieces) == "\n\n".join(["short", *paragraphs, "end"])
    assert max(map(len, pieces)) <= 2_000 + 2 * 2
    assert pieces[0].startswith("short\n\n0 ")
