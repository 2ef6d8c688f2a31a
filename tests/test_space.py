"""The Space: talked to over HTTP as a browser would, and started from a copy of exactly what publishing uploads."""

import ast
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import yaml

gr = pytest.importorskip("gradio", reason="the extra `space` is not installed")
from gradio_client import Client  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402
from scripted import echo  # noqa: E402

import nanochat_hf.chat_service as service  # noqa: E402
import nanochat_hf.space.app as app  # noqa: E402
from nanochat_hf.chat import ChatSession  # noqa: E402
from nanochat_hf.sampling import Sampling  # noqa: E402

SPACE = Path(app.__file__).parent
PACKAGE = SPACE.parent
SETTINGS = (0.0, 50, 99, 1)  # temperature, top-k, longest answer, seed


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    return echo(tiny_tokenizer)


@pytest.fixture(scope="module")
def url(model, tiny_tokenizer):
    """The app with that model, served on loopback."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "load_chat_model", lambda name: (model, tiny_tokenizer))
        patch.setenv("MESSAGES_PER_MINUTE", "1000")
        interface = app.build_app(["someone/model", "someone/other"])
    interface.queue(max_size=app.MAX_QUEUED_ANSWERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "SECONDS_BETWEEN_UPDATES", 0.0)
        yield interface.launch(prevent_thread_lock=True, quiet=True, server_port=free_port())[1]
        interface.close()


def test_a_model_that_cannot_be_compiled_says_so(model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(app, "load_chat_model", lambda name: (model, tiny_tokenizer))
    monkeypatch.setenv("COMPILE", "1")
    with pytest.raises(ValueError, match="compiled decoding is for nanochat_hf models"):
        app.build_app(["someone/model"])


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def texts(answer):
    return [piece["content"] for piece in answer]


def test_an_answer_streams(url):
    job = Client(url, verbose=False).submit("a b c d e f", *SETTINGS)
    job.result()
    updates = [texts(update)[0] for update in job.outputs()]
    assert updates[-1] == "a b c d e f"
    assert len(set(updates)) > 2 and all(updates[-1].startswith(update) for update in updates)


def test_a_tool_call_is_a_step_between_the_texts(url):
    answer = Client(url, verbose=False).predict("6*7", *SETTINGS)
    assert texts(answer) == ["It is ", "42", "."]
    assert answer[1]["metadata"] == {"title": service.TOOL_TITLE, "log": "6*7"}


def test_a_conversation_keeps_its_cache_between_turns(url, model):
    client = Client(url, verbose=False)
    client.predict("6*7", *SETTINGS)
    del model.num_tokens_read[:]
    assert texts(client.predict("and so on", *SETTINGS)) == ["and so on"]
    assert model.num_tokens_read[0] < 15


def test_users_at_once_get_their_own_answers(url):
    def talk(user):
        client = Client(url, verbose=False)
        return [texts(client.predict(f"user {user} says {turn}", *SETTINGS))[0] for turn in range(2)]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(talk, range(4))) == [
            [f"user {user} says {turn}" for turn in range(2)] for user in range(4)
        ]


@pytest.mark.parametrize(
    "message, settings, reason",
    [
        ("x" * 8001, SETTINGS, "8,000"),
        ("/" + "x" * 8001, SETTINGS, "8,002"),
        ("x" * 2_000_000, SETTINGS, "2,000,000"),
        ("  ", SETTINGS, "empty"),
        ("hi", (2.5, 50, 9, 1), "maximum"),
        ("hi", (1, 201, 9, 1), "maximum"),
        ("hi", (1, 50, 5000, 1), "maximum"),
    ],
)
def test_refusals_have_a_reason_and_the_service_goes_on(message, settings, reason, url):
    client = Client(url, verbose=False)
    with pytest.raises(AppError, match=reason):
        client.predict(message, *settings)
    assert texts(client.predict("still there", *SETTINGS)) == ["still there"]


def test_the_history_of_a_browser_is_the_sessions_own(model, tiny_tokenizer):
    """What Gradio shows, read back, equals what the session remembers: else every turn would be read anew."""
    session = ChatSession(model, tiny_tokenizer)
    history = []
    for message in ("6*7", "and so on", "1+1"):
        assert service.messages_of(history, message)[:-1] == session.messages
        shown = []
        for event in session.reply([*session.messages, {"role": "user", "content": message}], Sampling()):
            app.show(shown, event)
        history.append({"role": "user", "content": [{"type": "text", "text": message}]})
        history += [{"role": "assistant", "content": m.content, "metadata": m.metadata} for m in shown]


def test_an_output_that_no_call_asked_for_replaces_nothing():
    """A model may write an output span by itself, after text or after a whole call."""
    shown = []
    for kind, text in [
        ("text", "So"),
        ("tool_output", "4"),
        ("tool_call", "2+2"),
        ("tool_output", "4"),
        ("tool_output", "5"),
    ]:
        app.show(shown, app.ChatEvent(kind, text))
    assert [(m.content, m.metadata.get("log")) for m in shown] == [("So", None), ("4", None), ("4", "2+2"), ("5", None)]
    history = [{"role": "user", "content": "?"}]
    history += [{"role": "assistant", "content": m.content, "metadata": m.metadata} for m in shown]
    parts = service.messages_of(history, "next")[1]["content"]
    assert [(part["type"], part["text"]) for part in parts] == [
        ("text", "So"), ("python_output", "4"), ("python", "2+2"), ("python_output", "4"), ("python_output", "5")
    ]  # fmt: skip


def test_a_question_left_unanswered_is_passed_over():
    history = [{"role": "user", "content": "lost"}]
    assert service.messages_of(history, "asked again") == [{"role": "user", "content": "asked again"}]


def test_commands_are_answered_and_not_shown_to_the_model(url, model):
    client = Client(url, verbose=False)
    client.predict("first", *SETTINGS)
    [answer] = texts(client.predict("/topk 7", *SETTINGS))
    assert answer == "top-k is 7 now." and app.moved_sliders("/topk 7")[1] == 7
    del model.num_tokens_read[:]
    assert texts(client.predict("second", *SETTINGS)) == ["second"]
    assert model.num_tokens_read[0] < 15  # the conversation went on from its cache: the command was not in it
    client.predict("/clear", *SETTINGS)
    history = [{"role": "user", "content": text} for text in ("before", "/clear")]
    assert service.messages_of(history, "after") == [{"role": "user", "content": "after"}]


@pytest.mark.parametrize(
    "text, answer",
    [
        ("/temperature 3", "a number from 0 to 2"),
        ("/temperature warm", "a number from 0 to 2"),
        ("/temperature nan", "a number from 0 to 2"),
        ("/topk 2.5", "a whole number from 1 to 200"),
        ("/frob", "no command `/frob`"),
        ("/help", "/clear"),
    ],
)
def test_a_wrong_command_changes_nothing_and_says_what_is_right(text, answer):
    reply, changed = service.run_command(text)
    assert answer in reply and changed == {}


def test_text_with_a_slash_is_no_command():
    assert not any(map(service.is_command, ("/usr/bin", "a /help", "/", "/help\nme")))
    history = [{"role": "user", "content": "kept"}, {"role": "assistant", "content": "yes"}]
    history += [{"role": "user", "content": "/clearance"}, {"role": "assistant", "content": "no such command"}]
    assert [m["content"] for m in service.messages_of(history, "next")] == ["kept", "yes", "next"]


def test_another_model_may_be_chosen(url):
    client = Client(url, verbose=False)
    assert texts(client.predict("hi", *SETTINGS, "someone/other")) == ["hi"]
    with pytest.raises(AppError, match="someone/third"):
        client.predict("hi", *SETTINGS, "someone/third")


def test_limits_on_the_whole_conversation():
    long = [{"role": "user", "content": "x" * 5000}, {"role": "assistant", "content": "y" * 5000}] * 4
    with pytest.raises(ValueError, match="32,000"):
        service.check_limits([*long, {"role": "user", "content": "hi"}])
    with pytest.raises(ValueError, match="500"):
        service.check_limits([{"role": "user", "content": "x"}] * 501)


def test_rate_limit_by_client():
    limit = service.RateLimit(max_calls=2)
    assert [limit.allows("a", now) for now in (0, 1, 2)] == [True, True, False]
    assert limit.allows("b", 2)
    assert limit.allows("a", 60) and not limit.allows("a", 60.5)


class Request:
    """Of a request what `client_of` reads."""

    def __init__(self, forwarded):
        self.headers = {"x-forwarded-for": forwarded} if forwarded else {}
        self.client = SimpleNamespace(host="10.0.0.1")


def test_who_asks(monkeypatch):
    monkeypatch.delenv("SPACE_ID", raising=False)
    assert app.client_of(Request("1.2.3.4")) == "10.0.0.1"  # anybody can write that header
    monkeypatch.setenv("SPACE_ID", "me/tiny")
    assert app.client_of(Request("1.2.3.4, 5.6.7.8")) == "5.6.7.8" and app.client_of(Request(None)) == "10.0.0.1"


def accepted(url, **settings):
    """How many of six messages got an answer, each from a caller that claims another address."""
    count = 0
    for number in range(6):
        client = Client(url, verbose=False, headers={"x-forwarded-for": f"9.9.9.{number}"})
        try:
            client.predict("hi", *SETTINGS)
            count += 1
        except AppError as error:
            assert "messages in a minute" in str(error)
    return count


def test_the_rate_limit_holds_on_zero_gpu_too_and_what_is_no_answer_takes_no_gpu(model, tiny_tokenizer, monkeypatch):
    calls = []

    def gpu(task):
        """As the package `spaces`: what goes in and comes out crosses to another process."""

        def run(*arguments):
            calls.append(arguments)
            for event in task(*pickle.loads(pickle.dumps(arguments))):
                yield pickle.loads(pickle.dumps(event))

        return run

    monkeypatch.setattr(app, "load_chat_model", lambda name: (model, tiny_tokenizer))
    monkeypatch.setattr(app, "spaces", SimpleNamespace(GPU=gpu))
    monkeypatch.setenv("MESSAGES_PER_MINUTE", "5")
    monkeypatch.delenv("SPACE_ID", raising=False)
    interface = app.build_app(["someone/model"])
    url = interface.queue().launch(prevent_thread_lock=True, quiet=True, server_port=free_port())[1]
    try:
        client = Client(url, verbose=False)
        assert "/clear" in texts(client.predict("/help", *SETTINGS))[0]
        with pytest.raises(AppError, match="8,000"):
            client.predict("x" * 8001, *SETTINGS)
        assert calls == []
        with pytest.raises(AppError, match="shorten it"):  # the model's own refusal comes from over there
            client.predict("word " * 1500, *SETTINGS)
        assert len(calls) == 1
        assert accepted(url) == 2 and len(calls) == 3
    finally:
        interface.close()


def test_conversations_are_logged_where_it_is_asked_for_alone(url, monkeypatch, capsys):
    client = Client(url, verbose=False)
    client.predict("a secret", *SETTINGS)
    assert "a secret" not in capsys.readouterr().out
    monkeypatch.setenv("LOG_CHATS", "1")
    client.predict("no secret", *SETTINGS)
    logged = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["messages"]
    assert [message["content"] for message in logged[-2:]] == ["no secret", "no secret"]


TEXT_WITH_TAGS = "a < b, <b>bold</b> `<i>` <!-- c -->\n```html\n<form>\n```\n</form><?php"


def test_tags_are_shown_as_text_and_code_is_left_alone():
    shown = service.with_literal_tags(TEXT_WITH_TAGS)
    assert [piece for piece in ("<b>", "</b>", "<!--", "</form>", "<?php") if piece in shown] == []
    assert "a < b" in shown and "`<i>`" in shown and "\n<form>\n" in shown
    assert service.without_literal_tags(shown) == TEXT_WITH_TAGS


def test_a_result_alone_on_its_line_is_no_list_of_one_empty_item():
    text = "18.\n#### 18\n2) \n1. one\n`3.`"
    shown = service.with_literal_tags(text)
    assert shown == f"18{service.JOINER}.\n#### 18\n2{service.JOINER}) \n1. one\n`3.`"
    assert service.without_literal_tags(shown) == text


def test_kept_sessions_are_few_and_never_shared(tiny_tokenizer, model):
    kept = service.KeptSessions({"one": (model, tiny_tokenizer), "other": (model, tiny_tokenizer)})
    first = kept.take("tab", "one")
    assert kept.take("tab", "one") is not first  # the first is in use
    kept.put_back("tab", "one", first)
    assert kept.take("tab", "other") is not first
    assert kept.take("tab", "one") is first
    for number in range(service.NUM_KEPT_CACHES + 3):
        kept.put_back(str(number), "one", kept.take(str(number), "one"))
    assert len(kept._sessions) == service.NUM_KEPT_CACHES


@pytest.mark.parametrize("model_id, reason", [(None, "set MODEL_ID"), ("/no/such/folder", "no folder")])
def test_a_missing_model_is_said(model_id, reason, monkeypatch):
    monkeypatch.delenv("MODEL_ID", raising=False)
    if model_id:
        monkeypatch.setenv("MODEL_ID", model_id)
    with pytest.raises(SystemExit, match=reason):
        app.main()


def test_the_readme_is_space_metadata():
    metadata = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert metadata["sdk"] == "gradio" and (SPACE / metadata["app_file"]).is_file()
    assert int(metadata["sdk_version"].split(".")[0]) >= 6 and len(metadata["short_description"]) <= 60


def imports_of_ours(path):
    """Files of the package that a file imports, relative to the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            folder = path.parents[node.level - 1] if node.level else PACKAGE.parent
            base = folder / (node.module or "").replace(".", "/")
            found |= {base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)}
            found |= {folder / "__init__.py" for folder in base.parents if folder.is_relative_to(PACKAGE)}
    return {file.relative_to(PACKAGE) for file in found if file.is_relative_to(PACKAGE) and file.is_file()}


def test_modules_txt_lists_exactly_what_the_app_imports():
    needed, waiting = set(), [SPACE / "app.py"]
    while waiting:
        new = imports_of_ours(waiting.pop()) - needed
        needed |= new
        waiting += [PACKAGE / file for file in new]
    listed = {Path(line) for line in (SPACE / "modules.txt").read_text().split()}
    assert listed - needed == {Path("chat_template.jinja")}  # read by tokenizer.py
    assert needed - listed == set()


def test_the_upload_runs_by_itself(tiny_model, tiny_tokenizer, tmp_path):
    """Its own files and the listed ones, in a folder of their own, started as the Hub starts a Space."""
    model_folder, space = tmp_path / "model", tmp_path / "space"
    tiny_model.save_pretrained(model_folder)
    tiny_tokenizer.save_pretrained(model_folder)
    shutil.copytree(SPACE, space, ignore=shutil.ignore_patterns("__pycache__"))
    for line in (SPACE / "modules.txt").read_text().split():
        (space / "nanochat_hf" / line).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / line, space / "nanochat_hf" / line)
    with open(space / "nanochat_hf" / "__init__.py", "a") as file:
        file.write("\nprint('this is the copy', flush=True)\n")
    port = free_port()
    environment = os.environ | {"MODEL_ID": str(model_folder), "GRADIO_SERVER_PORT": str(port)}
    log = tmp_path / "log"
    with open(log, "w") as output:
        server = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 300
        while "Running on local URL" not in log.read_text():
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        assert "this is the copy" in log.read_text()
        client = Client(f"http://127.0.0.1:{port}", verbose=False)
        first, second = (client.predict("Hello", 1.0, 50, 8, 7) for _ in range(2))
        assert first and first != second  # a second turn, seeded alike but further on
        upload = httpx.post(f"http://127.0.0.1:{port}/gradio_api/upload", files={"files": ("x", b"x" * 2000)})
        assert upload.status_code == 413
        assert "Hello" not in log.read_text()
    finally:
        server.terminate()
        server.wait(20)
