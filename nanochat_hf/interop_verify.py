"""What every conversion shares: open strictly, write into a folder that only appears when it proved right, compare."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from . import NanoChatHFConfig, NanoChatHFForCausalLM
from .checkpoint import atomic_folder
from .interop_checkpoint import compare_tensors
from .interop_tokenizer import from_tiktoken_pickle, load_token_bytes
from .tokenizer import encode_conversation, encode_text, load_tokenizer, token_byte_lengths

MAX_LOGIT_DIFFERENCE = 1e-4  # of logits in -15..15, between two implementations in fp32
PROBE_TOKENS = 192
PROBE_TEXTS = (
    "",
    "The quick brown fox doesn't jump 1234567 times.\r\n\tover  it\n\n",
    "naïve Ünïcode 水車 мельница 👩‍👩‍👧 \x00\x07\u2028",
    "<|bos|>typed<|assistant_end|>",
)


def config_of(checkpoint: str | Path, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The configuration of a model folder or Hub id; a `ValueError` where it is of another model type."""
    if Path(checkpoint).is_dir() and not (Path(checkpoint) / "config.json").is_file():
        raise ValueError(f"{checkpoint} is not a model folder: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"no model at {checkpoint}: neither a folder nor a Hub id that opens ({reason})") from error
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{checkpoint}/config.json has a wrong value; correct it: {reason}") from error
    if not isinstance(config, config_class):
        raise ValueError(f"{checkpoint} is of model type {config.model_type}, not {config_class.model_type}")
    return config


def open_model(checkpoint: str | Path, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """Open a model folder as a user would, and insist on every weight."""
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights of {checkpoint} do not load: {error}") from error
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = [f"{kind.replace('_keys', '')}: {name}" for kind in kinds for name in sorted(map(str, loading[kind]))]
    if wrong:
        raise ValueError(f"{checkpoint} does not hold the weights of its configuration:\n  " + "\n  ".join(wrong))
    return model.eval()


def read_weights(folder: str | Path, config: NanoChatHFConfig) -> dict[str, torch.Tensor]:
    """A model folder's tensors in the dtypes they are stored in, exactly those that the configuration announces."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"no *.safetensors in {folder}; give a local model folder (from the Hub: hf download first)")
    try:
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are damaged: {error}") from error
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in NanoChatHFForCausalLM(config).state_dict().items()}
    compare_tensors({name: tensor.shape for name, tensor in tensors.items()}, expected, folder)
    return tensors


def model_of(
    config: PreTrainedConfig, state_dict: dict[str, torch.Tensor], model_class: type = NanoChatHFForCausalLM
) -> PreTrainedModel:
    """A model that holds exactly these tensors, in their dtypes."""
    model = model_class(config)
    model.load_state_dict(state_dict, assign=True)
    return model.eval()


def nanochat_tokenizer(
    checkpoint: Path, tokenizer: str | Path | None, vocab_size: int
) -> PreTrainedTokenizerFast | None:
    """nanochat's `tokenizer.pkl` from a given place or from beside a checkpoint; None, with a warning, without one.

    Raises:
        ValueError: damaged, hostile, of another vocabulary size, or at odds with the `token_bytes.pt` beside it.
    """
    if tokenizer is None:
        beside = [folder / "tokenizer.pkl" for folder in (checkpoint, checkpoint / "tokenizer")]
        tokenizer = next((path for path in beside if path.is_file()), None)
    if tokenizer is None:
        _warn_of_no_tokenizer(f"no tokenizer.pkl in {checkpoint} and no --tokenizer")
        return None
    words = from_tiktoken_pickle(tokenizer)
    _check_vocab_size(words, tokenizer, vocab_size)
    lengths = (Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent) / "token_bytes.pt"
    if lengths.is_file() and not torch.equal(load_token_bytes(lengths), token_byte_lengths(words)):
        raise ValueError(f"{lengths} does not fit the tokenizer beside it: they are not of the same run")
    return words


def open_tokenizer(checkpoint: str | Path, vocab_size: int) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a model folder or Hub id; None, with a warning, for a folder that has none.

    Raises:
        ValueError: damaged, or of another vocabulary size.
    """
    if Path(checkpoint).is_dir() and not (Path(checkpoint) / "tokenizer.json").is_file():
        _warn_of_no_tokenizer(f"no tokenizer.json in {checkpoint}")
        return None
    words = load_tokenizer(checkpoint)
    _check_vocab_size(words, checkpoint, vocab_size)
    return words


@contextmanager
def checked_output(output: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the name `output` once everything, checks included, went well."""
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists already and is not empty; name a new folder with --output")
    with atomic_folder(output) as folder:
        yield folder


@torch.no_grad()
def compare_logits(first: PreTrainedModel, second: PreTrainedModel) -> None:
    """Raise a `ValueError` where two models do not give the same logits on some random tokens."""
    length = min(PROBE_TOKENS, first.config.max_position_embeddings)
    ids = torch.randint(first.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    difference = (first(ids).logits - second(ids).logits).abs().max().item()
    if not difference <= MAX_LOGIT_DIFFERENCE:  # also where it is nan
        raise ValueError(
            f"the written model's logits differ from the read one's by {difference:.1e}, {MAX_LOGIT_DIFFERENCE:.0e} "
            f"at most: nothing was kept"
        )
    print(f"logits agree to {difference:.1e}")


def compare_tokenizers(words: PreTrainedTokenizerFast | None, folder: Path) -> None:
    """Raise a `ValueError` where the tokenizer written into a folder does not read texts as `words` does."""
    if words is None:
        return
    again = load_tokenizer(folder)
    conversation = [{"role": "user", "content": text} for text in PROBE_TEXTS[1:2]]
    for text in PROBE_TEXTS:
        if encode_text(again, text) != encode_text(words, text):
            raise ValueError(f"the written tokenizer reads {text!r} otherwise than the one read: nothing was kept")
    if encode_conversation(again, conversation) != encode_conversation(words, conversation):
        raise ValueError("the written tokenizer renders a conversation otherwise than the one read: nothing was kept")
    if not torch.equal(token_byte_lengths(again), token_byte_lengths(words)):
        raise ValueError("the written tokenizer's byte lengths differ from those of the one read: nothing was kept")
    print(f"tokenization agrees, {len(words):,} tokens")


def _check_vocab_size(words: PreTrainedTokenizerFast, tokenizer: str | Path, vocab_size: int) -> None:
    if len(words) != vocab_size:
        raise ValueError(
            f"the tokenizer of {tokenizer} has {len(words):,} tokens, the model {vocab_size:,}: they are not of the "
            f"same run; give the tokenizer that the model was trained with"
        )


def _warn_of_no_tokenizer(reason: str) -> None:
    print(f"warning: {reason}: only the model is written, nothing can turn text into its ids", file=sys.stderr)
