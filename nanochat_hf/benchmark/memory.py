"""The highest memory of a stretch of code: the allocator's on a GPU, the process's resident memory on a CPU."""

from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


class PeakMemory:
    """Starts to measure when made.

    Args:
        device: a CUDA device or the CPU. The kernel's mark of a process's highest memory is set back where it allows
            that (Linux); elsewhere the figures are None.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = resident_bytes("VmRSS")
        except OSError:
            self.before = None

    def read(self) -> dict[str, float | None]:
        """`peak_memory_mib` of the whole process, and `step_memory_mib`: how far it rose above the start."""
        if self.before is None:
            return {"peak_memory_mib": None, "step_memory_mib": None}
        is_cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if is_cuda else resident_bytes("VmHWM")
        return {"peak_memory_mib": peak / 2**20, "step_memory_mib": max(0, peak - self.before) / 2**20}


def resident_bytes(field: str) -> int:
    """A memory figure of the kernel about this process, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
