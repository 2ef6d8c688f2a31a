"""Model folders: whole or absent, loadable everywhere."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from nanochat_hf.checkpoint import atomic_folder, last_checkpoint, load_model, save_model


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(OSError, match="disk"), atomic_folder(target) as folder:
        (folder / "a").write_text("half")
        raise OSError("disk full")
    assert (target / "a").read_text() == "old"
    with atomic_folder(target) as folder:
        (folder / "b").write_text("new")
    assert sorted(os.listdir(target)) == ["b"] and os.listdir(tmp_path) == ["model"]


def test_newest_checkpoint_and_limit(tmp_path):
    for step in (10, 20, 100):
        (tmp_path / f"step-{step:06d}").mkdir()
    (tmp_path / "step-000200.partial").mkdir()
    assert last_checkpoint(tmp_path).name == "step-000100"
    last_checkpoint(tmp_path, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["step-000100", "step-000200.partial"]
    assert last_checkpoint(tmp_path / "absent") is None


def test_round_trip(tmp_path, tiny_model, tiny_tokenizer):
    save_model(tiny_model, tiny_tokenizer, tmp_path)
    model, tokenizer = load_model(tmp_path)
    ids = torch.tensor([tokenizer("one two three")["input_ids"]])
    assert torch.equal(model(ids).logits, tiny_model(ids).logits)
    assert tokenizer.chat_template == tiny_tokenizer.chat_template


def test_loads_in_a_process_without_this_package(tmp_path, tiny_model, tiny_tokenizer):
    save_model(tiny_model, tiny_tokenizer, tmp_path / "model")
    ids = torch.arange(20)[None]
    torch.save(tiny_model(ids).logits, tmp_path / "expected.pt")
    program = """
import sys
sys.modules["nanochat_hf"] = None  # any import of the package now fails
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
AutoTokenizer.from_pretrained("model", trust_remote_code=True)
AutoModel.from_pretrained("model", trust_remote_code=True)
assert not model.__class__.__module__.startswith("nanochat_hf")
# Not bit for bit: earlier tests may have left this suite's process with another number of threads.
torch.testing.assert_close(model(torch.arange(20)[None]).logits, torch.load("expected.pt"), atol=5e-6, rtol=0)
print("equal")
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip() == "equal", run.stderr


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor a Hub id"):
        load_model(tmp_path / "absent")


def test_a_half_copied_model_folder_is_an_error(tmp_path, tiny_model, tiny_tokenizer):
    save_model(tiny_model, tiny_tokenizer, tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match="no model at"):
        load_model(tmp_path / "copy")
