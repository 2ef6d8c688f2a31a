"""A conversation with a model: messages in, a stream of events out.

The key/value cache stays between the turns of one conversation, so a turn costs its own tokens only; history that was
edited, or cut because the context is full, is read anew. A message is encoded piece by piece: special tokens that a
user types are ordinary text; under another make's chat template, which joins the pieces first, they are refused.

    session = ChatSession(*load_chat_model("runs/tiny/rl"))
    for event in session.reply([{"role": "user", "content": "What is 12*12?"}], Sampling(temperature=0.6, top_k=50)):
        print(event.kind, event.text)
"""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .generation import Row, TurnTokens, decode, special_token_id
from .kv_cache import growing_cache
from .sampling import Sampling, row_uniforms
from .streaming import AnswerStream, ChatEvent
from .tokenizer import encode_prompt, encode_text

COMPLETION_NOTICE = "this model has no chat template: it continues your text instead of answering, one text at a time"
DROPPED_NOTICE = "the conversation has outgrown the model's {tokens:,} tokens: from now on it forgets the oldest turns"


class ChatSession:
    """One conversation: its messages, and the cache of what the model has read of them.

    Attributes:
        messages: the conversation so far, the last answer included; an answer cut short is kept as far as it came.
        context_tokens: the model's training length; prompt and answer together stay within it.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.turn = TurnTokens(tokenizer)
        self.context_tokens = model.config.max_position_embeddings
        ours = all(special_token_id(tokenizer, f"<|{name}|>") is not None for name in ("bos", "assistant_start"))
        self.format = "nanochat" if ours else "template" if tokenizer.chat_template else "completion"
        self.messages: list[dict] = []
        self._ids: list[int] = []  # the messages as the model read and wrote them
        self._cache = None  # of the first tokens of _ids
        self._notices_given: set[str] = set()

    def reply(
        self, messages: list[dict], sampling: Sampling, max_new_tokens: int = 512, seed: int = 0
    ) -> Iterator[ChatEvent]:
        """Answer the last message; closing the iterator stops the answer and leaves the session usable.

        Args:
            messages: the whole conversation, [{"role", "content"}], a user message last: usually
                `session.messages` and one more, but any other (a retry, an edited past) is as good.
            max_new_tokens: limit of the answer, tool output included.
            seed: together with the number of answers in `messages` it decides the draws.

        Raises:
            ValueError: a text instead of messages, no user message at the end, one longer than the model's context, or
                one that the model's own chat template refuses or would mistake for its special tokens.
        """
        if isinstance(messages, str):
            raise ValueError('messages are a list: [{"role": "user", "content": "..."}], not a text')
        if sum(message["role"] != "system" for message in messages) == 1:  # another conversation begins
            self._notices_given.clear()
        ids, notices = self._encode(messages, max_new_tokens)
        for notice in notices:
            self._notices_given.add(notice)
            yield ChatEvent("notice", notice)
        cache = self._reusable_cache(ids)
        num_tokens = min(max_new_tokens, self.context_tokens - len(ids))
        num_answers = sum(message["role"] == "assistant" for message in messages)
        uniforms = row_uniforms(seed, [num_answers], num_tokens) if sampling.temperature else None
        row = Row(ids, self.turn, use_calculator=self.format == "nanochat")
        answer = AnswerStream(self.tokenizer, self.turn)
        intact = False  # whether the cache is whole: not when an interrupt hits the model between two layers
        try:
            with closing(decode([row], self.model, sampling, uniforms, num_tokens, cache)) as steps:
                for _ in steps:
                    for event in answer.feed(row.completion.token_ids[-1]):
                        intact = True
                        yield event
                        intact = False
            intact = True
            yield from answer.close()
        finally:
            self._remember(messages, row, answer, cache if intact else None)
        limit = "max_new_tokens" if num_tokens == max_new_tokens else "context"
        yield ChatEvent("end", "finished" if row.completion.finished else limit)

    def _encode(self, messages: list[dict], max_new_tokens: int) -> tuple[list[int], list[str]]:
        """The conversation as token ids that leave room for an answer, and notices not given before."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("a conversation must end with a user message to be answered")
        room = self.context_tokens - min(max_new_tokens, self.context_tokens // 4)
        notices = []
        if self.format == "completion":
            bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
            ids = bos + encode_text(self.tokenizer, messages[-1]["content"])
            notices.append(COMPLETION_NOTICE)
        elif self.format == "nanochat" and self._ids and messages[:-1] == self.messages:
            # The past as it is in the cache, token for token (encoding its text anew may cut words differently).
            ids = self._ids + encode_prompt(self.tokenizer, messages[-1:])[1:]
        else:
            ids = self._render(messages)
        if len(ids) > room and self.format != "completion":
            while len(ids) > room and len(shorter := without_oldest_turn(messages)) < len(messages):
                messages = shorter
                ids = self._render(messages)
            notices.append(DROPPED_NOTICE.format(tokens=self.context_tokens))
        if len(ids) > room:
            what = "system text and message together are" if messages[0]["role"] == "system" else "the message is"
            raise ValueError(
                f"{what} {len(ids):,} tokens long; this model reads {self.context_tokens:,}, of which {room:,} for the "
                f"question: shorten it by about {len(ids) - room:,} tokens"
            )
        return ids, [notice for notice in notices if notice not in self._notices_given]

    def _render(self, messages: list[dict]) -> list[int]:
        if self.format == "nanochat":
            return encode_prompt(self.tokenizer, messages)
        for message in messages:
            for token in self.tokenizer.all_special_tokens:
                if message["role"] != "assistant" and token in message["content"]:
                    raise ValueError(
                        f"{token} is a special token of this model, which it would take for one: leave it out"
                    )
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            raise ValueError(f"this model's chat template refuses the conversation: {error}") from error

    def _reusable_cache(self, ids: list[int]):
        """The last turn's cache if it holds the beginning of `ids`, else an empty one."""
        cache, self._cache = self._cache, None
        if cache is not None:
            num_cached = int(cache.get_seq_length())
            if num_cached < len(ids) and ids[:num_cached] == self._ids[:num_cached]:
                return cache
        return growing_cache(self.model.config)

    def _remember(self, messages: list[dict], row: Row, answer: AnswerStream, cache) -> None:
        written = row.completion.token_ids
        if not written:  # stopped before the first token
            return
        answer.close()
        self.messages = [*messages, {"role": "assistant", "content": answer.content}]
        if row.completion.finished:
            written = written[:-1]
        end = special_token_id(self.tokenizer, "<|assistant_end|>")
        self._ids = row.prompt + written + ([] if end is None else [end])
        self._cache = cache


def without_oldest_turn(messages: list[dict]) -> list[dict]:
    """The conversation without its first user message and what answered it; a leading system message stays.

    A conversation of one turn is returned as it is.
    """
    start = 1 if messages[0]["role"] == "system" else 0
    users = [i for i in range(start, len(messages)) if messages[i]["role"] == "user"]
    return messages[:start] + messages[users[1] :] if len(users) > 1 else messages


def load_chat_model(name: str | os.PathLike) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a folder or the Hub, on the GPU if there is one.

    Raises:
        ValueError: no such folder, a folder that is no model, a Hub id that cannot be reached; the message says which.
    """
    name = os.fspath(name)
    folder = Path(os.path.expanduser(name))
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{name} is no model folder, it has no config.json; a run's models are its folders mid, sft and rl, and "
            f"base, which only continues text"
        )
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "/" in name and folder.parent.is_dir()
    if not folder.is_dir() and is_path:
        raise ValueError(f"no folder {name}; give a model folder (runs/tiny/rl) or a Hub id (user/name)")
    source = str(folder) if folder.is_dir() else name
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"cannot load {name}: {' '.join(str(error).split())}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer
