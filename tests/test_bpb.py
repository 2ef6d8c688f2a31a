import math

import pytest
import torch
from lm_eval_runs import token_losses

from nanochat_hf.evaluation.bpb import evaluate_bpb
from nanochat_hf.tokenizer import encode_documents, token_byte_lengths

TEXTS = ["Bits per byte do not depend on the tokenizer.", "Ünïcode takes more bytes than characters: 한국어.", "x = 1"]


def rows_of(tokenizer, texts):
    """One row a text: inputs and targets, both as lists."""
    return [(ids[:-1], ids[1:]) for ids in encode_documents(tokenizer, texts)]


def batch_of(rows):
    """Rows padded on the right, targets with -100."""
    width = max(len(inputs) for inputs, _ in rows)
    return {
        "input_ids": torch.tensor([inputs + [0] * (width - len(inputs)) for inputs, _ in rows]),
        "shift_labels": torch.tensor([targets + [-100] * (width - len(targets)) for _, targets in rows]),
    }


def test_equals_the_definition(tiny_model, tiny_tokenizer):
    lengths = token_byte_lengths(tiny_tokenizer)
    rows = rows_of(tiny_tokenizer, TEXTS)
    nats = sum(token_losses(tiny_model, inputs + targets[-1:]).sum().item() for inputs, targets in rows)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    expected = nats / (math.log(2) * num_bytes)
    assert evaluate_bpb(tiny_model, [batch_of(rows)], lengths) == pytest.approx(expected, rel=1e-5)
    apart = [batch_of([row]) for row in rows]
    assert evaluate_bpb(tiny_model, apart, lengths) == pytest.approx(expected, rel=1e-5), "batches do not matter"


def test_special_tokens_count_on_neither_side(tiny_model, tiny_tokenizer):
    lengths = token_byte_lengths(tiny_tokenizer)
    (inputs, targets), *_ = rows_of(tiny_tokenizer, TEXTS)
    bos = tiny_tokenizer.bos_token_id
    without = evaluate_bpb(tiny_model, [batch_of([(inputs, targets)])], lengths)
    # A document that follows: its <|bos|> is a target without bytes.
    followed = batch_of([(inputs + targets[-1:], targets + [bos])])
    assert evaluate_bpb(tiny_model, [followed], lengths) == pytest.approx(without, rel=1e-5)


def test_masked_targets_are_left_out(tiny_model, tiny_tokenizer):
    lengths = token_byte_lengths(tiny_tokenizer)
    (inputs, targets), *_ = rows_of(tiny_tokenizer, TEXTS)
    losses = token_losses(tiny_model, inputs + targets[-1:])
    kept = [i % 2 == 0 for i in range(len(targets))]
    masked = [target if keep else -100 for target, keep in zip(targets, kept, strict=True)]
    nats = sum(loss.item() for loss, keep in zip(losses, kept, strict=True) if keep)
    num_bytes = sum(lengths[target].item() for target, keep in zip(targets, kept, strict=True) if keep)
    score = evaluate_bpb(tiny_model, [batch_of([(inputs, masked)])], lengths)
    assert score == pytest.approx(nats / (math.log(2) * num_bytes), rel=1e-5)


def test_packed_rows_and_left_padding_score_as_rows_apart(tiny_model, tiny_tokenizer):
    lengths = token_byte_lengths(tiny_tokenizer)
    rows = rows_of(tiny_tokenizer, TEXTS)
    apart = evaluate_bpb(tiny_model, [batch_of([row]) for row in rows], lengths)
    packed = {
        "input_ids": torch.tensor([[token for inputs, _ in rows for token in inputs]]),
        "shift_labels": torch.tensor([[token for _, targets in rows for token in targets]]),
        "position_ids": torch.tensor([[position for inputs, _ in rows for position in range(len(inputs))]]),
    }
    assert evaluate_bpb(tiny_model, [packed], lengths) == pytest.approx(apart, rel=1e-5)
    width = max(len(inputs) for inputs, _ in rows)
    left = {
        "input_ids": torch.tensor([[0] * (width - len(inputs)) + inputs for inputs, _ in rows]),
        "shift_labels": torch.tensor([[-100] * (width - len(targets)) + targets for _, targets in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(inputs)) + [1] * len(inputs) for inputs, _ in rows]),
    }
    assert evaluate_bpb(tiny_model, [left], lengths) == pytest.approx(apart, rel=1e-5)


def test_nothing_to_score_is_said(tiny_model, tiny_tokenizer):
    lengths = token_byte_lengths(tiny_tokenizer)
    empty = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "shift_labels": torch.full((1, 4), -100)}
    with pytest.raises(ValueError, match="no target with bytes"):
        evaluate_bpb(tiny_model, [empty], lengths)
