"""Choosing the next token of every row of a batch: greedy, temperature, top-k, top-p, repetition penalty.

A row draws one uniform number a step and reads its token off the cumulated probabilities. The numbers of a row depend
on the seed and the row alone, so a row's text does not change when rows around it finish, or with the batch size.

    uniforms = row_uniforms(seed=0, rows=range(16), num_steps=64)
    tokens, logprobs = pick_tokens(logits, uniforms[:, 0], Sampling(temperature=1.0, top_k=50))
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

MIN_TEMPERATURE = 1e-5  # logits divided by less may leave fp32


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Applied in this order: repetition penalty, temperature, top-k, top-p.

    Attributes:
        temperature: divides the logits, 1e-5 or more; 0 = always the likeliest token.
        top_k: only the k likeliest tokens (None = all).
        top_p: only the likeliest tokens that together reach this probability (None = all).
        repetition_penalty: a token seen before has its logit divided by this if positive, else multiplied
            (arXiv 1909.05858); 1 = off.

    Raises:
        ValueError: a number outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if self.temperature and not MIN_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or {MIN_TEMPERATURE:g} and more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(
                f"top_k must be 1 or more, or None (on the command line 0) for all tokens, got {self.top_k}"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, or None for all tokens, got {self.top_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be above 0 (1 = off), got {self.repetition_penalty}")


def row_uniforms(seed: int, rows: Iterable[int], num_steps: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), (number of rows, num_steps) float64; row r's are a function of (seed, r) alone."""
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    return torch.from_numpy(np.stack([np.random.default_rng([seed, row]).random(num_steps) for row in rows]))


def pick_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor | None,
    sampling: Sampling,
    seen: torch.Tensor | None = None,
    with_logprobs: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The next token of every row, and how likely the model found it.

    Args:
        logits: (rows, vocab).
        uniforms: (rows,) in [0, 1); ignored when greedy.
        seen: (rows, vocab) bool, tokens the repetition penalty applies to.
        with_logprobs: without, None in their place; on a CPU they take longer than the choice itself.

    Returns:
        tokens (rows,) int64, and logprobs (rows,) float32 under softmax(logits / temperature) over the whole
        vocabulary (temperature 1 when greedy): what GRPO's trainer computes for the same token, whatever top-k did.
    """
    logits = logits.float()
    scale = sampling.temperature or 1.0
    scores = logits if scale == 1.0 else logits / scale
    allowed = scores
    if seen is not None:
        penalised = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        allowed = torch.where(seen, penalised, logits) / scale
    if sampling.temperature == 0:
        tokens = likeliest(allowed)
    else:
        tokens = _draw(allowed, uniforms, sampling)
    if not with_logprobs:
        return tokens, None
    return tokens, scores.gather(1, tokens[:, None])[:, 0] - scores.logsumexp(-1)


def likeliest(scores: torch.Tensor) -> torch.Tensor:
    """(rows,) the place of each row's largest score, the first of equals; on a CPU numpy finds it ten times as fast."""
    if scores.device.type != "cpu":
        return scores.argmax(-1)
    return torch.from_numpy(scores.detach().numpy().argmax(-1))


def _draw(scores: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Inverse transform sampling over the candidates that top-k and top-p leave."""
    candidates = None
    if sampling.top_k is not None and sampling.top_k < scores.shape[1]:
        scores, candidates = scores.topk(sampling.top_k)
    elif sampling.top_p is not None:
        scores, candidates = scores.sort(descending=True)
    # float64: over 65,536 tokens a float32 sum is off by more than many a token's whole probability
    cumulated = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    if sampling.top_p is not None:
        # The first candidate at which the sum reaches top_p is the last one allowed.
        last = torch.searchsorted(cumulated, total * sampling.top_p).clamp_(max=scores.shape[1] - 1)
        total = cumulated.gather(1, last)
    index = torch.searchsorted(cumulated, uniforms[:, None] * total, right=True).clamp_(max=scores.shape[1] - 1)
    return (index if candidates is None else candidates.gather(1, index))[:, 0]
