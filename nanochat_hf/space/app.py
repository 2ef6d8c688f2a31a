"""A chat in the browser for a model trained with nanochat-hf; the whole of a Hub Space, and runnable at home:

    MODEL_ID=runs/tiny/rl python nanochat_hf/space/app.py                 # http://127.0.0.1:7860
    MODEL_ID=runs/tiny/sft,runs/tiny/rl python nanochat_hf/space/app.py   # two to choose from

Beside this folder's files it needs the package files named in modules.txt, which publishing uploads with it. Settings
are environment variables, listed in README.md.
"""

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")  # requests whose times are kept
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000000000")  # never make a table of them; else each time
os.environ.setdefault("FORWARDED_ALLOW_IPS", "")  # or a caller on this machine could claim any address
try:
    import spaces  # on ZeroGPU machines, and there before torch
except ImportError:
    spaces = None

try:
    import gradio as gr
except ImportError:
    raise SystemExit('this page needs gradio: pip install -c constraints.txt -e ".[space]"') from None

from nanochat_hf.chat import COMPLETION_NOTICE, ChatSession, load_chat_model
from nanochat_hf.chat_service import (
    FORGOTTEN,
    MAX_NEW_TOKENS,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    TOOL_TITLE,
    KeptSessions,
    RateLimit,
    check_limits,
    is_command,
    messages_of,
    run_command,
    with_literal_tags,
    without_literal_tags,
)
from nanochat_hf.decode_compiled import compile_decoding
from nanochat_hf.hardware import return_freed_memory
from nanochat_hf.sampling import Sampling
from nanochat_hf.streaming import ChatEvent

NUM_CONCURRENT_ANSWERS, MAX_QUEUED_ANSWERS = 2, 64
SECONDS_BETWEEN_UPDATES = 0.05  # a browser redraws the answer at most so often
EXAMPLES = ["Who are you?", "What is 17*23 + 4?", "How many r are in strawberry?"]
THEME = gr.themes.Base(
    primary_hue="indigo",
    neutral_hue="slate",
    radius_size="lg",
    font=["system-ui", "sans-serif"],  # the theme's own would be fetched from Google
    font_mono=["ui-monospace", "monospace"],
)
CSS = """
.gradio-container > main, .gradio-container .main { max-width: 52rem !important; margin: 0 auto; }
#head { align-items: center; flex-wrap: nowrap; }
#head h1 { margin: 0; font-size: 1.3rem; }
#head p { margin: 0; opacity: .7; font-size: .85rem; }
#chat { border-width: 0 !important; background: transparent; }
#chat .thought-group .title { padding-right: .5rem; }
#chat .prose *, textarea { unicode-bidi: plaintext; text-align: start; } /* each paragraph in its script's direction */
.input-container textarea { background: transparent !important; }
@media (max-width: 600px) { .gradio-container main.app { padding: .5rem !important; } }
"""
# What an answer yields is added to the conversation; only the page can empty it, and not while it takes in the answer.
EMPTY_AFTER_CLEAR = f"""(messages) => {{
  const [asked, answer] = messages.slice(-2).map(message => message.content?.[0]?.text ?? message.content);
  const clear = () => document.querySelector("#chat [aria-label=Clear]")?.click();
  if (messages.at(-1)?.role === "assistant" && /^\\s*\\/clear(\\s|$)/.test(asked) && answer === {json.dumps(FORGOTTEN)})
    setTimeout(clear, 300);
}}"""


def show(shown: list[gr.ChatMessage], event: ChatEvent) -> None:
    """Add an event to the answer on display; a calculator call is a step that can be folded away."""
    if event.kind == "text":
        if not shown or shown[-1].metadata:
            shown.append(gr.ChatMessage(role="assistant", content=""))
        shown[-1].content += event.text
    elif event.kind == "tool_call":
        metadata = {"title": TOOL_TITLE, "log": event.text}
        shown.append(gr.ChatMessage(role="assistant", content="", metadata=metadata))
    elif event.kind == "tool_output":
        if not shown or shown[-1].metadata.get("log") is None or shown[-1].content:  # an output that no call asked for
            metadata = {"title": TOOL_TITLE}
            shown.append(gr.ChatMessage(role="assistant", content="", metadata=metadata))
        shown[-1].content = event.text


def show_tags(chatbot: gr.Chatbot) -> gr.Chatbot:
    """Let the chat on the page show HTML as text; what the conversation holds stays as it was written.

    Of a component's subclass Gradio would write a .pyi file beside this one, so the component itself is changed.
    """
    to_page, from_page = chatbot.postprocess, chatbot.preprocess

    def postprocess(value):
        data = to_page(value)
        for content in (content for message in data.root for content in message.content if content.type == "text"):
            content.text = with_literal_tags(content.text)
        return data

    def preprocess(payload):
        messages = from_page(payload)
        for content in (content for message in messages for content in message["content"] if content["type"] == "text"):
            content["text"] = without_literal_tags(content["text"])
        return messages

    chatbot.postprocess, chatbot.preprocess = postprocess, preprocess
    return chatbot


def client_of(request: gr.Request) -> str:
    """Who asks; in a Space the address the Hub's proxy saw (it appends it), elsewhere the connection's own."""
    forwarded = request.headers.get("x-forwarded-for", "") if os.environ.get("SPACE_ID") else ""
    return forwarded.split(",")[-1].strip() or request.client.host


def build_app(model_ids: list[str]) -> gr.Blocks:
    """The app around one model, or several to choose from.

    Args:
        model_ids: Hub ids or model folders; the first is chosen at the start.

    Raises:
        ValueError: a model cannot be loaded, or not be compiled where COMPILE asks for it.
    """
    models = {display_name(model_id): load_chat_model(model_id) for model_id in model_ids}
    if os.environ.get("COMPILE") == "1":
        for model, _ in models.values():
            compile_decoding(model, batch_sizes=[1])
    sessions = KeptSessions(models)
    rate_limit = RateLimit(int(os.environ.get("MESSAGES_PER_MINUTE", "20")))

    def generate(
        tab: str | None, model: str, messages: list[dict], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> Iterator[ChatEvent]:
        """An answer's events. On ZeroGPU this runs in a process of its own: all else a request needs stays outside."""
        session = sessions.take(tab, model)
        try:
            with closing(session.reply(messages, sampling, max_new_tokens, seed)) as events:
                yield from events
            if os.environ.get("LOG_CHATS") == "1":
                print(json.dumps({"messages": session.messages}, ensure_ascii=False), flush=True)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            sessions.put_back(tab, model, session)

    answer = spaces.GPU(generate) if spaces else generate

    def respond(
        message: str,
        history: list[dict],
        temperature: float,
        top_k: int,
        max_new_tokens: int,
        seed: int | None,
        model: str,
        request: gr.Request,
    ) -> Iterator[list[gr.ChatMessage]]:
        if not rate_limit.allows(client_of(request), time.monotonic()):
            raise gr.Error(
                f"More than {rate_limit.max_calls} messages in a minute: wait a little.", print_exception=False
            )
        message = without_literal_tags(message)  # an edited one comes as the page shows it
        if is_command(message):
            yield [gr.ChatMessage(role="assistant", content=run_command(message)[0])]
            return
        try:
            messages = messages_of(history, message)
            check_limits(messages)
            sampling = Sampling(temperature, int(top_k))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        seed = secrets.randbits(32) if seed is None or seed < 0 else int(seed)
        shown: list[gr.ChatMessage] = []
        updated = 0.0
        with closing(answer(request.session_hash, model, messages, sampling, int(max_new_tokens), seed)) as events:
            for event in events:
                if event.kind == "notice" and event.text != COMPLETION_NOTICE:
                    gr.Info(event.text)
                if event.kind == "end" and event.text != "finished":
                    gr.Info(f"The answer was cut: {event.text.replace('_', ' ')}.")
                show(shown, event)
                if event.kind != "text" or time.monotonic() - updated > SECONDS_BETWEEN_UPDATES:
                    updated = time.monotonic()
                    yield [replace(piece) for piece in shown]  # copies: Gradio sends what differs from the last

    context_tokens = min(model.config.max_position_embeddings for model, _ in models.values())
    with gr.Blocks(title="nanochat", fill_height=True) as app:
        with gr.Row(elem_id="head"):
            gr.Markdown(f"# nanochat\n{description(models)}")
            choice = gr.Dropdown(
                list(models), value=next(iter(models)), label="Model", container=False, visible=len(models) > 1,
                filterable=False, min_width=120,
            )  # fmt: skip
        hidden = {"render": False}  # ChatInterface draws them, folded away
        temperature = gr.Slider(
            0, MAX_TEMPERATURE, 0.6, step=0.1, label="Temperature (0 = the likeliest word)", **hidden
        )
        top_k = gr.Slider(1, MAX_TOP_K, 50, step=1, label="Top-k (draw from the k likeliest words)", **hidden)
        length = gr.Slider(
            1, MAX_NEW_TOKENS, min(512, context_tokens), step=1, label="Longest answer, tokens", **hidden
        )
        seed = gr.Number(-1, minimum=-1, precision=0, label="Seed (-1 = another answer every time)", **hidden)
        chat = gr.ChatInterface(
            respond,
            chatbot=show_tags(gr.Chatbot(
                elem_id="chat", show_label=False, sanitize_html=True, allow_tags=False, buttons=["copy"], scale=1,
                layout="bubble", height="calc(100dvh - 17rem)", min_height=240,
                placeholder="Ask something, or type /help",
            )),
            examples=[[example] for example in EXAMPLES],
            additional_inputs=[temperature, top_k, length, seed, choice],
            additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
            api_name="chat",
            editable=True,
            flagging_mode="never",
            cache_examples=False,
            concurrency_limit=NUM_CONCURRENT_ANSWERS,
        )  # fmt: skip
        quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "undocumented"}
        chat.textbox.submit(moved_sliders, chat.saved_input, [temperature, top_k], **quiet)
        chat.chatbot.change(None, chat.chatbot, js=EMPTY_AFTER_CLEAR)
    return app


def display_name(model_id: str) -> str:
    """A Hub id as it is; of a folder the last two names, for runs name their models alike."""
    return "/".join(os.path.abspath(model_id).split(os.sep)[-2:]) if os.path.isdir(model_id) else model_id


def description(models: dict[str, tuple]) -> str:
    """What a visitor should know before asking."""
    text = "A small language model, trained from scratch; it is often wrong."
    if len(models) == 1:
        text = f"{next(iter(models))}: a small language model, trained from scratch; it is often wrong."
    no_template = [name for name, parts in models.items() if ChatSession(*parts).format == "completion"]
    return text + "".join(f" {name}: {COMPLETION_NOTICE}." for name in no_template)


def moved_sliders(message: str) -> tuple:
    """Temperature and top-k after a slash command that sets one of them."""
    changed = run_command(message)[1] if is_command(message) else {}
    return tuple(changed.get(name, gr.skip()) for name in ("temperature", "top_k"))


def main() -> None:
    """Serve the models that MODEL_ID names; on 127.0.0.1 unless GRADIO_SERVER_NAME says otherwise."""
    return_freed_memory()
    model_ids = [name.strip() for name in os.environ.get("MODEL_ID", "").split(",") if name.strip()]
    if not model_ids:
        raise SystemExit("error: set MODEL_ID to a Hub id (user/name) or a model folder (runs/tiny/rl)")
    try:
        app = build_app(model_ids)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    app.queue(max_size=MAX_QUEUED_ANSWERS).launch(theme=THEME, css=CSS, max_file_size="1kb")  # nobody need send a file


if __name__ == "__main__":
    main()
