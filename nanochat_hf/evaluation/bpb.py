"""Bits per byte: a loss that does not depend on the tokenizer.

Nats over the targets that stand for bytes, divided by ln 2 and by those bytes. Special tokens have no bytes: they count
on neither side. The sums are exact whatever the packing, padding or masking of the rows; their quotient is the metric
module `bits_per_byte/`, which the `evaluate` library loads from its path.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist

from .bits_per_byte.bits_per_byte import BitsPerByte


@torch.no_grad()
def evaluate_bpb(
    model: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]], token_byte_lengths: torch.Tensor
) -> float:
    """Bits per byte of a NanoChatHF model over batches of rows, summed over all processes.

    Args:
        model: a NanoChatHFForCausalLM, in the mode and autocast context the caller wants.
        batches: dicts with `input_ids` (B, T), `shift_labels` (B, T; -100 is left out) and, for packed or padded rows,
            `position_ids` or `attention_mask`.
        token_byte_lengths: (vocab,) bytes of each token, 0 for special tokens.

    Raises:
        ValueError: no target with bytes in any batch.
    """
    device = next(model.parameters()).device
    token_byte_lengths = token_byte_lengths.to(device)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    num_bytes = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        inputs = {key: value.to(device) for key, value in batch.items()}
        targets = inputs.pop("shift_labels")
        lengths = token_byte_lengths[targets.clamp(min=0)] * (targets != -100)
        targets = torch.where(lengths > 0, targets, -100)
        nats += model(**inputs, shift_labels=targets, num_items_in_batch=1, skip_logits=True, use_cache=False).loss
        num_bytes += lengths.sum()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(nats)
        dist.all_reduce(num_bytes)
    # In memory: by default the library keeps what it adds up in a file of the cache folder.
    metric = BitsPerByte(keep_in_memory=True)
    return metric.compute(predictions=[nats.item()], references=[int(num_bytes.item())])["bits_per_byte"]
