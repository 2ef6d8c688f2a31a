"""`--model nanochat_hf`: lm-eval's hf model with our scoring and our decoding inside, for any causal model.

    python scripts/evaluate.py --model nanochat_hf --model_args pretrained=DIR --tasks core

Same requests, same answers as `--model hf`; but shared contexts run once, batches follow a token budget, only scored
positions reach the head, and generation runs the calculator. Model folders of this project need no
`trust_remote_code` here, and are not cut at their training length: nanochat scores long prompts whole.
"""

import logging

from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from .. import NanoChatHFConfig
from .scoring import score_continuations

logger = logging.getLogger(__name__)

REQUESTS_AT_ONCE = 8192  # tokenized and sorted together; bounds the memory for token ids
UNLIMITED = 10**9


@register_model("nanochat_hf")
class NanoChatHFLM(HFLM):
    """lm-eval model for NanoChatHF and any other causal model of transformers.

    Args:
        pretrained: folder, Hub id or a loaded model (then `tokenizer` is needed).
        max_batch_tokens: tokens of one forward when scoring, padding included; None chooses by device.
        max_length: longer prompts lose tokens on the left; None = the model's own limit, none for NanoChatHF.

    The other arguments are those of lm-eval's `HFLM`; `batch_size` is the number of rows that generate together.
    """

    def __init__(self, pretrained, max_batch_tokens: int | None = None, max_length: int | None = None, **kwargs):
        super().__init__(pretrained=pretrained, max_length=max_length, **kwargs)
        if self.backend != "causal":
            raise ValueError(
                f"--model nanochat_hf scores causal models, {pretrained} is {self.backend}; use --model hf"
            )
        self.max_batch_tokens = max_batch_tokens
        if max_length is None and isinstance(self.config, NanoChatHFConfig):
            self._max_length = UNLIMITED
        if hasattr(self, "accelerator"):  # HFLM spreads items over processes on several GPUs only
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each request's (context, continuation) strings."""
        answers = []
        with tqdm(total=len(requests), desc="scoring", disable=disable_tqdm or self.rank != 0) as progress:
            for start in range(0, len(requests), REQUESTS_AT_ONCE):
                window = [request.args for request in requests[start : start + REQUESTS_AT_ONCE]]
                pairs = self._encode_pairs(window)

                def on_scored(index, answer, window=window):
                    self.cache_hook.add_partial("loglikelihood", window[index], answer)
                    progress.update()

                answers += score_continuations(
                    self.model, pairs, self.max_length, self.max_batch_tokens, on_scored=on_scored
                )
        return answers

    def _encode_pairs(self, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """What `TemplateLM._encode_pair` gives, for many pairs at once."""
        contexts, wholes = [], []
        for context, continuation in pairs:
            stripped = context.rstrip()
            contexts.append(stripped)
            wholes.append(stripped + context[len(stripped) :] + continuation)
        ids = self._encode_texts({*contexts, *wholes} - {""})
        encoded = []
        for (raw_context, _), context, whole in zip(pairs, contexts, wholes, strict=True):
            if raw_context == "":
                tokens = self.tok_encode(whole, add_special_tokens=False)
                opened = tokens[:1] == [self.prefix_token_id]
                encoded.append((tokens[:1], tokens[1:]) if opened else ([self.prefix_token_id], tokens))
            else:
                context_ids = ids[context] if context else self.tok_encode("")
                encoded.append((context_ids, ids[whole][len(context_ids) :]))
        return encoded

    def _encode_texts(self, texts: set[str]) -> dict[str, list[int]]:
        """Token ids of texts, with the special tokens `tok_encode` would give them."""
        opening = self.tokenizer.decode(self.prefix_token_id)
        opened = [text for text in texts if text.startswith(opening)]
        plain = [text for text in texts if not text.startswith(opening)]
        special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        ids: dict[str, list[int]] = {}
        for group, options in ((opened, {"add_special_tokens": False}), (plain, special)):
            if group:
                ids.update(zip(group, self.tokenizer(group, **options)["input_ids"], strict=True))
        return ids
