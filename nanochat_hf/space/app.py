"""A chat in the browser for a model trained with nanochat-hf; the whole of a Hub Space, and runnable at home:

    MODEL_ID=runs/tiny/rl python nanochat_hf/space/app.py        # http://127.0.0.1:7860

Beside this folder's files it needs the package files named in modules.txt, which publishing uploads with it. Settings
are environment variables, listed in README.md.
"""

import json
import os
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
try:
    import spaces  # on ZeroGPU machines, and there before torch
except ImportError:
    spaces = None

import gradio as gr

from nanochat_hf.chat import COMPLETION_NOTICE, ChatSession, load_chat_model
from nanochat_hf.sampling import Sampling
from nanochat_hf.streaming import ChatEvent

MAX_MESSAGES, MAX_MESSAGE_CHARS, MAX_TOTAL_CHARS = 500, 8_000, 32_000
MAX_TEMPERATURE, MAX_TOP_K, MAX_NEW_TOKENS = 2.0, 200, 4_096
NUM_CONCURRENT_ANSWERS, MAX_QUEUED_ANSWERS = 2, 64
NUM_KEPT_CACHES = 8  # conversations whose key/value cache waits for the next turn
SECONDS_BETWEEN_UPDATES = 0.05  # a browser redraws the answer at most so often
TOOL_TITLE = "Calculator"


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
    """The last few conversations by browser tab; one in use is out of the shelf, so no two requests share it."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self._sessions: OrderedDict[str, ChatSession] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key: str | None) -> ChatSession:
        with self._lock:
            return self._sessions.pop(key, None) or ChatSession(self.model, self.tokenizer)

    def put_back(self, key: str | None, session: ChatSession) -> None:
        with self._lock:
            if key is not None:
                self._sessions[key] = session
            while len(self._sessions) > NUM_KEPT_CACHES:
                self._sessions.popitem(last=False)


def messages_of(history: list[dict], message: str) -> list[dict]:
    """Gradio's history and the new message as a conversation: an answer's pieces joined, unanswered questions left out.

    Gradio shows one answer as several assistant messages: text, a calculator step (its expression in the step's log),
    text again.
    """
    messages: list[dict] = []
    for entry in [*history, {"role": "user", "content": message}]:
        text = text_of(entry["content"])
        if entry["role"] == "user":
            if messages and messages[-1]["role"] == "user":
                messages.pop()
            messages.append({"role": "user", "content": text})
        elif messages:
            parts = [{"type": "text", "text": text}]
            metadata = entry.get("metadata") or {}
            if metadata.get("title") == TOOL_TITLE:
                parts = [{"type": "python", "text": metadata.get("log", "")}]
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


def show(shown: list[gr.ChatMessage], event: ChatEvent) -> None:
    """Add an event to the answer on display; a calculator call is a step that can be folded open."""
    if event.kind == "text":
        if not shown or shown[-1].metadata:
            shown.append(gr.ChatMessage(role="assistant", content=""))
        shown[-1].content += event.text
    elif event.kind == "tool_call":
        metadata = {"title": TOOL_TITLE, "log": event.text, "status": "done"}
        shown.append(gr.ChatMessage(role="assistant", content="", metadata=metadata))
    elif event.kind == "tool_output" and shown:
        shown[-1].content = event.text


def client_of(request: gr.Request) -> str:
    """Who asks; in a Space the address the Hub's proxy saw (it appends it), elsewhere the connection's own."""
    forwarded = request.headers.get("x-forwarded-for", "") if os.environ.get("SPACE_ID") else ""
    return forwarded.split(",")[-1].strip() or request.client.host


def build_app(model_id: str) -> gr.ChatInterface:
    """The app around a model.

    Args:
        model_id: a Hub id or a model folder.

    Raises:
        ValueError: the model cannot be loaded.
    """
    model, tokenizer = load_chat_model(model_id)
    sessions = KeptSessions(model, tokenizer)
    rate_limit = RateLimit(int(os.environ.get("MESSAGES_PER_MINUTE", "20")))

    def respond(
        message: str,
        history: list[dict],
        temperature: float,
        top_k: int,
        max_new_tokens: int,
        seed: int | None,
        request: gr.Request,
    ) -> Iterator[list[gr.ChatMessage]]:
        if not rate_limit.allows(client_of(request), time.monotonic()):
            raise gr.Error(
                f"More than {rate_limit.max_calls} messages in a minute: wait a little.", print_exception=False
            )
        session = sessions.take(request.session_hash)
        shown: list[gr.ChatMessage] = []
        updated = 0.0
        try:
            messages = messages_of(history, message)
            check_limits(messages)
            sampling = Sampling(temperature, int(top_k))
            seed = secrets.randbits(32) if seed is None else int(seed)
            with closing(session.reply(messages, sampling, int(max_new_tokens), seed)) as events:
                for event in events:
                    if event.kind == "notice" and event.text != COMPLETION_NOTICE:
                        gr.Info(event.text)
                    if event.kind == "end" and event.text != "finished":
                        gr.Info(f"The answer was cut: {event.text.replace('_', ' ')}.")
                    show(shown, event)
                    if event.kind != "text" or time.monotonic() - updated > SECONDS_BETWEEN_UPDATES:
                        updated = time.monotonic()
                        yield [replace(piece) for piece in shown]  # copies: Gradio sends what differs from the last
            if os.environ.get("LOG_CHATS") == "1":
                print(json.dumps({"messages": session.messages}, ensure_ascii=False), flush=True)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            sessions.put_back(request.session_hash, session)

    description = f"A small model, [{model_id}](https://huggingface.co/{model_id}): it is often wrong."
    if os.path.isdir(model_id):
        description = f"A small model, {os.path.basename(os.path.abspath(model_id))}: it is often wrong."
    if ChatSession(model, tokenizer).format == "completion":
        description += f" Note: {COMPLETION_NOTICE}."
    context_tokens = min(MAX_NEW_TOKENS, model.config.max_position_embeddings)
    return gr.ChatInterface(
        spaces.GPU(respond) if spaces else respond,
        title="nanochat",
        description=description,
        chatbot=gr.Chatbot(sanitize_html=True, allow_tags=False, buttons=["copy"], height="70vh"),
        examples=[["Hello! What are you?"], ["What is 17*23 + 4?"], ["How many r are in strawberry?"]],
        additional_inputs=[
            gr.Slider(0, MAX_TEMPERATURE, value=0.6, step=0.1, label="Temperature (0 = always the likeliest word)"),
            gr.Slider(1, MAX_TOP_K, value=50, step=1, label="Top-k (draw from the k likeliest)"),
            gr.Slider(1, MAX_NEW_TOKENS, value=min(512, context_tokens), step=1, label="Longest answer, in tokens"),
            gr.Number(value=None, minimum=0, precision=0, label="Seed (empty = another answer every time)"),
        ],
        api_name="chat",
        editable=True,
        flagging_mode="never",
        cache_examples=False,
        concurrency_limit=NUM_CONCURRENT_ANSWERS,
    )


def main() -> None:
    """Serve the model that MODEL_ID names; on 127.0.0.1 unless GRADIO_SERVER_NAME says otherwise."""
    if not os.environ.get("MODEL_ID"):
        raise SystemExit("error: set MODEL_ID to a Hub id (user/name) or a model folder (runs/tiny/rl)")
    try:
        app = build_app(os.environ["MODEL_ID"])
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    app.queue(max_size=MAX_QUEUED_ANSWERS).launch()


if __name__ == "__main__":
    main()
