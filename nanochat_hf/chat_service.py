"""What a chat that strangers use needs beside a model: limits, slash commands, kept conversations; no user interface.

messages = messages_of(history, message)      # Gradio's history -> a conversation
check_limits(messages)
"""

import re
import threading
from collections import OrderedDict, deque

from .chat import ChatSession

MAX_MESSAGES, MAX_MESSAGE_CHARS, MAX_TOTAL_CHARS = 500, 8_000, 32_000
MAX_TEMPERATURE, MAX_TOP_K, MAX_NEW_TOKENS = 2.0, 200, 4_096
NUM_KEPT_CACHES = 8  # conversations whose key/value cache waits for the next turn
TOOL_TITLE = "Calculator"
FORGOTTEN = "Forgotten."
COMMAND, MAX_COMMAND_CHARS = re.compile(r"/[A-Za-z_]+(?:[ \t=][^\n]*)?"), 200
TAG = re.compile(r"<(?=[A-Za-z/!?])")
EMPTY_ITEM = re.compile(r"^( {0,3}[0-9]+)(?=[.)][ \t]*$)", re.MULTILINE)  # of a list: "18." and nothing more
CODE = re.compile(r"(^ {0,3}```.*?(?:^ {0,3}```|\Z)|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
JOINER = "\u2060"  # invisible, of no width; a tag's name cannot begin with it
MARKED = re.compile(rf"(?<=<){JOINER}|(?<=[0-9]){JOINER}(?=[.)])")
HELP = f"""- `/temperature X`: 0 (always the likeliest word) to {MAX_TEMPERATURE:g}
- `/topk K`: draw from the K likeliest words, 1 to {MAX_TOP_K}
- `/clear`: forget the conversation
- `/help`: this text"""


class RateLimit:
    """At most `max_calls` in any `seconds` a client."""

    def __init__(self, max_calls: int, seconds: float = 60.0):
        self.max_calls, self.seconds = max_calls, seconds
        self._calls: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def allows(self, client: str, now: float) -> bool:
        """Whether this client may call now; counts the call if so."""
        with self._lock:
            if len(self._calls) > 10_000:  # forget who has been quiet, so that memory stays bounded
                self._calls = {c: times for c, times in self._calls.items() if times[-1] > now - self.seconds}
            times = self._calls.setdefault(client, deque())
            while times and times[0] <= now - self.seconds:
                times.popleft()
            if len(times) >= self.max_calls:
                return False
            times.append(now)
            return True


class KeptSessions:
    """The last few conversations by browser tab and model; one in use is out, so no two requests share it.

    Args:
        models: name -> (model, tokenizer).
    """

    def __init__(self, models: dict[str, tuple]):
        self.models = models
        self._sessions: OrderedDict[tuple, ChatSession] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, tab: str | None, name: str) -> ChatSession:
        with self._lock:
            return self._sessions.pop((tab, name), None) or ChatSession(*self.models[name])

    def put_back(self, tab: str | None, name: str, session: ChatSession) -> None:
        with self._lock:
            if tab is not None:
                self._sessions[tab, name] = session
            while len(self._sessions) > NUM_KEPT_CACHES:
                self._sessions.popitem(last=False)


def messages_of(history: list[dict], message: str) -> list[dict]:
    """Gradio's history and the new message as a conversation: an answer's pieces joined, what was no question left out.

    Gradio shows one answer as several assistant messages: text, a calculator step (its expression in the step's log),
    text again. Unanswered questions and slash commands are passed over; nothing before a `/clear` counts.
    """
    messages: list[dict] = []
    after_command = False
    for entry in [*history, {"role": "user", "content": message}]:
        text = text_of(entry["content"])
        if entry["role"] == "user":
            after_command = is_command(text)
            if messages and messages[-1]["role"] == "user":
                messages.pop()
            if after_command and text.split()[0] == "/clear":
                messages.clear()
            elif not after_command:
                messages.append({"role": "user", "content": text})
        elif messages and not after_command:
            parts = [{"type": "text", "text": text}]
            metadata = entry.get("metadata") or {}
            if metadata.get("title") == TOOL_TITLE:
                call = metadata.get("log")
                parts = [] if call is None else [{"type": "python", "text": call}]
                parts += [{"type": "python_output", "text": text}] if text else []
            if messages[-1]["role"] == "user":
                messages.append({"role": "assistant", "content": []})
            messages[-1]["content"] += parts
    for entry in messages:
        if entry["role"] == "assistant" and all(part["type"] == "text" for part in entry["content"]):
            entry["content"] = "".join(part["text"] for part in entry["content"])
    return messages


def text_of(content: str | list | dict) -> str:
    """The text of a Gradio message's content, which is a string or a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in parts)


def with_literal_tags(text: str) -> str:
    """Markdown whose HTML is text, to be read and not to be obeyed; code is left as it is, for it is text already.

    A number with a full stop or bracket that fills a line, as after a calculator's step, is text as well and no list.
    """
    pieces = CODE.split(text)
    pieces[::2] = [EMPTY_ITEM.sub(rf"\1{JOINER}", TAG.sub("<" + JOINER, piece)) for piece in pieces[::2]]
    return "".join(pieces)


def without_literal_tags(text: str) -> str:
    """What `with_literal_tags` was given."""
    return MARKED.sub("", text)


def check_limits(messages: list[dict]) -> None:
    """Refuse, with a reason, what would keep the machine busy for others."""
    lengths = [len(text_of(message["content"])) for message in messages]
    if len(messages) > MAX_MESSAGES:
        raise ValueError(f"This conversation has more than {MAX_MESSAGES} messages: clear it to go on.")
    if not messages[-1]["content"].strip():
        raise ValueError("The message is empty.")
    if lengths[-1] > MAX_MESSAGE_CHARS:
        raise ValueError(f"The message has {lengths[-1]:,} characters, at most {MAX_MESSAGE_CHARS:,} are taken.")
    if sum(lengths) > MAX_TOTAL_CHARS:
        raise ValueError(f"This conversation has more than {MAX_TOTAL_CHARS:,} characters: clear it to go on.")


def is_command(text: str) -> bool:
    """Whether a message is one line that begins with a slash and a word, and so is not for the model."""
    return len(text) <= MAX_COMMAND_CHARS and COMMAND.fullmatch(text.strip()) is not None


def run_command(text: str) -> tuple[str, dict[str, float]]:
    """What to answer a slash command, and the settings it changes: `temperature`, `top_k`."""
    name, _, argument = text.strip().partition(" ")
    settings = {"/temperature": ("temperature", 0, MAX_TEMPERATURE), "/topk": ("top_k", 1, MAX_TOP_K)}
    if name == "/help":
        return HELP, {}
    if name == "/clear":
        return FORGOTTEN, {}
    if name not in settings:
        return f"There is no command `{name}`.\n\n{HELP}", {}
    setting, lowest, highest = settings[name]
    try:
        value = float(argument) if setting == "temperature" else int(argument)
    except ValueError:
        value = float("nan")
    if not lowest <= value <= highest:
        return f"`{name}` takes a {'whole ' if setting == 'top_k' else ''}number from {lowest} to {highest:g}.", {}
    return f"{setting.replace('_', '-')} is {value:g} now.", {setting: value}
