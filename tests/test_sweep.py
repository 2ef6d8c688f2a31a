"""A sweep's rungs spend the FLOPs they are given; their figures become a table, a plot and a best size."""

import json

import pytest
from small_runs import small_run

from nanochat_hf.configs import SweepConfig
from nanochat_hf.pretrain import pretrain
from nanochat_hf.sweep import best_sizes, finish_sweep, ladder

ONLY = {"depth": None, "num_steps": None}


@pytest.fixture
def make_sweep(tmp_path, tiny_tokenizer):
    """A function: the configuration and settings of a sweep in a folder with a tokenizer."""

    def make(**changes):
        _, _, settings = small_run(tmp_path, tiny_tokenizer, "sweep")
        settings = {key: value for key, value in settings.items() if key not in ONLY} | changes
        return SweepConfig(**settings), settings

    return make


def test_three_depths_at_fixed_flops(make_sweep, tmp_path, capsys):
    config, settings = make_sweep(depths=[3, 1, 2], flops=[5e9], eval_every_steps=0)
    rungs = ladder(config, settings)
    assert [said["depth"] for _, said in rungs] == [1, 2, 3]
    for rung in rungs:
        pretrain(*rung)
    rows = finish_sweep(config, settings)
    assert [row["depth"] for row in rows] == [1, 2, 3]
    for row in rows:
        step = row["total_flops"] / (row["tokens"] / config.total_batch_tokens)
        assert abs(row["total_flops"] - 5e9) <= step / 2, "the nearest whole number of steps"
    assert (tmp_path / "sweep" / "plots" / "isoflop.png").stat().st_size > 5000
    record = json.loads((tmp_path / "sweep" / "eval" / "sweep.json").read_text())["results"]
    assert record["rungs"] == rows and "isoflop.png" in capsys.readouterr().out


def test_the_best_size_is_the_parabolas_lowest_point():
    rows = [{"flops": 1.0, "num_parameters": n, "val_bpb": b} for n, b in ((1e6, 1.1), (1e7, 1.0), (1e8, 1.1))]
    assert best_sizes(rows)["1"] == pytest.approx(1e7)
    falling = [row | {"val_bpb": -row["num_parameters"]} for row in rows]
    assert best_sizes(falling) == {"1": None} == best_sizes(rows[:2])


def test_what_a_sweep_refuses(make_sweep):
    with pytest.raises(ValueError, match="needs depths and FLOPs: --depths"):
        ladder(*make_sweep(flops=[1e9]))
    with pytest.raises(ValueError, match="num_steps is not to be set"):
        ladder(*make_sweep(depths=[1], flops=[5e9], num_steps=3))
    with pytest.raises(ValueError, match="1000 FLOPs are less than a step of depth 2"):
        ladder(*make_sweep(depths=[2], flops=[1e3]))
