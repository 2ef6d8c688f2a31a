"""Log-likelihoods of continuations, fast: what CORE, and any lm-eval multiple choice task, spends its time on.

Six levers, none of which changes a score: a context that several continuations share runs once and its cache is
reused; contexts whose continuations differ in the last token only run once altogether; batches are sorted by length
and filled to a budget of tokens; the head runs only where a token is scored; and of the last layer, contexts need keys
and values alone, so their forward pass stops there; on a CPU oneDNN does the products in fp32.

    score_continuations(model, [(context_ids, continuation_ids), ...])
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, modeling_utils

from ..kv_cache import select_rows
from ..onednn import onednn_products
from ..sampling import likeliest

HEADS_TAKE_MASKS = hasattr(modeling_utils, "slice_logits_to_keep")  # not yet in transformers 5.17
MIN_SHARED_TOKENS = 8  # below this a second forward costs more than the shared tokens save
MIN_PREFIX_TOKENS = 128  # the same where one row alone has the prefix, so that only its last layer is saved
MAX_LOGITS = 2**27  # elements of one (scored positions, vocabulary) tensor; 512 MiB in fp32


@dataclass
class _Row:
    """A distinct model input and the requests that read it: (request, continuation), scored at the row's end."""

    tokens: list[int]
    targets: list[tuple[int, list[int]]]

    @property
    def num_scored(self) -> int:
        return max(len(continuation) for _, continuation in self.targets)


@dataclass
class _Family:
    """Rows that continue one prefix of tokens; without a prefix it is a single row."""

    prefix: list[int]
    rows: list[_Row]

    @property
    def length(self) -> int:
        return len(self.prefix) + max(len(row.tokens) for row in self.rows)


def score_continuations(
    model: PreTrainedModel,
    requests: Sequence[tuple[list[int], list[int]]],
    max_length: int | None = None,
    max_batch_tokens: int | None = None,
    on_scored: Callable[[int, tuple[float, bool]], None] | None = None,
) -> list[tuple[float, bool]]:
    """Score continuations after their contexts.

    Args:
        model: any causal language model of transformers.
        requests: (context ids, continuation ids), neither empty.
        max_length: tokens of context and continuation together, as in nanochat; longer ones lose tokens on the left.
            None: no limit.
        max_batch_tokens: tokens of one forward, padding included; by default 1,024 on a CPU, else 65,536.
        on_scored: called with (request index, answer) as soon as an answer is there.

    Returns:
        A (log-likelihood in nats, whether each token is the argmax) pair a request, in order.

    Raises:
        ValueError: an empty context or continuation, or one that leaves no token of its context in max_length.
    """
    if max_batch_tokens is None:
        # A long context fills a CPU by itself, and one row needs no padding mask, which would double attention's work.
        max_batch_tokens = 1024 if model.device.type == "cpu" else 65536
    answers: list[tuple[float, bool] | None] = [None] * len(requests)
    families = _families(requests, max_length)
    with torch.inference_mode(), onednn_products(model):
        for batch in _batches(families, max_batch_tokens, model.config.get_text_config().vocab_size):
            logits = _shared_logits(model, batch) if batch[0].prefix else _single_logits(model, batch)
            rows = [row for family in batch for row in family.rows]
            for request, answer in _read_answers(logits, rows):
                answers[request] = answer
                if on_scored is not None:
                    on_scored(request, answer)
    return answers


def _families(requests: Sequence[tuple[list[int], list[int]]], max_length: int | None) -> list[_Family]:
    """Requests as rows without repetition, rows with one context together."""
    by_context: dict[tuple, dict[tuple, _Row]] = {}
    families = []
    for index, (context, continuation) in enumerate(requests):
        if not context or not continuation:
            raise ValueError(f"request {index}: context and continuation both need at least one token")
        if max_length is not None and len(continuation) >= max_length:
            raise ValueError(
                f"request {index}: its {len(continuation)} tokens to score leave no context in max_length={max_length}"
            )
        tokens = [*context, *continuation[:-1]]
        if max_length is not None and len(tokens) >= max_length:
            families.append(_Family([], [_Row(tokens[1 - max_length :], [(index, continuation)])]))
            continue
        rows = by_context.setdefault(tuple(context), {})
        rows.setdefault(tuple(continuation[:-1]), _Row(tokens, [])).targets.append((index, continuation))
    for context, rows in by_context.items():
        num_shared = len(context) - 1  # the last context token's output is scored, so it belongs to the rows
        if num_shared >= (MIN_SHARED_TOKENS if len(rows) > 1 else MIN_PREFIX_TOKENS):
            for row in rows.values():
                row.tokens = row.tokens[num_shared:]
            families.append(_Family(list(context[:num_shared]), list(rows.values())))
        else:
            families.extend(_Family([], [row]) for row in rows.values())
    return families


def _batches(families: list[_Family], max_batch_tokens: int, vocab_size: int) -> Iterator[list[_Family]]:
    """Families of one kind, longest first, as many as the budgets allow (one at least)."""
    for shared in (True, False):
        kind = sorted((f for f in families if bool(f.prefix) == shared), key=lambda f: f.length, reverse=True)
        batch: list[_Family] = []
        num_rows = num_scored = 0
        for family in kind:
            width = batch[0].length if batch else family.length
            num_rows += len(family.rows)
            num_scored += sum(row.num_scored for row in family.rows)
            # The cache of a shared prefix is repeated for each of its rows: memory, not work, so it may be larger.
            too_long = (len(batch) + 1) * width > max_batch_tokens or num_rows * width > 8 * max_batch_tokens
            if batch and (too_long or num_scored * vocab_size > MAX_LOGITS):
                yield batch
                batch = []
                num_rows, num_scored = len(family.rows), sum(row.num_scored for row in family.rows)
            batch.append(family)
        if batch:
            yield batch


def _pad(sequences: Sequence[Sequence[int]], device: torch.device, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (rows, longest) padded with 0, and the mask of real tokens."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(len(sequence))
        ids[row, place] = torch.tensor(sequence)
        mask[row, place] = True
    return ids.to(device), mask.to(device)


def _scored_positions(rows: Sequence[_Row], width: int, device: torch.device) -> torch.Tensor:
    """(rows, width) mask of the positions whose output is scored; rows are padded on the right."""
    end = torch.tensor([len(row.tokens) for row in rows])[:, None]
    count = torch.tensor([row.num_scored for row in rows])[:, None]
    position = torch.arange(width)[None]
    return ((position < end) & (position >= end - count)).to(device)


def _single_logits(model: PreTrainedModel, batch: list[_Family]) -> torch.Tensor:
    """Logits (scored positions, vocabulary), row after row. Right padding is in the future, so it needs no mask."""
    rows = [family.rows[0] for family in batch]
    ids, _ = _pad([row.tokens for row in rows], model.device, left=False)
    scored = _scored_positions(rows, ids.shape[1], model.device)
    return _scored_logits(model, scored, input_ids=ids, use_cache=False)


def _shared_logits(model: PreTrainedModel, batch: list[_Family]) -> torch.Tensor:
    """The same for families: prefixes padded on the left, their cache repeated, then all rows at once."""
    prefix, mask = _pad([family.prefix for family in batch], model.device, left=True)
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = not bool(mask.all())
    with _stop_at_last_keys(cache):
        model(
            input_ids=prefix,
            attention_mask=mask.long() if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    rows = [row for family in batch for row in family.rows]
    parents = torch.tensor([index for index, family in enumerate(batch) for _ in family.rows], device=model.device)
    if len(rows) > len(batch):
        select_rows(cache, parents)
    ids, real = _pad([row.tokens for row in rows], model.device, left=False)
    seen = mask.sum(1)[parents]
    scored = _scored_positions(rows, ids.shape[1], model.device)
    return _scored_logits(
        model,
        scored,
        input_ids=ids,
        attention_mask=torch.cat([mask[parents], torch.ones_like(real)], dim=1).long() if padded else None,
        position_ids=seen[:, None] + torch.arange(ids.shape[1], device=model.device),
        past_key_values=cache,
        use_cache=True,
    )


def _scored_logits(model: PreTrainedModel, scored: torch.Tensor, **inputs) -> torch.Tensor:
    """Logits (scored positions, vocabulary), row after row. Heads that take no mask compute more than is scored."""
    if HEADS_TAKE_MASKS or model.config.model_type == "nanochat_hf":
        return model(logits_to_keep=scored, **inputs).logits
    columns = scored.any(dim=0).nonzero()[:, 0]
    return model(logits_to_keep=columns, **inputs).logits[scored[:, columns]]


class _KeysRead(Exception):
    """The last layer has stored its keys and values."""


@contextmanager
def _stop_at_last_keys(cache: DynamicCache) -> Iterator[None]:
    """Ends a forward pass that is only to fill `cache` once the last layer's keys and values are in it.

    What follows there (attention, MLP, norm, head) would be read by no one. A model whose last layer stores nothing
    runs to its end.
    """
    layer = cache.layers[-1]

    def update_and_stop(*args, **kwargs):
        type(layer).update(layer, *args, **kwargs)
        raise _KeysRead

    layer.update = update_and_stop
    try:
        yield
    except _KeysRead:
        pass
    finally:
        del layer.update


def _read_answers(logits: torch.Tensor, rows: Sequence[_Row]) -> Iterator[tuple[int, tuple[float, bool]]]:
    """(request, (log-likelihood, is greedy)) of every request the rows hold; logits (scored positions, vocabulary)."""
    requests, positions, tokens = [], [], []
    start = 0
    for row in rows:
        for request, continuation in row.targets:
            first = start + row.num_scored - len(continuation)
            requests.append((request, len(continuation)))
            positions.extend(range(first, first + len(continuation)))
            tokens.extend(continuation)
        start += row.num_scored
    position, token = torch.tensor(positions, device=logits.device), torch.tensor(tokens, device=logits.device)
    logits = logits.float()
    log_likelihoods = (logits[position, token] - logits.logsumexp(-1)[position]).tolist()
    greedy = (likeliest(logits)[position] == token).tolist()
    done = 0
    for request, count in requests:
        span = slice(done, done + count)
        yield request, (sum(log_likelihoods[span]), all(greedy[span]))
        done += count
