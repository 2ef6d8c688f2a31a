"""From CORE prompts to lm-eval requests: (context, continuation) strings cut exactly at a token border.

lm-eval's models take strings, CORE scores tokens. A model of lm-eval's encodes the whole string, then the context
alone with its trailing blanks moved to the continuation, and scores the tokens after it. `RequestBuilder` foresees
that: it cuts the prompt where the scored tokens start, and where blanks are moved it adds one request for exactly
those, so that their likelihood can be taken off again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from .core_prompts import scored_starts


@dataclass
class CoreItem:
    """One item as requests, and how to read their answers.

    Attributes:
        requests: (context, continuation) pairs.
        num_tokens: scored tokens of each option; 0 = the option has no token of its own and no request.
        option_requests: index into `requests` of each option, None where it has no request.
        blank_requests: for each option the index of the request that scores the blanks moved before it, or None.
        exact: whether lm-eval's models will score exactly the tokens CORE scores.
    """

    requests: list[tuple[str, str]] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    option_requests: list[int | None] = field(default_factory=list)
    blank_requests: list[int | None] = field(default_factory=list)
    exact: bool = True

    def mean_losses(self, answers: Sequence[tuple[float, bool]]) -> list[float]:
        """Mean loss in nats a scored token, one an option; nan for an option without tokens of its own."""
        losses = []
        for request, blanks, count in zip(self.option_requests, self.blank_requests, self.num_tokens, strict=True):
            if request is None:
                losses.append(float("nan"))
                continue
            total = answers[request][0] - (answers[blanks][0] if blanks is not None else 0.0)
            losses.append(-total / count)
        return losses


class RequestBuilder:
    """Cuts prompts for one tokenizer.

    Args:
        tokenizer: a fast tokenizer; its beginning-of-sequence token (else its end-of-sequence token) opens a prompt.
        add_bos_token: lm-eval's model argument of that name; None leaves it to the tokenizer.

    Raises:
        ValueError: a tokenizer without character offsets, or without any token to open a prompt with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_bos_token: bool | None = None):
        if not tokenizer.is_fast:
            raise ValueError(f"{tokenizer.name_or_path}: CORE needs a fast tokenizer (tokenizer.json) to cut prompts")
        opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if opening is None:
            raise ValueError(
                f"{tokenizer.name_or_path} has neither a bos nor an eos token; CORE's prompts open with one"
            )
        self.tokenizer = tokenizer
        self.opening_text = tokenizer.decode(opening)
        self.special_tokens = {} if add_bos_token is None else {"add_special_tokens": add_bos_token}
        # A tokenizer that opens every text itself gets the bare prompt; the others get the token spelled out.
        self.prefix = "" if self.encode(["a"])[0].ids[0] == opening else self.opening_text
        if self.encode([self.prefix + "a"])[0].ids[0] != opening:
            raise ValueError(f"{tokenizer.name_or_path} does not read {self.opening_text!r} back as its opening token")

    def encode(self, texts: list[str]):
        """Encodings as lm-eval's hf model makes them."""
        spelled_out = texts[0].startswith(self.opening_text)
        return self.tokenizer(
            texts, **({"add_special_tokens": False} if spelled_out else self.special_tokens)
        ).encodings

    def build(self, prompts: Sequence[str], task_type: str) -> CoreItem:
        """Requests of one item; `prompts` as `render_prompts` returns them."""
        texts = [self.prefix + prompt for prompt in prompts]
        encodings = self.encode(texts)
        sequences = [encoding.ids for encoding in encodings]
        starts = scored_starts(sequences, task_type)
        if task_type == "language_modeling":
            texts, encodings, sequences = texts[1:], encodings[1:], sequences[1:]
        item = CoreItem()
        index_of: dict[tuple[str, str], int] = {}
        blank_tokens: dict[str, list[int]] = {}

        def add(context: str, continuation: str) -> int:
            return index_of.setdefault((context, continuation), len(index_of))

        context_ids: dict[str, list[int]] = {}
        for text, encoding, ids, start in zip(texts, encodings, sequences, starts, strict=True):
            item.num_tokens.append(len(ids) - start)
            item.blank_requests.append(None)
            if start == len(ids):
                item.option_requests.append(None)
                continue
            cut = encoding.token_to_chars(start)[0]
            context, continuation = text[:cut], text[cut:]
            item.option_requests.append(add(context, continuation))
            stripped = context.rstrip()
            if stripped not in context_ids:
                context_ids[stripped] = self.encode([stripped])[0].ids
            kept = context_ids[stripped]
            item.exact &= ids[: len(kept)] == kept and len(kept) <= start
            if len(kept) < start:
                blanks = context[len(stripped) :]
                if stripped + blanks not in blank_tokens:
                    blank_tokens[stripped + blanks] = self.encode([stripped + blanks])[0].ids
                item.exact &= blank_tokens[stripped + blanks] == ids[:start]
                item.blank_requests[-1] = add(stripped, blanks) if blanks else None
        item.requests = list(index_of)
        return item
