"""Models in and out: nanochat's checkpoints and transformers' native `nanochat` type, both ways.

Each conversion reads everything, checks it, writes into a temporary folder, opens that folder again as a user would and
compares logits and tokenization with what was read; only then does the folder take its name.

    python scripts/convert.py from_nanochat --checkpoint base_checkpoints/d20 --tokenizer tokenizer --output d20
    python scripts/convert.py to_nanochat --checkpoint runs/d20/base --output base_checkpoints/d20
    python scripts/convert.py to_transformers --checkpoint runs/d20_2025_10/sft --output d20_native
    python scripts/convert.py from_transformers --checkpoint d20_native --output d20
"""

import json
from pathlib import Path

import torch
from transformers import NanoChatConfig, NanoChatForCausalLM

from . import NanoChatHFConfig
from .checkpoint import generation_settings, save_model
from .configs import ConvertConfig
from .interop_checkpoint import (
    NanochatCheckpoint,
    files_by_step,
    model_meta,
    read_checkpoint,
    read_meta,
    same_settings,
    write_checkpoint,
)
from .interop_verify import (
    checked_output,
    compare_logits,
    compare_tokenizers,
    config_of,
    model_of,
    nanochat_tokenizer,
    open_model,
    open_tokenizer,
    read_weights,
)
from .recipe import nearest


def convert(direction: str | None, config: ConvertConfig) -> None:
    """Run one conversion: `from_nanochat`, `to_nanochat`, `from_transformers` or `to_transformers`."""
    directions = {
        "from_nanochat": (from_nanochat, ("step", "tokenizer")),
        "to_nanochat": (to_nanochat, ("step",)),
        "from_transformers": (from_transformers, ()),
        "to_transformers": (to_transformers, ()),
    }
    if direction not in directions:
        meant = f"; did you mean {nearest(direction, directions)}?" if direction else ""
        raise ValueError(f"the first argument names the conversion: {', '.join(directions)}{meant}")
    for name in ("checkpoint", "output"):
        if not getattr(config, name):
            raise ValueError(f"{direction} needs --{name} FOLDER")
    function, options = directions[direction]
    given = {name: getattr(config, name) for name in ("step", "tokenizer") if getattr(config, name) is not None}
    if given.keys() - set(options):
        raise ValueError(f"{direction} takes no --{', --'.join(sorted(given.keys() - set(options)))}")
    function(config.checkpoint, config.output, **given)


def from_nanochat(
    checkpoint: str | Path, output: str | Path, step: int | None = None, tokenizer: str | Path | None = None
) -> None:
    """Write a nanochat checkpoint as a model folder that `from_pretrained` opens.

    Args:
        checkpoint: folder with `model_<step>.pt` and `meta_<step>.json`.
        output: new folder.
        step: which checkpoint; the last by default.
        tokenizer: folder with `tokenizer.pkl`, or that file; looked for beside the checkpoint by default.

    Raises:
        ValueError: anything damaged, unknown, missing or of another shape; a tokenizer of another vocabulary size.
    """
    read = read_checkpoint(checkpoint, step)
    words = nanochat_tokenizer(Path(checkpoint), tokenizer, read.config.vocab_size)
    if words is not None:
        read.config.bos_token_id, read.config.eos_token_id = words.bos_token_id, words.eos_token_id
        read.config.pad_token_id = words.pad_token_id
    model = model_of(read.config, read.state_dict)
    with checked_output(output) as folder:
        save_model(model, words, folder)
        # The meta file it came with, under its own name, so that it can go back unchanged.
        (folder / f"meta_{read.step:06d}.json").write_text(json.dumps(read.meta, indent=2) + "\n")
        compare_logits(model.float(), open_model(folder))
        compare_tokenizers(words, folder)
    print(f"wrote step {read.step} ({read.config.architecture}, {model.num_parameters():,} parameters) to {output}")


def to_nanochat(checkpoint: str | Path, output: str | Path, step: int | None = None) -> None:
    """Write a model folder of ours as nanochat's `model_<step>.pt` and `meta_<step>.json`.

    Args:
        checkpoint: model folder of either generation.
        output: new folder.
        step: number in the file names; that of the checkpoint it was imported from by default, or 0.

    Raises:
        ValueError: settings that nanochat does not have, or weights that are unknown, missing or of another shape.
    """
    config = config_of(checkpoint, NanoChatHFConfig)
    state_dict = read_weights(Path(checkpoint), config)
    imported = files_by_step(Path(checkpoint), "meta_*.json")  # none, or the one of from_nanochat
    changes = {} if step is None else {"step": step}
    step = max(imported, default=0) if step is None else step
    meta = {"step": step, "model_config": model_meta(config)}
    if imported:
        original = read_meta(imported[max(imported)])
        if same_settings(original["model_config"], meta["model_config"], config.architecture):
            meta = original | changes
    with checked_output(output) as folder:
        write_checkpoint(NanochatCheckpoint(step, meta, config, state_dict), folder)
        again = read_checkpoint(folder, step)
        for name, tensor in state_dict.items():
            if not torch.equal(tensor, again.state_dict[name]):
                raise ValueError(f"{name} was not written as it was read; is the disk full?")
        compare_logits(model_of(config, state_dict).float(), model_of(again.config, again.state_dict).float())
    print(f"wrote nanochat checkpoint of step {step} ({config.architecture}) to {output}")


def to_transformers(checkpoint: str | Path, output: str | Path) -> None:
    """Write a 2025-10 model folder as transformers' own `nanochat` type, which loads without remote code.

    Raises:
        ValueError: a model of the 2026-07 generation, for which transformers has no type; a tokenizer of another
            vocabulary size.
    """
    config = config_of(checkpoint, NanoChatHFConfig)
    newer = [
        name for name in ("value_embeddings", "residual_scalars", "smear", "backout") if getattr(config, f"use_{name}")
    ]
    newer += ["sliding_windows"] * ("sliding_attention" in config.layer_types) + ["qk_scale"] * (config.qk_scale != 1)
    if newer:
        raise ValueError(
            f"{checkpoint} is of the {config.architecture} generation: transformers' nanochat type has no "
            f"{', '.join(newer).replace('_', ' ')}. Publish the folder as it is: it carries its code, and opens with "
            f"from_pretrained(..., trust_remote_code=True)"
        )
    model, words = open_model(checkpoint), open_tokenizer(checkpoint, config.vocab_size)
    native = NanoChatConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        hidden_act=config.hidden_act,
        rms_norm_eps=config.rms_norm_eps or torch.finfo(torch.float32).eps,
        rope_parameters=config.rope_parameters,
        final_logit_softcapping=config.final_logit_softcapping,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    native.dtype = torch.float32
    with checked_output(output) as folder:
        converted = model_of(native, model.state_dict(), NanoChatForCausalLM)
        if words is not None:
            converted.generation_config = generation_settings(words)
            words.save_pretrained(folder)
        converted.save_pretrained(folder)
        compare_logits(model, open_model(folder))
        compare_tokenizers(words, folder)
    print(f"wrote transformers' nanochat type to {output}")


def from_transformers(checkpoint: str | Path, output: str | Path) -> None:
    """Write a folder (or Hub id) of transformers' `nanochat` type as one of ours, with logits that stay equal.

    The weights are stored in the dtype that the folder announces, unless that would round them: then in fp32.

    Raises:
        ValueError: another model type, settings that nanochat never had, a tokenizer of another vocabulary size.
    """
    native = config_of(checkpoint, NanoChatConfig)
    foreign = [f"attention_bias={native.attention_bias}"] * bool(native.attention_bias)
    foreign += [f"attention_dropout={native.attention_dropout}"] * bool(native.attention_dropout)
    foreign += ["final_logit_softcapping=None"] * (native.final_logit_softcapping is None)
    if foreign:
        raise ValueError(f"{checkpoint} is no model that nanochat trained: {', '.join(foreign)}")
    model, words = open_model(checkpoint), open_tokenizer(checkpoint, native.vocab_size)
    shared = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    shared += "max_position_embeddings hidden_act rms_norm_eps rope_parameters final_logit_softcapping "
    shared += "bos_token_id eos_token_id pad_token_id"
    fields = {name: getattr(native, name) for name in shared.split()}
    config = NanoChatHFConfig(architecture="2025-10", head_dim=getattr(native, "head_dim", None), **fields)
    weights = model.state_dict()
    stored = {name: tensor.to(native.dtype or torch.float32) for name, tensor in weights.items()}
    is_rounded = any(not torch.equal(stored[name].float(), tensor) for name, tensor in weights.items())
    converted = model_of(config, weights if is_rounded else stored)
    with checked_output(output) as folder:
        save_model(converted, words, folder)
        compare_logits(model, open_model(folder))
        compare_tokenizers(words, folder)
    print(f"wrote {converted.num_parameters():,} parameters (2025-10) to {output}")
