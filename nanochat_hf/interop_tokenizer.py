"""nanochat's own tokenizer files in: `tokenizer.pkl` (a pickled tiktoken `Encoding`) and `token_bytes.pt`.

Unpickling runs whatever the file says. So the file is first read as a list of instructions, of which only those that
build plain data pass, and then unpickled by a reader that knows one class, a stand-in for `tiktoken.core.Encoding` that
keeps the data and does nothing. Neither tiktoken nor any other code is imported.

    tokenizer = from_tiktoken_pickle("tokenizer.pkl")
    tokenizer.save_pretrained("tokenizer/")
"""

import io
import pickle
import pickletools
import re
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from .tokenizer import BYTE_CHARACTERS, SPECIAL_TOKENS, SPLIT_PATTERN, build_tokenizer

MAX_FILE_BYTES = 64 * 2**20  # a vocabulary of 65,536 takes about 1 MB
MAX_SQUARED_BYTES = 2**26  # of all tokens, as splitting takes time by the squares of their lengths: here about 15 s
# What pickling an Encoding's dict of names, bytes and numbers needs, in protocols 3 to 5.
ALLOWED_OPCODES = frozenset(
    "PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET EMPTY_DICT EMPTY_TUPLE SETITEM SETITEMS "
    "SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES BININT BININT1 BININT2 GLOBAL STACK_GLOBAL NEWOBJ "
    "BUILD".split()
)
FIELDS = {"name": str, "pat_str": str, "mergeable_ranks": dict, "special_tokens": dict}


class _EncodingParts:
    """Stands in for `tiktoken.core.Encoding`: keeps the pickled state, builds nothing."""

    def __setstate__(self, state: object) -> None:
        self.state = state


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _EncodingParts
        raise ValueError(f"it asks for {module}.{name}, only tiktoken.core.Encoding is allowed")


def from_tiktoken_pickle(path: str | Path) -> PreTrainedTokenizerFast:
    """Read nanochat's `tokenizer.pkl` as a transformers tokenizer with the same ids on every text.

    Args:
        path: the file, or the folder that holds it.

    Raises:
        ValueError: not there, damaged, anything but a tiktoken encoding in it (nothing of it is run), or an encoding
            of another layout than nanochat's (bytes first, merges by rank, the nine special tokens last).
    """
    path = _file(path, "tokenizer.pkl")
    try:
        parts = _read_parts(path.read_bytes())
        merges = merges_from_ranks(parts["mergeable_ranks"])
        _check_special_tokens(parts["special_tokens"], len(parts["mergeable_ranks"]))
        _check_pattern(parts["pat_str"])
    except ValueError as error:
        raise ValueError(f"{path} is not a nanochat tokenizer: {error}") from error
    return build_tokenizer(merges, split_pattern=parts["pat_str"])


def load_token_bytes(path: str | Path) -> torch.Tensor:
    """Read nanochat's `token_bytes.pt`: the byte length of each token, LongTensor (vocab,); only tensors load."""
    path = _file(path, "token_bytes.pt")
    try:
        lengths = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or hostile file
        raise ValueError(
            f"{path} does not load as a plain tensor: {str(error).strip().partition(chr(10))[0]}"
        ) from error
    if not isinstance(lengths, torch.Tensor) or lengths.ndim != 1 or lengths.is_floating_point():
        raise ValueError(f"{path} must hold one integer a token, found {type(lengths).__name__}")
    return lengths.long()


def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """The pair each token was merged from, in rank order and in byte characters.

    tiktoken keeps only the result of a merge. The pair is what the token's bytes come to under all earlier merges.
    """
    tokens = sorted(ranks, key=ranks.get)
    if [ranks[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("ranks must count 0, 1, 2, ... without a gap")
    if tokens[:256] != [bytes([byte]) for byte in range(256)]:
        raise ValueError("the first 256 tokens must be the bytes 0..255 in order")
    if sum(len(token) ** 2 for token in tokens) > MAX_SQUARED_BYTES:
        longest = max(tokens, key=len)
        raise ValueError(f"tokens too long to be words: token {ranks[longest]} is {len(longest):,} bytes long")
    merges = []
    for token in tokens[256:]:
        pair = _split_before(token, ranks)
        if len(pair) != 2:
            raise ValueError(f"token {ranks[token]} ({token!r:.60}) cannot be reached by merging earlier tokens")
        merges.append(tuple("".join(BYTE_CHARACTERS[byte] for byte in part) for part in pair))
    return merges


def _split_before(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Merge a token's bytes with the merges that came before the token itself."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        best = min(range(len(candidates)), key=candidates.__getitem__)  # ties: leftmost
        if candidates[best] >= ranks[token]:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def _read_parts(content: bytes) -> dict:
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{len(content):,} bytes is more than any tokenizer needs ({MAX_FILE_BYTES:,})")
    try:
        refused = {}  # in order, without repetition
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name not in ALLOWED_OPCODES:
                refused[opcode.name] = None
            if opcode.name.endswith("BINPUT") and argument > len(content):
                raise ValueError(f"the pickle asks for {argument:,} memory slots")
        if refused:
            raise ValueError(f"pickle instructions refused, as no tiktoken encoding needs them: {', '.join(refused)}")
        encoding = _RestrictedUnpickler(io.BytesIO(content)).load()
    except ValueError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"damaged pickle ({type(error).__name__}: {error})") from error
    state = getattr(encoding, "state", None) if isinstance(encoding, _EncodingParts) else None
    if not isinstance(state, dict):
        raise ValueError("it holds no tiktoken encoding of its own (a registered one is pickled by name only)")
    for field, field_type in FIELDS.items():
        if not isinstance(state.get(field), field_type):
            raise ValueError(f"the encoding's {field} is missing or no {field_type.__name__}")
    for field, key_type in (("mergeable_ranks", bytes), ("special_tokens", str)):
        for key, value in state[field].items():
            if type(key) is not key_type or type(value) is not int:
                found = f"{type(key).__name__} to {type(value).__name__}"
                raise ValueError(f"{field} must map {key_type.__name__} to int, found {found}")
    return state


def _check_special_tokens(special_tokens: dict[str, int], num_ranks: int) -> None:
    expected = {token: num_ranks + i for i, token in enumerate(SPECIAL_TOKENS)}
    if special_tokens != expected:
        raise ValueError(f"special tokens must be {expected}, found {special_tokens!r:.600}")


def _check_pattern(pattern: str) -> None:
    """Only the longest run of digits may differ: another pattern could split otherwise here than in tiktoken."""
    if re.sub(r"\\p\{N\}\{1,[1-9]\}", r"\\p{N}{1,2}", pattern, count=1) != SPLIT_PATTERN:
        raise ValueError(f"the split pattern must be nanochat's {SPLIT_PATTERN}, found {pattern!r:.300}")


def _file(path: str | Path, name: str) -> Path:
    path = Path(path)
    path = path / name if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no file {path}; nanochat keeps {name} in its tokenizer folder")
    return path
