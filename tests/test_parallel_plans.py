"""The model's tensor-parallel and FSDP plans, really run on two gloo processes of transformers' own making."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers.testing_utils import CaptureLogger, LoggingLevel
from transformers.utils import logging

GENERATIONS = ("2026-07", "2025-10")


@pytest.mark.parametrize("architecture", GENERATIONS)
def test_plans_name_modules_that_exist_and_no_others(architecture, make_model):
    """The setters warn of a rule that names nothing; the model's own rules draw no warning."""
    model = make_model(architecture)
    logger = logging.get_logger("transformers.distributed.mixin")
    with LoggingLevel(logging.WARNING), CaptureLogger(logger) as said:
        model.tp_plan, model.fsdp_plan = dict(model.tp_plan), dict(model.fsdp_plan)
        assert not said.io.getvalue()
        model.tp_plan = model.tp_plan | {"model.layers.*.absent": "colwise"}
        assert "model.layers.*.absent" in said.io.getvalue()
    assert ("model.value_embeds.*" in model.tp_plan) == (architecture == "2026-07")
    assert not {"base_model_tp_plan", "base_model_fsdp_plan"} & model.config.to_dict().keys()


def test_two_processes_hold_one_model(make_model, tmp_path):
    """Logits, greedy tokens and gradients of both generations and both plans; parameters really are shared out."""
    for architecture in GENERATIONS:
        make_model(architecture).save_pretrained(tmp_path / architecture)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(Path(__file__).with_name("parallel_plans.py")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("agrees") == 8, done.stdout  # two models, two plans, two processes
