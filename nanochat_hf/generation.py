"""Decoding with the calculator in the loop: what chat, RL rollouts and the lm-eval model share.

`generate` cannot run a tool inside a turn: here, when a row closes a calculator call, the result's tokens are forced
into it while the other rows go on sampling. Identical prompts are read once (RL asks every question many times), rows
that have ended leave the batch, and the cache grows in place. Works with any causal LM of transformers through its
public forward.

    completions = generate_completions(model, tokenizer, [encode_prompt(tokenizer, messages)], max_new_tokens=64)
    tokenizer.decode(completions[0].token_ids, skip_special_tokens=True)
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from . import calculator
from .decode_compiled import COMPILED
from .decode_graph import GraphStep
from .decode_step import DecodeStep, can_step
from .kv_cache import growing_cache, select_rows
from .onednn import onednn_products
from .sampling import Sampling, pick_tokens, row_uniforms
from .tokenizer import encode_text


@dataclass
class Completion:
    """What a model wrote after one prompt.

    Attributes:
        token_ids: everything after the prompt, tool results and the token that ended the turn included.
        sampled: per token, whether the model chose it; False = forced (a tool's output span), not to be trained on.
        logprobs: per token, under softmax(logits / temperature) over the whole vocabulary; 0.0 where forced, and
            everywhere unless they were asked for.
        finished: whether the model ended the turn itself (else it ran into `max_new_tokens`).
    """

    token_ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False


class TurnTokens:
    """The ids that steer a turn: its ends, and the four around a tool call and its output.

    The calculator's four are None for a tokenizer without them; such a model answers without a tool.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        named = {name: special_token_id(tokenizer, f"<|{name}|>") for name in ("bos", "assistant_end")}
        self.ends = {i for i in (*named.values(), tokenizer.eos_token_id) if i is not None}
        self.python_start = special_token_id(tokenizer, "<|python_start|>")
        self.python_end = special_token_id(tokenizer, "<|python_end|>")
        self.output_start = special_token_id(tokenizer, "<|output_start|>")
        self.output_end = special_token_id(tokenizer, "<|output_end|>")

    @property
    def has_calculator(self) -> bool:
        return None not in (self.python_start, self.python_end, self.output_start, self.output_end)

    def tool_output(self, expression_ids: list[int]) -> list[int]:
        """The output span for a calculator call; empty when the calculator declines, as nanochat does."""
        expression = self.tokenizer.decode(expression_ids, clean_up_tokenization_spaces=False)
        result = calculator.use_calculator(expression)
        return [] if result is None else [self.output_start, *encode_text(self.tokenizer, result), self.output_end]


def special_token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """The id of a token, None where the tokenizer has no such token."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    return token_id if token_id is not None and tokenizer.convert_ids_to_tokens(token_id) == token else None


class Row:
    """One sequence being decoded: a prompt, what has been written so far, and the tool call it may be inside of."""

    def __init__(self, prompt: Sequence[int], turn: TurnTokens, use_calculator: bool):
        self.prompt, self.turn = list(prompt), turn
        self.completion = Completion()
        self.use_calculator = use_calculator and turn.has_calculator
        self._forced: deque[int] = deque()
        self._expression: list[int] | None = None

    def take(self, token: int, logprob: float) -> int:
        """Append the sampled token, or a forced one in its place; returns the one that counts."""
        forced = bool(self._forced)
        if forced:
            token, logprob = self._forced.popleft(), 0.0
        self.completion.token_ids.append(token)
        self.completion.sampled.append(not forced)
        self.completion.logprobs.append(logprob)
        if not forced:
            self._notice(token)
        return token

    def _notice(self, token: int) -> None:
        if token in self.turn.ends:
            self.completion.finished = True
        elif not self.use_calculator:
            return
        elif token == self.turn.python_start:
            self._expression = []
        elif token == self.turn.python_end:
            if self._expression is not None:
                self._forced.extend(self.turn.tool_output(self._expression))
            self._expression = None
        elif self._expression is not None:
            self._expression.append(token)


def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    use_calculator: bool = True,
    max_batch_size: int = 256,
    with_logprobs: bool = False,
) -> list[Completion]:
    """Complete every prompt; a prompt given several times is completed several times, independently.

    Args:
        prompts: token ids, e.g. of `encode_prompt`; not cut, whatever the model's training length.
        max_new_tokens: at most so many tokens after each prompt, tool output included.
        temperature: 0 = greedy.
        seed: the completion of prompt number i depends on (seed, i), not on its neighbours.
        max_batch_size: rows decoded together; bounds memory.
        with_logprobs: whether to compute them, which takes time.

    Returns:
        One `Completion` a prompt, in the prompts' order.

    Raises:
        ValueError: an empty prompt, a token id outside the model's vocabulary, a setting outside its range.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    if max_batch_size < 1:
        raise ValueError(f"max_batch_size must be 1 or more, got {max_batch_size}")
    turn = TurnTokens(tokenizer)
    rows = [Row(prompt, turn, use_calculator) for prompt in prompts]
    uniforms = row_uniforms(seed, range(len(rows)), max_new_tokens) if rows and sampling.temperature else None
    # Like lengths together: less padding. Equal prompts together: they share their reading.
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].prompt), rows[i].prompt))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), max_batch_size):
            chosen = order[start : start + max_batch_size]
            draws = None if uniforms is None else uniforms[chosen]
            decoding = decode(
                [rows[i] for i in chosen], model, sampling, draws, max_new_tokens, with_logprobs=with_logprobs
            )
            for _ in decoding:
                pass
    finally:
        model.train(was_training)
    return [row.completion for row in rows]


@torch.no_grad()
def decode(
    rows: list[Row],
    model: PreTrainedModel,
    sampling: Sampling,
    uniforms: torch.Tensor | None,
    max_new_tokens: int,
    cache: Cache | None = None,
    with_logprobs: bool = False,
) -> Iterator[None]:
    """Advance all rows together until each has ended; yields after every token, so a caller may stream or stop.

    Args:
        rows: written to as decoding goes.
        uniforms: (rows, max_new_tokens) from `row_uniforms`; None when greedy.
        cache: an earlier turn's cache, for a single row: it already holds the beginning of the row's prompt. When this
            generator has ended or is closed, it holds the prompt and all new tokens but the last.
    """
    device = model.device
    uniforms = None if uniforms is None else uniforms.to(device)
    is_kept = cache is not None
    cache = cache if is_kept else growing_cache(model.config)
    logits, mask = _read_prompts(rows, model, cache)
    lengths = torch.tensor([len(row.prompt) for row in rows], device=device)
    seen = _seen_tokens(rows, logits) if sampling.repetition_penalty != 1.0 else None
    only_order_matters = not (sampling.temperature or with_logprobs or seen is not None)
    fast_step = graph = None
    compiled = COMPILED.get(model)  # for one batch size: its rows stay to the end

    try:
        for step in range(max_new_tokens):
            draws = None if uniforms is None else uniforms[:, step]
            picked, logprobs = pick_tokens(logits, draws, sampling, seen, with_logprobs)
            logprobs = [0.0] * len(rows) if logprobs is None else logprobs.tolist()
            tokens = [
                token if row.completion.finished else row.take(token, logprob)
                for row, token, logprob in zip(rows, picked.tolist(), logprobs, strict=True)
            ]
            yield
            going = [i for i, row in enumerate(rows) if not row.completion.finished]
            if not going or step + 1 == max_new_tokens:
                return
            next_ids = torch.tensor(tokens, device=device)
            # Copying the cache costs about as much as a step: rows leave a quarter of the batch at a time.
            if len(going) <= 0.75 * len(rows) and compiled is None:
                if graph is not None:
                    graph.store()
                kept = torch.tensor(going, device=device)
                select_rows(cache, kept)
                rows, next_ids, lengths = [rows[i] for i in going], next_ids[kept], lengths[kept]
                uniforms = None if uniforms is None else uniforms[kept]
                mask = None if mask is None else mask[kept]
                seen = None if seen is None else seen[kept]
            if seen is not None:
                seen.scatter_(1, next_ids[:, None], True)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            if step == 0 and can_step(model):
                fast_step = compiled or DecodeStep(model, not only_order_matters, len(rows))
                graph = GraphStep(fast_step, cache) if compiled or device.type == "cuda" else None
            if graph is not None:
                logits = graph(next_ids, lengths + step, mask)
                if compiled is not None and not only_order_matters:
                    logits = compiled.apply_softcap(logits)
            elif fast_step is not None:
                logits = fast_step(next_ids, lengths + step, cache, mask)
            else:
                logits = _forward(model, next_ids[:, None], mask, (lengths + step)[:, None], cache)
    finally:
        if graph is not None and is_kept:
            graph.store()


def _read_prompts(rows: list[Row], model: PreTrainedModel, cache: Cache) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fill the cache with every row's prompt, each different prompt read once; returns the next token's logits.

    Returns:
        logits (rows, vocab), and the attention mask (rows, longest prompt), None when no row is padded.
    """
    for row in rows:
        if not row.prompt:
            raise ValueError("a prompt has no tokens; begin it with the tokenizer's <|bos|>")
        if not 0 <= min(row.prompt) <= max(row.prompt) < model.config.vocab_size:
            raise ValueError(
                f"a prompt holds token ids {min(row.prompt)} to {max(row.prompt)}, the model's vocabulary has "
                f"{model.config.vocab_size}: this tokenizer belongs to another model"
            )
    num_cached = int(cache.get_seq_length())
    assert num_cached == 0 or len(rows) == 1, "only a single row can go on from a cache"
    distinct: dict[tuple[int, ...], int] = {}
    place = [distinct.setdefault(tuple(row.prompt), len(distinct)) for row in rows]
    longest = max(map(len, distinct))
    ids = torch.zeros(len(distinct), longest, dtype=torch.long)
    mask = torch.zeros(len(distinct), longest, dtype=torch.long)
    for i, prompt in enumerate(distinct):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    position_ids = (mask.cumsum(1) - 1).clamp_(min=0)[:, num_cached:].to(model.device)
    ids, mask = ids[:, num_cached:].to(model.device), mask.to(model.device)
    with onednn_products(model):
        logits = _forward(model, ids, None if mask.all() else mask, position_ids, cache)
    if len(distinct) < len(rows):
        index = torch.tensor(place, device=model.device)
        select_rows(cache, index)
        logits, mask = logits[index], mask[index]
    return logits, None if mask.all() else mask


def _forward(model, input_ids, mask, position_ids, cache) -> torch.Tensor:
    """Logits (rows, vocab) of each row's last token."""
    output = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


def _seen_tokens(rows: list[Row], logits: torch.Tensor) -> torch.Tensor:
    """(rows, vocab) bool: which tokens each prompt holds."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for i, row in enumerate(rows):
        seen[i, torch.tensor(sorted(set(row.prompt)), device=seen.device)] = True
    return seen
