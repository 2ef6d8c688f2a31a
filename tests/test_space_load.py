"""The Space under load: many conversations at once over HTTP, every answer checked against its own seed.

python -m pytest tests/test_space_load.py -m slow -s      # fifty conversations for two minutes, with the figures
"""

import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import psutil
import pytest

pytest.importorskip("gradio", reason="the extra `space` is not installed")
from gradio_client import Client  # noqa: E402
from gradio_client.utils import QueueError  # noqa: E402
from test_space import free_port, texts  # noqa: E402

import nanochat_hf.space.app as app  # noqa: E402
from nanochat_hf.chat import ChatSession, load_chat_model  # noqa: E402
from nanochat_hf.chat_service import messages_of  # noqa: E402
from nanochat_hf.sampling import Sampling  # noqa: E402

NEW_TOKENS, TURNS = 24, 4
WORDS = ["who", "what", "seven", "river", "strawberry", "é", "שלום", "<|bos|>", "6*7", "**bold**", "<b>x</b>"]


@pytest.fixture
def server(tiny_model, tiny_tokenizer, tmp_path):
    """The app in a process of its own, with a model that says something else to everyone: its url, process, model."""
    folder, port, log = tmp_path / "model", free_port(), tmp_path / "log"
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    environment = os.environ | {
        "MODEL_ID": str(folder),
        "GRADIO_SERVER_PORT": str(port),
        "MESSAGES_PER_MINUTE": "1000000",
    }
    with open(log, "w") as output:
        process = subprocess.Popen([sys.executable, app.__file__], env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 300
        while "Running on local URL" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process, folder
        assert "Traceback" not in log.read_text(), log.read_text()[-2000:]
    finally:
        process.terminate()
        process.wait(20)


def converse(client, user, deadline):
    """Talk until the deadline; returns (history, message, seed, answer, seconds, updates) of every turn."""
    rng, turns, history = random.Random(user), [], []
    while time.monotonic() < deadline:
        if len(history) and len(turns) % TURNS == 0:
            client.predict("/clear", 1.0, 50, NEW_TOKENS, 0)
            history = []
        message = f"{user} {' '.join(rng.choices(WORDS, k=rng.randint(1, 6)))}"
        seed = rng.randrange(2**31)
        started = time.monotonic()
        job = client.submit(message, 1.0, 50, NEW_TOKENS, seed)
        answer = job.result(timeout=300)
        turns.append((list(history), message, seed, answer, time.monotonic() - started, job.outputs()))
        history += [{"role": "user", "content": message}, *answer]
    return turns


def pieces_of(answer):
    return [(piece["content"], (piece.get("metadata") or {}).get("log")) for piece in answer]


def answer_alone(session, history, message, seed):
    """What the model says to this conversation with this seed, when nobody else is there."""
    shown = []
    for event in session.reply(messages_of(history, message), Sampling(1.0, 50), NEW_TOKENS, seed):
        app.show(shown, event)
    return [(piece.content, piece.metadata.get("log")) for piece in shown]


def check_turns(turns, model, tokenizer):
    """Every answer is its seed's own: the kept session's, or a new one's where the server had put that away.

    The two differ where a text, encoded anew, is cut into other tokens than the model wrote.
    """
    sessions = []
    for history, message, seed, answer, _, updates in turns:
        candidates = [*sessions, ChatSession(model, tokenizer)]
        sessions = [one for one in candidates if answer_alone(one, history, message, seed) == pieces_of(answer)]
        assert sessions, (message, seed, answer)
        streamed = ["".join(texts(update)) for update in updates]
        assert all("".join(texts(answer)).startswith(text) for text in streamed), (message, streamed)


@pytest.mark.parametrize("users, seconds", [(6, 3), pytest.param(50, 120, marks=pytest.mark.slow)])
def test_many_conversations_at_once(users, seconds, server):
    """No answer is lost or another's; memory is flat; past the queue's limit it refuses, and goes on."""
    url, process, folder = server
    memory, resident = [], psutil.Process(process.pid).memory_info
    with ThreadPoolExecutor(users + 1) as pool:
        clients = list(pool.map(lambda _: Client(url, verbose=False), range(users)))
        deadline = time.monotonic() + seconds
        running = [pool.submit(converse, client, user, deadline) for user, client in enumerate(clients)]
        while time.monotonic() < deadline:
            memory.append(resident().rss / 2**20)
            time.sleep(min(1.0, seconds / 20))
        turns = [turn for future in running for turn in future.result()]

    model, tokenizer = load_chat_model(str(folder))
    for future in running:
        check_turns(future.result(), model, tokenizer)

    burst = app.MAX_QUEUED_ANSWERS + app.NUM_CONCURRENT_ANSWERS + 60
    jobs = [clients[i % users].submit(f"burst {i}", 1.0, 50, NEW_TOKENS, i) for i in range(burst)]
    outcomes = [job.exception(timeout=300) for job in jobs]
    refused = [error for error in outcomes if error is not None]
    assert refused and not [repr(error) for error in refused if not isinstance(error, QueueError)]
    clients[0].predict("/clear", 1.0, 50, NEW_TOKENS, 0)
    after = clients[0].predict("still there", 1.0, 50, NEW_TOKENS, 3)
    assert pieces_of(after) == answer_alone(ChatSession(model, tokenizer), [], "still there", 3)

    late = memory[len(memory) // 4 :]  # the first quarter fills caches and pools
    half = len(late) // 2
    growth = median(late[half:]) - median(late[:half])
    waited = sorted(seconds for *_, seconds, _ in turns)
    print(
        f"\n{users} conversations, {seconds} s: {len(turns)} answers, all as their seeds say; "
        f"median {median(waited):.2f} s, longest {waited[-1]:.2f} s; "
        f"memory {median(late):.0f} MiB, second half {growth:+.1f} MiB; "
        f"a burst of {burst}: {burst - len(refused)} answered, {len(refused)} refused ({next(iter(refused), '')})"
    )
    assert len(turns) >= users
    if seconds >= 60:
        assert growth < 0.03 * median(late)
