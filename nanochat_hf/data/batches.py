"""Batches made ahead of the step: packed, collated, pinned and sent on their way to the device by a thread.

A thread and not DataLoader's worker processes: `tokenizers` works outside the interpreter on all cores, and the state
of one data set is exact where workers would each pack a share of their own. Every process reads its own share of the
corpus, so nothing is dispatched between processes (what Accelerate calls `dispatch_batches=False`).
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch.utils.data import DataLoader

from .packing import PackedDataset

BATCHES_AHEAD = 2


class BatchesAhead:
    """An iterator of batches {"input_ids", "shift_labels"}, (batch_size, T), on the device.

    Args:
        dataset: positioned by its `load_state_dict`, or at its beginning.
        num_batches: batches to give; none is made beyond.
        waiting: batches that a state held, given first.
    """

    def __init__(
        self, dataset: PackedDataset, batch_size: int, device: torch.device, num_batches: int, waiting: list[dict] = ()
    ):
        self.dataset, self.device, self._num_to_make = dataset, device, num_batches - len(waiting)
        self._loader = iter(DataLoader(dataset, batch_size))
        self._executor = ThreadPoolExecutor(1, "batches-ahead")
        self._ahead: deque[Future] = deque()
        for batch in waiting:
            future = Future()
            future.set_result(batch)
            self._ahead.append(future)
        while len(self._ahead) < BATCHES_AHEAD and self._num_to_make > 0:
            self._start()

    def _start(self) -> None:
        self._num_to_make -= 1
        self._ahead.append(self._executor.submit(self._make))

    def _make(self) -> dict[str, torch.Tensor]:
        batch = next(self._loader)
        return {key: value.pin_memory() for key, value in batch.items()} if self.device.type == "cuda" else batch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        if not self._ahead:
            raise StopIteration
        batch = self._ahead.popleft().result()
        if self._num_to_make > 0:
            self._start()
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def state_dict(self) -> dict:
        """What the next batch and all later ones depend on: the batches made ahead, and the data set behind them."""
        waiting = [future.result() for future in self._ahead]  # the thread rests then
        return {"waiting": waiting, "dataset": self.dataset.state_dict()}
