"""The first stage of a run: text in, `<run_dir>/tokenizer/` out, compared with other tokenizers.

python scripts/train_tokenizer.py --config recipes/tiny/tokenizer.yaml
"""

import dataclasses
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from .configs import TokenizerConfig
from .data.corpus import load_corpus
from .interop_tokenizer import from_tiktoken_pickle
from .stage import Stage
from .tokenizer import (
    SPECIAL_TOKENS,
    check_vocab_size,
    encode_text,
    load_tokenizer,
    token_byte_lengths,
    train_bpe,
)
from .tokenizer_evaluation import evaluate_tokenizer, evaluation_tables

EVALUATED_CHARS = 1_000_000  # of the train and of the validation split each


class CappedDocuments:
    """Documents cut at `max_document_chars`, until `max_chars` characters have come; counts what it gave."""

    def __init__(self, documents: Iterable[str], max_chars: int, max_document_chars: int):
        self.documents, self.max_chars, self.max_document_chars = documents, max_chars, max_document_chars
        self.num_documents = self.num_chars = 0

    def __iter__(self) -> Iterator[str]:
        for document in self.documents:
            document = document[: min(self.max_document_chars, self.max_chars - self.num_chars)]
            self.num_documents += 1
            self.num_chars += len(document)
            yield document
            if self.num_chars >= self.max_chars:
                return


def train_tokenizer(config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """Train a tokenizer on the train split, save it to `<run_dir>/tokenizer`, record settings and results.

    A finished stage is not repeated: its tokenizer is loaded.

    Raises:
        ValueError: a setting out of range, text that cannot fill the vocabulary, or a `run_dir` of another recipe.
    """
    settings = dataclasses.asdict(config)
    folder = Path(settings.pop("run_dir")) / "tokenizer"
    check_vocab_size(config.vocab_size)
    for name in ("max_chars", "max_document_chars"):
        if settings[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {settings[name]}")
    stage = Stage(config.run_dir, "tokenizer", settings)
    if stage.finished:
        print(f"tokenizer: already trained, {folder} (--fresh in run.sh starts over)")
        return load_tokenizer(folder)
    corpus = load_corpus(config.dataset, "train", on_bad_shard=config.on_bad_shard)
    documents = CappedDocuments(corpus, config.max_chars, config.max_document_chars)
    next(iter(load_corpus(config.dataset, "validation", on_bad_shard=config.on_bad_shard)))  # read before the work
    with stage:
        started = time.perf_counter()
        if config.start_from is not None:
            tokenizer = existing_tokenizer(config)
        else:
            print(f"tokenizer: learning {config.vocab_size:,} tokens from {config.dataset}", flush=True)
            tokenizer = train_bpe(documents, config.vocab_size, show_progress=sys.stderr.isatty())
        train_seconds = time.perf_counter() - started
        lengths = token_byte_lengths(tokenizer)
        lengths = lengths[lengths > 0].double()  # special tokens stand for no bytes
        evaluation = evaluate_tokenizer(
            tokenizer, {split: _opening_text(config, split) for split in ("train", "validation")}
        )
        stage.results |= {
            "vocab_size": len(tokenizer),
            "num_special_tokens": len(SPECIAL_TOKENS),
            "num_documents": documents.num_documents,
            "num_chars": documents.num_chars,
            "train_seconds": train_seconds,
            "token_bytes_min": int(lengths.min()),
            "token_bytes_max": int(lengths.max()),
            "token_bytes_mean": float(lengths.mean()),
            "token_bytes_std": float(lengths.std()),
            "bytes_per_token": evaluation["rows"][-1]["bytes_per_token"],  # of the validation text
            "evaluation": evaluation,
        }
        _save(tokenizer, folder)
    origin = f"{documents.num_documents:,} documents ({documents.num_chars:,} characters) in {train_seconds:.1f} s"
    print(
        f"tokenizer: {len(tokenizer):,} tokens from {config.start_from or origin}\n\n{evaluation_tables(evaluation)}\n"
    )
    return tokenizer


def existing_tokenizer(config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """The tokenizer `start_from` names, a nanochat one converted.

    Raises:
        ValueError: none there, or one of another size than the recipe says.
    """
    path = Path(config.start_from)
    is_pickle = path.suffix == ".pkl" or (path / "tokenizer.pkl").is_file()
    tokenizer = from_tiktoken_pickle(path) if is_pickle else load_tokenizer(config.start_from)
    if len(tokenizer) != config.vocab_size:
        raise ValueError(f"the tokenizer in {path} has {len(tokenizer):,} tokens, vocab_size={config.vocab_size:,}")
    return tokenizer


def _opening_text(config: TokenizerConfig, split: str) -> str:
    """The first `EVALUATED_CHARS` characters of a split."""
    corpus = load_corpus(config.dataset, split, on_bad_shard=config.on_bad_shard)
    return "\n".join(CappedDocuments(corpus, EVALUATED_CHARS, EVALUATED_CHARS))


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write beside the folder, check, and rename: the folder is whole or not there."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(partial)
    probe = "".join(SPECIAL_TOKENS) + " 12345 naïve \u4f60\u597d\n\t\x00"
    if encode_text(load_tokenizer(partial), probe) != encode_text(tokenizer, probe):
        raise RuntimeError(f"the tokenizer written to {partial} encodes otherwise than the trained one")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
