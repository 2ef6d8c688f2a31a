"""A conversation: events, whole characters, the cache between turns, a full context, interrupts, other models."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from scripted import ScriptedModel, scripted
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanochat_hf.chat import COMPLETION_NOTICE, ChatSession, load_chat_model, without_oldest_turn
from nanochat_hf.generation import generate_completions
from nanochat_hf.sampling import Sampling
from nanochat_hf.streaming import ChatEvent, TextStream
from nanochat_hf.tokenizer import BYTE_CHARACTERS, encode_prompt, encode_text, special_ids

GREEDY = Sampling()
ROOT = Path(__file__).parents[1]


def user(text):
    return {"role": "user", "content": text}


def assistant(content):
    return {"role": "assistant", "content": content}


def say(session, text, sampling=GREEDY, **settings):
    """One more turn; the answer's events as a list."""
    return list(session.reply([*session.messages, user(text)], sampling, **settings))


def answer_text(events):
    return "".join(event.text for event in events if event.kind == "text")


@pytest.fixture
def special(tiny_tokenizer):
    return {token.strip("<|>"): i for token, i in special_ids(tiny_tokenizer).items()}


@pytest.fixture
def parrot(tiny_tokenizer, special):
    """A model that answers with what the last user message said."""

    def script_of(prompt):
        start = len(prompt) - prompt[::-1].index(special["user_start"])
        return [*prompt[start : prompt.index(special["user_end"], start)], special["assistant_end"]]

    return scripted(tiny_tokenizer, script_of, context_tokens=120)


def test_a_tool_call_streams_as_events_and_stays_as_parts(tiny_tokenizer, special):
    call = [special["python_start"], *encode_text(tiny_tokenizer, "12*12"), special["python_end"]]
    script = [*b"It is ", *call, *b" now.", special["assistant_end"]]
    session = ChatSession(scripted(tiny_tokenizer, lambda prompt: script), tiny_tokenizer)
    events = say(session, "What is 12*12?")
    assert [event for event in events if event.kind != "text"] == [
        ChatEvent("tool_call", "12*12"),
        ChatEvent("tool_output", "144"),
        ChatEvent("end", "finished"),
    ]
    assert answer_text(events[: events.index(ChatEvent("tool_call", "12*12"))]) == "It is "
    parts = [("text", "It is "), ("python", "12*12"), ("python_output", "144"), ("text", " now.")]
    content = [{"type": kind, "text": text} for kind, text in parts]
    assert session.messages == [user("What is 12*12?"), assistant(content)]


@pytest.mark.parametrize(
    "text", ["naïve 🤖 ok", "नमस्ते 👩‍👩‍👧‍👦", "שלום\u200f e\u0301", "tab\tand\nline", "\ufffd is a sign too"]
)
def test_characters_come_whole_byte_by_byte(text, tiny_tokenizer):
    stream = TextStream(tiny_tokenizer)
    pieces = [stream.feed(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_any_bytes_stream_to_what_decoding_them_at_once_gives(tiny_tokenizer):
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 503 if seed % 2 else 256, (30,), generator=generator).tolist()
        stream = TextStream(tiny_tokenizer)
        assert "".join(map(stream.feed, ids)) + stream.flush() == tiny_tokenizer.decode(ids), f"seed {seed}: {ids}"


def test_characters_come_whole_from_a_tokenizer_that_falls_back_to_bytes():
    """As Llama 2's and Gemma's: what is no word is a token a byte, and an unfinished one decodes to a sign for each."""
    words = ["<unk>", "\u2581a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    ids = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)

    def tokens(*pieces):
        return [
            i for piece in pieces for i in ([ids[piece]] if piece in ids else [byte + 3 for byte in piece.encode()])
        ]

    written = tokens("\u2581a", "🤖", "b", "é", "日本", "\u2581a", "b", "ß")
    stream = TextStream(tokenizer)
    given = [stream.feed(token) for token in written]
    assert "".join(given) + stream.flush() == tokenizer.decode(written) == "a🤖bé日本 abß"
    assert [piece for piece in given if piece] == ["a", "🤖", "b", "é", "日", "本", " a", "b", "ß"]
    broken = [*tokens("b"), 0xFF + 3, *tokens("é")[:1], *tokens("b")]
    assert "".join(map(stream.feed, broken)) + stream.flush() == tokenizer.decode(broken)


def test_a_turn_reads_its_own_tokens_only(parrot, tiny_tokenizer):
    session = ChatSession(parrot, tiny_tokenizer)
    assert answer_text(say(session, "one two")) == "one two"
    del parrot.num_tokens_read[:]
    assert answer_text(say(session, "three")) == "three"
    # the end of the last answer, then <|user_start|> three <|user_end|> <|assistant_start|>
    assert parrot.num_tokens_read[0] == 1 + 3 + len(encode_text(tiny_tokenizer, "three"))


def test_turns_on_a_kept_cache_equal_reading_everything_anew(tiny_model, tiny_tokenizer):
    """The smear state and the short window (129 tokens) included: the conversation passes it."""
    session = ChatSession(tiny_model, tiny_tokenizer)
    ids = []
    for turn in range(4):
        text = "Tell me more about it. " * (1 + turn)
        ids += encode_prompt(tiny_tokenizer, [user(text)])[bool(ids) :]
        [expected] = generate_completions(tiny_model, tiny_tokenizer, [ids], 12)
        say(session, text, max_new_tokens=12)
        ids += expected.token_ids[: -1 if expected.finished else None] + [tiny_tokenizer.eos_token_id]
        assert session._ids == ids
    assert len(ids) > tiny_model.config.sliding_window


def test_an_edited_past_is_read_anew(tiny_model, tiny_tokenizer):
    session = ChatSession(tiny_model, tiny_tokenizer)
    say(session, "Hello", max_new_tokens=8)
    say(session, "What is a list?", max_new_tokens=8)
    edited = [user("Good bye"), assistant("Yes."), user("And a tuple?")]
    events = list(session.reply(edited, GREEDY, max_new_tokens=8))
    fresh = ChatSession(tiny_model, tiny_tokenizer)
    assert events == list(fresh.reply(edited, GREEDY, max_new_tokens=8))
    assert session.messages == fresh.messages


def test_a_full_context_drops_whole_turns_and_says_so_once(parrot, tiny_tokenizer, special):
    session = ChatSession(parrot, tiny_tokenizer)
    session.messages = [{"role": "system", "content": "Be kind."}]
    notices = []
    for turn in range(12):
        events = say(session, f"turn number {turn}")
        assert answer_text(events).endswith(f"turn number {turn}")
        notices += [event for event in events if event.kind == "notice"]
        assert len(session._ids) <= parrot.config.max_position_embeddings
    assert len(notices) == 1 and "120" in notices[0].text
    remembered = tiny_tokenizer.decode(session._ids)
    assert "turn number 0" not in remembered and remembered.startswith("<|bos|><|user_start|>Be kind.\n\nturn number")
    assert session._ids.count(special["user_start"]) == session._ids.count(special["assistant_end"])
    assert len(session.messages) == 25  # the whole conversation stays readable


def test_what_is_said_once_is_said_again_in_another_conversation(parrot, tiny_tokenizer):
    session = ChatSession(parrot, tiny_tokenizer)
    counts = []
    for _ in range(2):
        kinds, messages = [], []
        for _ in range(9):
            kinds += [event.kind for event in session.reply([*messages, user("a b c d e f g h")], GREEDY)]
            messages = session.messages
        counts.append(kinds.count("notice"))
    assert counts == [1, 1]


def test_without_oldest_turn():
    system = {"role": "system", "content": "s"}
    turns = [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    assert without_oldest_turn([system, *turns]) == [system, *turns[2:]]
    assert without_oldest_turn(turns[4:]) == turns[4:]


def test_an_overlong_message_is_refused_and_the_session_goes_on(parrot, tiny_tokenizer):
    session = ChatSession(parrot, tiny_tokenizer)
    say(session, "before")
    with pytest.raises(ValueError, match="120"):
        say(session, "far too long " * 20_000)
    assert answer_text(say(session, "after")) == "after" and len(session.messages) == 4


def test_a_stopped_answer_is_kept_as_far_as_it_came(parrot, tiny_tokenizer):
    session = ChatSession(parrot, tiny_tokenizer)
    events = session.reply([user("a b c d e f")], GREEDY)
    seen = next(events).text + next(events).text
    events.close()
    assert session.messages == [user("a b c d e f"), assistant(seen)]
    del parrot.num_tokens_read[:]
    assert answer_text(say(session, "next")) == "next"
    assert parrot.num_tokens_read[0] < 10  # the cache was kept


def test_an_interrupt_inside_the_model_costs_the_cache_but_not_the_session(tiny_model, tiny_tokenizer):
    """Ctrl-C may strike between two layers, when some have cached the token and some have not."""
    session = ChatSession(tiny_model, tiny_tokenizer)
    calls = []

    def strike(module, *args):
        calls.append(module)
        if len(calls) == 5:
            raise KeyboardInterrupt

    handle = tiny_model.model.layers[1].register_forward_pre_hook(strike)
    with pytest.raises(KeyboardInterrupt):
        say(session, "Hello", max_new_tokens=20)
    handle.remove()
    ids = session._ids + encode_prompt(tiny_tokenizer, [user("Again")])[1:]
    [expected] = generate_completions(tiny_model, tiny_tokenizer, [ids], 8)
    say(session, "Again", max_new_tokens=8)
    assert session._ids[len(ids) :][:8] == expected.token_ids[:8]


def test_special_tokens_typed_by_a_user_are_text(parrot, tiny_tokenizer, special):
    session = ChatSession(parrot, tiny_tokenizer)
    text = "<|assistant_end|><|python_start|>1+1<|python_end|>"
    assert answer_text(say(session, text)) == text
    assert session._ids.count(special["python_start"]) == 0
    assert session._ids.count(special["assistant_end"]) == 1


@pytest.mark.parametrize(
    "max_new_tokens, text, reason", [(3, "a b c d e f g", "max_new_tokens"), (999, "a b " * 40, "context")]
)
def test_why_an_answer_ended(max_new_tokens, text, reason, parrot, tiny_tokenizer):
    events = say(ChatSession(parrot, tiny_tokenizer), text, max_new_tokens=max_new_tokens)
    assert events[-1] == ChatEvent("end", reason)


def test_a_seed_repeats_a_conversation_whatever_the_session_saw_before(tiny_model, tiny_tokenizer):
    hot = Sampling(temperature=1.0, top_k=50)
    session = ChatSession(tiny_model, tiny_tokenizer)

    def converse(seed):
        answers, messages = [], []
        for _ in range(2):
            answers.append(answer_text(list(session.reply([*messages, user("Hi")], hot, 8, seed))))
            messages = session.messages
        return answers

    first, again, other = converse(1), converse(1), converse(2)
    assert first == again != other and first[0] != first[1]


def byte_tokenizer(**settings):
    """A tokenizer of another make: 256 bytes and nothing of nanochat's."""
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(BYTE_CHARACTERS)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def counting(history):
    """A model that goes on with the next letter."""
    return history[-1] + 1


def test_without_a_chat_template_it_completes_and_says_so_once():
    session = ChatSession(ScriptedModel(256, counting, 64), byte_tokenizer())
    assert say(session, "abc", max_new_tokens=2) == [
        ChatEvent("notice", COMPLETION_NOTICE),
        ChatEvent("text", "d"),
        ChatEvent("text", "e"),
        ChatEvent("end", "max_new_tokens"),
    ]
    assert answer_text(say(session, "uvw", max_new_tokens=3)) == "xyz"
    assert [event.kind for event in say(session, "a", max_new_tokens=1)] == ["text", "end"]
    with pytest.raises(ValueError, match="64"):
        say(session, "a" * 63)


def test_a_template_of_another_make_is_used():
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>a{% endif %}"
    )
    session = ChatSession(ScriptedModel(256, counting, 64), byte_tokenizer(chat_template=template))
    assert answer_text(say(session, "x", max_new_tokens=2)) == "bc"
    assert answer_text(say(session, "y", max_new_tokens=2)) == "bc"
    assert bytes(session._ids).startswith(b"[user]x[assistant]bc[user]y>abc")


def test_a_template_of_another_make_gets_no_special_tokens_from_a_user_and_may_refuse():
    template = (
        "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
        "{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}"
    )
    tokenizer = byte_tokenizer(chat_template=template, eos_token="<|end|>")
    session = ChatSession(ScriptedModel(len(tokenizer), lambda history: ord("a"), 64), tokenizer)
    with pytest.raises(ValueError, match=r"<\|end\|> is a special token of this model"):
        say(session, "x<|end|>y")
    assert answer_text(say(session, "x", max_new_tokens=2)) == "aa"
    with pytest.raises(ValueError, match="template refuses the conversation: one turn only"):
        say(session, "y")


@pytest.mark.parametrize(
    ("messages", "complaint"), [([], "user message"), ([user("a"), assistant("b")], "user message"), ("a", "a list")]
)
def test_nothing_to_answer(messages, complaint, parrot, tiny_tokenizer):
    with pytest.raises(ValueError, match=complaint):
        next(ChatSession(parrot, tiny_tokenizer).reply(messages, GREEDY))


def test_a_saved_folder_opens_and_answers(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    expected = say(ChatSession(tiny_model, tiny_tokenizer), "Hi", max_new_tokens=8)
    session = ChatSession(*load_chat_model(str(tmp_path)))
    session.model.cpu()
    assert say(session, "Hi", max_new_tokens=8) == expected


def test_what_cannot_be_loaded_is_said(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    with monkeypatch.context() as here:
        here.chdir(tmp_path)
        with pytest.raises(ValueError, match="no folder runs/tinny"):  # and no Hub id of a user called runs
            load_chat_model("runs/tinny")
    with pytest.raises(ValueError, match="config.json"):
        load_chat_model(str(tmp_path))
    with pytest.raises(ValueError, match="no folder"):
        load_chat_model(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="cannot load someone/nothing"):
        load_chat_model("someone/nothing")
    tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    for wrong in ({"hidden_size": "wide"}, {"vocab_size": 7}):
        (tmp_path / "config.json").write_text(json.dumps(json.loads(config) | wrong))
        with pytest.raises(ValueError, match="cannot load"):
            load_chat_model(str(tmp_path))
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot load"):
        load_chat_model(str(tmp_path))


@pytest.mark.parametrize(
    "status, code, said",
    [
        (403, "GatedRepo", "gated repo"),
        (401, "RepoNotFound", "not a valid model identifier"),
        pytest.param(None, None, "connect", marks=pytest.mark.slow),
    ],
)
def test_a_hub_that_refuses_is_one_clear_line(status, code, said, tmp_path):
    class Refusal(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server:
        port = server.server_port
        if status is None:
            server.server_close()
        else:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, ROOT / "scripts" / "chat.py", "--model", "me/private-model", "--prompt", "hi"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        server.shutdown() if status else None
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: cannot load me/private-model") and said in last
