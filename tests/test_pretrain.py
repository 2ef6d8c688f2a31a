"""The pretraining loop on a model of a few thousand parameters: what it writes, resuming, and what goes wrong."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from small_runs import curve, small_run

from nanochat_hf import NanoChatHFForCausalLM, pretrain, pretrain_model, training_step
from nanochat_hf.checkpoint import load_model
from nanochat_hf.configs import PretrainConfig
from nanochat_hf.pretrain_estimate import describe_plan
from nanochat_hf.recipe import parse_recipe
from nanochat_hf.training_step import TrainingStep


@pytest.fixture
def make_run(tmp_path, tiny_tokenizer):
    """A function: a run folder with a tokenizer, its configuration and settings."""
    return partial(small_run, tmp_path, tiny_tokenizer)


def test_a_run_writes_a_model_and_its_records(make_run):
    run_dir, config, settings = make_run("run")
    pretrain.pretrain(config, settings)
    model, tokenizer = load_model(run_dir / "base")
    assert isinstance(model, NanoChatHFForCausalLM) and model.config.vocab_size == len(tokenizer)
    record = json.loads((run_dir / "eval" / "base.json").read_text())["results"]
    assert record["tokens"] == 6 * 256 and record["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert record["val_bpb"] == curve(run_dir, "val_bpb")[6] < record["untrained_val_bpb"]
    assert sorted(curve(run_dir, "val_bpb")) == [0, 3, 6] and sorted(curve(run_dir, "loss")) == [1, 2, 3, 4, 5, 6]
    losses = json.loads((run_dir / "eval" / "base_loss.json").read_text())["results"]
    assert len(losses["samples"]) == 7 and losses["samples"][0].startswith("<|bos|>The capital of France is")
    pretrain.pretrain(config, settings)  # finished: returns at once


def test_a_stopped_run_resumes_exactly(make_run, monkeypatch):
    whole_dir, config, settings = make_run("whole")
    pretrain.pretrain(config, settings)

    run_dir, config, settings = make_run("stopped")
    take_step = TrainingStep.__call__

    def stop_after_four(self, batches, step):
        self.stop_requested = step == 3
        return take_step(self, batches, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="step 4.*resume"):
        patch.setattr(TrainingStep, "__call__", stop_after_four)
        pretrain.pretrain(config, settings)
    assert not (run_dir / "base").exists() and (run_dir / "checkpoints" / "base" / "step-000004").is_dir()
    pretrain.pretrain(config, settings)
    assert curve(run_dir, "loss") == curve(whole_dir, "loss")
    ours, theirs = (load_model(d / "base")[0].state_dict() for d in (run_dir, whole_dir))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_another_number_of_processes_is_refused(make_run):
    run_dir, config, settings = make_run("two", save_every_steps=2)
    pretrain.pretrain(config, settings)
    (folder,) = (run_dir / "checkpoints" / "base").iterdir()
    (folder / "state-1.pt").write_bytes((folder / "state-0.pt").read_bytes())
    (run_dir / "eval" / "base.json").unlink()
    with pytest.raises(ValueError, match="made by 2 processes, now there are 1.*Launch 2"):
        pretrain.pretrain(config, settings)


def test_accumulation_changes_nothing(make_run):
    """One forward pass of four rows, or two of two: the same rows, the same step."""
    losses = {}
    for size in (2, 4):
        run_dir, config, settings = make_run(f"batch{size}", device_batch_size=size, num_steps=3)
        pretrain.pretrain(config, settings)
        losses[size] = list(curve(run_dir, "loss").values())
    assert losses[2] == pytest.approx(losses[4], abs=2e-4)


def test_bad_losses_stop_the_run(make_run, monkeypatch):
    _, config, settings = make_run("nan")

    def broken(self, *args, forward=NanoChatHFForCausalLM.forward, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training:
            output.loss = output.loss * math.nan
        return output

    monkeypatch.setattr(NanoChatHFForCausalLM, "forward", broken)
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        pretrain.pretrain(config, settings)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_loss_is_left_out_and_counted(make_run, monkeypatch, bad):
    """Two in a row and, later, one: three steps leave weights and optimizer as they were, the run goes on."""
    run_dir, config, settings = make_run("nan", eval_every_steps=0)
    take_step, step_number, untouched = TrainingStep.__call__, [], []

    def noticing(self, batches, step):
        before = [p.clone() for p in self.model.parameters()]
        step_number[:] = [step]
        loss = take_step(self, batches, step)
        untouched.append(all(torch.equal(p, q) for p, q in zip(self.model.parameters(), before, strict=True)))
        return loss

    def broken(self, *args, forward=NanoChatHFForCausalLM.forward, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training and step_number[0] in (1, 2, 4):
            output.loss = output.loss * bad
        return output

    monkeypatch.setattr(TrainingStep, "__call__", noticing)
    monkeypatch.setattr(NanoChatHFForCausalLM, "forward", broken)
    pretrain.pretrain(config, settings)
    assert untouched == [False, True, True, False, True, False]
    assert json.loads((run_dir / "eval" / "base.json").read_text())["results"]["num_skipped_steps"] == 3


def test_a_batch_that_does_not_divide_names_the_nearest(make_run):
    _, config, settings = make_run("bad", total_batch_tokens=300)
    with pytest.raises(ValueError, match="total_batch_tokens=300 is no multiple.*2 \\* 64 \\* 1 = 128.*nearest.*256"):
        pretrain.pretrain(config, settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device_batch_size": 0}, "device_batch_size must be 1 or more, got 0"),
        ({"tracker": "trackio"}, "tracker: trackio is not installed: pip install trackio"),
        (
            {"learning_rates": {"matirx": 0.1}},
            "learning_rates names \\['matirx'\\]; this model's groups are .*matrix",
        ),
    ],
)
def test_bad_settings_cost_nothing(make_run, monkeypatch, change, message):
    monkeypatch.setattr(training_step, "find_spec", lambda name: None)
    run_dir, config, settings = make_run("bad", **change)
    with pytest.raises(ValueError, match=message):
        pretrain.pretrain(config, settings)
    assert not (run_dir / "logs").exists() and not (run_dir / "eval").exists()


def test_a_machine_without_a_compiler_trains_uncompiled_and_says_so(make_run, monkeypatch, capsys):
    monkeypatch.setattr(pretrain_model, "has_compiler", lambda: False)
    monkeypatch.setattr(pretrain_model, "CPU_COMPILE_FLOPS", 0)
    _, config, settings = make_run("asked", compile=True)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        pretrain.pretrain(config, settings)
    run_dir, config, settings = make_run("not asked")
    pretrain.pretrain(config, settings)
    assert "not compiled" in capsys.readouterr().out and (run_dir / "base" / "config.json").is_file()


def test_a_checkpoint_without_state_is_named(make_run):
    run_dir, config, settings = make_run("stateless")
    (run_dir / "checkpoints" / "base" / "step-000002").mkdir(parents=True)
    with pytest.raises(ValueError, match="step-000002 holds no state.*delete it"):
        pretrain.pretrain(config, settings)


@pytest.mark.parametrize("vocab_size", [None, 512])
def test_a_run_without_tokenizer(tmp_path, vocab_size):
    config = PretrainConfig(run_dir=str(tmp_path), vocab_size=vocab_size)
    with pytest.raises(ValueError, match="train the tokenizer first"):
        pretrain.pretrain(config, {})


def test_rates_that_yaml_reads_as_text(make_run):
    run_dir, config, settings = make_run("text", learning_rates={"matrix": "4e-2"}, num_steps=1)
    pretrain.pretrain(config, settings)
    record = json.loads((run_dir / "eval" / "base.json").read_text())["results"]
    numbers = make_run("numbers", learning_rates={"matrix": 0.04}, num_steps=1)
    pretrain.pretrain(*numbers[1:])
    same = json.loads((numbers[0] / "eval" / "base.json").read_text())["results"]
    assert record["learning_rates"] == same["learning_rates"] and record["val_bpb"] == same["val_bpb"]


def test_the_plan_of_the_published_run(capsys):
    recipe = str(Path(__file__).parents[1] / "recipes" / "d20_2025_10" / "pretrain.yaml")
    config, settings = parse_recipe(PretrainConfig, argv=["--config", recipe, "--plan", "--run_dir", "nowhere"])
    pretrain.pretrain(config, settings)
    text = capsys.readouterr().out
    assert "560,988,160" in text and "21,400 steps of 524,288 tokens" in text and "3.917670e+19" in text
    assert "fits" in text and "NOT" not in text and not Path("nowhere").exists()
    config.device_batch_size, config.total_batch_tokens = 256, 2**23
    text = describe_plan(config, 65536)
    assert text.count("does NOT fit") == 2 and "--device_batch_size 32 would" in text


def test_a_tokenizer_of_another_size_is_refused(make_run):
    run_dir, config, settings = make_run("sizes", vocab_size=600)
    with pytest.raises(ValueError, match="vocab_size=600, but the tokenizer in .* has 512 tokens"):
        pretrain.pretrain(config, settings)


def test_a_plan_does_not_mind_another_runs_tokenizer(make_run, capsys):
    run_dir, config, settings = make_run("plan", vocab_size=600, plan=True)
    pretrain.pretrain(config, settings)
    assert (run_dir / "tokenizer").is_dir() and "600" in capsys.readouterr().out


def test_a_plan_needs_a_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="train the tokenizer first, or give --vocab_size"):
        pretrain.pretrain(PretrainConfig(run_dir=str(tmp_path), plan=True), {})
