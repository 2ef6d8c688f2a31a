"""From token ids, one at a time, to what a person sees: text in whole characters, tool calls, tool outputs.

A character may span tokens (an emoji is four bytes, often four tokens): it is held back until it is whole.
"""

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from .generation import TurnTokens

REPLACEMENT = "\ufffd"  # what decoding puts in place of bytes that are no character, or not yet
MAX_UNFINISHED = 3  # of them at the end of a text: a character has four bytes, and some decoders put one for each


@dataclass(frozen=True)
class ChatEvent:
    """One thing that happened in an answer.

    `text`: a piece of the answer. `tool_call`: a whole expression. `tool_output`: its whole result. `notice`: something
    the reader should know (said once a conversation). `end`: the last event; its text says why: `finished`,
    `max_new_tokens` (the limit asked for) or `context` (the model's context is full).
    """

    kind: Literal["text", "tool_call", "tool_output", "notice", "end"]
    text: str = ""


class TextStream:
    """Decodes tokens as they come; never gives out part of a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._context: list[int] = []  # the last token that is whole by itself (SentencePiece needs one before it)
        self._ids: list[int] = []  # it, and what came after
        self._num_given = 0  # characters of decode(_ids) given out already

    def feed(self, token: int) -> str:
        """The characters this token completes, possibly none."""
        self._ids.append(token)
        text = self._decode(self._ids)
        num_unfinished = min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_UNFINISHED)
        given = text[self._num_given : len(text) - num_unfinished]
        self._num_given += len(given)
        if not num_unfinished:
            if REPLACEMENT not in self._decode([token]):
                self._context = [token]
            self._start_anew(self._context)
        return given

    def flush(self) -> str:
        """What is still held back, complete or not; the stream starts anew."""
        given = self._decode(self._ids)[self._num_given :]
        self._context = []
        self._start_anew([])
        return given

    def _start_anew(self, ids: list[int]) -> None:
        self._ids, self._num_given = list(ids), len(self._decode(ids))

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


class AnswerStream:
    """Sorts an answer's tokens into events, and keeps it as the content parts of an assistant message."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turn: TurnTokens):
        self.turn, self._text = turn, TextStream(tokenizer)
        self._special_ids = set(tokenizer.all_special_ids) | turn.ends
        self._type = "text"  # of the part being written: text, python or python_output
        self.parts: list[dict] = []

    @property
    def content(self) -> str | list[dict]:
        """The answer so far as a message's content: a string, or parts when a tool was called."""
        if any(part["type"] != "text" for part in self.parts):
            return self.parts
        return "".join(part["text"] for part in self.parts)

    def feed(self, token: int) -> list[ChatEvent]:
        """The events this token completes."""
        opens = {self.turn.python_start: "python", self.turn.output_start: "python_output"}
        if token in opens or token in (self.turn.python_end, self.turn.output_end):
            return self._turn_to(opens.get(token, "text"))
        if token in self._special_ids:  # ends the turn, or stands where no special token belongs: not for display
            return []
        return self._add(self._text.feed(token))

    def close(self) -> list[ChatEvent]:
        """What an answer that stopped in mid-character or mid-call still owes."""
        return self._turn_to("text")

    def _turn_to(self, next_type: str) -> list[ChatEvent]:
        events = self._add(self._text.flush())
        if self._type != "text":
            kind = "tool_call" if self._type == "python" else "tool_output"
            text = self.parts[-1]["text"] if self.parts and self.parts[-1]["type"] == self._type else ""
            events.append(ChatEvent(kind, text))
        self._type = next_type
        if next_type != "text":
            self.parts.append({"type": next_type, "text": ""})
        return events

    def _add(self, text: str) -> list[ChatEvent]:
        if not text:
            return []
        if not self.parts or self.parts[-1]["type"] != self._type:
            self.parts.append({"type": self._type, "text": ""})
        self.parts[-1]["text"] += text
        return [ChatEvent("text", text)] if self._type == "text" else []
