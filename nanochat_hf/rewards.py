"""Rewards for RL, as plain functions named by import path in a recipe (`rewards: [nanochat_hf.rewards.exact_answer]`).

TRL calls a reward as `f(completions=..., answer=..., **other columns)` and takes one float per completion. A completion
is a string with the tool's markers in it, or a list of messages; write your own the same way.

    exact_answer(["... <|python_start|>2+3<|python_end|><|output_start|>5<|output_end|>5.\\n#### 5"], answer=["5"])
    -> [1.0]
"""

import functools
import math
import re
from collections.abc import Callable, Sequence

from .chat_format import conversation_spans

_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
_MARKERS = re.compile(r"<\|(python_start|python_end|output_start|output_end)\|>")
_SPAN = ["python_start", "python_end", "output_start", "output_end"]

Completion = str | list[dict]


def exact_answer(completions: Sequence[Completion], answer: Sequence[str], **columns) -> list[float]:
    """1 where the first `#### number` is the answer's, else 0: nanochat's only reward.

    Args:
        answer: per completion the expected number, or a whole GSM8K solution that ends in one; None for a row that has
            no number to state (in a mixed recipe), which gives 0.
    """
    pairs = zip(completions, answer, strict=True)
    return [
        float(expected is not None and is_correct(completion_text(completion), expected))
        for completion, expected in pairs
    ]


def answer_format(completions: Sequence[Completion], **columns) -> list[float]:
    """1 where an answer stands after `####`, once and at the end, and every tool span is closed and has its output."""
    rewards = []
    for completion in completions:
        text = completion_text(completion).removesuffix("<|assistant_end|>").rstrip()
        answers = list(_ANSWER.finditer(text))
        is_final = len(answers) == 1 and answers[0].end() == len(text)
        rewards.append(float(is_final and _spans_are_closed(text)))
    return rewards


def tool_used(completions: Sequence[Completion], **columns) -> list[float]:
    """1 where the calculator was called at least once and answered, else 0."""
    texts = [completion_text(completion) for completion in completions]
    return [float(_spans_are_closed(text) and "<|output_end|>" in text) for text in texts]


def extract_answer(text: str) -> str | None:
    """The number after the first `#### `, without commas, as text; None where there is none."""
    found = _ANSWER.search(text)
    return found[1].replace(",", "") if found else None


def is_correct(text: str, answer: str) -> bool:
    """Whether `text` states `answer` (a bare number, or a text with a `#### number`); compared as text, as upstream."""
    expected = extract_answer(answer) if "#### " in answer else answer.strip().replace(",", "")
    if not expected:
        raise ValueError(f"no number to compare with in the expected answer {answer!r:.200}")
    return extract_answer(text) == expected


def completion_text(completion: Completion) -> str:
    """What the model wrote, with the tool's markers: of a string the string, of messages all their spans."""
    if isinstance(completion, str):
        return completion
    question = [{"role": "user", "content": ""}]
    spans = conversation_spans(question + list(completion))
    return "".join(span.text for span in spans[5:])  # after <|bos|>, the empty question and <|assistant_start|>


def checked(
    reward: Callable[..., list], decode: Callable[[list[int]], str] | None = None
) -> Callable[..., list[float]]:
    """A reward for TRL that fails loudly: with its name and the row when it raises or returns anything but numbers.

    Args:
        reward: a reward function.
        decode: ids -> text that keeps special tokens. TRL's own text has lost them, and with them the tool's spans;
            given this, `completions` are decoded anew from `completion_ids`.

    Raises (the function returned):
        ValueError: a raising reward, a wrong number of rewards, one that is None, NaN or infinite.
    """

    @functools.wraps(reward)  # TRL logs a reward under its __name__
    def call(completions: Sequence[Completion], completion_ids: Sequence[list[int]] | None = None, **columns):
        if decode is not None and completion_ids is not None:
            completions = [decode(ids) for ids in completion_ids]
        name = getattr(reward, "__name__", repr(reward))
        try:
            rewards = list(reward(completions=completions, completion_ids=completion_ids, **columns))
        except Exception as error:
            row = _first_failing_row(reward, completions, completion_ids, columns)
            raise ValueError(f"reward {name} raised {type(error).__name__}: {error}{row}") from error
        if len(rewards) != len(completions):
            raise ValueError(f"reward {name} gave {len(rewards)} rewards for {len(completions)} completions")
        for row, value in enumerate(rewards):
            if isinstance(value, str) or value is None or not math.isfinite(value):
                raise ValueError(f"reward {name} gave {value!r} for row {row}: {completions[row]!r:.300}")
        return [float(value) for value in rewards]

    return call


def _first_failing_row(reward, completions, completion_ids, columns) -> str:
    """Which row it was: the batch is scored row by row until one fails alone."""
    for row, completion in enumerate(completions):
        one = {k: [v[row]] if isinstance(v, list) and len(v) == len(completions) else v for k, v in columns.items()}
        ids = None if completion_ids is None else [completion_ids[row]]
        try:
            reward(completions=[completion], completion_ids=ids, **one)
        except Exception:
            return f" (row {row} of the batch: {completion!r:.300})"
    return " (on the whole batch, on no row alone)"


def _spans_are_closed(text: str) -> bool:
    markers = _MARKERS.findall(text)
    return markers == _SPAN * (len(markers) // 4)
