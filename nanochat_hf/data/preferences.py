"""Preference pairs: rows {prompt, chosen, rejected} become exact ids, what cannot be learned from named or counted.

    build_pairs([{"dataset": "HuggingFaceH4/ultrafeedback_binarized", "split": "train_prefs"}], "train")

`chosen` and `rejected` are texts, messages of the assistant, or whole conversations that differ in their last answer
(then `prompt` may be left out); `prompt` is a text or messages.
"""

import datasets
import numpy as np

from ..recipe import nearest
from ..tokenizer import encode_conversation, encode_prompt
from .conversations import HELD_OUT, parse_line
from .messages import check_messages
from .rows import load_rows

KEYS = ("dataset", "name", "split", "rows")


def build_pairs(
    sources: list[dict], split: str = "train", seed: int = 42, on_bad_row: str = "error"
) -> tuple[datasets.Dataset, dict]:
    """Load, check and shuffle preference pairs.

    Args:
        sources: dicts with `dataset` (a .jsonl or .parquet file, a folder of them or a Hub id), perhaps `rows` to keep,
            and `name` and `split` on the Hub.
        split: "train", or "test": every 20th row of each source.
        on_bad_row: "error", or "skip".

    Returns:
        Columns `prompt`, `chosen`, `rejected`, lists of messages each (the last two of one answer); and the counts,
        rows per data set and `skipped`.

    Raises:
        ValueError: no source, an unknown key, a bad row (with its name).
    """
    pairs: list[dict] = []
    counts: dict = {"rows": {}, "skipped": 0}
    for position, source in enumerate(sources):
        for key in source:
            if key not in KEYS:
                raise ValueError(
                    f"preferences entry {position}: unknown key {key!r}, did you mean {nearest(str(key), KEYS)!r}?"
                )
        if "dataset" not in source:
            raise ValueError(f"preferences entry {position} must say `dataset:`, a file, a folder or a Hub id")
        table, name_of = load_rows(source["dataset"], source.get("name"), source.get("split", "train"))
        is_test = np.arange(len(table)) % HELD_OUT == HELD_OUT - 1
        chosen = np.random.default_rng(seed).permutation(np.flatnonzero(is_test if split == "test" else ~is_test))
        found = 0
        for index in chosen[: source.get("rows")].tolist():
            try:
                row = table[index]
                pairs.append(pair_from_row(parse_line(row["line"]) if set(row) == {"line"} else row))
                found += 1
            except ValueError as error:
                if on_bad_row == "error":
                    raise ValueError(
                        f"{name_of(index)}: {error}. Mend it, or let bad rows be left out and counted: on_bad_row: skip"
                    ) from error
                counts["skipped"] += 1
        counts["rows"][source["dataset"]] = found
    if not pairs:
        raise ValueError(f"no preference pairs: {'no sources are given' if not sources else counts}")
    features = datasets.Features({name: datasets.Json() for name in ("prompt", "chosen", "rejected")})
    columns = {name: [pair[name] for pair in pairs] for name in features}
    return datasets.Dataset.from_dict(columns, features=features).shuffle(seed=seed), counts


def pair_from_row(row: dict) -> dict:
    """One row as messages: the conversation so far, and two answers of the assistant.

    Raises:
        ValueError: a column is missing, an answer is empty, both answers are the same, roles are out of order.
    """
    answers = {}
    for name in ("chosen", "rejected"):
        value = row.get(name)
        if not isinstance(value, (str, list)) or not value:
            raise ValueError(f"no `{name}`; a row has prompt, chosen and rejected, this one {', '.join(sorted(row))}")
        answers[name] = [{"role": "assistant", "content": value}] if isinstance(value, str) else value
    prompt = row.get("prompt") or []
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if len(answers["chosen"]) > 1:  # whole conversations: the prompt is in them
        prompt, other = answers["chosen"][:-1], answers["rejected"][:-1]
        if prompt != other:
            raise ValueError("`chosen` and `rejected` are conversations that differ before their last answer")
        answers = {name: messages[-1:] for name, messages in answers.items()}
    for name, messages in answers.items():
        try:
            check_messages(prompt + messages)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if answers["chosen"] == answers["rejected"]:
        raise ValueError("`chosen` and `rejected` are the same answer")
    return {"prompt": prompt, **answers}


def encode_pairs(pairs: datasets.Dataset, tokenizer, max_tokens: int) -> tuple[datasets.Dataset, int]:
    """Columns `prompt_ids`, `chosen_ids`, `rejected_ids`, and how many pairs were dropped: prompt or answer too long.

    An answer cut off would be judged by a part of it, so a pair that does not fit `max_tokens` is left out.

    Raises:
        ValueError: no pair fits.
    """

    def encode(row: dict) -> dict:
        prompt_ids = encode_prompt(tokenizer, row["prompt"])
        ids = {"prompt_ids": prompt_ids}
        for name in ("chosen", "rejected"):
            ids[f"{name}_ids"] = encode_conversation(tokenizer, row["prompt"] + row[name])[0][len(prompt_ids) :]
        return ids

    encoded = pairs.map(encode, remove_columns=pairs.column_names)
    longest = [
        len(prompt) + max(len(chosen), len(rejected))
        for prompt, chosen, rejected in zip(
            encoded["prompt_ids"], encoded["chosen_ids"], encoded["rejected_ids"], strict=True
        )
    ]
    kept = np.flatnonzero(np.array(longest) <= max_tokens)
    if not len(kept):
        raise ValueError(f"no preference pair of {len(pairs)} fits max_length={max_tokens}; raise it")
    return encoded.select(kept), len(pairs) - len(kept)
