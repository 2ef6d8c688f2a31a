"""Conversations as rows to train on: exact ids and targets, what does not fit cut or dropped and counted, then packed.

The bug most reported of nanochat is NaN in SFT when rows are shorter than conversations: a batch whose every target is
masked. Here a conversation that keeps no target is dropped before packing, so no row can be without one.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import datasets
import numpy as np
import pyarrow as pa
import torch
from trl import pack_dataset

from ..tokenizer import encode_conversation
from .packing import BestFitBuffer

BUFFER_CONVERSATIONS = 100  # nanochat's, from which the best fit is taken


def encode_mixture(
    mixture: datasets.Dataset,
    tokenizer,
    max_tokens: int,
    overlong: str,
    encode: Callable = encode_conversation,
) -> tuple[datasets.Dataset, dict]:
    """Encode conversations exactly and keep those that can be learned from.

    Args:
        mixture: columns `messages` and `source`.
        max_tokens: longest conversation that fits a row.
        overlong: `truncate` longer ones to `max_tokens`, or `drop` them.
        encode: (tokenizer, messages) -> (ids, mask).

    Returns:
        Columns `input_ids`, `labels` (the assistant's tokens, else -100) and `source`; and the counts: rows and tokens
        per source, truncated, dropped for length, dropped because no target was left (they could only give NaN).

    Raises:
        ValueError: a conversation that cannot be encoded (with its number), or none left to learn from.
    """

    def encode_row(row: dict, index: int) -> dict:
        try:
            ids, mask = encode(tokenizer, row["messages"])
        except ValueError as error:
            raise ValueError(f"row {index} of the mixture (source {row['source']}): {error}") from error
        labels = [token if trained else -100 for token, trained in zip(ids, mask, strict=True)][:max_tokens]
        return {
            "input_ids": ids[:max_tokens],
            "labels": labels,
            "overlong": len(ids) > max_tokens,
            "has_target": any(label != -100 for label in labels[1:]),  # nothing predicts a row's first token
        }

    columns = mixture.select_columns(["messages", "source"])
    encoded = columns.map(encode_row, with_indices=True, remove_columns=["messages"])
    is_overlong, has_target = np.array(encoded["overlong"], bool), np.array(encoded["has_target"], bool)
    is_dropped = is_overlong & (overlong == "drop")
    kept = encoded.select(np.flatnonzero(has_target & ~is_dropped)).remove_columns(["overlong", "has_target"])
    if len(kept) == 0:
        raise ValueError(
            f"no conversation is left of {len(mixture)}: {int(is_dropped.sum())} were dropped as longer than "
            f"max_length={max_tokens}, the others have no assistant token within it; raise max_length"
        )
    lengths = np.array([len(ids) for ids in kept["input_ids"]])
    sources = np.array(kept["source"])
    counts = {
        "rows": {name: int((sources == name).sum()) for name in sorted(set(sources))},
        "tokens": {name: int(lengths[sources == name].sum()) for name in sorted(set(sources))},
        "truncated": int((is_overlong & has_target & ~is_dropped).sum()),
        "dropped_overlong": int(is_dropped.sum()),
        "dropped_without_target": int((~has_target & ~is_dropped).sum()),
    }
    return kept, counts


def describe_counts(title: str, counts: dict) -> str:
    """The mixture as a small table: rows, tokens and token share per source, then what was cut or dropped."""
    total = sum(counts["tokens"].values())
    lines = [f"{title}: {sum(counts['rows'].values()):,} conversations, {total:,} tokens"]
    for name, num_rows in counts["rows"].items():
        tokens = counts["tokens"][name]
        lines.append(f"  {name:<26}{num_rows:>8,} rows {tokens:>12,} tokens {tokens / total:>7.1%}")
    lines.append(
        f"  truncated {counts['truncated']}; dropped: {counts['dropped_overlong']} too long, "
        f"{counts['dropped_without_target']} without a target, {counts['skipped_bad']} bad"
    )
    return "\n".join(lines)


def pack_rows(
    encoded: datasets.Dataset, sequence_length: int, strategy: str | None, assistant_only: bool
) -> datasets.Dataset:
    """Rows as TRL's collator takes them; a row without `labels` has every token as a target.

    Args:
        strategy: TRL's `wrapped` (one stream, cut anywhere) or `bfd` (whole conversations that do not see each other,
            told apart by `seq_lengths`); `best_fit`, nanochat's of 2026-07; None = one conversation a row. In the last
            two the collator pads.
    """
    rows = encoded.select_columns(["input_ids", "labels"] if assistant_only else ["input_ids"])
    if strategy == "best_fit":
        rows = join_rows(rows, best_fit_groups(map(len, rows["input_ids"]), sequence_length))
    elif strategy is not None:
        rows = pack_dataset(rows, sequence_length, strategy)
        # The last row of a wrapped stream may be a single token, which predicts nothing.
        rows = rows.select(np.flatnonzero([len(ids) > 1 for ids in rows["input_ids"]]))
    return rows


def best_fit_groups(lengths: Iterable[int], row_tokens: int) -> list[list[int]]:
    """Which conversations share a row: of a buffer always the longest that fits what is left; else the row is done.

    Args:
        lengths: tokens of each conversation, none above `row_tokens`; they enter the buffer in this order.
    """
    waiting, buffer = enumerate(lengths), BestFitBuffer(row_tokens)
    groups: list[list[int]] = []
    room = 0
    while True:
        for index, length in islice(waiting, BUFFER_CONVERSATIONS - len(buffer)):
            buffer.add(np.array([index]), length)
        if not len(buffer):
            return groups
        if buffer.shortest > room:
            groups.append([])
            room = row_tokens
        index, length = buffer.take(room)
        groups[-1].append(int(index[0]))
        room -= length


def join_rows(rows: datasets.Dataset, groups: list[list[int]]) -> datasets.Dataset:
    """A data set of lists whose row i is the rows of group i, one after the other."""
    table = rows.select([index for group in groups for index in group]).with_format("arrow")[:]
    ends = np.cumsum([len(group) for group in groups])
    columns = {}
    for name in rows.column_names:
        lists = table[name].combine_chunks()
        offsets = np.asarray(lists.offsets) - lists.offsets[0].as_py()
        starts = pa.array(np.concatenate([[0], offsets[ends]]), lists.offsets.type)
        columns[name] = type(lists).from_arrays(starts, lists.flatten())
    return datasets.Dataset(pa.table(columns))


def padded_batches(
    encoded: datasets.Dataset, pad_token_id: int, assistant_only: bool, device, batch_size: int = 16
) -> Iterator[dict[str, torch.Tensor]]:
    """Right-padded batches (B, T) of whole conversations, longest first, with `shift_labels` for `evaluate_bpb`."""
    rows = sorted(encoded, key=lambda row: -len(row["input_ids"]))
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        width = len(chunk[0]["input_ids"])
        input_ids = torch.full((len(chunk), width), pad_token_id)
        shift_labels = torch.full((len(chunk), width), -100)
        attention_mask = torch.zeros((len(chunk), width), dtype=torch.long)
        for i, row in enumerate(chunk):
            ids, labels = row["input_ids"], row["labels"] if assistant_only else row["input_ids"]
            input_ids[i, : len(ids)] = torch.tensor(ids)
            shift_labels[i, : len(ids) - 1] = torch.tensor(labels[1:])
            attention_mask[i, : len(ids)] = 1
        yield {
            "input_ids": input_ids.to(device),
            "shift_labels": shift_labels.to(device),
            "attention_mask": attention_mask.to(device),
        }
