"""README's table of other projects' formats, checked by their own exporters and runtimes where these are installed.

pip install onnx onnxscript onnxruntime mlx[cpu] mlx-lm && bash scripts/test.sh -m slow tests/test_exports.py
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from nanochat_hf import NanoChatHFConfig, NanoChatHFForCausalLM
from nanochat_hf.checkpoint import save_model
from nanochat_hf.interop import to_nanochat, to_transformers

pytestmark = pytest.mark.slow
IDS = torch.tensor([[3, 50, 7, 200, 9, 31, 8, 5, 44, 250]])


@pytest.fixture(params=["2025-10", "2026-07"])
def model(request, tiny_tokenizer):
    torch.manual_seed(0)
    config = NanoChatHFConfig(
        architecture=request.param,
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    model = NanoChatHFForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # nanochat's initialisation has zeros that would hide mistakes
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def test_onnx(model, tmp_path):
    pytest.importorskip("onnxscript", reason="onnx, onnxscript and onnxruntime are not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    path = str(tmp_path / "model.onnx")
    torch.onnx.export(Logits().eval(), (IDS,), path, input_names=["ids"], dynamo=True, verbose=False)
    [logits] = onnxruntime.InferenceSession(path).run(None, {"ids": IDS.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), logits_of(model, IDS), atol=1e-5, rtol=0)


def test_mlx(model, tiny_tokenizer, tmp_path):
    """transformers' native folder with its weights under nanochat's names, as mlx-lm's `nanochat` has them."""
    mlx = pytest.importorskip("mlx.core", reason="mlx and mlx-lm are not installed")
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    ours, native = tmp_path / "ours", tmp_path / "native"
    save_model(model, tiny_tokenizer, ours)
    if model.config.architecture == "2026-07":
        with pytest.raises(ValueError, match="is of the 2026-07 generation"):
            to_transformers(ours, native)
        return
    to_transformers(ours, native)
    to_nanochat(ours, tmp_path / "nanochat", 0)
    weights = torch.load(tmp_path / "nanochat" / "model_000000.pt", weights_only=True)
    weights = {name.removeprefix("_orig_mod."): tensor.float() for name, tensor in weights.items()}
    save_file(weights, native / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((native / "config.json").read_text())
    config |= {"rope_theta": config["rope_parameters"]["rope_theta"]}
    (native / "config.json").write_text(json.dumps(config))
    mlx_lm.convert(str(native), str(tmp_path / "mlx"))
    converted, _ = mlx_lm.load(str(tmp_path / "mlx"))
    logits = torch.tensor(converted(mlx.array(IDS.tolist())).tolist())
    torch.testing.assert_close(logits, logits_of(model, IDS), atol=5e-5, rtol=0)
