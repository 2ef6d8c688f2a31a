"""Sampling: against transformers' own logits processors, and the promise that a row's draws are its own."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nanochat_hf.sampling import Sampling, likeliest, pick_tokens, row_uniforms

VOCAB = 40


@pytest.fixture
def logits():
    return 3 * torch.randn(1, VOCAB)


def drawn_shares(logits, sampling, num_draws=20_000, seen=None):
    """How often each token comes up when the uniform numbers sweep [0, 1) evenly."""
    uniforms = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    seen = None if seen is None else seen.expand(num_draws, -1)
    tokens, _ = pick_tokens(logits.expand(num_draws, -1), uniforms, sampling, seen)
    return torch.bincount(tokens, minlength=VOCAB) / num_draws


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.6),
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_k=500),
        Sampling(temperature=1.0, top_p=0.7),
        Sampling(temperature=0.8, top_k=10, top_p=0.9),
        Sampling(temperature=0.8, top_k=500, top_p=0.9),
        Sampling(temperature=1.0, top_p=1.0),
    ],
)
def test_draws_follow_transformers_processors(logits, sampling):
    expected = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k is not None:
        expected = TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p is not None:
        expected = TopPLogitsWarper(sampling.top_p)(None, expected)
    torch.testing.assert_close(drawn_shares(logits, sampling), expected.softmax(-1)[0], atol=2e-4, rtol=0)


def test_repetition_penalty_is_transformers_own(logits):
    before = torch.tensor([[3, 7, 7, 11]])
    seen = torch.zeros(1, VOCAB, dtype=torch.bool)
    seen[0, before[0]] = True
    expected = RepetitionPenaltyLogitsProcessor(1.7)(before, logits.clone()).softmax(-1)[0]
    shares = drawn_shares(logits, Sampling(temperature=1.0, repetition_penalty=1.7), seen=seen)
    torch.testing.assert_close(shares, expected, atol=2e-4, rtol=0)


def test_logprobs_are_of_the_whole_distribution_at_the_temperature(logits):
    sampling = Sampling(temperature=0.7, top_k=3)
    tokens, logprobs = pick_tokens(logits, torch.tensor([0.5], dtype=torch.float64), sampling)
    torch.testing.assert_close(logprobs, (logits / 0.7).log_softmax(-1)[0, tokens])


def test_greedy_takes_the_likeliest_and_scores_it_at_temperature_one(logits):
    tokens, logprobs = pick_tokens(logits, None, Sampling())
    assert tokens.item() == logits.argmax()
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[0, tokens])


def test_of_equal_scores_the_first_is_the_likeliest():
    scores = torch.tensor([[0.0, 2.0, 2.0], [-1.0, -1.0, -3.0], [1.0, float("nan"), 2.0]], requires_grad=True)
    assert likeliest(scores).tolist() == scores.argmax(-1).tolist() == [1, 0, 1]


def test_extreme_uniforms_stay_in_the_vocabulary():
    """The largest number below one must not fall off the end, nor the smallest on a token of probability zero."""
    logits = torch.full((2, 70_000), -50.0)
    logits[:, 100:110] = 0.0
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens, _ = pick_tokens(logits, uniforms, Sampling(temperature=0.2))
    assert tokens.tolist() == [100, 109]


def test_a_rows_numbers_depend_on_seed_and_row_alone():
    every = row_uniforms(5, range(8), 20)
    assert torch.equal(row_uniforms(5, [6, 2], 10), every[[6, 2], :10])
    assert len(every[:, 0].unique()) == 8
    assert not torch.equal(row_uniforms(6, range(8), 20), every)


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        Sampling(**wrong)


def test_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed"):
        row_uniforms(-1, [0], 3)
