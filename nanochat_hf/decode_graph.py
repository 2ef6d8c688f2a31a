"""Decoding on a GPU without the cost of launching: fixed buffers for keys and values, and the step as a CUDA graph.

One token is hundreds of kernels of a few microseconds each, which Python cannot launch as fast as a GPU runs them. Here
they are recorded once and replayed. Recording takes as long as a few plain steps; it happens again when the buffers are
full or the batch has lost rows.

    step = GraphStep(DecodeStep(model), cache)
    logits = step(ids, positions, mask)
    step.store()     # now the cache has the new tokens, too
"""

import math
from threading import Lock

import numpy as np
import torch
from transformers import Cache

from .decode_step import DecodeStep

RECORDING = Lock()  # a process records one graph at a time


class GraphStep:
    """A `DecodeStep` over buffers of its own, which begin as a copy of the cache.

    Args:
        cache: what the model has read; not written to before `store`.
    """

    def __init__(self, step: DecodeStep, cache: Cache):
        self.step, self.cache = step, cache
        self.num_seen = self.num_stored = cache.get_seq_length()
        self.ids: torch.Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Logits (B, V) fp32 of the token after each row's newest; the next call overwrites them.

        Args:
            ids: (B,) the newest token of every row. Before a call with fewer rows, `store` and select the cache's rows.
            positions: (B,) its position in the row, padding not counted.
            mask: (B, seen + 1) with 0 at padding, or None.
        """
        if self.ids is None or len(ids) != len(self.ids) or self.num_seen == self.capacity:
            self.store()
            self._allocate(ids, mask)
            self._record()
            self._load()
        if self.graph is None:
            self._run(ids, positions)
        else:
            self.ids.copy_(ids)
            self.positions.copy_(positions)
            self.graph.replay()
        self.num_seen += 1
        return self.logits

    def store(self) -> None:
        """Write the tokens decoded since the last time into the cache."""
        new = slice(self.num_stored, self.num_seen)
        if new.start < new.stop:
            for i, (keys, values) in enumerate(self.buffers):
                self.cache.update(keys[:, :, new], values[:, :, new], i)
            if self.smear_state is not None:
                self.cache.update_conv_state(self.smear_state, len(self.buffers) - 1, conv_kernel_size=1)
            self.num_stored = self.num_seen

    def _allocate(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        batch, device = len(ids), ids.device
        self.capacity = max(self.step.min_capacity, 1 << self.num_seen.bit_length())  # a power of two, more than seen
        self.buffers = [
            [
                zeros((batch, x.shape[1], self.capacity, x.shape[3]), self.step.dtype, device)
                for x in (layer.keys, layer.values)
            ]
            for layer in self.cache.layers
        ]
        self.smear_state = None
        if self.step.smear_gate is not None:
            self.smear_state = torch.zeros(batch, self.step.hidden_size, 1, dtype=self.step.dtype, device=device)
        self.ids, self.positions = torch.zeros_like(ids), torch.ones_like(ids)
        self.end = torch.zeros(1, dtype=torch.long, device=device)  # where the next token goes
        self.is_real = torch.ones(batch, self.capacity, dtype=torch.bool, device=device)
        if mask is not None:
            self.is_real[:, : mask.shape[1]] = mask != 0

    def _record(self) -> None:
        self.graph, device = None, self.ids.device
        if device.type != "cuda":
            return
        with RECORDING, torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries allocate what they need before anything is recorded
                self._run(self.ids, self.positions)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # other chats may go on
                self._run(self.ids, self.positions)
        self.graph = graph

    def _load(self) -> None:
        """Copy the cache; windowed layers hold only their last keys."""
        for buffers, layer in zip(self.buffers, self.cache.layers, strict=True):
            for buffer, held in zip(buffers, (layer.keys, layer.values), strict=True):
                buffer[:, :, self.num_seen - held.shape[2] : self.num_seen] = held
        if self.smear_state is not None:  # asking for the state also sets it, until `store` sets it right
            states = self.cache.update_conv_state(self.smear_state, len(self.buffers) - 1, conv_kernel_size=1)
            self.smear_state.copy_(states[:, :, -2:-1])
        self.end.fill_(self.num_seen)

    def _run(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        with torch.autocast(ids.device.type, enabled=False):
            buffers = (self.buffers, self.smear_state, self.end, self.is_real)
            self.logits = self.step.advance(ids, positions, *buffers)
            self.end += 1


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As `torch.zeros`; on a CPU the system clears a large one's memory when it is touched, and much of it never is."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
