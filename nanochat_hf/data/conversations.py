"""Conversations to learn from: one row of a source becomes `messages`, several sources become one shuffled mixture.

    build_mixture(
        [
            {"source": "gsm8k", "dataset": "../shared/data/eval/gsm8k_train.jsonl", "epochs": 2},
            {"source": "messages", "dataset": "../shared/data/chat/oasst_sample.jsonl"},
            {"source": "arithmetic", "rows": 500, "two_steps": 0.5},
        ],
        split="train",
    )

Order as in nanochat: each source is shuffled by the seed and cut to its `rows`, an oversampled one is listed several
times, and all of it is shuffled once more. Nothing is left out silently: a row that cannot be used stops the run with
its name, or is skipped and counted.
"""

import json
import logging
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import datasets
import numpy as np

from ..recipe import load_function, nearest
from .arithmetic import arithmetic_problems
from .embedded_chat import docstring_conversations, letter_counting_problems, multiple_choice_questions
from .identity import identity_conversations
from .messages import (
    check_messages,
    messages_from_arc,
    messages_from_gsm8k,
    messages_from_humaneval,
    messages_from_messages,
    messages_from_mmlu,
    render_multiple_choice,
)
from .rows import load_rows

__all__ = ["SOURCES", "build_mixture", "render_multiple_choice"]

HELD_OUT = 20  # where a data set has no test split, every 20th row is held out; and a test cut is a 20th of `rows`
_FEATURES = datasets.Features(
    # Contents may be text or lists of parts, which Arrow's own types cannot mix.
    {
        "messages": datasets.Json(),
        "source": datasets.Value("string"),
        "columns": datasets.Json(),
        "problem": datasets.Value("string"),
    }
)
log = logging.getLogger(__name__)


class Source(NamedTuple):
    """How rows become messages, and where they come from unless the recipe says otherwise."""

    to_messages: Callable[[dict], list[dict]]
    generate: Callable[..., list[dict]] | None = None  # embedded: (split, rows, **options) -> rows
    options: tuple[str, ...] = ("dataset", "name", "split")  # recipe keys beyond source, rows, epochs
    hub_id: str | None = None
    hub_name: str | None = None
    hub_test: tuple[str | None, str] | None = None  # configuration (None: the same) and split with held-out rows
    columns: tuple[str, ...] = ()  # of the row, kept for rewards


SOURCES = {
    "messages": Source(messages_from_messages),
    "smoltalk": Source(messages_from_messages, hub_id="HuggingFaceTB/smol-smoltalk", hub_test=(None, "test")),
    "mmlu": Source(messages_from_mmlu, hub_id="cais/mmlu", hub_name="auxiliary_train", hub_test=("all", "validation")),
    "arc": Source(messages_from_arc, hub_id="allenai/ai2_arc", hub_name="ARC-Easy", hub_test=(None, "validation")),
    "gsm8k": Source(messages_from_gsm8k, hub_id="openai/gsm8k", hub_name="main", hub_test=(None, "test")),
    "code": Source(messages_from_humaneval, columns=("test", "entry_point")),
    "arithmetic": Source(messages_from_gsm8k, arithmetic_problems, ("seed", "two_steps", "distractors")),
    "letter_counting": Source(messages_from_gsm8k, letter_counting_problems, ("seed",)),
    "multiple_choice": Source(messages_from_mmlu, multiple_choice_questions, ("seed",)),
    "docstrings": Source(messages_from_messages, docstring_conversations, ("seed",)),
    "identity": Source(messages_from_messages, identity_conversations, ("seed",)),
}
_UNBOUNDED = (arithmetic_problems, letter_counting_problems, multiple_choice_questions)


def build_mixture(
    sources: Sequence[dict],
    split: str = "train",
    seed: int = 42,
    on_bad_row: str = "error",
    counts: dict | None = None,
) -> datasets.Dataset:
    """Load, convert, check, mix and shuffle.

    Args:
        sources: dicts as in a recipe: `source` (a key of `SOURCES`, or an import path, see `source_of`); `rows` to
            keep (default all); `epochs`, how often the source is listed (default 1; test lists it once); for data sets
            `dataset` (path or Hub id), `name` and `split` on the Hub, and `max_rows` instead of `rows`, where fewer may
            be there; for embedded sources their `seed` and options.
        split: "train", or "test" for held-out rows of the same sources (a 20th of `rows`).
        seed: of all shuffles.
        on_bad_row: "error", or "skip" to leave bad rows out, with a warning that counts them.
        counts: filled with `{label: {"rows": in the mixture, "skipped": bad rows left out}}` when given.

    Returns:
        Columns `messages` (content a string or a list of parts), `source` (the label: the source's name, with the file
        or configuration where it has one) and `columns` (what of the row the source keeps for rewards, by name).

    Raises:
        ValueError: an unknown source or key, more rows than there are, a bad row (with its name), nothing left.
    """
    if split not in ("train", "test"):
        raise ValueError(f"a mixture has the splits train and test, not {split!r}")
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row is error or skip, not {on_bad_row!r}")
    counts = {} if counts is None else counts
    tables, order, total = [], [], 0
    for position, source in enumerate(sources):
        check_source(position, source)
    for source in sources:
        table = _load_source(source, split, seed, on_bad_row, counts)
        epochs = source.get("epochs", 1) if split == "train" else 1
        counts[_label(source)]["rows"] += epochs * len(table)
        order += epochs * list(range(total, total + len(table)))
        if len(table):
            tables.append(table)
        total += len(table)
    if not order:
        raise ValueError(f"the {split} mixture is empty: {'no sources are given' if not sources else counts}")
    random.Random(seed).shuffle(order)
    return datasets.concatenate_datasets(tables).select(order)


def source_of(name: str) -> Source:
    """A source by its name, or by the import path of a function of one's own: `my_module.my_rows`.

    The function takes (split, num_rows) and returns rows that hold `messages`, or GSM8K's `question` and `answer`.

    Raises:
        ValueError: no such name or function.
    """
    if name in SOURCES:
        return SOURCES[name]
    if "." not in name:
        raise ValueError(f"unknown source {name!r}; did you mean {nearest(name, SOURCES)!r}?")
    return Source(_messages_of_either, load_function(name, "source"), options=())


def _messages_of_either(row: dict) -> list[dict]:
    return messages_from_messages(row) if "messages" in row else messages_from_gsm8k(row)


def check_source(position: int, source: dict) -> None:
    """Check one entry of a recipe's mixture before anything is loaded; a ValueError names the nearest valid word."""
    where = f"mixture entry {position}"
    if not isinstance(source, dict) or "source" not in source:
        raise ValueError(f"{where} must say `source:` (one of {', '.join(SOURCES)}), got {source!r}")
    kind = source["source"]
    try:
        found = source_of(str(kind))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    allowed = ("source", "rows", "max_rows", "epochs", *found.options)
    for key in source:
        if key not in allowed:
            raise ValueError(
                f"{where} ({kind}): unknown key {key!r}, did you mean {nearest(str(key), allowed)!r}? "
                f"Allowed are {', '.join(allowed)}"
            )
    for key in ("rows", "max_rows", "epochs"):
        value = source.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{where} ({kind}): {key} must be a whole number of at least 1, got {value!r}")
    if "max_rows" in source and ("rows" in source or found.generate):
        raise ValueError(f"{where} ({kind}): max_rows is for data sets, instead of rows")
    if found.generate in _UNBOUNDED and "rows" not in source:
        raise ValueError(f"{where}: {kind} can make any number of rows; say how many, e.g. rows: 1000")
    if found.generate is None and not (source.get("dataset") or found.hub_id):
        raise ValueError(f"{where}: {kind} needs `dataset:`, a .jsonl or .parquet file or a Hub id")


def _load_source(source: dict, split: str, seed: int, on_bad_row: str, counts: dict) -> datasets.Dataset:
    """One source's rows as `messages` and `source`, shuffled and cut."""
    kind, label = source_of(source["source"]), _label(source)
    num_rows = source.get("rows", source.get("max_rows"))
    if split == "test" and num_rows:
        num_rows = -(-num_rows // HELD_OUT)
    if kind.generate:
        options = {key: source[key] for key in kind.options if key in source}
        table = datasets.Dataset.from_list(kind.generate(split, num_rows, **options))
        rows = np.arange(len(table))
        name_of = "row {} (counted from 0)".format
    else:
        table, rows, name_of = _load_split(source, kind, split)
        if num_rows and num_rows > len(rows):
            if split == "train" and "rows" in source:
                raise ValueError(f"{label} has {len(rows)} rows, not {num_rows}; ask for fewer rows, or more epochs")
            num_rows = None
    counts.setdefault(label, {"rows": 0, "skipped": 0})
    if not len(rows):
        log.warning("%s has no %s rows: under %d rows none is held out", label, split, HELD_OUT)
        return datasets.Dataset.from_dict({"messages": [], "source": []})
    # The permutation is datasets' own, as nanochat's is.
    permutation = datasets.Dataset.from_dict({"row": rows}).shuffle(seed=seed)["row"][:num_rows]
    converted = table.select(permutation).map(
        lambda row: _convert(row, kind, label),
        remove_columns=table.column_names,
        features=_FEATURES,
        load_from_cache_file=False,  # the cache's key would not see a change of to_messages
    )
    problems = converted["problem"][:]
    bad = [i for i, problem in enumerate(problems) if problem]
    counts[label]["skipped"] += len(bad)
    if bad:
        first = f"{label}, {name_of(permutation[bad[0]])}: {problems[bad[0]]}"
        if on_bad_row == "error":
            others = f" ({len(bad) - 1} more rows are bad too)" if len(bad) > 1 else ""
            raise ValueError(f"{first}{others}. Mend it, or let bad rows be left out and counted: on_bad_row: skip")
        log.warning("%s: %d of %d rows skipped; the first: %s", label, len(bad), len(problems), first)
        converted = converted.select([i for i, problem in enumerate(problems) if not problem])
    return converted.remove_columns("problem")


def _load_split(source: dict, kind: Source, split: str):
    """The table that holds the split, the split's row indices in it, and the namer of its rows."""
    dataset, name = source.get("dataset", kind.hub_id), source.get("name")
    if dataset == kind.hub_id and kind.hub_test:  # its held-out rows have a split of their own
        name = name or kind.hub_name
        if split == "test":
            test_name, hub_split = kind.hub_test
            table, name_of = load_rows(dataset, test_name or name, hub_split)
        else:
            table, name_of = load_rows(dataset, name, source.get("split", "train"))
        return table, np.arange(len(table)), name_of
    table, name_of = load_rows(dataset, name, source.get("split", "train"))
    is_test = np.arange(len(table)) % HELD_OUT == HELD_OUT - 1
    return table, np.flatnonzero(is_test if split == "test" else ~is_test), name_of


def _convert(row: dict, kind: Source, label: str) -> dict:
    converted = {"messages": [], "source": label, "columns": {}, "problem": ""}
    try:
        if set(row) == {"line"}:
            row = parse_line(row["line"])
        messages = kind.to_messages(row)
        check_messages(messages)
    except ValueError as error:
        return {**converted, "problem": str(error)}
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        problem = f"the row has another shape than this source's ({type(error).__name__}: {error}): {row!r:.200}"
        return {**converted, "problem": problem}
    return {**converted, "messages": messages, "columns": {name: row[name] for name in kind.columns}}


def parse_line(line: bytes) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error}): {line!r:.100}") from error
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object: {line!r:.100}")
    return row


def _label(source: dict) -> str:
    """`gsm8k`, `arc:ARC-Easy`, `messages:oasst_sample`."""
    if source.get("name"):
        return f"{source['source']}:{source['name']}"
    if source.get("dataset"):
        last = source["dataset"].rstrip("/").rsplit("/", 1)[-1]
        return f"{source['source']}:{last.removesuffix('.jsonl').removesuffix('.parquet')}"
    return source["source"]
