"""Rows of a data set by path or Hub id, each with a name that an error message can point at.

A .jsonl file is kept as its lines, parsed row by row later: one broken line is then one bad row, and rows may differ in
shape. A folder stands for all its .jsonl or .parquet files, in the order of their names.

    table, name_of = load_rows("../shared/data/eval/gsm8k_train.jsonl")
    json.loads(table[0]["line"]), name_of(0)        # {...}, "../shared/data/eval/gsm8k_train.jsonl:1"
"""

import bisect
from collections.abc import Callable
from pathlib import Path

import datasets

SUFFIXES = (".jsonl", ".parquet")
NameOf = Callable[[int], str]


def load_rows(dataset: str, name: str | None = None, split: str = "train") -> tuple[datasets.Dataset, NameOf]:
    """Load a .jsonl or .parquet file, a folder of either, or a Hub data set.

    Args:
        dataset: path, or Hub id such as `openai/gsm8k`.
        name: the Hub data set's configuration.
        split: the Hub data set's split.

    Returns:
        The rows (those of .jsonl as one column `line`), and a function from row index to a name for messages.

    Raises:
        ValueError: nothing there, no rows, or the Hub cannot be reached.
    """
    path = Path(dataset).expanduser()
    if not path.exists():
        if dataset.startswith((".", "/", "~")) or dataset.endswith(SUFFIXES) or dataset.count("/") > 1:
            raise ValueError(f"no file or folder {dataset}; a Hub data set is named user/name")
        return _from_hub(dataset, name, split)
    files = [path] if path.is_file() else []
    for suffix in SUFFIXES:
        files = files or sorted(path.glob(f"*{suffix}"))
    if not files or files[0].suffix not in SUFFIXES:
        raise ValueError(f"{dataset} is no .jsonl or .parquet file, nor a folder of them")
    if files[0].suffix == ".parquet":
        table = datasets.Dataset.from_parquet([str(file) for file in files])
        return _with_rows(table, dataset), lambda index: f"{dataset} row {index} (counted from 0)"
    lines, starts = [], []
    for file in files:
        starts.append(len(lines))
        lines += file.read_bytes().rstrip(b"\n").split(b"\n")  # a line that is no UTF-8 is one bad row, too

    def name_of(index: int) -> str:
        which = bisect.bisect_right(starts, index) - 1
        return f"{files[which]}:{index - starts[which] + 1}"

    table = datasets.Dataset.from_dict({"line": lines if any(lines) else []})
    return _with_rows(table, dataset), name_of


def _from_hub(dataset: str, name: str | None, split: str) -> tuple[datasets.Dataset, NameOf]:
    what = f"{dataset}{f' ({name})' if name else ''} split {split}"
    try:
        table = datasets.load_dataset(dataset, name, split=split)
    except (OSError, ValueError) as error:  # no such id, no such configuration, no network
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot load {what} from the Hub: {reason:.200}. Without a network give `dataset` the path of a .jsonl or "
            f".parquet file with the same columns"
        ) from error
    return _with_rows(table, what), lambda index: f"{what} row {index} (counted from 0)"


def _with_rows(table: datasets.Dataset, what: str) -> datasets.Dataset:
    if len(table) == 0:
        raise ValueError(f"{what} has no rows")
    return table
