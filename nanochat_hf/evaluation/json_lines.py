"""Reading .jsonl files so that every complaint names file and line.

for where, row in read_json_lines(Path("copa.jsonl")): ...      # "copa.jsonl, line 1", {...}
"""

import json
from collections.abc import Iterator
from pathlib import Path


def read_json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Each object of a file and where it stands; blank lines are left out.

    Raises:
        ValueError: a line that is no UTF-8, no JSON or no object.
    """
    # Only a line feed ends a line: `splitlines` would also cut at U+2028 or U+0085 inside a text.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error}); fetch the file again") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: found {type(row).__name__} instead of an object")
        yield where, row
