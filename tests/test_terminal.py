"""The chat in a terminal: commands, several lines, Ctrl-C, one answer from --prompt or a pipe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scripted import scripted

from nanochat_hf import terminal
from nanochat_hf.configs import ChatConfig
from nanochat_hf.terminal import Terminal, chat, printable
from nanochat_hf.tokenizer import encode_text, special_ids


@pytest.fixture
def model(tiny_tokenizer):
    """Answers every message by a calculator call."""
    special = special_ids(tiny_tokenizer)
    call = [special["<|python_start|>"], *b"6*7", special["<|python_end|>"]]
    script = [*encode_text(tiny_tokenizer, "It is "), *call, *b" sure.", special["<|assistant_end|>"]]
    return scripted(tiny_tokenizer, lambda prompt: script)


@pytest.fixture
def typed(model, tiny_tokenizer, monkeypatch, capsys):
    """A function that types lines into a terminal (an exception is a key like Ctrl-C) and returns what it shows."""

    def type_lines(*lines, **settings):
        monkeypatch.setattr(terminal, "load_chat_model", lambda name: (model, tiny_tokenizer))
        keys = iter([*lines, EOFError()])

        def read(prompt):
            key = next(keys)
            if isinstance(key, BaseException):
                raise key
            return key

        monkeypatch.setattr("builtins.input", read)
        type_lines.terminal = Terminal(ChatConfig(**settings))
        type_lines.terminal.converse()
        return capsys.readouterr().out

    return type_lines


def test_an_answer_shows_its_calculation(typed):
    assert "It is <<6*7=42>> sure.\n" in typed("What is 6*7?")
    assert [m["role"] for m in typed.terminal.session.messages] == ["user", "assistant"]


def test_commands_change_the_settings_and_say_so(typed):
    shown = typed("/temperature 0.2", "/topk 1234567", "/topk", "/topk 7", "/temperature", "/topk 0")
    assert "top_k = 1234567" in shown and "top_k is 1234567" in shown
    assert "temperature = 0.2" in shown and "top_k = 7" in shown and "temperature is 0.2" in shown
    assert typed.terminal.sampling.temperature == 0.2 and typed.terminal.sampling.top_k is None


def test_wrong_commands_explain_themselves_and_change_nothing(typed):
    shown = typed("/temperature hot", "/temperature -1", "/topk 1.5", "/tempreature 1", "/temp 1")
    assert shown.count("stays") == 3 and shown.count("did you mean /temperature?") == 2
    assert "'hot' is not a number" in shown and "'1.5' is not a whole number" in shown
    assert typed.terminal.sampling == terminal.sampling_of(ChatConfig())


def test_help_names_every_command(typed):
    shown = typed("/help")
    assert all(f"  {name}" in shown for name in ("/temperature", "/topk", "/clear", "/save", "/help", "/exit"))


def test_clear_forgets_but_keeps_the_system_message(typed):
    typed("Hi", "/clear", system="Be kind.")
    assert typed.terminal.session.messages == [{"role": "system", "content": "Be kind."}]


def test_save_appends_lines_that_are_chat_data(typed, tmp_path):
    path = tmp_path / "talk.jsonl"
    shown = typed(f"/save {path}", "Hi", "/save", f"/save {path}", "Ho", f"/save {path}", f"/save {tmp_path}")
    assert "nothing to save yet" in shown and "needs a file name" in shown and "not saved" in shown
    saved = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert [len(messages) for messages in saved] == [2, 4]
    assert saved[0][1]["content"][1] == {"type": "python", "text": "6*7"}


def test_a_file_that_cannot_be_written_costs_nothing(typed, tmp_path):
    shown = typed("Hi", "/save ~nosuchuser/talk.jsonl", "/save a\0b", f"/save {tmp_path / 'talk.jsonl'}")
    assert shown.count("not saved") == 2 and "(saved: " in shown


def test_a_path_is_no_command_and_a_mistyped_command_no_message(typed):
    shown = typed("/etc/hosts is what?", "/top_p 0.9", "/Help", "/temperature=0.5", "/exit now", "never read")
    assert [m["content"] for m in typed.terminal.session.messages[::2]] == ["/etc/hosts is what?"]
    assert shown.count("did you mean") == 3


@pytest.mark.parametrize("key", [EOFError, KeyboardInterrupt])
def test_leaving_a_long_message_leaves_the_program_alone(typed, key):
    shown = typed('"""one', key(), "two")
    assert "(dropped)" in shown and [m["content"] for m in typed.terminal.session.messages[::2]] == ["two"]


def test_several_lines_are_one_message(typed):
    typed('"""def f(x):', "    return x", '"""', '"""one"""', "/exit", "never read")
    assert [m["content"] for m in typed.terminal.session.messages[::2]] == ["def f(x):\n    return x", "one"]


def test_what_is_quoted_is_no_command(typed):
    typed('"""/help"""', '"""', "/exit", '"""')
    assert [m["content"] for m in typed.terminal.session.messages[::2]] == ["/help", "/exit"]


def test_bytes_that_are_no_text_do_not_keep_a_conversation_from_being_saved(typed, tmp_path):
    shown = typed(b"caf\xff".decode(errors="surrogateescape"), f"/save {tmp_path / 'saved.jsonl'}")
    assert "(saved:" in shown and "caf\ufffd" in (tmp_path / "saved.jsonl").read_text(encoding="utf-8")


def test_ctrl_c_stops_the_answer_and_not_the_program(typed, model, monkeypatch):
    read = type(model).__call__

    def interrupted(self, *args, **kwargs):
        if len(model.batch_sizes) == 4:
            model.batch_sizes.append(0)
            raise KeyboardInterrupt
        return read(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "__call__", interrupted)
    shown = typed(KeyboardInterrupt(), "Hi", "Ho")
    assert "(Ctrl-D leaves)" in shown and "(stopped)" in shown
    assert shown.endswith("It is <<6*7=42>> sure.\n\n")
    assert len(typed.terminal.session.messages) == 4


def test_an_overlong_message_is_answered_by_its_reason(typed):
    assert "(the message is" in typed("word " * 9999, "Hi")
    assert "(system text and message together are" in typed("Hi", system="word " * 9999)
    assert "(max_new_tokens must be 1 or more, got -5)" in typed("Hi", max_new_tokens=-5)


def test_one_prompt_gives_the_bare_answer(model, tiny_tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(terminal, "load_chat_model", lambda name: (model, tiny_tokenizer))
    chat(ChatConfig(prompt="What is 6*7?"))
    assert capsys.readouterr().out == "It is <<6*7=42>> sure.\n"
    with pytest.raises(ValueError, match="nothing to answer"):
        chat(ChatConfig(prompt="  "))


def test_nobody_to_answer_to_is_no_error(typed, monkeypatch):
    typed()
    monkeypatch.setattr("sys.stdout", None)
    Terminal(ChatConfig()).answer_once("Hi")


def test_a_model_that_cannot_be_compiled_says_so(typed):
    with pytest.raises(ValueError, match="compiled decoding is for nanochat_hf models"):
        typed(compile=True)


@pytest.mark.slow
def test_a_compiled_model_answers_the_same(tiny_model, tiny_tokenizer, tmp_path, capsys):
    tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    answers = []
    for compiled in (False, True):
        chat(ChatConfig(model=str(tmp_path), prompt="Hi there", seed=1, max_new_tokens=40, compile=compiled))
        answers.append(capsys.readouterr())
    assert answers[0].out == answers[1].out and answers[0].out.strip()
    assert answers[1].err.startswith("(compiling)")


def test_control_characters_of_a_model_do_not_reach_the_terminal():
    assert printable("a\x1b]0;title\x07b\x9bc\td\né\u200f") == "a\ufffd]0;title\ufffdb\ufffdc\td\né\u200f"


def test_the_script_answers_piped_input(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    script = Path(terminal.__file__).parents[1] / "scripts" / "chat.py"
    command = [sys.executable, script, "--model", tmp_path, "--seed", "1", "--max_new_tokens", "8"]
    piped = subprocess.run(command, input="Hi there\n", capture_output=True, text=True)
    assert piped.returncode == 0 and piped.stdout.strip(), piped.stderr
    closed = subprocess.run(["bash", "-c", '"$@" <&-', "-", *map(str, command)], capture_output=True, text=True)
    assert closed.returncode == 2 and "nothing to answer" in closed.stderr.splitlines()[-1]
    failed = subprocess.run([*command, "--temperature=-1"], input="Hi", capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith("error: temperature must be")
