"""One row of a source becomes `messages`: a small function per source, and the check every conversation passes.

    messages_from_gsm8k({"question": "2+3?", "answer": "<<2+3=5>>5\\n#### 5"})
    -> user "2+3?", assistant [python "2+3", python_output "5", text "5\\n#### 5"]

A row that cannot be used raises a ValueError that says why; `conversations.py` adds which row it was.
"""

import re
from collections.abc import Sequence

from ..chat_format import conversation_spans

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def messages_from_messages(row: dict) -> list[dict]:
    """Rows that are conversations already: SmolTalk, `../shared/data/chat`, OpenAI-shaped tool calls included."""
    messages = _column(row, "messages")
    if not isinstance(messages, list):
        raise ValueError(f"`messages` must be a list of {{role, content}}, got {messages!r:.100}")
    # Arrow fills the keys that other rows have with null.
    return [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in messages]


def messages_from_mmlu(row: dict) -> list[dict]:
    """`{question, choices, answer: index}`; MMLU's auxiliary_train wraps each row in a column `train`."""
    if set(row) == {"train"}:
        row = row["train"]
    question, choices, answer = (_column(row, name) for name in ("question", "choices", "answer"))
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"`answer` must be the index of one of {len(choices)} choices, got {answer!r}")
    return _exchange(render_multiple_choice(question, LETTERS[: len(choices)], choices), LETTERS[answer])


def messages_from_arc(row: dict) -> list[dict]:
    """`{question, choices: {text, label}, answerKey}`; labels are the row's own, A.. or 1.., as nanochat keeps them."""
    question, choices, answer = (_column(row, name) for name in ("question", "choices", "answerKey"))
    if answer not in choices["label"]:
        raise ValueError(f"`answerKey` must be one of {choices['label']}, got {answer!r}")
    return _exchange(render_multiple_choice(question, choices["label"], choices["text"]), answer)


def messages_from_gsm8k(row: dict) -> list[dict]:
    """`{question, answer}`: each `<<expr=result>>` of the answer becomes a call of the calculator and its output."""
    question, answer = _column(row, "question"), _column(row, "answer")
    parts = []
    for piece in re.split(r"(<<[^>]*>>)", answer):
        if piece.startswith("<<"):
            expression, _, result = piece.removeprefix("<<").removesuffix(">>").rpartition("=")
            if not (expression and result):
                raise ValueError(f"tool call without its output: {piece!r} should be <<expression=result>>")
            parts.append({"type": "python", "text": expression})
            parts.append({"type": "python_output", "text": result})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return _exchange(question, parts)


def messages_from_humaneval(row: dict) -> list[dict]:
    """`{prompt, canonical_solution, test, entry_point}`: the prompt is the question, the whole program the answer."""
    for name in ("prompt", "canonical_solution", "test", "entry_point"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"no text in column `{name}`; the row has {', '.join(sorted(row))}")
    answer = f"{row['prompt']}\n{row['canonical_solution']}"
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]


def render_multiple_choice(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """nanochat's prompt for a question with choices; the answer to it is the bare letter.

    The letter follows its choice without a space, so its token is the one that answers.
    """
    if len(letters) != len(choices):
        raise ValueError(f"{len(choices)} choices need as many letters, got {len(letters)}: {list(letters)}")
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def check_messages(messages: list[dict]) -> None:
    """Refuse what cannot be trained on.

    Raises:
        ValueError: no messages, roles out of order, no answer at the end, an empty message, a tool call without its
            output, content of another shape. Names the message by its index.
    """
    conversation_spans(messages)  # order and shape
    if messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
        raise ValueError(f"message {len(messages) - 1}: the last message must be the assistant's answer")
    for index, message in enumerate(messages):
        calls, content = message.get("tool_calls") or [], message.get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not calls and not "".join(part["text"] for part in parts).strip():
            raise ValueError(f"message {index} ({message['role']}) is empty")
        types = [part["type"] for part in parts]
        if any(
            this == "python" and after != "python_output" for this, after in zip(types, [*types[1:], ""], strict=True)
        ):
            raise ValueError(f"message {index}: tool call without its output; add a part of type python_output")
        if [m["role"] for m in messages[index + 1 : index + 1 + len(calls)]] != ["tool"] * len(calls):
            raise ValueError(f"message {index}: tool call without its output; add a message of role tool")


def _exchange(question: str, answer: str | list[dict]) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _column(row: dict, name: str):
    if row.get(name) is None:
        raise ValueError(f"no column `{name}`; the row has {', '.join(sorted(row)) or 'no columns'}")
    return row[name]
