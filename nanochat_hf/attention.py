"""Attention over training rows: causal, every row whole, no padding, no cache; windows without a dense mask.

transformers' `sdpa` gives a windowed layer a dense mask, which on a GPU means its slowest kernel. Here the fastest
backend that the machine has is taken, layer by layer (a model of `use_row_attention` has None for every mask):

- full layers: SDPA, on NVIDIA GPUs cuDNN's kernel first
- windows on GPUs from compute capability 8.0 on, in half precision: torch's own FlashAttention 2 with a window
- windows on other GPUs: FlexAttention, compiled
- windows on CPUs: blocks of queries against their own and the previous block of keys (FlexAttention has no backward
  pass there)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface, PreTrainedModel

NAME = "nanochat_rows"
FULL_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def use_row_attention(model: PreTrainedModel) -> None:
    """Let a model attend by this file from now on."""
    AttentionInterface.register(NAME, row_attention)
    model.config._attn_implementation = NAME  # set_attn_implementation does not know a class that FSDP2 has derived


@contextmanager
def cached_attention(model: PreTrainedModel) -> Iterator[None]:
    """Meanwhile attend by transformers' SDPA, which knows padding and caches."""
    before, model.config._attn_implementation = model.config._attn_implementation, "sdpa"
    yield
    model.config._attn_implementation = before


def row_attention(module, query, key, value, attention_mask, scaling, sliding_window=None, **kwargs):
    """Attention as transformers calls it: (B, H, T, d) and (B, K, T, d) twice; returns (B, T, H, d) and no weights.

    Args:
        sliding_window: keys a query sees, itself included; None is all to its left.
    """
    assert attention_mask is None and query.shape[2] == key.shape[2], "for whole rows without padding or cache"
    if sliding_window is None or sliding_window >= query.shape[2]:
        attend = full_attention
    else:
        attend = partial(window_backend(query.device, query.dtype, query.shape[-1]), window=sliding_window)
    return attend(query, key, value, scaling).transpose(1, 2), None


def full_attention(query, key, value, scaling: float) -> torch.Tensor:
    """Causal attention, (B, H, T, d)."""
    grouped = query.shape[1] != key.shape[1]
    attend = partial(F.scaled_dot_product_attention, is_causal=True, scale=scaling, enable_gqa=grouped)
    if query.device.type != "cuda":
        return attend(query, key, value)
    with sdpa_kernel(FULL_BACKENDS, set_priority=True):
        return attend(query, key, value)


def window_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> Callable[..., torch.Tensor]:
    """The function for windowed layers on a device."""
    if device.type != "cuda":
        return block_attention
    has_flash = torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (
        8,
        0,
    )
    if has_flash and dtype in (torch.bfloat16, torch.float16) and head_dim <= 256:
        return flash_attention
    return flex_window_attention


def flash_attention(query, key, value, scaling: float, window: int) -> torch.Tensor:
    """torch's FlashAttention 2, which takes a window although SDPA does not offer it."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, T, heads, d)
    time = query.shape[1]
    out, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, None, None, time, time, 0.0, True, False,
        scale=scaling, window_size_left=window - 1, window_size_right=0,
    )  # fmt: skip
    return out.transpose(1, 2)


def flex_window_attention(query, key, value, scaling: float, window: int) -> torch.Tensor:
    """FlexAttention, which skips blocks outside the window."""
    attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    mask = window_block_mask(query.shape[2], window, query.device)
    return attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])


@cache
def _compiled_flex_attention() -> Callable:
    return torch.compile(flex_attention, dynamic=False)


@cache
def window_block_mask(time: int, window: int, device: torch.device):
    """FlexAttention's mask of a window over T positions."""

    def sees(batch, head, q, k):
        return (q >= k) & (q - k < window)

    return create_block_mask(sees, None, None, time, time, device=str(device))


def block_attention(query, key, value, scaling: float, window: int) -> torch.Tensor:
    """Blocks of window - 1 queries, each against its own and the previous block of keys: no more than two windows."""
    batch, heads, time, head_dim = query.shape
    left = max(1, window - 1)  # keys to the left that a query sees, and the size of a block
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    missing = -time % left
    num_blocks = (time + missing) // left
    query = F.pad(query, (0, 0, 0, missing)).view(batch * heads, num_blocks, left, head_dim)
    key, value = (
        F.pad(x, (0, 0, left, missing)).view(batch * heads, -1, head_dim).unfold(1, 2 * left, left).transpose(-1, -2)
        for x in (key, value)
    )  # (batch * heads, blocks, 2 * left, d)
    place = torch.arange(2 * left, device=query.device) - torch.arange(left, device=query.device)[:, None]
    sees = ((place >= 0 if window > 1 else place >= left) & (place <= left)).expand(num_blocks, -1, -1).clone()
    sees[0, :, :left] = False  # before the first block there is only padding
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=sees, scale=scaling)
    return out.reshape(batch, heads, -1, head_dim)[:, :, :time]
