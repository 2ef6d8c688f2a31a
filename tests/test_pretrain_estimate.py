"""What `--plan` says is what the recipes' READMEs say, and it knows when a run will not fit."""

import re
from pathlib import Path

import pytest

from nanochat_hf.configs import PretrainConfig
from nanochat_hf.pretrain_estimate import MACHINES, describe_plan, largest_batch_that_fits, memory_bytes
from nanochat_hf.pretrain_plan import scaling_plan
from nanochat_hf.recipe import parse_recipe

RECIPES = Path(__file__).parents[1] / "recipes"


def plan_of(name: str, *flags: str) -> tuple:
    config, _ = parse_recipe(PretrainConfig, argv=["--config", str(RECIPES / name / "pretrain.yaml"), *flags])
    return config, scaling_plan(config, config.vocab_size)


@pytest.mark.parametrize("name", ["d12", "d20", "d24", "d26", "d20_2025_10"])
def test_a_recipes_readme_says_what_its_plan_says(name):
    config, plan = plan_of(name)
    readme, text = (RECIPES / name / "README.md").read_text(), describe_plan(config, config.vocab_size)
    for figure in (plan.num_parameters, plan.num_tokens, plan.num_steps, plan.total_batch_tokens):
        assert f"{figure:,}" in readme and f"{figure:,}" in text, figure
    assert f"{plan.total_flops:.6e}" in readme and f"{plan.total_flops:.6e}" in text
    planned = re.findall(r"([\d.,]+) hours, \$([\d.,]+)", text)
    told = re.findall(r"(?:8xH100|one H200), estimated \| ([\d.]+) h, \$(\d+)", readme)
    assert len(planned) == len(told) == len(MACHINES)
    for (hours, dollars), (hours_told, dollars_told) in zip(planned, told, strict=True):
        assert float(hours_told) == pytest.approx(float(hours), rel=0.01)
        assert float(dollars_told) == pytest.approx(float(dollars), abs=0.51)
    assert "fits" in text and "NOT" not in text


def test_a_run_that_will_not_fit_names_the_setting_that_would():
    config, plan = plan_of("d26", "--device_batch_size", "128", "--total_batch_tokens", str(2**22))
    text = describe_plan(config, config.vocab_size)
    fitting = largest_batch_that_fits(plan, MACHINES[1])
    assert f"does NOT fit in {0.92 * 139.8:.1f} GiB: --device_batch_size {fitting} would" in text
    assert memory_bytes(plan, 2 * fitting, 1)["weights and gradients"] == 8 * plan.num_parameters
    huge, _ = plan_of("d26", "--depth", "64", "--total_batch_tokens", str(2**22))
    assert describe_plan(huge, 32768).count("not even with one row a device: FSDP2 or a smaller depth would") >= 1
