"""Attention: every backend this machine has for full and for windowed layers, forward and backward, on one shape.

A windowed layer's FLOPs are those within its window. Each result is compared with SDPA under a spelled-out mask.

    python scripts/benchmark.py attention
    python scripts/benchmark.py attention --heads 10 --batch_size 32                            # a layer of d20
    python scripts/benchmark.py attention --heads 4 --head_dim 64 --time 512 --window 129       # of d4
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention import block_attention, flash_attention, flex_window_attention
from ..configs import AttentionBenchmarkConfig
from ..training_step import compute_dtype, make_accelerator

CONFIG = AttentionBenchmarkConfig
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def backends(config: AttentionBenchmarkConfig, device: torch.device, scaling: float) -> dict[str, dict[str, Attend]]:
    """Functions of (q, k, v) by kind of layer and name; the first of each kind is the reference."""
    place = torch.arange(config.time, device=device)
    distance = place[:, None] - place
    dense = (distance >= 0) & (distance < config.window)
    causal = partial(F.scaled_dot_product_attention, is_causal=True, scale=scaling)

    def only(backend: SDPBackend) -> Attend:
        def attend(q, k, v):
            with sdpa_kernel([backend]):
                return causal(q, k, v)

        return attend

    full = {"sdpa, torch's choice": causal}
    windowed = {"sdpa, dense mask": partial(F.scaled_dot_product_attention, attn_mask=dense, scale=scaling)}
    within = {"scaling": scaling, "window": config.window}
    windowed["blocks"] = partial(block_attention, **within)
    if device.type == "cuda":
        full["cuDNN"] = only(SDPBackend.CUDNN_ATTENTION)
        full["FlashAttention 2"] = only(SDPBackend.FLASH_ATTENTION)
        windowed["FlashAttention 2, window"] = partial(flash_attention, **within)
        windowed["FlexAttention"] = partial(flex_window_attention, **within)
    return {"full": full, "window": windowed}


def run(config: AttentionBenchmarkConfig) -> tuple[dict, str]:
    """Measure; returns the figures and their table."""
    accelerator = make_accelerator()
    device, dtype = accelerator.device, compute_dtype(accelerator)
    shape = config.batch_size, config.heads, config.time, config.head_dim
    inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    pairs = {"full": config.time * (config.time + 1) // 2}
    pairs["window"] = sum(min(i + 1, config.window) for i in range(config.time))
    figures = []
    for kind, functions in backends(config, device, config.head_dim**-0.5).items():
        flops = 12 * config.batch_size * config.heads * config.head_dim * pairs[kind]  # forward 4, backward 8 a pair
        wanted = None
        for name, attend in functions.items():
            results, seconds = measure(attend, inputs, config.rounds)
            wanted = results if wanted is None else wanted
            largest = max((a - b).abs().max().item() for a, b in zip(results, wanted, strict=True))
            figures.append({"layer": kind, "backend": name, "seconds": seconds, "flops_per_second": flops / seconds})
            figures[-1]["largest_difference"] = largest
    lines = ["| layer | backend | ms | GFLOP/s | largest difference |", "|---|---|--:|--:|--:|"]
    for row in figures:
        speed = f"{1e3 * row['seconds']:.2f} | {row['flops_per_second'] / 1e9:,.0f}"
        lines.append(f"| {row['layer']} | {row['backend']} | {speed} | {row['largest_difference']:.1e} |")
    return {"dtype": str(dtype), "backends": figures}, "\n".join(lines)


def measure(attend: Attend, inputs: list[torch.Tensor], rounds: int) -> tuple[list[torch.Tensor], float]:
    """Output and gradients, and the median seconds of a forward and a backward pass."""
    gradient = torch.linspace(-1, 1, inputs[0].numel(), device=inputs[0].device).view(inputs[0].shape).to(inputs[0])
    seconds = []
    for _ in range(rounds + 2):  # two to warm up
        wait(inputs[0].device)
        started = time.perf_counter()
        out = attend(*inputs)
        gradients = torch.autograd.grad(out, inputs, gradient)
        wait(inputs[0].device)
        seconds.append(time.perf_counter() - started)
    return [out.detach(), *gradients], median(seconds[2:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
