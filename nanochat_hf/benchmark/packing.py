"""Packing: the buffer indexed by length beside a plain scan of it, over the same tokenised documents, on one core.

Lengths are log-normal as on web pages (median 450 tokens, mean 740); the first rows of both sides are compared.

    python scripts/benchmark.py packing
"""

import time
from collections.abc import Iterator
from itertools import islice
from statistics import median
from types import SimpleNamespace

import numpy as np

from ..configs import PackingBenchmarkConfig
from ..data.packing import PackedDataset

CONFIG = PackingBenchmarkConfig
REFILL_DOCUMENTS = 128
SCAN_ROWS = 200  # the scan is slow: it shows its speed, and its rows, on this many


def scan_rows(refills: Iterator[list[np.ndarray]], row_tokens: int, buffer_documents: int) -> Iterator[np.ndarray]:
    """Best fit in its plainest form: every document of the buffer is looked at for each choice."""
    buffer: list[np.ndarray] = []
    while True:
        row = np.empty(row_tokens, np.int64)
        filled = 0
        while filled < row_tokens:
            while len(buffer) < buffer_documents and (refill := next(refills, None)):
                buffer += refill
            if not buffer:
                return
            room, best, shortest = row_tokens - filled, -1, 0
            for i, tokens in enumerate(buffer):
                if len(tokens) <= room and (best < 0 or len(tokens) > len(buffer[best])):
                    best = i
                if len(tokens) < len(buffer[shortest]):
                    shortest = i
            tokens = buffer.pop(best if best >= 0 else shortest)[:room]
            row[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
        yield row


def run(config: PackingBenchmarkConfig) -> tuple[dict, str]:
    """Measure both; returns the figures and their table.

    Raises:
        ValueError: too few documents to fill the rows that are compared.
    """
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(450), 1.0, config.num_documents)).astype(int).clip(2, 100_000)
    if lengths.clip(max=config.sequence_length).sum() < 2 * SCAN_ROWS * (config.sequence_length + 1):
        raise ValueError(f"num_documents={config.num_documents} do not fill {2 * SCAN_ROWS} rows: give more")
    documents = [rng.integers(1, 2**15, length, np.int32) for length in lengths]
    refills = [documents[i : i + REFILL_DOCUMENTS] for i in range(0, len(documents), REFILL_DOCUMENTS)]

    def indexed() -> Iterator[np.ndarray]:
        corpus, tokenizer = SimpleNamespace(), SimpleNamespace(bos_token_id=0)  # refills take the place of both
        dataset = PackedDataset(corpus, tokenizer, config.sequence_length, config.buffer_documents)
        return dataset.best_fit_rows(iter(refills))

    def scanned() -> Iterator[np.ndarray]:
        return scan_rows(iter(refills), config.sequence_length + 1, config.buffer_documents)

    first = list(islice(indexed(), SCAN_ROWS))
    equal = all(np.array_equal(ours, theirs) for ours, theirs in zip(first, scanned(), strict=False))
    if not equal:
        raise RuntimeError("the rows differ from those of the plain scan")
    ours = [speed(indexed(), config, None) for _ in range(config.rounds)]
    scan = [speed(scanned(), config, SCAN_ROWS) for _ in range(config.rounds)]
    results = {
        "tokens_per_second": median(ours),
        "tokens_per_second_by_round": ours,
        "scan_tokens_per_second": median(scan),
        "speedup": median(ours) / median(scan),
        "rows_equal": equal,
    }
    lines = [
        "| | tokens/s |",
        "|---|--:|",
        f"| indexed | {median(ours):,.0f} |",
        f"| plain scan | {median(scan):,.0f} |",
    ]
    return results, "\n".join(lines) + f"\n\n{results['speedup']:.1f}x the scan; the first {SCAN_ROWS} rows are equal"


def speed(rows: Iterator[np.ndarray], config: PackingBenchmarkConfig, num_rows: int | None) -> float:
    """Tokens per second of rows made one after the other."""
    started = time.perf_counter()
    num_rows = sum(1 for _ in islice(rows, num_rows))
    return num_rows * config.sequence_length / (time.perf_counter() - started)
