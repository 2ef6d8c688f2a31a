"""Model folders: written whole or not at all, opened with a clear error.

Every stage's result is a plain `from_pretrained` folder with weights, tokenizer, generation settings and the two code
files, so it loads anywhere with `trust_remote_code=True`, this package installed or not.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .tokenizer import load_tokenizer


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Give a temporary sibling to write into; on success it is fsynced and takes the name `folder`.

    Killed or out of disk in the middle, `folder` is what it was before.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for path in (*partial.rglob("*"), partial):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    previous = folder.with_name(folder.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        os.replace(folder, previous)
    os.replace(partial, folder)
    shutil.rmtree(previous, ignore_errors=True)


def generation_settings(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Where a turn ends: at <|assistant_end|>, or at a <|bos|> that starts another document."""
    end, bos = tokenizer.convert_tokens_to_ids("<|assistant_end|>"), tokenizer.bos_token_id
    return GenerationConfig(bos_token_id=bos, eos_token_id=[end, bos], pad_token_id=tokenizer.pad_token_id)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path) -> None:
    """Write weights, code, tokenizer (if there is one) and generation settings into an existing folder."""
    if tokenizer is not None:
        model.generation_config = generation_settings(tokenizer)
        tokenizer.save_pretrained(folder)
    # save_pretrained itself only lists AutoModelForCausalLM. AutoModel opens the folder too, and so does `transformers
    # serve`, which looks remote code up under AutoModelForDecision and nowhere else (as of transformers 5.23).
    model.config.auto_map = {
        "AutoModel": "modeling_nanochat_hf.NanoChatHFModel",
        "AutoModelForDecision": "modeling_nanochat_hf.NanoChatHFForCausalLM",
    }
    model.save_pretrained(folder)
    # It noted the first parameter's dtype, which is the embedding's: by that, from_pretrained without a dtype would
    # round nanochat's fp32 matrices to the bf16 of its embeddings. The widest dtype loses nothing.
    model.config.dtype = reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()})
    model.config.save_pretrained(folder)


def load_model(path: str | Path, dtype: torch.dtype | str = torch.float32) -> tuple[PreTrainedModel, object]:
    """Open a model folder or Hub id with its tokenizer.

    Raises:
        ValueError: a folder that holds no model, with what was looked for.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path} is not a model folder: it has no config.json. A stage that finished writes one")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"no model at {path}: neither a folder nor a Hub id that opens ({reason})") from error
    return model, load_tokenizer(path)


def last_checkpoint(folder: str | Path, keep: int | None = None) -> Path | None:
    """The newest `step-*` folder; with `keep`, older ones beyond so many are deleted. None where there is none."""
    found = sorted(path for path in Path(folder).glob("step-*") if path.suffix == "")
    for old in found[:-keep] if keep else []:
        shutil.rmtree(old)
    return found[-1] if found else None
