"""CORE (DCLM's 22 tasks) as lm-eval tasks, equal item for item to nanochat's own evaluation.

    CORE_DATA_DIR=../shared/data/core lm_eval --model hf --model_args pretrained=DIR,trust_remote_code=True \
        --include_path nanochat_hf/evaluation/tasks --tasks core --limit 40

lm-eval's own normalised accuracies are per character or byte where CORE's are per token, and its few-shot draw is
another; so `CoreTask` builds its prompts itself and emits plain loglikelihood requests, which any lm-eval model
answers. A task is one YAML: file, shots, delimiter, kind and baseline.
"""

import logging
from functools import lru_cache

from lm_eval.utils import warning_once
from transformers import PreTrainedTokenizerBase

from . import CORE_DATA_DIR
from .core_prompts import ROW_FIELDS, answer_text, fewshot_rows, read_rows, render_prompts, shuffled
from .core_requests import CoreItem, RequestBuilder
from .row_task import MissingData, RowTask

logger = logging.getLogger(__name__)


class CoreTask(RowTask):
    """One CORE task, configured by its YAML.

    Keys beside lm-eval's `task`, `num_fewshot` and `target_delimiter` (between question and answer): `core_type`
    (multiple_choice, schema or language_modeling), `baseline`, and `data_file` (a file in the folder CORE_DATA_DIR) or
    `rows` (a function that returns them).
    """

    OUTPUT_TYPE = "multiple_choice"
    request_type = "loglikelihood"
    own_keys = ("core_type", "data_file", "rows")

    def __init__(self, config: dict):
        self.core_type: str = config["core_type"]
        if self.core_type not in ROW_FIELDS:
            raise ValueError(f"{config['task']}: core_type={self.core_type!r} is none of {', '.join(ROW_FIELDS)}")
        super().__init__(config)
        self._pool: list[dict] = self._docs
        self._items: dict[int, CoreItem] = {}

    def load_rows(self) -> list[dict]:
        """The task file, or what the YAML's function makes, in CORE's order."""
        if "rows" in self.own:
            return shuffled(self.own["rows"]())
        path = self.data_dir("core_data_dir", CORE_DATA_DIR) / self.own["data_file"]
        if path.is_file():
            return shuffled(read_rows(path, self.core_type))
        advice = "set CORE_DATA_DIR to the folder that holds it, or run `python scripts/get_core_data.py`"
        if not path.parent.is_dir():
            raise ValueError(f"no folder {path.parent} with CORE's task files; {advice}")
        raise MissingData(path.name, f"no file {path}; {advice}")

    def build_all_requests(self, *, limit: int | None = None, tokenizer_name: str = "", **kwargs) -> None:
        """As in lm-eval; the few-shot examples come from the file cropped to `limit`, as nanochat's do."""
        self._pool = self._docs[: int(limit)] if limit else self._docs
        self._items = {}
        tokenizer_name += f"-limit{limit}"  # shots depend on the crop, which lm-eval's cache of requests does not know
        if kwargs.get("apply_chat_template"):
            warning_once(logger, "CORE's prompts are plain text: --apply_chat_template does not change them")
        super().build_all_requests(limit=limit, tokenizer_name=tokenizer_name, **kwargs)
        inexact = sum(not item.exact for item in self._items.values())
        if inexact:
            logger.warning(
                "%s: in %d of %d items a token border falls inside a character or merges across the cut; their scores "
                "may differ from CORE's",
                self.config.task,
                inexact,
                len(self._items),
            )

    def fewshot_context(self, doc: dict, num_fewshot: int, **kwargs) -> list[str]:
        """The prompts of an item, one an option (language modeling: without and with the continuation)."""
        if self.missing:
            return []
        examples = fewshot_rows(self._pool, doc["index"], num_fewshot)
        if len(examples) < num_fewshot and doc["index"] == 0:
            logger.warning("%s: %d shots, not %d: the crop has no more", self.config.task, len(examples), num_fewshot)
        return render_prompts(doc, examples, self.core_type, self.config.target_delimiter)

    def request_arguments(self, doc: dict, ctx: list[str]) -> list[tuple]:
        """(context, continuation) pairs of an item."""
        return self._item(doc, ctx).requests

    def _item(self, doc: dict, prompts: list[str] | None = None) -> CoreItem:
        """The item's layout; built again where lm-eval took its requests from a cache."""
        if doc["index"] not in self._items:
            prompts = prompts or self.fewshot_context(doc, self.config.num_fewshot or 0)
            builder = request_builder(self.tokenizer(), self.metadata.get("add_bos_token"))
            try:
                self._items[doc["index"]] = builder.build(prompts, self.core_type)
            except ValueError as error:
                raise ValueError(f"{self.config.task}, item {doc['index']}: {error}") from error
        return self._items[doc["index"]]

    def score(self, doc: dict, results: list[tuple[float, bool]]) -> float:
        """1.0 for the lowest mean token loss on the right option, or for a continuation that is all argmax."""
        item = self._item(doc)
        if self.core_type == "language_modeling":
            return float(results[item.option_requests[0]][1])
        losses = item.mean_losses(results)
        return float(losses.index(min(losses)) == doc["gold"])

    def doc_to_text(self, doc: dict) -> str:
        return "" if self.missing else self.fewshot_context(doc, 0)[0]

    def doc_to_target(self, doc: dict) -> str:
        return "" if self.missing else answer_text(doc, self.core_type)


@lru_cache(maxsize=4)
def request_builder(tokenizer: PreTrainedTokenizerBase, add_bos_token: bool | None) -> RequestBuilder:
    """The prompt cutter of a tokenizer, shared by the tasks."""
    return RequestBuilder(tokenizer, add_bos_token)
