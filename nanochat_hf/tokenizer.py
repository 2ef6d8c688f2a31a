"""The tokenizer: byte-level BPE in nanochat's layout, as a folder that plain `AutoTokenizer.from_pretrained` opens.

Ids 0..255 are the raw bytes, merges follow in the order they were learned, the nine special tokens come last. Called as
any transformers tokenizer, it reads `<|bos|>` typed in a text as the special token, unless the call says
`split_special_tokens=True`. The functions below never do: they run the same pipeline without its added tokens, so what
a user types stays text, and every id is nanochat's.

    tokenizer = load_tokenizer("runs/tiny/tokenizer")     # made by scripts/train_tokenizer.py
    ids, mask = encode_conversation(tokenizer, messages)
"""

import json
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import count
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .chat_format import conversation_spans

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = count(256)
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()


def train_bpe(documents: Iterable[str], vocab_size: int, show_progress: bool = False) -> PreTrainedTokenizerFast:
    """Learn merges from a stream of documents; only word counts stay in memory.

    Args:
        documents: texts, read once.
        vocab_size: tokens in all: 256 bytes, merges, 9 special tokens.

    Raises:
        ValueError: `vocab_size` below 265, or more merges asked for than the text has.
    """
    check_vocab_size(vocab_size)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = _pre_tokenizer(SPLIT_PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    backend.train_from_iterator(documents, trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    tokenizer = build_tokenizer(merges)
    if len(tokenizer) < vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size:,} is more than this text can fill: it yields {len(tokenizer):,} tokens "
            f"(256 bytes, {len(tokenizer) - MIN_VOCAB_SIZE:,} merges, 9 special tokens). "
            f"Give more text (dataset, max_chars) or set vocab_size to at most {len(tokenizer)}."
        )
    return tokenizer


def build_tokenizer(merges: Iterable[tuple[str, str]], split_pattern: str = SPLIT_PATTERN) -> PreTrainedTokenizerFast:
    """A tokenizer of the given merges, in rank order, written in byte characters (`BYTE_CHARACTERS`)."""
    vocab = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
    kept = []
    for left, right in merges:
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            kept.append((left, right))
    for token in SPECIAL_TOKENS:  # in the vocabulary too, so that tokenizer.vocab_size counts them
        vocab[token] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=kept))
    backend.pre_tokenizer = _pre_tokenizer(split_pattern)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    bos = SPECIAL_TOKENS[0]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
    )
    template = resources.files("nanochat_hf").joinpath("chat_template.jinja").read_text(encoding="utf-8")
    # Nine tokens and no pad among them. Padding with the end token is safe: attention masks hide it, and `generate`,
    # when given no mask, guesses one from the pad token only where that is not the end token. Padding with <|bos|>
    # would have it mask the start of every prompt.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|assistant_end|>",
        pad_token="<|assistant_end|>",
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|bos|>", "<|assistant_end|>")],
        chat_template=template,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Open a tokenizer or model folder, or a Hub id; a `ValueError` says what is missing."""
    if Path(path).exists() and not (Path(path) / "tokenizer.json").is_file():
        raise ValueError(f"{path} has no tokenizer.json; make one: python scripts/train_tokenizer.py --run_dir RUN")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"no tokenizer at {path}: neither a folder nor a Hub id that opens ({reason})") from error
    special_ids(tokenizer)
    return tokenizer


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens need "
            f"{MIN_VOCAB_SIZE} (recipes/tiny uses a few thousand)"
        )


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Ids of the nine special tokens; a `ValueError` names those that the tokenizer lacks."""
    ids = {token: tokenizer.backend_tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    missing = [token for token, token_id in ids.items() if token_id is None]
    if missing:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} lacks {', '.join(missing)}: conversations need the nine tokens "
            f"of nanochat (python scripts/train_tokenizer.py makes a tokenizer that has them)"
        )
    return ids


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> torch.LongTensor:
    """Bytes that each token stands for, from the raw token and not from its decoded string; special tokens have 0.

    Returns:
        LongTensor (len(tokenizer),). Byte-level vocabularies (ours, GPT-2, Llama 3) and SentencePiece ones with byte
        fallback (Llama 2) are understood; any other is a `ValueError`.
    """
    kind = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    decoder_types = {kind.get("type"), *(part["type"] for part in kind.get("decoders", []))}
    if "ByteLevel" not in decoder_types and "ByteFallback" not in decoder_types:
        raise ValueError(f"byte lengths of this vocabulary are unknown: decoder {sorted(map(str, decoder_types))}")
    lengths = torch.zeros(len(tokenizer), dtype=torch.long)
    special = set(tokenizer.all_special_ids)
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    for token, token_id in tokenizer.get_vocab().items():
        if token_id in special or token_id >= len(lengths):
            continue
        if token_id in added:  # stored as typed, not in byte characters
            lengths[token_id] = len(added[token_id].encode())
        elif "ByteLevel" in decoder_types:
            lengths[token_id] = len(token)  # one character a byte
        else:
            is_byte = len(token) == 6 and token.startswith("<0x")
            lengths[token_id] = 1 if is_byte else len(token.replace("\u2581", " ").encode())
    return lengths


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of a text, without `<|bos|>`; special tokens typed in it stay text."""
    return _ordinary(tokenizer).encode(_valid_unicode(text), add_special_tokens=False).ids


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> list[list[int]]:
    """Ids of each document, `<|bos|>` first; special tokens typed in it stay text. Uses all cores: pass hundreds."""
    bos = special_ids(tokenizer)["<|bos|>"]
    backend = _ordinary(tokenizer)
    documents = list(documents)
    try:
        encodings = backend.encode_batch_fast(documents, add_special_tokens=False)
    except TypeError:  # a lone surrogate somewhere
        encodings = backend.encode_batch_fast([_valid_unicode(d) for d in documents], add_special_tokens=False)
    return [[bos, *encoding.ids] for encoding in encodings]


def encode_conversation(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict], max_tokens: int | None = None
) -> tuple[list[int], list[int]]:
    """Encode a conversation span by span, exactly as nanochat does.

    Args:
        messages: as `conversation_spans` takes them.
        max_tokens: cut both lists at this length (nanochat: 2,048).

    Returns:
        `(ids, mask)`, equally long; mask 1 = the model is trained to write this token.

    Raises:
        ValueError: roles out of order, content of another shape, or a tokenizer without the nine special tokens.
    """
    special, backend = special_ids(tokenizer), _ordinary(tokenizer)
    ids: list[int] = []
    mask: list[int] = []
    for span in conversation_spans(messages):
        if span.special:
            span_ids = [special[span.text]]
        else:
            span_ids = backend.encode(_valid_unicode(span.text), add_special_tokens=False).ids
        ids += span_ids
        mask += [int(span.trained)] * len(span_ids)
    return ids[:max_tokens], mask[:max_tokens]


def encode_prompt(tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict]) -> list[int]:
    """Ids of a conversation that waits for the assistant: ends with `<|assistant_start|>`.

    After a tool call or its output the assistant's turn is already open, and the ids end there.

    Raises:
        ValueError: the last message is the assistant's finished answer, so there is nothing to write.
    """
    ids, _ = encode_conversation(tokenizer, messages)
    special = special_ids(tokenizer)
    if ids[-1] == special["<|assistant_end|>"]:
        raise ValueError("there is nothing to answer: the last message is the assistant's; drop it (messages[:-1])")
    if ids[-1] == special["<|user_end|>"]:
        ids.append(special["<|assistant_start|>"])
    return ids


def _pre_tokenizer(split_pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(split_pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _ordinary(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The tokenizer's pipeline without its added tokens. Shares the model, so it costs nothing to make."""
    shared = tokenizer.backend_tokenizer
    backend = Tokenizer(shared.model)
    if shared.normalizer is not None:
        backend.normalizer = shared.normalizer
    if shared.pre_tokenizer is not None:
        backend.pre_tokenizer = shared.pre_tokenizer
    return backend


def _valid_unicode(text: str) -> str:
    """Lone surrogates (broken JSON escapes) become U+FFFD, as tiktoken does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
