"""What the machine can do: bf16 or not, its peak, and how much of it a run uses (MFU); how it keeps memory."""

import ctypes
import platform
from functools import cache

import torch

from .scaling import ScalingPlan

# Dense bf16 peaks in FLOP/s, from the vendors' data sheets; the first name found in the device's name counts.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
}


@cache
def cpu_name() -> str:
    """The processor's model, as the system gives it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):  # no Linux, or one on ARM
        return platform.processor() or platform.machine()


def supports_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are fast here; elsewhere training runs in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def return_freed_memory() -> None:
    """Let glibc give freed memory back to the system, as long as this process lives; elsewhere, do nothing.

    By default the size from which a block is mapped by itself grows with the blocks freed, up to 32 MiB, and
    threads spread over up to eight heaps a core: a server's freed tensors then stay there, and the heaps grow by the
    holes between them.
    Source: mallopt(3).
    """
    m_mmap_threshold, m_arena_max = -3, -8
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows: other allocators
        return
    mallopt(m_mmap_threshold, 128 * 1024)
    mallopt(m_arena_max, 2)


def has_compiler() -> bool:
    """Whether there is a C++ compiler, without which `torch.compile` makes nothing, for a GPU neither."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second to import

    try:
        get_cpp_compiler()
    except RuntimeError:
        return False
    return True


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


class Throughput:
    """Tokens per second of the training steps alone, evaluation and saving left out.

    The first step of a session warms kernels and caches up (and compiles): it is not counted.
    """

    def __init__(self, plan: ScalingPlan, device: torch.device, num_processes: int):
        self.plan, self.num_processes, self.peak_flops = plan, num_processes, peak_flops(device)
        self.num_steps, self.seconds, self.warmup_seconds = 0, 0.0, None

    def count_step(self, seconds: float) -> None:
        """Count one optimizer step of so many seconds."""
        if self.warmup_seconds is None:
            self.warmup_seconds = seconds
        else:
            self.num_steps += 1
            self.seconds += seconds

    @property
    def tokens_per_second(self) -> float:
        return self.num_steps * self.plan.total_batch_tokens / self.seconds if self.seconds else 0.0

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, None where the device's peak is not known."""
        if self.peak_flops is None:
            return None
        return self.tokens_per_second * self.plan.flops_per_token / (self.peak_flops * self.num_processes)

    def seconds_of(self, num_tokens: int) -> float | None:
        """How long so many tokens take at this speed."""
        return num_tokens / self.tokens_per_second if self.seconds else None
