"""Benchmarks run, say what the project promises, and show that their sides do the same work. No test asserts a time."""

import json

import pytest
import torch

from nanochat_hf.benchmark import benchmark
from nanochat_hf.benchmark.memory import PeakMemory
from nanochat_hf.checkpoint import save_model
from nanochat_hf.recipe import RecipeError

SMALL = "--depth 2 --vocab_size 256 --sequence_length 64 --device_batch_size 2 --steps 1 --rounds 2"


def test_pretrain_sides_do_the_same_work(tmp_path, capsys):
    output = tmp_path / "out.json"
    benchmark(
        ["pretrain", *SMALL.split(), "--num_batches", "2", "--sides", "plain", "bare", "eager", "--output", str(output)]
    )
    figures = json.loads(output.read_text())
    assert set(figures["sides"]) == {"plain", "bare", "eager"} and figures["speedup"] is None
    assert figures["loss_difference"] <= 0.05
    speeds = {name: side["tokens_per_second"] for name, side in figures["sides"].items()}
    assert figures["speedup_eager"] == pytest.approx(speeds["eager"] / speeds["plain"])
    assert figures["speedup_over_bare"] == pytest.approx(speeds["eager"] / speeds["bare"])
    split = figures["sides"]["eager"]["seconds_by_part"]
    assert list(split) == ["data", "forward", "backward", "optimizer", "other"]
    assert all(
        len(side["losses"]) == 5 for side in figures["sides"].values()
    )  # 2 to warm up, 2 rounds, 1 for the split
    assert "| eager |" in capsys.readouterr().out


@pytest.mark.slow
def test_decode_sides_write_the_same_tokens(tiny_model, tiny_tokenizer, tmp_path, capsys):
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    flags = f"--model {tmp_path}/model --prompt_tokens 20 --new_tokens 12 --rounds 1 --output {tmp_path}/out.json"
    benchmark(["decode", *flags.split()])
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["tokens_equal"] is True and figures["compile_seconds"] > 0
    for size in ("1", "16"):
        sides = figures["batches"][size]
        rates = [sides[side]["tokens_per_second"] for side in ("ours", "generate")]
        assert figures[f"speedup_batch_{size}"] == pytest.approx(rates[0] / rates[1])
        assert sides["generate"]["tokens_equal"] and set(sides) == {"generate", "ours", "ours, eager"}
        assert sides["ours"]["tokens_per_second_per_stream"] == pytest.approx(rates[0] / int(size))
        assert 0 < sides["ours"]["first_token_seconds"]
    assert "| 16 | ours |" in capsys.readouterr().out


@pytest.mark.slow
def test_pretrain_compiled(tmp_path):
    figures = benchmark(["pretrain", *SMALL.split(), "--output", str(tmp_path / "out.json")])
    assert figures["speedup"] > 0 and figures["compile_seconds"] > 0 and figures["loss_difference"] <= 0.05


def test_grpo_sides_write_the_same_tokens(tmp_path, tiny_model, tiny_tokenizer, capsys):
    output, model = tmp_path / "out.json", tmp_path / "model"
    model.mkdir()
    save_model(tiny_model, tiny_tokenizer, model)
    shape = "--num_prompts 3 --num_generations 2 --max_completion_length 6 --rounds 2"
    benchmark(["grpo", "--model", str(model), *shape.split(), "--output", str(output)])
    figures = json.loads(output.read_text())
    assert figures["same_tokens"] is True and figures["num_completions"] == 6
    sides = figures["sides"]
    assert figures["speedup"] == pytest.approx(sides["trl"]["seconds"] / sides["ours"]["seconds"])
    assert all(len(side["seconds_by_round"]) == 2 for side in sides.values())
    assert "speedup" in capsys.readouterr().out


def test_attention_backends_agree(capsys):
    shape = "--batch_size 1 --heads 2 --head_dim 32 --time 100 --window 33 --rounds 1"
    figures = benchmark(["attention", *shape.split()])
    assert [row["layer"] for row in figures["backends"]] == ["full", "window", "window"]
    rounding = {"torch.float32": 1e-4, "torch.bfloat16": 0.04}[figures["dtype"]]  # by what the machine computes in
    assert all(row["largest_difference"] < rounding and row["seconds"] > 0 for row in figures["backends"])
    assert "| window | blocks |" in capsys.readouterr().out


def test_packing_compares_equal_rows(capsys):
    figures = benchmark(["packing", "--sequence_length", "256", "--num_documents", "1000", "--rounds", "1"])
    assert figures["rows_equal"] and figures["tokens_per_second"] > 0
    assert "| plain scan |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="num_documents=10 do not fill"):
        benchmark(["packing", "--num_documents", "10"])


def test_an_unknown_subcommand_names_the_nearest():
    with pytest.raises(RecipeError, match="`pretrian` is not one of .*did you mean `pretrain`"):
        benchmark(["pretrian"])


def test_peak_memory_sees_what_was_freed():
    memory = PeakMemory(torch.device("cpu"))
    if memory.before is None:
        pytest.skip("this kernel does not reset the mark")
    torch.ones(64 * 2**18).sum()  # 64 MiB, gone at once
    assert 40 < memory.read()["step_memory_mib"] < 200
