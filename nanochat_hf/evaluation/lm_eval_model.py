"""`--model nanochat_hf`: lm-eval's hf model with our scoring and our decoding inside, for any causal model.

    python scripts/evaluate.py --model nanochat_hf --model_args pretrained=DIR --tasks core

Same requests, same answers as `--model hf`; but shared contexts run once, batches follow a token budget, only scored
positions reach the head, and generation runs the calculator. Model folders of this project need no
`trust_remote_code` here.
"""

import json
import logging
import sys
from copy import deepcopy

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from ..generation import Completion, generate_completions
from . import TASKS_DIR
from .scoring import score_continuations

logger = logging.getLogger(__name__)

REQUESTS_AT_ONCE = 8192  # tokenized and sorted together; bounds the memory for token ids


@register_model("nanochat_hf")
class NanoChatHFLM(HFLM):
    """lm-eval model for NanoChatHF and any other causal model of transformers.

    Args:
        pretrained: folder, Hub id or a loaded model (then `tokenizer` is needed).
        max_batch_tokens: tokens of one forward when scoring, padding included; None chooses by device.
        max_length: longer prompts lose tokens on the left; None = the model's own limit. As in nanochat, a prompt
            and what is scored of it are together so long; lm-eval's hf model keeps one token more.
        max_batch_size: rows that generate together.

    The other arguments are those of lm-eval's `HFLM`; `batch_size` has no effect.

    Raises:
        ValueError: a model that cannot be loaded, or one that is not causal.
    """

    def __init__(
        self,
        pretrained,
        max_batch_tokens: int | None = None,
        max_length: int | None = None,
        max_batch_size: int | None = 256,
        **kwargs,
    ):
        kwargs = {"backend": "causal"} | kwargs  # lm-eval's guess knows only transformers' own types
        try:
            super().__init__(pretrained=pretrained, max_length=max_length, max_batch_size=max_batch_size, **kwargs)
        except OSError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{pretrained} is no model folder, and the Hub gives no such model: {reason}") from error
        if self.config.is_encoder_decoder:
            raise ValueError(f"--model nanochat_hf scores causal models, and {pretrained} is none; use --model hf")
        self.max_batch_tokens = max_batch_tokens
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

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each request's context, the calculator run inside the turn.

        Turn and tool markers stay in the text; the token that ended the turn does not. A stop string of the request
        that is not a special token cuts the text afterwards.
        """
        by_settings: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_settings.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm or self.rank != 0) as progress:
            for indices in by_settings.values():
                settings = normalize_gen_kwargs(deepcopy(requests[indices[0]].args[1]), self.max_gen_toks)
                stops, sampling = settings.pop("until", None) or [], self._sampling(settings)
                contexts = [requests[index].args[0] for index in indices]
                ids = self._encode_texts(set(contexts))
                room, seed = self.max_length - sampling["max_new_tokens"], sampling.pop("seed", 0)
                if room <= 0:
                    raise ValueError(
                        f"max_gen_toks={sampling['max_new_tokens']} leaves no room for a prompt in the model's "
                        f"{self.max_length} tokens: give --gen_kwargs max_gen_toks=N with a smaller N"
                    )
                # Windows of whole batches: what is done is in lm-eval's cache before the next one starts.
                for start in range(0, len(indices), self.max_batch_size):
                    window = range(start, min(start + self.max_batch_size, len(indices)))
                    prompts = [ids[contexts[i]][-room:] for i in window]
                    # A window's own seed: with the same one, each would draw the samples of the first again.
                    completions = generate_completions(
                        self.model, self.tokenizer, prompts, seed=seed + start, **sampling
                    )
                    for i, completion in zip(window, completions, strict=True):
                        text = self._text(completion, stops)
                        texts[indices[i]] = text
                        self.cache_hook.add_partial("generate_until", requests[indices[i]].args, text)
                    progress.update(len(window))
        return texts

    def _sampling(self, settings: dict) -> dict:
        """lm-eval's generation settings as those of `generate_completions`."""
        sampling = {"max_new_tokens": settings.pop("max_gen_toks"), "max_batch_size": self.max_batch_size}
        samples = settings.pop("do_sample", False)
        for name in ("temperature", "top_k", "top_p", "repetition_penalty", "seed"):
            if name in settings:
                value = settings.pop(name)
                if samples or name not in ("temperature", "top_k", "top_p"):
                    sampling[name] = value
        if samples:
            sampling.setdefault("temperature", 1.0)
        if settings:
            raise ValueError(
                f"generation settings {', '.join(sorted(settings))} are unknown to --model nanochat_hf; it takes "
                f"max_gen_toks, until, do_sample, temperature, top_k, top_p, repetition_penalty, seed"
            )
        return sampling

    def _text(self, completion: Completion, stops: list[str]) -> str:
        ids = completion.token_ids[:-1] if completion.finished else completion.token_ids
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]

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


def run_lm_eval() -> None:
    """lm-eval's own command line (`sys.argv`), with this class and this project's tasks known to it."""
    if not any(argument.split("=")[0] == "--include_path" for argument in sys.argv):
        sys.argv += ["--include_path", str(TASKS_DIR)]
    cli_evaluate()
