"""CORE without lm-eval's reporting: the benchmark's three sides, and training that scores itself."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import make_table
from lm_eval_runs import flags, run, save
from small_runs import curve, small_run
from test_core import ROWS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from nanochat_hf import pretrain
from nanochat_hf.benchmark import benchmark
from nanochat_hf.configs import EvaluationConfig
from nanochat_hf.evaluation import TASKS_DIR, lm_eval_model
from nanochat_hf.evaluation.core_score import load_core, mean_centered, score_model, score_tasks
from nanochat_hf.evaluation.evaluate import evaluate
from nanochat_hf.evaluation.lm_eval_model import NanoChatHFLM
from nanochat_hf.evaluation.noise import standard_error
from nanochat_hf.training_step import make_accelerator


@pytest.fixture
def core_data(tmp_path, monkeypatch):
    """A folder with small files for all 22 tasks."""
    folder = tmp_path / "core"
    folder.mkdir()
    monkeypatch.setenv("CORE_DATA_DIR", str(folder))
    for task in load_kinds():
        rows = ROWS[task["core_type"]](4)
        (folder / task["data_file"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def load_kinds():
    import yaml

    from nanochat_hf.evaluation import TASKS_DIR

    for path in (TASKS_DIR / "core").glob("core_*.yaml"):
        yield yaml.safe_load(path.read_text().replace("!function ", ""))


@pytest.fixture
def folder(tmp_path, tiny_model, tiny_tokenizer):
    return save(tiny_model, tiny_tokenizer, tmp_path / "model")


def test_flags_and_core_are_lm_evals(folder, core_data, tiny_model, tiny_tokenizer, capsys):
    tasks = load_core(folder)
    lm = NanoChatHFLM(folder, device="cpu")
    capsys.readouterr()
    ours = score_tasks(lm, tasks, limit=3)
    assert "%|" not in capsys.readouterr().err, "lm-eval's progress bar of each task"
    theirs = run(lm, ["core"], limit=3)
    assert len(ours) == 22 and ours == {name: flags(theirs, name) for name in ours}
    accuracies = {name: sum(each) / len(each) for name, each in ours.items()}
    core = mean_centered(tasks, accuracies)
    assert core == pytest.approx(theirs["groups"]["core"]["centered,none"])
    del accuracies["core_copa"]
    assert mean_centered(tasks, accuracies) is None
    halves = [score_tasks(lm, tasks, limit=3, rank=rank, world_size=2) for rank in (0, 1)]
    assert all(sorted(halves[0][name] + halves[1][name]) == sorted(ours[name]) for name in ours)
    tiny_model.train()
    assert score_model(tasks, 3, make_accelerator(), tiny_model, tiny_tokenizer) == pytest.approx(core)
    assert tiny_model.training


def evaluate_base(run_dir, core_data, **settings):
    """The record of a recipe's evaluation of the base model on CORE's files."""
    evaluate(EvaluationConfig(run_dir=str(run_dir), stages=["base"], core_data=str(core_data), **settings))
    return json.loads((run_dir / "eval" / "core.json").read_text(), parse_constant=pytest.fail)


def test_the_recipe_scores_core_and_says_what_is_missing(tmp_path, core_data, tiny_model, tiny_tokenizer, capsys):
    save(tiny_model, tiny_tokenizer, tmp_path / "base")
    summary = evaluate_base(tmp_path, core_data)["summary"]
    tasks = summary["tasks"].values()
    assert len(tasks) == 22 and summary["core"] == pytest.approx(sum(task["centered"] for task in tasks) / 22)
    errors = [standard_error(task["correct"]) / (1 - task["baseline"]) for task in tasks]
    assert summary["core_stderr"] == pytest.approx(math.sqrt(sum(error**2 for error in errors)) / 22)
    assert not (tmp_path / "eval" / "core.cache").exists()
    os.remove(core_data / "copa.jsonl")
    os.remove(tmp_path / "eval" / "core.json")
    record = evaluate_base(tmp_path, core_data)
    assert record["summary"]["core"] is None and record["summary"]["missing"] == ["core_copa (no copa.jsonl)"]
    assert record["groups"]["core"]["centered,none"] is None and "copa" in make_table(record)
    assert "not whole, missing core_copa" in capsys.readouterr().out


@pytest.mark.parametrize("is_another_model", [False, True])
def test_an_interrupted_recipe_goes_on_from_its_cache(
    tmp_path, core_data, tiny_model, tiny_tokenizer, monkeypatch, is_another_model
):
    save(tiny_model, tiny_tokenizer, tmp_path / "base")
    score, asked = lm_eval_model.score_continuations, []

    def interrupted(model, pairs, *arguments, on_scored):
        score(model, pairs[:5], *arguments, on_scored=on_scored)
        asked.append(len(pairs))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lm_eval_model, "score_continuations", interrupted)
        evaluate_base(tmp_path, core_data)
    monkeypatch.setattr(lm_eval_model, "score_continuations", lambda *a, **k: asked.append(len(a[1])) or score(*a, **k))
    if is_another_model:
        save(tiny_model, tiny_tokenizer, tmp_path / "base")
    evaluate_base(tmp_path, core_data)
    assert asked[1] == asked[0] if is_another_model else asked[1] <= asked[0] - 5


@pytest.mark.parametrize("is_whole", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_plain_lm_eval_command_prints_core(folder, core_data, tmp_path, is_whole):
    if not is_whole:
        os.remove(core_data / "copa.jsonl")
    command = [str(Path(sys.executable).with_name("lm_eval")), "--model", "hf", "--include_path", str(TASKS_DIR)]
    command += ["--model_args", f"pretrained={folder},trust_remote_code=True", "--tasks", "core", "--log_samples"]
    command += ["--output_path", str(tmp_path / "output"), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "output").rglob("results_*.json")
    results = json.loads(path.read_text())
    tasks = {name: figures for name, figures in results["results"].items() if name != "core"}
    core = results["groups"]["core"]["centered,none"]
    assert len(tasks) == 22 and math.isnan(core) is not is_whole
    if is_whole:
        assert core == pytest.approx(sum(figures["centered,none"] for figures in tasks.values()) / 22)
    assert [name for name, figures in tasks.items() if math.isnan(figures["acc,none"])] == ["core_copa"] * (
        not is_whole
    )
    for name in tasks.keys() - {"core_copa"}:
        assert re.search(rf"\b{name}\b", done.stdout)
        (samples,) = path.parent.glob(f"samples_{name}_2*.jsonl")
        flags = [json.loads(line)["acc"] for line in samples.read_text().split("\n") if line]
        assert len(flags) == 4 and set(flags) <= {0.0, 1.0}
        assert tasks[name]["acc,none"] == pytest.approx(sum(flags) / 4)
    assert ("(no copa.jsonl)" in done.stdout) is not is_whole


def test_a_gpt2_of_transformers_has_the_same_flags_by_both_models(core_data, tmp_path):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    backend.train_from_iterator((path.read_text() for path in core_data.iterdir()), trainer)
    tokenizer = GPT2TokenizerFast(tokenizer_object=backend)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=1024))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "gpt2")
    theirs, ours = (run(each(str(tmp_path / "gpt2"), device="cpu"), ["core"], limit=4) for each in (HFLM, NanoChatHFLM))
    found = {name: flags(theirs, name) for name in theirs["samples"]}
    assert len(found) == 22 and found == {name: flags(ours, name) for name in found}
    assert 0 < sum(map(sum, found.values())) < 88


def test_training_logs_core_and_wants_all_files_before_it_starts(tmp_path, tiny_tokenizer, core_data):
    arguments = (tmp_path, tiny_tokenizer, "run")
    run_dir, config, settings = small_run(*arguments, num_steps=4, core_every_steps=2, core_max_per_task=2)
    pretrain.pretrain(config, settings)
    assert sorted(curve(run_dir, "core")) == [2, 4]
    os.remove(core_data / "copa.jsonl")
    run_dir, config, settings = small_run(tmp_path, tiny_tokenizer, "other", core_every_steps=2)
    with pytest.raises(ValueError, match="no copa.jsonl; set CORE_DATA_DIR"):
        pretrain.pretrain(config, settings)


def test_the_benchmarks_sides_answer_alike(folder, core_data, tmp_path, capsys):
    os.remove(core_data / "boolq.jsonl")
    output = tmp_path / "core.json"
    benchmark(["core", "--model", folder, "--max_per_task", "2", "--rounds", "1", "--output", str(output)])
    figures = json.loads(output.read_text())
    assert figures["items_equal"] is True and figures["items_that_differ"] == [] and figures["num_items"] == 42
    seconds = figures["seconds"]
    assert figures["speedup_over_one_by_one"] == pytest.approx(seconds["one_by_one"] / seconds["ours"])
    assert figures["speedup_over_lm_eval"] == pytest.approx(seconds["lm_eval"] / seconds["ours"])
    assert figures["lm_eval_batch_size"] in (1, 2, 4, 8, 16, 32)
    assert figures["core"] is None and figures["missing"] == ["boolq.jsonl"]
    assert "all 42 items have the same flag on every side\nCORE: not whole, no boolq.jsonl" in capsys.readouterr().out


def test_the_benchmark_says_when_the_answers_differ(folder, core_data, monkeypatch):
    monkeypatch.setattr("nanochat_hf.benchmark.core.score_batch", lambda lm, ids, counts: ([0.0, 1.0, 2.0], [True]))
    figures = benchmark(["core", "--model", folder, "--max_per_task", "3", "--rounds", "1"])
    assert figures["items_equal"] is False and figures["items_that_differ"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is missing"),
        (["--model", "m", "--max_per_task", "0"], "must be at least 1"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_bad_benchmarks_are_refused(arguments, message, core_data):
    with pytest.raises((ValueError, OSError), match=message):
        benchmark(["core", *arguments])


def test_no_data_at_all_is_said(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CORE_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="none of CORE.s task files is at hand; set CORE_DATA_DIR"):
        benchmark(["core", "--model", folder])


@pytest.mark.gpu
def test_the_benchmark_runs_on_a_gpu(folder, core_data):
    assert torch.cuda.is_available() and benchmark(["core", "--model", folder, "--max_per_task", "3"])["items_equal"]
