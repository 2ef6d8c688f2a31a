"""Matrix products in fp32 on a CPU by oneDNN, which PyTorch has aboard and asks in bf16 only.

For fp32 PyTorch asks MKL, which on AMD's CPUs leaves AVX-512 alone and reads a matrix for one row with one thread. On
two cores of a Zen 5 oneDNN was 2.2 times as fast with 50 rows and more, and 2.5 times with one row and a matrix too
large for the cache; on two of a Zen 3, without AVX-512, 1.1 to 3 times with a large matrix and slower with a small
one. On Intel's own CPUs MKL stays: through oneDNN prompts took 1.3 to 1.6 times as long (Sapphire Rapids, 2026-11-28).
Without gradients.

    with onednn_products(model):
        logits = model(ids).logits
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from .hardware import cpu_name

MIN_ROWS = 16  # of an input; with fewer, bringing the matrix into oneDNN's layout anew each time costs too much
MIN_PACKED = 2**19  # elements of a matrix that pays off packed even for one row
MIN_ELEMENTS = {"AVX512": 0, "AVX2": 2**18}  # of a matrix that pays off for several rows; other CPUs: not measured


def padded_rows(num_rows: int) -> int:
    """The next of a few numbers of rows, eight an octave: for each number oneDNN compiles a kernel and keeps it.

    Conversations of any length would fill a server's memory with kernels: 0.7 MB an answer (2026-11-27).
    """
    step = max(8, 1 << (num_rows - 1).bit_length() - 4)
    return -(-num_rows // step) * step


def has_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this kind are better left to oneDNN."""
    is_measured = torch.backends.cpu.get_cpu_capability() in MIN_ELEMENTS and "Intel" not in cpu_name()
    return device.type == "cpu" and dtype == torch.float32 and is_measured and torch.backends.mkldnn.is_available()


def min_elements() -> int:
    """Elements of a matrix from which on several rows are better left to oneDNN, on this CPU."""
    return MIN_ELEMENTS[torch.backends.cpu.get_cpu_capability()]


def pack(matrix: torch.Tensor) -> torch.Tensor:
    """A copy of a matrix (out, in) in oneDNN's own layout, for `multiply`."""
    return torch.ops.mkldnn._reorder_linear_weight(matrix.detach().contiguous())


def multiply(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """`F.linear(x, matrix)`, the matrix packed or not; no gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")


class _OneDNNProducts(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.min_elements = min_elements()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not kwargs:
            x, matrix, *bias = args
            is_plain = (not bias or bias[0] is None) and matrix.numel() >= self.min_elements
            num_rows = x.shape[:-1].numel()
            if is_plain and x.dtype == matrix.dtype == torch.float32 and num_rows >= MIN_ROWS:
                rows = F.pad(x.reshape(num_rows, -1), (0, 0, 0, padded_rows(num_rows) - num_rows))
                return multiply(rows, matrix)[:num_rows].view(*x.shape[:-1], -1)
        return func(*args, **(kwargs or {}))


def onednn_products(model: PreTrainedModel):
    """Context in which the model's linear layers are computed by oneDNN where that is better; else it does nothing."""
    if not has_onednn(model.device, model.dtype) or torch.is_autocast_enabled("cpu") or torch.is_grad_enabled():
        return nullcontext()
    return _OneDNNProducts()
