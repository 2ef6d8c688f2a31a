"""The chat in a terminal: answers that stream, a prompt with history, Ctrl-C that stops an answer, not the program.

python scripts/chat.py --model runs/tiny/rl                  # type /help in it
python scripts/chat.py --model runs/tiny/rl --prompt "What is 12*12?"
cat question.txt | python scripts/chat.py --model runs/tiny/rl
"""

import json
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace

import transformers

from .chat import ChatSession, load_chat_model
from .chat_service import COMMAND
from .configs import ChatConfig
from .decode_compiled import compile_decoding
from .recipe import nearest
from .sampling import Sampling

HELP = '''\
  /temperature X   0 = always the likeliest token (now {temperature:g})
  /topk K          draw from the K likeliest tokens, 0 = from all (now {top_k})
  /clear           forget the conversation
  /save FILE       append the conversation to FILE as one line of JSON (`messages`, readable as chat_data)
  /help            this text
  /exit            leave; Ctrl-D does too
  """              begins and ends a message of several lines
  Ctrl-C           stops the answer'''
TRIPLE = '"""'


def chat(config: ChatConfig) -> None:
    """Talk with a model: one answer for `prompt` or piped input, else a conversation until Ctrl-D.

    Raises:
        ValueError: a model that cannot be loaded, a setting outside its range, an empty or overlong prompt.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    terminal = Terminal(config)
    if config.prompt is None and sys.stdin is not None and sys.stdin.isatty():
        terminal.converse()
    else:
        piped = "" if config.prompt is not None or sys.stdin is None else sys.stdin.read()
        terminal.answer_once(piped if config.prompt is None else config.prompt)


@dataclass
class Terminal:
    """A session and the settings that commands change."""

    config: ChatConfig

    def __post_init__(self):
        self.sampling = sampling_of(self.config)
        self.seed = secrets.randbits(32) if self.config.seed is None else self.config.seed
        self.model, self.tokenizer = load_chat_model(self.config.model)
        if self.config.compile:
            print("(compiling)", file=sys.stderr, flush=True)
            compile_decoding(self.model, batch_sizes=[1])
        is_terminal = sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        has_styles = is_terminal and not os.environ.get("NO_COLOR")
        self.dim, self.plain = ("\033[2m", "\033[0m") if has_styles else ("", "")
        self.clear()

    def clear(self) -> None:
        self.session = ChatSession(self.model, self.tokenizer)
        if self.config.system:
            self.session.messages = [{"role": "system", "content": self.config.system}]

    def answer_once(self, text: str) -> None:
        """Answer one message, the answer alone on standard output."""
        if not text.strip():
            raise ValueError("nothing to answer: give --prompt some text, or pipe some into standard input")
        self.answer(text.strip("\n"))

    def converse(self) -> None:
        """Read, answer, repeat."""
        with suppress(ImportError):  # arrow keys and line history for input(); Windows has its own
            import readline

            readline.parse_and_bind("set enable-bracketed-paste on")  # several pasted lines are one message
        print(f"{self.config.model}: type a message, /help for commands, Ctrl-D to leave")
        while True:
            try:
                text, is_quoted = read_message()
            except KeyboardInterrupt:
                print("\n(Ctrl-D leaves)")
                continue
            except EOFError:
                print()
                return
            if not is_quoted and text.split()[:1] in (["/exit"], ["/quit"]):
                return
            if not is_quoted and COMMAND.fullmatch(text.strip()):
                print(self.run_command(text))
            elif text.strip():
                try:
                    self.answer(text)
                except KeyboardInterrupt:
                    print(f"{self.plain}\n(stopped)")
                except ValueError as error:
                    print(f"({error})")

    def answer(self, text: str) -> None:
        """Print an answer as it comes; a calculator call shows as GSM8K writes it, <<12*12=144>>."""
        messages = [*self.session.messages, {"role": "user", "content": text}]
        call = None
        with closing(self.session.reply(messages, self.sampling, self.config.max_new_tokens, self.seed)) as events:
            for event in events:
                if event.kind == "tool_call":
                    call = event.text
                    continue
                if call is not None:
                    result = f"={event.text}" if event.kind == "tool_output" else ""
                    self._show(f"{self.dim}<<{printable(call)}{printable(result)}>>{self.plain}")
                    call = None
                if event.kind == "text":
                    self._show(printable(event.text))
                elif event.kind == "notice":
                    print(f"({event.text})", file=sys.stderr, flush=True)
                elif event.kind == "end":
                    self._show("\n")
                    if event.text != "finished":
                        limit = {"context": "the model's context is full", "max_new_tokens": "--max_new_tokens reached"}
                        print(f"(cut: {limit[event.text]})", file=sys.stderr, flush=True)

    def _show(self, text: str) -> None:
        print(text, end="", flush=True)

    def run_command(self, line: str) -> str:
        """Run a /command; returns what to print."""
        name, _, argument = line.strip().partition(" ")
        commands: dict[str, Callable[[str], str]] = {
            "/temperature": lambda value: self._set("temperature", float, value),
            "/topk": lambda value: self._set("top_k", int, value),
            "/clear": lambda _: self.clear() or "(forgotten)",
            "/save": self._save,
            "/help": lambda _: HELP.format(temperature=self.sampling.temperature, top_k=self.sampling.top_k or 0),
        }
        if name not in commands:
            return f"(no command {name}; did you mean {nearest(name, [*commands, '/exit'])}? /help lists them all)"
        return commands[name](argument.strip())

    def _set(self, name: str, number: type, value: str) -> str:
        now = shown(getattr(self.sampling, name) or 0)
        if not value:
            return f"({name} is {now})"
        try:
            chosen = number(value)
        except ValueError:
            return f"({name} stays {now}: {value!r} is not {'a whole number' if number is int else 'a number'})"
        try:
            self.sampling = replace(self.sampling, **{name: (chosen or None) if name == "top_k" else chosen})
        except ValueError as error:
            return f"({name} stays {now}: {error})"
        return f"({name} = {shown(chosen)})"

    def _save(self, name: str) -> str:
        if not name:
            return "(/save needs a file name: /save conversation.jsonl)"
        if not any(message["role"] == "assistant" for message in self.session.messages):
            return "(nothing to save yet)"
        try:
            line = (json.dumps({"messages": self.session.messages}, ensure_ascii=False) + "\n").encode()
            path = os.path.expanduser(name)
            with open(path, "ab") as file:
                file.write(line)
        except (OSError, ValueError) as error:  # the latter for a character that cannot be written
            return f"(not saved: {error})"
        return f"(saved: {path}, {len(self.session.messages)} messages)"


def sampling_of(config: ChatConfig) -> Sampling:
    """The settings that decide the next token; a top_k of 0 means all tokens."""
    return Sampling(config.temperature, config.top_k or None, config.top_p, config.repetition_penalty)


def shown(number: float) -> str:
    """A setting as it was typed: a whole number with all its digits."""
    return f"{number:g}" if isinstance(number, float) else str(number)


def read_message() -> tuple[str, bool]:
    """A line, or the lines between two triple quotes; and whether it was quoted, which makes it no command."""
    line = input("> ")
    if not line.lstrip().startswith(TRIPLE):
        return valid(line), False
    text = line.lstrip()[len(TRIPLE) :]
    while not text.rstrip().endswith(TRIPLE):
        try:
            text += "\n" + input(". ")
        except (EOFError, KeyboardInterrupt):
            print("\n(dropped)")
            return "", True
    return valid(text.rstrip()[: -len(TRIPLE)].strip("\n")), True


def valid(text: str) -> str:
    """Text without the surrogates that Python reads for bytes that are no UTF-8."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def printable(text: str) -> str:
    """Text without control characters (a model could otherwise move the cursor or retitle the window)."""
    return "".join(
        c if c >= " " and c != "\x7f" and not "\x80" <= c < "\xa0" or c in "\n\t" else "\ufffd" for c in text
    )
