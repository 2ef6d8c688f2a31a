"""nanochat's own checkpoint files: `model_<step>.pt` with `meta_<step>.json`, read and written.

Everything is compared with what the meta file announces before a weight is used: each name, each shape. Reading takes
tensors only (`weights_only=True`), so a hostile file runs nothing.

    checkpoint = read_checkpoint("base_checkpoints/d20")
    checkpoint.config, checkpoint.state_dict      # our names, padding rows cropped
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from . import NanoChatHFConfig, NanoChatHFForCausalLM

VOCAB_MULTIPLE = 64  # the 2026-07 generation pads its vocabulary tensors to a multiple of this many rows
NEWEST_KEYS = ("lambda", "smear", "value_embeds", "ve_gate")  # in the names of tensors that 2025-10 does not have
META_FIELDS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
MAX_META_VALUE = 10**7  # of those fields: more than any nanochat has, and tensors of that size have a size
NAME_PARTS = {
    "model.embed_tokens.": "transformer.wte.",
    "model.layers.": "transformer.h.",
    "self_attn.q_proj": "attn.c_q",
    "self_attn.k_proj": "attn.c_k",
    "self_attn.v_proj": "attn.c_v",
    "self_attn.o_proj": "attn.c_proj",
    "self_attn.ve_gate": "attn.ve_gate",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


@dataclass(frozen=True)
class NanochatCheckpoint:
    """One checkpoint: its step, its whole meta file, our configuration, and the weights under our names.

    Weights keep the dtypes they were stored in (nanochat stores embeddings in bf16).
    """

    step: int
    meta: dict
    config: NanoChatHFConfig
    state_dict: dict[str, torch.Tensor]


def nanochat_name(name: str) -> str:
    """nanochat's name of one of our parameters."""
    for ours, theirs in NAME_PARTS.items():
        name = name.replace(ours, theirs)
    return name.removeprefix("model.")


def padded_vocab_size(config: NanoChatHFConfig) -> int:
    """Rows of nanochat's vocabulary tensors."""
    if config.architecture == "2025-10":
        return config.vocab_size
    return -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def read_checkpoint(folder: str | Path, step: int | None = None) -> NanochatCheckpoint:
    """Read a checkpoint folder of nanochat, of either generation.

    Args:
        folder: holds `model_<step>.pt` and `meta_<step>.json`.
        step: which one; the last by default.

    Raises:
        ValueError: no such file, a damaged or hostile one, a meta file that lacks a field, or tensors that are
            unknown, missing or of another shape: all of them are listed.
    """
    folder = Path(folder)
    steps = files_by_step(folder, "model_*.pt")
    if not steps:
        raise ValueError(f"no model_<step>.pt in {folder}; give the folder of one nanochat checkpoint")
    if step is not None and step not in steps:
        raise ValueError(f"no step {step} in {folder}; it has {', '.join(map(str, sorted(steps)))}")
    step = max(steps) if step is None else step
    meta = read_meta(steps[step].with_name(steps[step].stem.replace("model_", "meta_") + ".json"))
    tensors = _read_tensors(steps[step])
    newest = any(part in name for name in tensors for part in NEWEST_KEYS)
    num_layers = meta["model_config"]["n_layer"]
    if num_layers > len(tensors):  # before a model of so many layers is built, if only to compare the shapes
        raise ValueError(f"{steps[step]} holds {len(tensors)} tensors, its meta file announces n_layer={num_layers:,}")
    config = _config_of(meta["model_config"], "2026-07" if newest else "2025-10")
    return NanochatCheckpoint(step, meta, config, _checked(tensors, config, steps[step]))


def files_by_step(folder: Path, pattern: str) -> dict[int, Path]:
    """The files of a folder whose names end in a number of steps, by that number."""
    return {int(found[1]): path for path in folder.glob(pattern) if (found := re.search(r"_(\d+)$", path.stem))}


def write_checkpoint(checkpoint: NanochatCheckpoint, folder: Path) -> None:
    """Write `model_<step>.pt` and `meta_<step>.json`; vocabulary tensors are padded with rows of zeros."""
    tensors, vocab_size = {}, checkpoint.config.vocab_size
    for name, tensor in checkpoint.state_dict.items():
        if is_vocabulary(name):
            padding = padded_vocab_size(checkpoint.config) - vocab_size
            tensor = torch.cat([tensor, tensor.new_zeros(padding, tensor.shape[1])])
        tensors[nanochat_name(name)] = tensor.contiguous().clone()
    torch.save(tensors, folder / f"model_{checkpoint.step:06d}.pt")
    (folder / f"meta_{checkpoint.step:06d}.json").write_text(json.dumps(checkpoint.meta, indent=2) + "\n")


def model_meta(config: NanoChatHFConfig) -> dict:
    """nanochat's `model_config` of a model.

    Raises:
        ValueError: a setting that nanochat fixes has another value here; all of them are listed.
    """
    meta = {
        "sequence_len": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_kv_head": config.num_key_value_heads,
        "n_embd": config.hidden_size,
    }
    if config.architecture == "2026-07":
        meta["window_pattern"] = config.window_pattern
    fixed = NanoChatHFConfig(**_config_fields(meta, config.architecture)).to_dict()
    free = {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "dtype", "rms_norm_eps", "window_pattern"}
    free |= {"architectures", "auto_map", "transformers_version", "_name_or_path"}
    other = {key: value for key, value in config.to_dict().items() if key not in free and fixed.get(key) != value}
    if other:
        wrong = ", ".join(f"{key}={value!r} (nanochat: {fixed.get(key)!r})" for key, value in sorted(other.items()))
        raise ValueError(f"this model is no nanochat of {config.architecture}: {wrong}")
    return meta


def same_settings(first: dict, second: dict, architecture: str) -> bool:
    """Whether two `model_config` mean the same model, however they write its window pattern."""
    return _config_fields(first, architecture) == _config_fields(second, architecture)


def is_vocabulary(name: str) -> bool:
    """Whether a parameter has one row a token."""
    return name in ("model.embed_tokens.weight", "lm_head.weight") or ".value_embeds." in name


def compare_tensors(found: dict[str, torch.Size], expected: dict[str, torch.Size], source: str | Path) -> None:
    """Raise a `ValueError` that lists every missing, unknown and misshapen tensor of a file."""
    wrong = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    wrong += [f"unknown: {name}" for name in sorted(found.keys() - expected.keys())]
    wrong += [
        f"of another shape: {name} {tuple(found[name])}, not {tuple(expected[name])}"
        for name in sorted(found.keys() & expected.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    if wrong:
        raise ValueError(
            f"{source} does not hold the tensors that its configuration announces:\n  " + "\n  ".join(wrong)
        )


def read_meta(path: Path) -> dict:
    """A meta file whole; a `ValueError` where its `model_config` is not what nanochat writes."""
    if not path.is_file():
        raise ValueError(f"no {path.name} beside the weights in {path.parent}: nanochat writes the two together")
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    fields = meta.get("model_config") if isinstance(meta, dict) else None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} has no model_config")
    wrong = [
        f"{key}={fields.get(key)!r}"
        for key in META_FIELDS
        if type(fields.get(key)) is not int or not 1 <= fields[key] <= MAX_META_VALUE
    ]
    wrong += [f"{key}={fields[key]!r} (unknown)" for key in sorted(fields.keys() - {*META_FIELDS, "window_pattern"})]
    if wrong:
        raise ValueError(f"{path}: model_config must give {', '.join(META_FIELDS)} as integers from 1 to "
                         f"{MAX_META_VALUE:,} and may give window_pattern; found {', '.join(wrong)}")  # fmt: skip
    return meta


def _config_fields(meta: dict, architecture: str) -> dict:
    fields = {
        "architecture": architecture,
        "vocab_size": meta["vocab_size"],
        "hidden_size": meta["n_embd"],
        "num_hidden_layers": meta["n_layer"],
        "num_attention_heads": meta["n_head"],
        "num_key_value_heads": meta["n_kv_head"],
        "max_position_embeddings": meta["sequence_len"],
    }
    if architecture == "2026-07":
        # Checkpoints from before there were windows do not name a pattern: nanochat opens them with full attention.
        fields["window_pattern"] = str(meta.get("window_pattern", "L")).upper()
    return fields


def _config_of(meta: dict, architecture: str) -> NanoChatHFConfig:
    config = NanoChatHFConfig(**_config_fields(meta, architecture))
    config.dtype = torch.float32
    return config


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or hostile file
        raise ValueError(
            f"{path} does not load as plain tensors: {str(error).strip().partition(chr(10))[0]}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} must hold names and tensors, found {type(tensors).__name__} of something else")
    integers = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if integers:
        raise ValueError(f"{path} holds weights that are no floating-point numbers: {', '.join(integers)}")
    # torch.compile puts its mark before every name.
    plain = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise ValueError(f"{path} holds some weights twice, with and without the prefix `_orig_mod.`")
    return plain


def _checked(tensors: dict[str, torch.Tensor], config: NanoChatHFConfig, path: Path) -> dict[str, torch.Tensor]:
    """The tensors under our names, cropped to the vocabulary, if they are exactly those of the configuration."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in NanoChatHFForCausalLM(config).state_dict().items()}
    ours = {nanochat_name(name): name for name in expected}
    vocab_size, padded = config.vocab_size, padded_vocab_size(config)
    cropped = {}
    for theirs, tensor in tensors.items():
        if theirs in ours and is_vocabulary(ours[theirs]) and tensor.ndim == 2 and tensor.shape[0] == padded:
            tensor = tensor[:vocab_size].clone()
        cropped[theirs] = tensor
    shapes = {theirs: tensor.shape for theirs, tensor in cropped.items()}
    compare_tensors(shapes, {theirs: expected[name] for theirs, name in ours.items()}, path)
    return {ours[theirs]: tensor for theirs, tensor in cropped.items()}
