"""Figures as text: one format for a number wherever it stands in the report, "-" for one that does not exist."""

import math
from collections.abc import Iterable, Sequence


def number(value: object) -> str:
    """A count with thousands separators, a share or loss with four digits, a huge figure in scientific notation."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return " ".join(str(value).split()) or "(empty)"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 1e12 else f"{value:.6e}"
    if value and not 1e-3 <= abs(value) < 1e9:
        return f"{value:.4g}" if abs(value) < 1 else f"{value:.6e}"
    return f"{value:,.4f}"


def duration(seconds: float | None) -> str:
    """3h38m, 12m04s, 56.8s."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"


def mebibytes(value: float | None) -> str:
    """Memory in MiB, two digits."""
    return "-" if value is None else f"{value:,.2f}MiB"


def percent(value: float | None) -> str:
    """A share of 1 as a percentage."""
    return "-" if value is None else f"{100 * value:.2f}%"


def bullets(pairs: Iterable[tuple[str, str]]) -> str:
    """`- name: value` a line."""
    return "\n".join(f"- {name}: {value}" for name, value in pairs)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells are made one line, and a bar in them cannot end a cell."""
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in row) + " |" for row in lines
    )


def flatten(values: dict, prefix: str = "") -> list[tuple[str, object]]:
    """Nested dicts as dotted names; a list becomes one value, of dicts their `key=value` pairs."""
    pairs: list[tuple[str, object]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            pairs += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            pairs.append((f"{prefix}{key}", "; ".join(map(list_item, value))))
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def list_item(item: object) -> str:
    """An entry of a list, such as one source of a mixture."""
    return " ".join(f"{key}={value}" for key, value in item.items()) if isinstance(item, dict) else str(item)


def quote(text: str) -> str:
    """Model output as a Markdown block that nothing in it can leave: a fence longer than any run of backticks in it."""
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
