"""Checkpoints of unusual shapes, imported and compared with the plain reference; a golden folder of such shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_models import checkpoint_of, expected_of, per_model
from reference_nanochat import reference_logits
from transformers import AutoModelForCausalLM

from nanochat_hf import NanoChatHFConfig, NanoChatHFForCausalLM
from nanochat_hf.interop import from_nanochat, to_nanochat
from nanochat_hf.interop_checkpoint import NanochatCheckpoint, model_meta, read_checkpoint, write_checkpoint

# architecture, layers, heads, key/value heads, width, training length, window pattern, vocabulary
SHAPES = {
    "one layer": ("2026-07", 1, 2, 1, 48, 64, "SSSL", 300),
    "two layers, one shared key head": ("2026-07", 2, 3, 1, 72, 100, "SL", 257),
    "an odd depth and a long pattern": ("2026-07", 7, 4, 2, 64, 600, "SSSSL", 321),
    "full attention": ("2026-07", 3, 2, 2, 48, 200, "L", 64),
    "short windows but for the last layer": ("2026-07", 5, 6, 3, 96, 300, "S", 129),
    "2025-10, shared key heads": ("2025-10", 3, 4, 2, 48, 50, None, 97),
    "2025-10, one layer, one key head": ("2025-10", 1, 4, 1, 32, 130, None, 101),
}


def random_checkpoint(folder: Path, shape: tuple, prefix: str = "", embedding_dtype=torch.float32, step=7) -> Path:
    """A checkpoint folder whose weights let every path count, with logits of a trained model's size (a few units)."""
    architecture, layers, heads, kv_heads, width, length, pattern, vocab_size = shape
    config = NanoChatHFConfig(
        architecture=architecture, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        hidden_size=width, max_position_embeddings=length, window_pattern=pattern, vocab_size=vocab_size,
    )  # fmt: skip
    state = {}
    for name, tensor in NanoChatHFForCausalLM(config).state_dict().items():
        tensor = 0.8 * width**-0.5 * torch.randn(tensor.shape) + (0.3 if "lambda" in name else 0)
        state[name] = tensor.to(embedding_dtype) if "embed" in name else tensor
    meta = {"step": step, "model_config": model_meta(config)}
    folder.mkdir(parents=True)
    write_checkpoint(NanochatCheckpoint(step, meta, config, state), folder)
    path = next(folder.glob("model_*.pt"))
    torch.save({prefix + name: tensor for name, tensor in torch.load(path, weights_only=True).items()}, path)
    return folder


@per_model("expected.pt")
def test_reference_has_the_golden_logits(folder):
    read, expected = checkpoint_of(folder), expected_of(folder)
    tensors = torch.load(folder / f"model_{read.step:06d}.pt", weights_only=True)
    logits = reference_logits(tensors, read.meta["model_config"], expected["input_ids"])
    torch.testing.assert_close(logits.float(), expected["logits"], atol=5e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("prefix, embedding_dtype", [("", torch.float32), ("_orig_mod.", torch.bfloat16)])
@torch.no_grad()
def test_odd_shapes_have_the_references_logits_and_tokens(shape, prefix, embedding_dtype, tmp_path, capsys):
    folder = random_checkpoint(tmp_path / "checkpoint", shape, prefix, embedding_dtype)
    from_nanochat(folder, tmp_path / "model")
    assert capsys.readouterr().err.count("warning:") == 1  # no tokenizer beside it: said once
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    read = read_checkpoint(folder)
    tensors, settings = torch.load(next(folder.glob("model_*.pt")), weights_only=True), read.meta["model_config"]
    ids = torch.randint(settings["vocab_size"], (2, settings["sequence_len"]))
    expected = reference_logits(tensors, settings, ids)
    torch.testing.assert_close(model(ids).logits, expected.float(), atol=5e-6, rtol=0)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, expected.float(), atol=5e-6, rtol=0)
    model.set_attn_implementation("sdpa")

    prompt = ids[:1, :9]
    tokens = prompt
    for _ in range(12):
        tokens = torch.cat([tokens, reference_logits(tensors, settings, tokens)[:, -1:].argmax(-1)], dim=1)
    for cache in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        found = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, **cache)
        assert torch.equal(found, tokens), cache
    to_nanochat(tmp_path / "model", tmp_path / "back")
    back = torch.load(next((tmp_path / "back").glob("model_*.pt")), weights_only=True)
    before = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert set(back) == set(before) and all(torch.equal(back[name], before[name]) for name in before)


@pytest.mark.slow
def test_golden_tests_take_another_folder(tmp_path):
    """The tests read NANOCHAT_HF_GOLDEN, hard-code no shape, and skip what the folder lacks."""
    for name in ("two layers, one shared key head", "2025-10, shared key heads"):
        shape = SHAPES[name]
        folder = random_checkpoint(tmp_path / f"model_{shape[0]}", shape)
        tensors = torch.load(next(folder.glob("model_*.pt")), weights_only=True)
        settings = json.loads(next(folder.glob("meta_*.json")).read_text())["model_config"]
        ids = torch.randint(shape[-1], (2, 40))
        logits = reference_logits(tensors, settings, ids)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        prompt = tokens = ids[0, :5]
        for _ in range(30):
            tokens = torch.cat([tokens, reference_logits(tensors, settings, tokens[None])[0, -1:].argmax(-1)])
        expected = {"input_ids": ids, "logits": logits.float(), "loss": loss.float(), "greedy_prompt": prompt}
        torch.save(expected | {"greedy_tokens": tokens[5:]}, folder / "expected.pt")
    files = ["test_modeling.py", "test_interop.py", "test_interop_tokenizer.py", "test_optim.py", "test_packing.py"]
    files += ["test_conversations.py", "test_scaling.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-rps", "-p", "no:cacheprovider", "-k", "golden or nanochat"]
    command += [str(Path(__file__).with_name(name)) for name in files]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | {"NANOCHAT_HF_GOLDEN": str(tmp_path)}
    )
    assert done.returncode == 0, done.stdout[-5000:]
    for name in ("model_2026-07", "model_2025-10"):
        assert f"test_greedy_tokens_equal_nanochats[{name}]" in done.stdout
    for lacking in ("tokenizer/tokenizer.pkl", "packing.json", "init_stats.json", "optimizer_8_steps.pt"):
        assert lacking in done.stdout, f"nothing says that {lacking} is not there"
