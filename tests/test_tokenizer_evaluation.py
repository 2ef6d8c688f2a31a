"""Comparison with GPT-2's and GPT-4's tokenizers, whether or not they can be had."""

import sys
import time
import types

import pytest

from nanochat_hf.tokenizer import encode_text, train_bpe
from nanochat_hf.tokenizer_evaluation import evaluate_tokenizer, evaluation_tables, load_references


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["The river runs past the mill, and the miller grinds the corn."] * 2, 290)


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_table_has_the_published_columns_and_differences(tokenizer, monkeypatch):
    words = types.SimpleNamespace(encode_ordinary=str.split)
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: words)
    result = evaluate_tokenizer(tokenizer, {"validation": "the mill the mill"})
    ours = len(encode_text(tokenizer, "the mill the mill"))
    assert result["missing"] == {} and result["rows"][-1]["reference_tokens"] == {"GPT-2": 4, "GPT-4": 4}
    table = evaluation_tables(result)
    assert "### Comparison with GPT-4" in table and "Relative Diff %" in table
    assert f"| validation | 17 | 4 | 4.25 | {ours} | {17 / ours:.2f} | {(4 - ours) / 4 * 100:+.1f}% |" in table


def test_offline_one_line_says_what_is_missing(tokenizer, empty_cache, monkeypatch):
    pytest.importorskip("tiktoken")
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("requests.get", lambda *_, **__: pytest.fail("the network was asked"))
    result = evaluate_tokenizer(tokenizer, {})
    assert set(result["missing"]) == {"GPT-2", "GPT-4"}
    table = evaluation_tables(result)
    assert "No comparison with GPT-2 and GPT-4: not in tiktoken's cache" in table
    assert "| korean |" in table and "Relative" not in table


def test_tiktoken_cache_is_read_offline(empty_cache, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    asked = []

    def get_encoding(name):
        asked.append(name)
        if name == "gpt2":
            return tiktoken.load.read_file("https://x")  # a miss asks for the network
        return types.SimpleNamespace(encode_ordinary=list)

    monkeypatch.setattr("tiktoken.get_encoding", get_encoding)
    references, missing = load_references()
    assert asked == ["gpt2", "cl100k_base"] and list(references) == ["GPT-4"] and list(missing) == ["GPT-2"]


def test_a_network_that_hangs_is_not_waited_for(monkeypatch):
    pytest.importorskip("tiktoken")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("nanochat_hf.tokenizer_evaluation.DOWNLOAD_SECONDS", 0.1)
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: time.sleep(3) if name == "gpt2" else 1 / 0)
    started = time.monotonic()
    references, missing = load_references()
    assert time.monotonic() - started < 2 and references == {}
    assert "more than 0.1 seconds" in missing["GPT-2"] and "ZeroDivisionError" in missing["GPT-4"]


def test_without_tiktoken_the_fix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert "pip install tiktoken" in load_references()[1]["GPT-2"]
