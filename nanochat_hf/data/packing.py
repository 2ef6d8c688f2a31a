"""Documents become rows of equal length, without padding: inputs `row[:-1]`, targets `row[1:]` of T + 1 tokens.

Two ways, one for each generation of nanochat:

- "best_fit" (2026-07): from a buffer of documents take the longest that fits what is left of the row, of equal ones
  the first read; where none fits, crop the shortest and drop its rest. A row starts with a document's `<|bos|>`. The
  buffer is indexed by length, so that a choice is a bisection, not a scan.
- "flat" (2025-10): one stream of all documents, cut every T tokens; nothing is dropped. The last target of a row is the
  first input of the next, so each token is a target exactly once (nanochat skips one token a batch there).

Documents are tokenised ahead in a thread (`tokenizers` lets go of the interpreter), but the state counts only what has
reached a row or the buffer: work done ahead is done again after a resume, and the rows are the same.

    rows = PackedDataset(load_corpus("embedded", "train", epochs=None), tokenizer, sequence_length=512)
    for batch in DataLoader(rows, batch_size=16): model(**batch)
"""

import copy
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ..tokenizer import encode_documents
from .corpus import Corpus

PACKINGS = ("best_fit", "flat")
_REFILLS_AHEAD = 2
# A key of the index is length * 2**48 - number of the document: the longest come last, of equals the first added.
_LENGTH_SHIFT = 48


class BestFitBuffer:
    """Documents waiting for a row, found by length.

    A document is kept only up to `row_tokens`: what lies beyond can never enter a row.
    """

    def __init__(self, row_tokens: int):
        self.row_tokens = row_tokens
        self._keys: list[int] = []  # sorted
        self._documents: dict[int, np.ndarray] = {}
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest document."""
        return _num_tokens(self._keys[0])

    def add(self, tokens: np.ndarray, num_tokens: int) -> None:
        """Append a document of `num_tokens` tokens, of which `tokens` holds the first."""
        key = (num_tokens << _LENGTH_SHIFT) - self._num_added
        self._num_added += 1
        self._keys.insert(bisect_left(self._keys, key), key)
        self._documents[key] = tokens if len(tokens) <= self.row_tokens else tokens[: self.row_tokens].copy()

    def take(self, room: int) -> tuple[np.ndarray, int]:
        """Remove the longest document of at most `room` tokens, else the shortest; its tokens and its true length."""
        place = bisect_right(self._keys, room << _LENGTH_SHIFT) - 1
        if place < 0:  # none fits: the shortest, and of those the first
            place = bisect_right(self._keys, self.shortest << _LENGTH_SHIFT) - 1
        key = self._keys.pop(place)
        return self._documents.pop(key), _num_tokens(key)

    def in_order(self) -> list[tuple[np.ndarray, int]]:
        """The documents in the order they were added, each with its true length."""
        keys = sorted(self._keys, key=lambda key: -key % (1 << _LENGTH_SHIFT))
        return [(self._documents[key], _num_tokens(key)) for key in keys]


def _num_tokens(key: int) -> int:
    return -(-key >> _LENGTH_SHIFT)


class PackedDataset(IterableDataset):
    """Rows of `sequence_length` tokens from a corpus: {"input_ids", "shift_labels"}, both LongTensor (T,).

    `iter()` starts at the beginning, or where `load_state_dict` said, once; one iteration at a time. A corpus with
    `epochs=None` gives rows for ever; with a number of epochs the buffer is emptied at the end and the last row, if not
    full, is dropped and counted. A validation corpus opened with `epochs=None` gives the same rows at each `iter()`,
    and starts over where more rows are asked than it has.

    Use it in a DataLoader without workers: then `state_dict()` after k batches is the state before batch k + 1. With
    workers, which each pack a share of their own, only torchdata's StatefulDataLoader knows the state.

    Args:
        corpus: the documents, already this process's share.
        tokenizer: as `nanochat_hf.tokenizer` makes them.
        sequence_length: T, tokens in a row.
        buffer_documents: best_fit: documents to choose from, at least.
        refill_documents: documents tokenised at a time.
        packing: "best_fit" or "flat".

    Attributes:
        num_rows: rows given.
        num_documents: documents that entered them.
        num_dropped_tokens: tokens of those documents that were cropped away, the unfinished last row included.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer,
        sequence_length: int,
        buffer_documents: int = 1000,
        refill_documents: int = 128,
        packing: str = "best_fit",
    ):
        if packing not in PACKINGS:
            raise ValueError(f"packing={packing!r}: give one of {', '.join(PACKINGS)}")
        if sequence_length < 1 or buffer_documents < 1 or refill_documents < 1:
            raise ValueError(
                f"sequence_length={sequence_length}, buffer_documents={buffer_documents} and "
                f"refill_documents={refill_documents} must be at least 1"
            )
        self.corpus, self.tokenizer, self.sequence_length = corpus, tokenizer, sequence_length
        self.buffer_documents, self.refill_documents, self.packing = buffer_documents, refill_documents, packing
        self._is_positioned = False
        self._reset()

    def _reset(self) -> None:
        self.num_rows = self.num_documents = self.num_dropped_tokens = 0
        self._corpus_state: dict | None = None  # after the last refill used; None: at the beginning
        self._buffer = BestFitBuffer(self.sequence_length + 1)
        self._stream, self._position = np.empty(0, np.int32), 0

    @property
    def epoch(self) -> int:
        """Passes over the corpus completed by what was read into the buffer."""
        return self._read("epoch")

    @property
    def num_empty_documents(self) -> int:
        """Documents left out because they hold nothing."""
        return self._read("num_empty_documents")

    @property
    def num_skipped_shards(self) -> int:
        """Shards given up because they could not be read (`on_bad_shard="skip"`)."""
        return self._read("num_skipped_shards")

    def _read(self, counter: str) -> int:
        return self._corpus_state[counter] if self._corpus_state else 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if not self._is_positioned:
            self._reset()
        self._is_positioned = False
        refills = self._refills()
        rows = self.best_fit_rows(refills) if self.packing == "best_fit" else self._flat_rows(refills)
        return ({"input_ids": row[:-1], "shift_labels": row[1:]} for row in map(torch.from_numpy, rows))

    def _refills(self) -> Iterator[list[np.ndarray]]:
        """Tokenised documents, `refill_documents` at a time, made ahead in a thread."""
        corpus = copy.copy(self.corpus)  # its position is this iteration's own: another may still be running out
        if self._corpus_state is not None:
            corpus.load_state_dict(self._corpus_state)
        documents = iter(corpus)

        def refill() -> tuple[list[np.ndarray], dict]:
            texts = list(islice(documents, self.refill_documents))
            tokens = [np.array(ids, np.int32) for ids in encode_documents(self.tokenizer, texts)] if texts else []
            return tokens, corpus.state_dict()

        # Dropped with this generator; its thread ends by itself then, as executors' threads do.
        executor = ThreadPoolExecutor(1, "tokenise-ahead")
        ahead: deque[Future] = deque(executor.submit(refill) for _ in range(_REFILLS_AHEAD))
        while True:
            tokens, state = ahead.popleft().result()
            if not tokens:
                return
            ahead.append(executor.submit(refill))
            self._corpus_state = state
            yield tokens

    def best_fit_rows(self, refills: Iterator[list[np.ndarray]]) -> Iterator[np.ndarray]:
        """Rows of T + 1 tokens from refills of tokenised documents, as long as these last."""
        row_tokens = self.sequence_length + 1
        buffer = self._buffer
        while True:
            row = np.empty(row_tokens, np.int64)
            filled = num_documents = num_dropped = 0
            while filled < row_tokens:
                while len(buffer) < self.buffer_documents and (refill := next(refills, None)):
                    for tokens in refill:
                        buffer.add(tokens, len(tokens))
                if not len(buffer):
                    self.num_dropped_tokens += filled
                    return
                tokens, num_tokens = buffer.take(row_tokens - filled)
                used = min(num_tokens, row_tokens - filled)
                row[filled : filled + used] = tokens[:used]
                filled += used
                num_documents += 1
                num_dropped += num_tokens - used
            self.num_rows += 1
            self.num_documents += num_documents
            self.num_dropped_tokens += num_dropped
            yield row

    def _flat_rows(self, refills: Iterator[list[np.ndarray]]) -> Iterator[np.ndarray]:
        bos = self.tokenizer.bos_token_id
        while True:
            while len(self._stream) - self._position <= self.sequence_length:
                if not (refill := next(refills, None)):
                    left = len(self._stream) - self._position
                    self.num_dropped_tokens += left - (self.num_rows > 0)  # the first of them was a target already
                    return
                self._stream = np.concatenate([self._stream[self._position :], *refill])
                self._position = 0
            row = self._stream[self._position : self._position + self.sequence_length + 1].astype(np.int64)
            self._position += self.sequence_length
            self.num_rows += 1
            self.num_documents += int((row[:-1] == bos).sum())
            yield row

    def state_dict(self) -> dict:
        """Everything the next row depends on: ints, strings, two tensors; `torch.load(weights_only=True)` opens it.

        `tokens` holds the buffered documents end to end (int32, at most T + 1 each) and `lengths` their true lengths;
        with "flat" packing `tokens` is the stream not used yet.
        """
        waiting = self._buffer.in_order()
        tokens = [tokens for tokens, _ in waiting] + [self._stream[self._position :]]
        return {
            **self._settings(),
            "num_rows": self.num_rows,
            "num_documents": self.num_documents,
            "num_dropped_tokens": self.num_dropped_tokens,
            "corpus": self._corpus_state,
            "tokens": torch.from_numpy(np.concatenate(tokens)),
            "lengths": torch.tensor([length for _, length in waiting], dtype=torch.int64),
        }

    def load_state_dict(self, state: dict) -> None:
        """Let the next `iter()` go on from `state`.

        Raises:
            ValueError: the state was made with other settings, of other data or of another share of it.
        """
        for name, value in self._settings().items():
            if state[name] != value:
                raise ValueError(
                    f"cannot resume: the checkpoint's rows were packed with {name}={state[name]!r}, "
                    f"now {name}={value!r}. Set it back, or start over."
                )
        if state["corpus"] is not None:
            copy.copy(self.corpus).load_state_dict(state["corpus"])  # refuses other data
        self._reset()
        self.num_rows, self.num_documents = state["num_rows"], state["num_documents"]
        self.num_dropped_tokens, self._corpus_state = state["num_dropped_tokens"], state["corpus"]
        tokens = state["tokens"].cpu().numpy()
        for length in state["lengths"].tolist():
            kept = min(length, self.sequence_length + 1)
            self._buffer.add(tokens[:kept], length)
            tokens = tokens[kept:]
        self._stream = tokens
        self._is_positioned = True

    def _settings(self) -> dict:
        names = ("packing", "sequence_length", "buffer_documents", "refill_documents")
        return {name: getattr(self, name) for name in names}
