"""CORE's protocol without lm-eval: rows of a task file, few-shot prompts, and where in the tokens the scoring starts.

CORE (DCLM, arXiv 2406.11794) has three kinds of tasks: `multiple_choice` (one context, several continuations),
`schema` (several contexts, one continuation) and `language_modeling` (the continuation must be the argmax, token by
token). Shuffle, crop, few-shot draw and delimiters are nanochat's, so every item's right/wrong flag is too.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from .json_lines import read_json_lines

SHUFFLE_SEED = 1337
FEWSHOT_SEED = 1234  # plus the item's index in the shuffled file

# field name -> its type, for each kind of task
ROW_FIELDS = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}


def read_rows(path: Path, task_type: str) -> list[dict]:
    """The rows of a task file in the file's order, each checked.

    Raises:
        ValueError: a line that is no JSON object, lacks a field, has fewer than two options, a gold index out of
            range or a blank continuation; the message names file and line.
    """
    rows = []
    for where, row in read_json_lines(path):
        if problem := row_problem(row, task_type):
            raise ValueError(f"{where}: {problem}; a {task_type} row has {', '.join(ROW_FIELDS[task_type])}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows; fetch the file again")
    return rows


def shuffled(rows: Sequence[dict]) -> list[dict]:
    """Rows in the order CORE evaluates them: nanochat shuffles before it crops."""
    rows = list(rows)
    random.Random(SHUFFLE_SEED).shuffle(rows)
    return rows


def row_problem(row: dict, task_type: str) -> str | None:
    """What is wrong with a row, or None."""
    for name, kind in ROW_FIELDS[task_type].items():
        if not isinstance(row.get(name), kind):
            return f"`{name}` must be {kind.__name__}, found {row.get(name)!r}"
    if task_type != "language_modeling":
        options = row["choices" if task_type == "multiple_choice" else "context_options"]
        if len(options) < 2 or not all(isinstance(option, str) for option in options):
            return f"needs at least two options, all text, found {options!r}"
        if not 0 <= row["gold"] < len(options):
            return f"gold={row['gold']} names none of the {len(options)} options (0 to {len(options) - 1})"
    texts = row["choices"] if task_type == "multiple_choice" else [row["continuation"]]
    if not all(text.strip() for text in texts):
        return "a continuation is blank, so there would be nothing to score"
    return None


def fewshot_rows(rows: Sequence[dict], index: int, num_fewshot: int) -> list[dict]:
    """The examples of item `index`, in drawn order; fewer when a crop leaves fewer other rows."""
    others = [j for j in range(len(rows)) if j != index]
    return [rows[j] for j in random.Random(FEWSHOT_SEED + index).sample(others, min(num_fewshot, len(others)))]


def render_prompts(row: dict, examples: Sequence[dict], task_type: str, delimiter: str) -> list[str]:
    """One prompt an option; for language modeling two: without and with the continuation."""

    def solved(example: dict) -> str:
        if task_type == "multiple_choice":
            return example["query"] + delimiter + example["choices"][example["gold"]]
        if task_type == "schema":
            return example["context_options"][example["gold"]] + delimiter + example["continuation"]
        return example["context"].strip() + delimiter + example["continuation"]

    shots = "".join(solved(example) + "\n\n" for example in examples)
    if task_type == "multiple_choice":
        return [shots + row["query"] + delimiter + choice for choice in row["choices"]]
    if task_type == "schema":
        return [shots + context + delimiter + row["continuation"] for context in row["context_options"]]
    without = shots + row["context"].strip() + delimiter
    return [without.strip(), without + row["continuation"]]


def answer_text(row: dict, task_type: str) -> str:
    """The right option, for logs."""
    if task_type == "multiple_choice":
        return row["choices"][row["gold"]]
    return row["context_options"][row["gold"]] if task_type == "schema" else row["continuation"]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix all sequences share."""
    first, last = min(sequences), max(sequences)  # in lexical order: what these two share, all between them do
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def common_suffix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest suffix all sequences share."""
    return common_prefix([s[::-1] for s in sequences])


def scored_starts(sequences: Sequence[Sequence[int]], task_type: str) -> list[int]:
    """Index of the first scored token of each tokenized prompt; scoring runs to the prompt's end.

    For language modeling the sequences are (without, with) and the one index belongs to the second.

    Raises:
        ValueError: the prompt without the continuation is no token prefix of the one with it; or nothing is left to
            tell the options apart by, or to score.
    """
    if task_type == "multiple_choice":
        start = common_prefix(sequences)
        if start == max(map(len, sequences)):
            raise ValueError("all choices are the same tokens")
        return [start] * len(sequences)
    if task_type == "schema":
        starts = [len(s) - common_suffix(sequences) for s in sequences]
        if min(starts) == 0:
            raise ValueError("all contexts are the same tokens")
        return starts
    without, whole = sequences
    if whole[: len(without)] != without:
        raise ValueError(
            "the prompt without its continuation is not a token prefix of the whole prompt: this tokenizer merges "
            "across the border, so CORE's language modeling tasks are not defined for it"
        )
    if len(whole) == len(without):
        raise ValueError("the continuation adds no token to its context")
    return [len(without)]
