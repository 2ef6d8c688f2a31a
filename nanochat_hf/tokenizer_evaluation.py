"""How well a tokenizer compresses text of different kinds, beside GPT-2's and GPT-4's tokenizers.

The figure is bytes per token: the higher, the more text fits a row. GPT-2's and GPT-4's vocabularies come through
tiktoken, which downloads them once (to `TIKTOKEN_CACHE_DIR`); without a network, one line says that they are missing.

    result = evaluate_tokenizer(tokenizer, {"train": text, "validation": text})
    print(evaluation_tables(result))
"""

import os
import threading
from collections.abc import Callable
from unittest import mock

from transformers import PreTrainedTokenizerFast

from .tokenizer import encode_text
from .tokenizer_texts import SAMPLE_TEXTS

REFERENCES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}  # name -> tiktoken's encoding
DOWNLOAD_SECONDS = 30  # in all; two files of 1.6 MB at most


def evaluate_tokenizer(tokenizer: PreTrainedTokenizerFast, texts: dict[str, str]) -> dict:
    """Count the tokens of our sample texts and of `texts` (name -> text), also with the reference tokenizers.

    Returns:
        JSON-ready `{"rows": [{"text", "bytes", "tokens", "bytes_per_token", "reference_tokens": {"GPT-2": n}}],
        "missing": {"GPT-4": reason}}`.
    """
    references, missing = load_references()
    rows = []
    for name, text in {**SAMPLE_TEXTS, **texts}.items():
        num_bytes, num_tokens = len(text.encode("utf-8", "replace")), len(encode_text(tokenizer, text))
        rows.append(
            {
                "text": name,
                "bytes": num_bytes,
                "tokens": num_tokens,
                "bytes_per_token": num_bytes / max(num_tokens, 1),
                "reference_tokens": {reference: len(encode(text)) for reference, encode in references.items()},
            }
        )
    return {"rows": rows, "missing": missing}


def evaluation_tables(result: dict) -> str:
    """Markdown of an evaluation: one table a reference tokenizer, as in nanochat's published report.

    "Relative Diff %" is the share of the reference's tokens that ours saves (+) or needs on top (-).
    """
    blocks = []
    references = list(result["rows"][0]["reference_tokens"]) if result["rows"] else []
    for reference in references:
        theirs_and_ours = f"{reference} Tokens | {reference} Ratio | Ours Tokens | Ours Ratio"
        lines = [f"| Text Type | Bytes | {theirs_and_ours} | Relative Diff % |", "|---|---|---|---|---|---|---|"]
        for row in result["rows"]:
            theirs, ours = row["reference_tokens"][reference], row["tokens"]
            lines.append(
                f"| {row['text']} | {row['bytes']} | {theirs} | {row['bytes'] / max(theirs, 1):.2f} "
                f"| {ours} | {row['bytes_per_token']:.2f} | {(theirs - ours) / max(theirs, 1) * 100:+.1f}% |"
            )
        blocks.append(f"### Comparison with {reference}\n\n" + "\n".join(lines))
    if not references:
        lines = ["| Text Type | Bytes | Ours Tokens | Ours Ratio |", "|---|---|---|---|"]
        for row in result["rows"]:
            lines.append(f"| {row['text']} | {row['bytes']} | {row['tokens']} | {row['bytes_per_token']:.2f} |")
        blocks.append("\n".join(lines))
    by_reason: dict[str, list[str]] = {}
    for reference, reason in result["missing"].items():
        by_reason.setdefault(reason, []).append(reference)
    blocks += [f"No comparison with {' and '.join(names)}: {reason}." for reason, names in by_reason.items()]
    return "\n\n".join(blocks)


def load_references() -> tuple[dict[str, Callable[[str], list[int]]], dict[str, str]]:
    """GPT-2's and GPT-4's encoders, and the reason for each one that cannot be had. Never waits long for a network."""
    try:
        import tiktoken
    except ImportError:
        return {}, dict.fromkeys(REFERENCES, "tiktoken is not installed (pip install tiktoken)")
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
    encoders, missing = {}, {}
    for name, encoding_name in REFERENCES.items():
        outcome = _load_encoding(tiktoken, encoding_name, offline)
        if isinstance(outcome, str):
            missing[name] = outcome
            offline = True  # what failed once is not waited for again
        else:
            encoders[name] = outcome.encode_ordinary
    return encoders, missing


def _load_encoding(tiktoken, encoding_name: str, offline: bool):
    """The encoding, from tiktoken's cache or, unless `offline`, by download; or the reason why not, as a string."""
    outcome = []

    def refuse(url: str) -> bytes:
        raise ConnectionError(f"offline: {url}")

    def load() -> None:
        try:
            outcome.append(tiktoken.get_encoding(encoding_name))
        except Exception as error:  # requests, DNS, proxies and caches fail in many ways
            outcome.append(f"not in tiktoken's cache, and no download ({type(error).__name__})")

    if offline:
        with mock.patch("tiktoken.load.read_file", refuse):
            load()
    else:  # tiktoken sets no timeout; a thread that hangs does not keep the program from ending
        thread = threading.Thread(target=load, daemon=True)
        thread.start()
        thread.join(DOWNLOAD_SECONDS)
    return outcome[0] if outcome else f"tiktoken's download took more than {DOWNLOAD_SECONDS} seconds"
