"""Every backend of row attention equals transformers' SDPA with its dense masks, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from nanochat_hf import NanoChatHFConfig, NanoChatHFForCausalLM
from nanochat_hf.attention import (
    block_attention,
    cached_attention,
    flash_attention,
    flex_window_attention,
    full_attention,
    use_row_attention,
    window_backend,
    window_block_mask,
)


def qkv(heads: int, kv_heads: int, time: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list:
    shapes = [(2, heads, time, 16), (2, kv_heads, time, 16), (2, kv_heads, time, 16)]
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def reference(q, k, v, window: int | None) -> torch.Tensor:
    """SDPA with the mask spelled out."""
    place = torch.arange(q.shape[2], device=q.device)
    distance = place[:, None] - place
    sees = (distance >= 0) & (distance < (window or q.shape[2]))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=0.3)


def assert_same(attend, heads, kv_heads, time, window, tolerance=1e-5, **where) -> None:
    inputs = qkv(heads, kv_heads, time, **where)
    results = []
    for function in (attend, lambda *args: reference(*args, window)):
        out = function(*inputs)
        grads = torch.autograd.grad(out, inputs, torch.linspace(-1, 1, out.numel()).view(out.shape).to(out))
        results.append([out, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_full(heads, kv_heads):
    assert_same(lambda *args: full_attention(*args, 0.3), heads, kv_heads, 37, None)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize(("time", "window"), [(64, 17), (61, 17), (9, 8), (40, 2), (12, 1)])
def test_blocks(heads, kv_heads, time, window):
    assert_same(lambda *args: block_attention(*args, 0.3, window), heads, kv_heads, time, window)


def test_flex_forward():
    """On a CPU FlexAttention has no backward pass; its mask and its result are those of a GPU."""
    q, k, v = (x.detach() for x in qkv(4, 2, 256))
    mask = window_block_mask(256, 33, q.device)
    ours = flex_attention(q, k, v, block_mask=mask, scale=0.3, enable_gqa=True)  # eager: no minute of compilation
    torch.testing.assert_close(ours, reference(q, k, v, 33), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("attend", [flash_attention, flex_window_attention, block_attention])
def test_windows_on_a_gpu(attend):
    assert window_backend(torch.device("cuda"), torch.float32, 16) is flex_window_attention
    assert_same(
        lambda *args: attend(*args, 0.3, 129), 4, 2, 512, 129, tolerance=2e-2, device="cuda", dtype=torch.bfloat16
    )


@pytest.mark.parametrize("pattern", ["L", "SL"])
def test_a_model_computes_the_same(pattern):
    config = NanoChatHFConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, window_pattern=pattern, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = NanoChatHFForCausalLM(config)
    torch.nn.init.normal_(model.model.layers[0].self_attn.o_proj.weight, std=0.1)
    ids = torch.randint(128, (2, 512))
    batch = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:], "use_cache": False}
    wanted = model(**batch).loss
    use_row_attention(model)
    assert model(**batch).loss.item() == pytest.approx(wanted.item(), abs=1e-6)
    assert pattern == "SL" or torch.equal(model(**batch).loss, wanted), "full layers take the same kernel"
    with cached_attention(model):
        generated = model.generate(ids[:, :9], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert generated.shape == (2, 12)
    assert "attn" not in model.config.to_json_string(use_diff=False)
