"""Scores side by side: what counts as noise, and reading lm-eval's files and a run's records."""

import json
import math
from pathlib import Path

import pytest
from lm_eval.utils import make_table
from lm_eval_runs import save

from nanochat_hf.configs import EvaluationConfig
from nanochat_hf.evaluation import mini_tasks
from nanochat_hf.evaluation.compare import compare
from nanochat_hf.evaluation.evaluate import evaluate
from nanochat_hf.evaluation.noise import (
    mean_difference,
    normal_test,
    paired_difference,
    sign_test,
    standard_error,
    unpaired_difference,
)
from nanochat_hf.report.metrics import build_metrics
from nanochat_hf.report.run_records import RunRecords

FLAGS = [1, 0, 1, 1, 0, 0, 1, 0, 1, 0] * 4


def write_results(folder, flags, date="2026-01-01", baseline=0.25, samples=True, task="core_one"):
    """What `lm_eval --output_path --log_samples` leaves for one task and a group of it."""
    folder.mkdir(parents=True, exist_ok=True)
    accuracy, stderr = sum(flags) / len(flags), standard_error(flags)
    figures = {"alias": task, "acc,none": accuracy, "acc_stderr,none": stderr}
    centered = {"alias": "CORE", "centered,none": (accuracy - baseline) / (1 - baseline)}
    results = {
        "results": {task: figures, "core": centered},
        "groups": {"core": centered},
        "group_subtasks": {"core": [task]},
        "configs": {task: {"metadata": {"baseline": baseline}}},
        "n-samples": {task: {"effective": len(flags)}},
    }
    path = folder / f"results_{date}.json"
    path.write_text(json.dumps(results))
    if samples:
        lines = [json.dumps({"doc_id": i, "acc": float(flag)}) + "\n" for i, flag in enumerate(flags)]
        (folder / f"samples_{task}_{date}.jsonl").write_text("".join(lines))
    return str(path)


def changed(*indices):
    return [1 - flag if i in indices else flag for i, flag in enumerate(FLAGS)]


def test_noise_is_told_from_a_difference():
    assert standard_error([0, 1]) == pytest.approx(0.5) and math.isnan(standard_error([1]))
    # 3 items better, none worse: equally good models do that in one of four times.
    few = paired_difference(FLAGS, changed(1, 4, 5))
    assert few.value == pytest.approx(3 / 40) and few.p_value == 0.25 and few.is_noise
    many = paired_difference(FLAGS, changed(1, 4, 5, 7, 9, 11))
    assert many.p_value == pytest.approx(2 / 2**6) and not many.is_noise
    assert many.stderr == pytest.approx(standard_error([1.0] * 6 + [0.0] * 34))
    # Shares of several samples are no flags: the mean's own error decides.
    shares = paired_difference([0.0, 0.5, 0.25, 0.5], [0.5, 1.0, 0.75, 0.75])
    assert shares.p_value == normal_test(shares.value, shares.stderr) < 0.05
    apart = unpaired_difference(0.5, 0.03, 0.6, 0.04)
    assert (apart.stderr, apart.p_value) == (pytest.approx(0.05), pytest.approx(0.0455, abs=1e-4))
    assert not apart.is_noise and unpaired_difference(0.5, math.nan, 0.9, 0.1).is_noise
    mean = mean_difference([many, few], [2.0, 1.0])
    assert mean.value == pytest.approx((2 * many.value + few.value) / 2)
    assert mean.stderr == pytest.approx(math.hypot(2 * many.stderr, few.stderr) / 2)
    assert sign_test(3, 0) == 0.25


def test_models_stand_side_by_side(tmp_path):
    one = write_results(tmp_path / "a", FLAGS)
    write_results(tmp_path / "b", changed(0, 2, 3, 6, 8, 10), date="2025-12-31")
    write_results(tmp_path / "b", changed(1, 4, 5, 7, 9, 11), date="2026-01-02")
    few = write_results(tmp_path / "c", changed(1, 4, 5))
    table = compare([one, str(tmp_path / "b"), few])
    task, core = table.splitlines()[-2:]
    assert task == (
        "| core_one | 40 | 0.5000 ± 0.0801 | 0.6500 ± 0.0764 | 0.5750 ± 0.0792 "
        "| +0.1500 ± 0.0572 (p 0.031) | +0.0750 ± 0.0422 (inside the noise) |"
    )
    assert core.startswith("| **core** |  | 0.3333 ± 0.1068 | 0.5333 ± 0.1018 |")
    assert "+0.2000 ± 0.0762" in core and "+0.1000 ± 0.0562 (inside the noise)" in core


def test_without_samples_differences_are_unpaired(tmp_path):
    one = write_results(tmp_path / "a", FLAGS, samples=False)
    two = write_results(tmp_path / "b", changed(1, 4, 5, 7, 9, 11))
    table = compare([one, two])
    assert "+0.1500 ± 0.1107 (inside the noise, unpaired)" in table and "lm-eval keeps them with --log_samples" in table


def test_stock_files_with_filters_lists_and_names_of_their_own(tmp_path):
    """As of `--output_path my_run.json`: another stem, a sample for each filter, items that are no numbers."""
    paths = []
    for name, flags in (("a", FLAGS), ("b", changed(1, 4, 5, 7, 9, 11))):
        path = Path(write_results(tmp_path / name, flags))
        samples = path.with_name("samples_core_one_2026-01-01.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        lines = [line | {"filter": "none"} for line in lines] + [line | {"filter": "x", "acc": 0} for line in lines]
        samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
        paths.append(str(path.rename(path.with_name("my_run_2026-01-01.json"))))
    assert "+0.1500 ± 0.0572 (p 0.031)" in compare(paths)
    samples.write_text("".join(json.dumps(line | {"acc": [1, 2]}) + "\n" for line in lines))
    assert "unpaired)" in compare(paths)


def test_what_cannot_be_compared_is_refused(tmp_path):
    one = write_results(tmp_path / "a", FLAGS)
    with pytest.raises(ValueError, match="two models or more"):
        compare([one])
    with pytest.raises(ValueError, match="no file or folder .*nothing; give a results file"):
        compare([one, str(tmp_path / "nothing")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no results_"):
        compare([one, str(tmp_path / "empty")])
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(ValueError, match="text.json is not JSON"):
        compare([one, str(tmp_path / "text.json")])
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(ValueError, match="is no results file of lm-eval's"):
        compare([one, str(tmp_path / "text.json")])
    with pytest.raises(ValueError, match="answered other items .40 and 20.; evaluate both with the same --limit"):
        compare([one, write_results(tmp_path / "b", FLAGS[:20])])
    with pytest.raises(ValueError, match="shares no task with the others"):
        compare([one, write_results(tmp_path / "c", FLAGS, task="core_other")])


def test_a_runs_record_is_a_results_file_of_lm_evals(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    for name in ("NUM_CORE_ROWS", "NUM_ARITHMETIC_ROWS", "NUM_CHAT_ROWS"):
        monkeypatch.setattr(mini_tasks, name, 6)
    for stage in ("base", "sft"):
        save(tiny_model, tiny_tokenizer, tmp_path / stage)
    evaluate(EvaluationConfig(run_dir=str(tmp_path), stages=["base", "sft"]))
    record = json.loads((tmp_path / "eval" / "core.json").read_text())
    assert "|core_mini_last_word" in make_table(record).replace("| - ", "|").replace(" ", "")
    assert "centered" in make_table(record, "groups")
    records = RunRecords(tmp_path)
    assert records.results("core") == record["summary"] and len(record["summary"]["tasks"]) == 3
    assert build_metrics(records, 1.0)["core"]["core"] == pytest.approx(record["groups"]["core_mini"]["centered,none"])
    table = compare([str(tmp_path), str(tmp_path / "eval" / "core.json")])
    assert "| chatcore_mini_arithmetic | 6 |" in table and table.count("+0.0000 ± 0.0000 (the same items right)") == 4
