"""A corpus: the documents of a data set in a fixed order, shared out among processes, resumable to the document.

Row r of shard s belongs to the process with (r + s) mod `world_size` == `rank`: no overlap and no loss whatever the
numbers of files, row groups and processes, and shares equal to within one document a shard. Each process decodes the
whole text column, which is cheap, but tokenises only its own documents. A DataLoader with workers splits a share once
more in the same way.

    for document in load_corpus("../shared/data/pretrain", "train", epochs=1): ...
"""

import hashlib
import logging
import threading
from collections.abc import Iterator

from ..recipe import nearest
from .shards import BadShardError, find_shards

SPLITS = ("train", "validation")
log = logging.getLogger(__name__)


def load_corpus(
    dataset: str,
    split: str = "train",
    rank: int = 0,
    world_size: int = 1,
    epochs: int | None = 1,
    num_shards: int | None = None,
    on_bad_shard: str = "error",
) -> "Corpus":
    """Open the documents of `dataset`.

    Args:
        dataset: "embedded", a folder of parquet shards with a `text` column (sorted by name, the last is validation),
            a .parquet or .jsonl file (the last 5% of its rows are validation), or a Hub dataset id, perhaps with a
            folder of it ("HuggingFaceFW/fineweb-edu/sample/10BT"), whose parquet files count like a local folder's.
        split: "train" or "validation".
        rank, world_size: this process and the number of processes that share the corpus.
        epochs: passes over the split; None repeats it for ever.
        num_shards: use only the first so many training shards.
        on_bad_shard: "error" stops at a shard that cannot be read, "skip" leaves the rest of it out and counts it.

    Raises:
        ValueError: before any document is read, for what can be seen then: a missing path, no `text` column, fewer
            than two documents, a damaged local shard. Of a Hub data set only the first shard is fetched and checked.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {SPLITS}; did you mean {nearest(split, SPLITS)!r}?")
    if on_bad_shard not in ("error", "skip"):
        raise ValueError(f"on_bad_shard={on_bad_shard!r}: give 'error' or 'skip'")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size} processes: ranks count from 0 to world_size - 1")
    shards = find_shards(dataset, split, num_shards)
    _check(shards, dataset, split, on_bad_shard)
    return Corpus(shards, dataset, rank, world_size, epochs, on_bad_shard)


def _check(shards: list, dataset: str, split: str, on_bad_shard: str) -> None:
    num_rows, errors = 0, []
    seen_now = shards[:1] if shards[0].is_remote else shards
    for shard in seen_now:
        try:
            num_rows += shard.num_rows()
            if shard is shards[0]:
                next(shard.read(0, 1), None)  # a .jsonl file shows only when read whether it has a key `text`
        except BadShardError as error:
            errors.append(error)
    if errors and (on_bad_shard == "error" or len(errors) == len(shards)):
        raise errors[0]
    if not errors and not num_rows:
        raise ValueError(
            f"the {split} split of {dataset} is empty: no document in {', '.join(s.name for s in seen_now)}"
        )


class Corpus:
    """An iterable of documents (str). `iter()` starts at the beginning, or where `load_state_dict` said, once.

    One iteration at a time: state and counters belong to the newest iterator. Empty documents (null, or only white
    space) are left out and counted.

    Attributes:
        epoch: passes completed.
        num_documents, num_empty_documents, num_skipped_shards: seen by this process since the beginning.
    """

    def __init__(self, shards, source, rank, world_size, epochs, on_bad_shard):
        self.shards, self.source, self.epochs, self.on_bad_shard = shards, source, epochs, on_bad_shard
        self._rank, self._world_size = self._share = rank, world_size
        self._fingerprint = hashlib.sha256("\n".join(s.identity() for s in shards).encode()).hexdigest()[:16]
        self._is_positioned = False
        self._reset()

    def _reset(self) -> None:
        self.epoch = self.num_documents = self.num_empty_documents = self.num_skipped_shards = 0
        self._num_epoch_documents = self._shard = self._row = 0

    def __iter__(self) -> Iterator[str]:
        if not self._is_positioned:
            self._reset()
        self._is_positioned = False
        self._share = self._current_share()
        return self._documents(*self._share)

    def _current_share(self) -> tuple[int, int]:
        """(rank, world_size) of the process, or of the DataLoader worker that asks: its part of the process's rows."""
        from torch.utils.data import get_worker_info

        if (worker := get_worker_info()) is None:
            return self._rank, self._world_size
        return self._rank + self._world_size * worker.id, self._world_size * worker.num_workers

    def _documents(self, rank: int, world_size: int) -> Iterator[str]:
        bad_shard = BadShardError  # a local: modules are gone when a process exits in the middle
        while self.epochs is None or self.epoch < self.epochs:
            while self._shard < len(self.shards):
                self._prefetch(self._shard + 1)
                # The first row of this share that is not before the position.
                start = self._row + (rank - self._shard - self._row) % world_size
                try:
                    for row, text in self.shards[self._shard].read(start, world_size):
                        self._row = row + 1
                        if not text or text.isspace():
                            self.num_empty_documents += 1
                            continue
                        self.num_documents += 1
                        self._num_epoch_documents += 1
                        yield text
                except bad_shard as error:
                    if self.on_bad_shard == "error":
                        raise
                    self.num_skipped_shards += 1
                    log.warning("skipped: %s", error)
                self._shard, self._row = self._shard + 1, 0
            if not self._num_epoch_documents:
                raise ValueError(
                    f"{self.source} has no document for process {rank} of {world_size} "
                    f"({self.num_empty_documents} empty, {self.num_skipped_shards} shards skipped): "
                    f"use fewer processes or more text"
                )
            self.epoch += 1
            self._shard = self._num_epoch_documents = 0

    def _prefetch(self, index: int) -> None:
        """Fetch the next Hub shard while this one is read; a failure shows when its turn comes."""
        if index < len(self.shards) and self.shards[index].is_remote:

            def fetch() -> None:
                try:
                    self.shards[index].fetch()
                except OSError:
                    pass

            threading.Thread(target=fetch, daemon=True).start()

    def state_dict(self) -> dict:
        """The position after the last document given, and the counters: plain ints and strings."""
        rank, world_size = self._share
        return {
            "epoch": self.epoch,
            "shard": self._shard,
            "row": self._row,
            "num_documents": self.num_documents,
            "num_epoch_documents": self._num_epoch_documents,
            "num_empty_documents": self.num_empty_documents,
            "num_skipped_shards": self.num_skipped_shards,
            "rank": rank,
            "world_size": world_size,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict) -> None:
        """Let the next `iter()` go on from `state`.

        Raises:
            ValueError: the state is of other data, or of another share of it.
        """
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"cannot resume: the files of {self.source} are not those of the checkpoint (another data set, split, "
                f"num_shards or Python version). Restore them, or start over."
            )
        self._share = self._current_share()
        if (state["rank"], state["world_size"]) != self._share:
            raise ValueError(
                f"cannot resume: the checkpoint's position is of process {state['rank']} of {state['world_size']}, "
                f"this is process {self._share[0]} of {self._share[1]}: use as many processes as then, or start over."
            )
        self.epoch, self._shard, self._row = state["epoch"], state["shard"], state["row"]
        self.num_documents, self._num_epoch_documents = state["num_documents"], state["num_epoch_documents"]
        self.num_empty_documents, self.num_skipped_shards = state["num_empty_documents"], state["num_skipped_shards"]
        self._is_positioned = True
