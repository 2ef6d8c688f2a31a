"""Where documents lie: from the `dataset:` field of a recipe to a list of shards, each readable from any row.

A shard is a list in memory (the embedded text), rows of a parquet file (local, or on the Hub and fetched when its turn
comes), or lines of a .jsonl file. `read(start, step)` goes straight to a row group by pyarrow: unlike in `datasets`'
streaming, a resumed run does not read a shard from its beginning, and a damaged file is one exception to count.

The validation split is pinned: the last parquet file in name order, or the last 5% of the rows where there is one file.
"""

import dataclasses
import difflib
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .embedded_text import embedded_documents
from .hub_files import HubUnavailable, list_parquet_files

_BATCH_ROWS = 1_024  # bounds memory where one row group holds a whole shard
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(.+?))?/?")
_FORMS = (
    "`dataset` is `embedded`, a folder of .parquet shards, a .parquet or .jsonl file, "
    "or a Hub dataset id such as karpathy/climbmix-400b-shuffle"
)


class BadShardError(ValueError):
    """A shard cannot be read, or holds no text; the message names the shard, the row and the fix."""


@dataclasses.dataclass(frozen=True)
class TextShard:
    """Documents in memory."""

    name: str
    documents: tuple[str, ...]
    is_remote = False

    def identity(self) -> str:
        return hashlib.sha256("\0".join(self.documents).encode(errors="replace")).hexdigest()

    def num_rows(self) -> int:
        return len(self.documents)

    def read(self, start: int, step: int) -> Iterator[tuple[int, str | None]]:
        for row in range(start, len(self.documents), step):
            yield row, self.documents[row]


@dataclasses.dataclass(frozen=True)
class JsonLinesShard:
    """Lines `first` to `stop` of a file of JSON objects with a `text` key, blank lines not counted."""

    name: str
    path: Path
    first: int = 0
    stop: int | None = None
    is_remote = False

    def identity(self) -> str:
        return f"{self.name} {_signature(self.path)} {self.first}:{self.stop}"

    def num_rows(self) -> int:
        if self.stop is not None:
            return self.stop - self.first
        with open(self.path, "rb") as file:
            return sum(not line.isspace() for line in file) - self.first

    def read(self, start: int, step: int) -> Iterator[tuple[int, str | None]]:
        with open(self.path, "rb") as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if not line.isspace())
            for row, (number, line) in enumerate(islice(lines, self.first + start, self.stop, step)):
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise BadShardError(
                        f"{self.path}, line {number} is not JSON: {error}. Mend or remove it."
                    ) from error
                if not isinstance(record, dict) or not isinstance(record.get("text", ...), str | None):
                    found = f"keys {sorted(record)}" if isinstance(record, dict) else type(record).__name__
                    raise BadShardError(
                        f"{self.path}, line {number} has {found}; each line must be an object with the document "
                        f'under the key `text`, a string: {{"text": "..."}}'
                    )
                text = record["text"]
                if text is not None and not text.isascii():
                    # JSON can spell half of a surrogate pair, which is no character and breaks tokenizers: U+FFFD.
                    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                yield start + row * step, text


@dataclasses.dataclass(frozen=True)
class ParquetShard:
    """Rows `first` to `stop` of the `text` column of a parquet file."""

    name: str
    fetch: Callable[[], Path]  # the local file; downloads it where it lies on the Hub
    origin: str  # what the fingerprint of the data set says of it
    first: int = 0
    stop: int | None = None
    is_remote: bool = False

    def identity(self) -> str:
        return f"{self.name} {self.origin} {self.first}:{self.stop}"

    def num_rows(self) -> int:
        if self.stop is not None:
            return self.stop - self.first
        with self._open() as file:
            return file.metadata.num_rows - self.first

    def read(self, start: int, step: int) -> Iterator[tuple[int, str | None]]:
        row = self.first + start  # the next wanted row of the file
        damage = (OSError, pa.ArrowException, UnicodeDecodeError)  # a local: modules are gone when the process exits
        try:
            with self._open() as file:
                stop = file.metadata.num_rows if self.stop is None else self.stop
                position = 0  # rows of the file before the current row group or batch
                for group in range(file.num_row_groups):
                    group_rows = file.metadata.row_group(group).num_rows
                    if row >= min(position + group_rows, stop):
                        position += group_rows
                        continue
                    for batch in file.iter_batches(_BATCH_ROWS, [group], ["text"], use_threads=False):
                        wanted = range(row - position, min(len(batch), stop - position), step)
                        for text in batch.column(0).take(pa.array(wanted, pa.int64())).to_pylist():
                            yield row - self.first, text
                            row += step
                        position += len(batch)
        except damage as error:
            raise BadShardError(_broken(self.name, row, error)) from error

    def _open(self) -> pq.ParquetFile:
        try:
            file = pq.ParquetFile(self.fetch())
        except (OSError, pa.ArrowException) as error:
            raise BadShardError(_broken(self.name, 0, error)) from error
        schema = file.schema_arrow
        if "text" not in schema.names:
            raise BadShardError(
                f"{self.name} has no column `text`, only {schema.names}: rename the column that holds the documents"
            )
        kind = schema.field("text").type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if str(kind) not in ("string", "large_string", "string_view", "null"):  # null: nothing but nulls
            raise BadShardError(f"the column `text` of {self.name} holds {kind}, it must hold strings")
        return file


def _broken(name: str, row: int, error: Exception) -> str:
    return (
        f"cannot read shard {name} from row {row} on ({type(error).__name__}: {error}). The file is truncated or "
        f'damaged: fetch it again or remove it; on_bad_shard="skip" leaves the rest of such shards out and counts them.'
    )


def find_shards(dataset: str, split: str, num_shards: int | None) -> list:
    """The shards of one split, in order. Hub shards are not downloaded yet, except a data set's only file.

    Raises:
        ValueError: no such path or id, no file of a known kind, fewer than two documents, too large a `num_shards`.
    """
    if dataset == "embedded":
        _refuse_num_shards(dataset, num_shards)
        return [TextShard("embedded", embedded_documents(split))]
    path = Path(dataset).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*.parquet") if not p.name.startswith("."))
        if not files:
            found = sorted({p.suffix or p.name for p in path.iterdir()})
            raise ValueError(f"{path} holds no .parquet file (found: {', '.join(found) or 'nothing'}). {_FORMS}.")
        shards = [_local_parquet(file, str(file.relative_to(path))) for file in files]
    elif path.is_file() and path.suffix == ".parquet":
        shards = [_local_parquet(path, path.name)]
    elif path.is_file() and path.suffix == ".jsonl":
        shards = [JsonLinesShard(path.name, path)]
    elif path.is_file():
        raise ValueError(f"{path} is neither .parquet nor .jsonl. {_FORMS}.")
    elif (hub_id := _HUB_ID.fullmatch(dataset)) and path.suffix not in (".parquet", ".jsonl"):
        try:
            files = list_parquet_files(hub_id[1], hub_id[2] or "")
        except HubUnavailable as error:
            raise ValueError(f"{_missing(path)} And {error}. {_FORMS}.") from error
        shards = [ParquetShard(f"{f.repo}/{f.name}", f.fetch, f.blob, is_remote=True) for f in files]
    else:
        raise ValueError(f"{_missing(path)} {_FORMS}.")
    if len(shards) == 1:
        _refuse_num_shards(dataset, num_shards)
        return [_part_of_only_shard(shards[0], split)]
    if split == "validation":
        return shards[-1:]
    if num_shards is not None and not 1 <= num_shards < len(shards):
        raise ValueError(
            f"num_shards={num_shards}, but {dataset} has {len(shards) - 1} training shards (the last of its "
            f"{len(shards)} is validation): give 1 to {len(shards) - 1}, or leave it out"
        )
    return shards[:-1][:num_shards]


def _part_of_only_shard(shard, split: str):
    rows = shard.num_rows()
    if rows < 2:
        raise ValueError(
            f"{shard.name} holds {rows} document{'s' * (rows != 1)}; at least two are needed, "
            f"one to train and one to validate on"
        )
    boundary = rows - max(1, rows // 20)
    part = {"stop": boundary} if split == "train" else {"first": boundary, "stop": rows}
    return dataclasses.replace(shard, **part)


def _refuse_num_shards(dataset: str, num_shards: int | None) -> None:
    if num_shards is not None:
        raise ValueError(
            f"num_shards={num_shards} chooses among parquet shards, but {dataset} is one piece: leave it out"
        )


def _missing(path: Path) -> str:
    """A sentence on a path that does not exist: its first missing part, and the name most like it beside it."""
    missing = next(p for p in (*reversed(path.absolute().parents), path.absolute()) if not p.exists())
    names = [p.name for p in missing.parent.iterdir()] if missing.parent.is_dir() else []
    similar = difflib.get_close_matches(missing.name, [*names, "embedded"], n=1)
    hint = f"; did you mean {similar[0]!r}?" if similar else "."
    return f"there is no {path}: {missing.parent} has no {missing.name!r}{hint}"


def _local_parquet(path: Path, name: str) -> ParquetShard:
    return ParquetShard(name, lambda: path, _signature(path))


def _signature(path: Path) -> str:
    """Size and a checksum of the end, which in a parquet file holds the sizes and statistics of all the rest."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - 2**16))
        return f"{size} {zlib.crc32(file.read()):08x}"
