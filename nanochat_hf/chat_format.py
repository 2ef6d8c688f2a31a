"""What a conversation looks like to the model: messages in, a flat list of spans out.

A span is either one special token or a piece of plain text, and carries whether the model is trained to write it. The
tokenizer encodes span by span, so nothing a user types can become a special token. The same rules stand once more in
`chat_template.jinja`, for tools that only know `apply_chat_template`; `tests/test_chat_format.py` holds the two equal.
The template makes one string that is encoded at once, so its ids differ in two places: a special token typed as text
has a space inside it there, and adjacent text parts are encoded as one text.

    for span in conversation_spans([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]):
        print(span)
"""

import difflib
import json
from collections.abc import Sequence
from typing import NamedTuple

# Trained on by part type: the model learns to call the tool, never to invent the tool's answer.
PART_TOKENS = {
    "text": (None, None, True),
    "python": ("<|python_start|>", "<|python_end|>", True),
    "python_output": ("<|output_start|>", "<|output_end|>", False),
}
ROLES = ("system", "user", "assistant", "tool")


class Span(NamedTuple):
    text: str  # a special token's name, or plain text
    special: bool
    trained: bool  # the loss counts these tokens


def conversation_spans(messages: Sequence[dict]) -> list[Span]:
    """Lay a conversation out as spans, beginning with `<|bos|>`.

    Args:
        messages: `{"role", "content"}` dicts: an optional system message (joined to the first user message with a
            blank line), then user and assistant in turn. Assistant content is a string or a list of parts
            `{"type": "text" | "python" | "python_output", "text"}`. An assistant message with `tool_calls`, the `tool`
            messages after it and the assistant message that goes on mean the same as one message of such parts.

    Returns:
        The spans. An assistant turn that still waits after a tool call at the very end is left open (no
        `<|assistant_end|>`), so that generation can go on from there.

    Raises:
        ValueError: no messages, roles out of order, or content of another shape; names the message by its index.
    """
    messages = [_check_message(i, message) for i, message in enumerate(messages)]
    if not messages:
        raise ValueError("a conversation needs at least one message, e.g. [{'role': 'user', 'content': 'Hi'}]")
    spans = [Span("<|bos|>", True, False)]
    prefix, position, expected = "", 0, "user"
    if messages[0]["role"] == "system":
        prefix, position = _plain_content(0, messages[0]) + "\n\n", 1
        if len(messages) == 1:
            raise ValueError("message 0 is a system message and nothing follows; add the user's message")
    turn_is_open = False  # an assistant turn that has called a tool and goes on
    while position < len(messages):
        message = messages[position]
        if message["role"] != expected:
            raise ValueError(_order_error(position, message["role"], expected, turn_is_open))
        if expected == "user":
            text = prefix + _plain_content(position, message)
            spans += [_token("<|user_start|>"), Span(text, False, False), _token("<|user_end|>")]
            prefix, position, expected = "", position + 1, "assistant"
            continue
        if not turn_is_open:
            spans.append(_token("<|assistant_start|>"))
        spans += _part_spans(position, message.get("content"))
        calls = message.get("tool_calls") or []
        index, position = position, position + 1
        for call in calls:
            spans += _tool_spans("python", _call_expression(index, call))
            # Outputs answer calls in order; a call the tool could not evaluate has no output.
            if position < len(messages) and messages[position]["role"] == "tool":
                _check_answers(position, messages[position], call)
                spans += _tool_spans("python_output", _plain_content(position, messages[position]))
                position += 1
        turn_is_open = bool(calls)
        if not turn_is_open:
            spans.append(Span("<|assistant_end|>", True, True))
        expected = "assistant" if turn_is_open else "user"
    return spans


def _token(name: str) -> Span:
    return Span(name, True, False)


def _tool_spans(part_type: str, text: str) -> list[Span]:
    start, end, trained = PART_TOKENS[part_type]
    if start is None:
        return [Span(text, False, trained)]
    return [Span(start, True, trained), Span(text, False, trained), Span(end, True, trained)]


def _part_spans(index: int, content: str | Sequence[dict] | None) -> list[Span]:
    if content is None:
        return []
    if isinstance(content, str):
        return [Span(content, False, True)]
    spans = []
    for part in content:
        part_type = part.get("type") if isinstance(part, dict) else None
        if part_type not in PART_TOKENS or not isinstance(part.get("text"), str):
            close = difflib.get_close_matches(str(part_type), PART_TOKENS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"message {index}: an assistant's parts are {{'type': text|python|python_output, 'text': str}}, "
                f"got {part!r:.200}; did you mean type {close!r}?"
            )
        spans += _tool_spans(part_type, part["text"])
    return spans


def _plain_content(index: int, message: dict) -> str:
    """Text of a system, user or tool message; a list of text parts (OpenAI's shape) is joined."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"message {index}: content of a {message['role']} message must be text, got {content!r:.200}")
    return "".join(texts)


def _call_expression(index: int, call: dict) -> str:
    """The Python expression of a tool call: its only argument, whatever the argument is called."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if isinstance(arguments, str):
        if not arguments.lstrip().startswith("{"):
            return arguments
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise ValueError(
                f"message {index}: tool call arguments are broken JSON ({error}): {arguments!r}"
            ) from error
    values = list(arguments.values()) if isinstance(arguments, dict) else []
    if len(values) != 1 or not isinstance(values[0], str):
        raise ValueError(
            f"message {index}: the calculator takes one text argument, e.g. "
            f"{{'function': {{'name': 'calculator', 'arguments': {{'expression': '12/60'}}}}}}, got {call!r:.200}"
        )
    return values[0]


def _check_answers(index: int, message: dict, call: dict) -> None:
    answered, called = message.get("tool_call_id"), call.get("id")
    if answered is not None and called is not None and answered != called:
        raise ValueError(f"message {index} answers tool call {answered!r}, but the next open call is {called!r}")


def _check_message(index: int, message: dict) -> dict:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        given = message.get("role") if isinstance(message, dict) else message
        close = difflib.get_close_matches(str(given), ROLES, n=1, cutoff=0.0)[0]
        raise ValueError(f"message {index} must be a dict with a role of {', '.join(ROLES)}; got {given!r} ({close}?)")
    content = message.get("content")
    if not isinstance(content, (str, list, tuple)) and not (content is None and message.get("tool_calls")):
        raise ValueError(
            f"message {index} ({message['role']}): content must be text or a list of parts, got {content!r}"
        )
    if message.get("tool_calls") and message["role"] != "assistant":
        raise ValueError(f"message {index}: only the assistant calls tools, this is a {message['role']} message")
    return message


def _order_error(index: int, given: str, expected: str, turn_is_open: bool) -> str:
    if given == "tool":
        return f"message {index} is a tool output, but no tool call waits for one"
    if turn_is_open:
        return f"message {index} is of the {given}, but the assistant called a tool and has not answered yet"
    if given == "system":
        return f"message {index}: a system message can only come first"
    if index == 0 or expected == "user":
        return f"message {index} must be of the user (user and assistant take turns), got {given}"
    return f"message {index} must be of the assistant; join neighbouring messages of the {given} into one"
