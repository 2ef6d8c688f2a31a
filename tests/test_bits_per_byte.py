"""The metric module, loaded by the `evaluate` library from its path as anyone would."""

import math

import evaluate
import pytest

from nanochat_hf.evaluation import BITS_PER_BYTE


@pytest.fixture
def metric(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return evaluate.load(str(BITS_PER_BYTE), cache_dir=str(tmp_path / "cache"))


def test_it_loads_from_its_path_and_follows_the_definition(metric):
    result = metric.compute(predictions=[2.0, 1.0, 9.0], references=[5, 1, 0])
    assert result == {"bits_per_byte": pytest.approx(3.0 / (6 * math.log(2))), "nats": 3.0, "bytes": 6}


def test_batches_add_up(metric):
    metric.add_batch(predictions=[2.0, 0.5], references=[5, 2])
    metric.add(prediction=1.5, reference=3)
    assert metric.compute()["bits_per_byte"] == pytest.approx(4.0 / (10 * math.log(2)))


def test_nonsense_is_refused(metric):
    with pytest.raises(ValueError, match="no target with bytes"):
        metric.compute(predictions=[1.0], references=[0])
    with pytest.raises(ValueError, match="byte counts, 0 or more; found -1"):
        metric.compute(predictions=[1.0], references=[-1])


def test_it_can_be_published():
    card = (BITS_PER_BYTE / "README.md").read_text()
    assert card.startswith("---\ntitle:") and "app_file: app.py" in card and "- metric" in card
    assert {path.name for path in BITS_PER_BYTE.iterdir()} >= {"bits_per_byte.py", "app.py", "requirements.txt"}
