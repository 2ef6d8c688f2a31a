"""CORE (DCLM's 22 tasks) as lm-eval tasks, equal item for item to nanochat's own evaluation.

    CORE_DATA_DIR=../shared/data/core lm_eval --model hf --model_args pretrained=DIR,trust_remote_code=True \
        --include_path nanochat_hf/evaluation/tasks --tasks core --limit 40

lm-eval's own normalised accuracies are per character or byte where CORE's are per token, and its few-shot draw is
another; so `CoreTask` builds its prompts itself and emits plain loglikelihood requests, which any lm-eval model
answers. A task is one YAML: file, shots, delimiter, kind and baseline.
"""

import logging
import os
from functools import lru_cache
from pathlib import Path

from transformers import AutoTokenizer

from .core_prompts import ROW_FIELDS, answer_text, fewshot_rows, load_rows, render_prompts, shuffled
from .core_requests import CoreItem, RequestBuilder
from .row_task import RowTask

logger = logging.getLogger(__name__)

DEFAULT_DATA_DIR = Path("~/.cache/nanochat_hf/core")


def core_data_dir() -> Path:
    """Where the task files lie: `CORE_DATA_DIR`, else where `scripts/get_core_data.py` puts them."""
    return Path(os.environ.get("CORE_DATA_DIR") or DEFAULT_DATA_DIR).expanduser()


@lru_cache(maxsize=4)
def request_builder(path: str, revision: str, trust_remote_code: bool, add_bos_token: bool | None) -> RequestBuilder:
    """The prompt cutter of a model folder or Hub id; shared by the 22 tasks."""
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    return RequestBuilder(tokenizer, add_bos_token)


class CoreTask(RowTask):
    """One CORE task, configured by its YAML.

    Keys of the YAML: `task`; `core_type` (multiple_choice, schema or language_modeling); `data_file` (a file in
    `core_data_dir()`) or `rows` (a function that returns them); `num_fewshot`; `target_delimiter` (between question
    and answer); `baseline` (accuracy of guessing, 0 to 1).

    In the group, a task whose file is missing becomes one nan item, so that CORE cannot look whole; alone, it raises.
    """

    OUTPUT_TYPE = "multiple_choice"
    request_type = "loglikelihood"

    def __init__(self, config: dict):
        own = ("class", "core_type", "baseline", "rows", "data_file", "in_group")
        given = {key: config[key] for key in own if key in config}
        config = {key: value for key, value in config.items() if key not in own}
        self.core_type, self.baseline = given["core_type"], given["baseline"]
        if self.core_type not in ROW_FIELDS:
            raise ValueError(f"{config['task']}: core_type={self.core_type!r} is none of {', '.join(ROW_FIELDS)}")
        config["metadata"] = {**config["metadata"], "core_type": self.core_type, "baseline": self.baseline}
        self.missing_file: str | None = None
        if "rows" in given:
            rows = shuffled(given["rows"]())
        else:
            rows = self._load(config, core_data_dir() / given["data_file"], given.get("in_group", False))
        super().__init__({**config, "output_type": self.OUTPUT_TYPE}, rows)
        self._pool: list[dict] = self._docs
        self._items: dict[int, CoreItem] = {}

    def _load(self, config: dict, path: Path, in_group: bool) -> list[dict]:
        if path.is_file():
            return load_rows(path, self.core_type)
        advice = (
            f"{config['task']}: no file {path}; set CORE_DATA_DIR to the folder that holds it, or run "
            f"`python scripts/get_core_data.py`"
        )
        if not in_group or not path.parent.is_dir():
            raise ValueError(advice)
        logger.warning("%s. This task is left out, and CORE is not whole: it will read nan.", advice)
        self.missing_file = path.name
        config["task_alias"] = f"{config['task']} (no file {path.name})"
        return [{}]

    def build_all_requests(self, *, limit: int | None = None, tokenizer_name: str = "", **kwargs) -> None:
        """As in lm-eval; the few-shot examples come from the file cropped to `limit`, as nanochat's do."""
        self._pool = self._docs[: int(limit)] if limit else self._docs
        self._items = {}
        # Requests depend on the crop and on the tokenizer: lm-eval's request cache is told both through this name.
        tokenizer_name = f"{tokenizer_name}-{self._tokenizer_path()}-limit{limit}".replace("/", "__")
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
        if self.missing_file:
            return []
        examples = fewshot_rows(self._pool, doc["index"], num_fewshot)
        if len(examples) < num_fewshot and doc["index"] == 0:
            logger.warning(
                "%s: only %d of %d shots, the crop has no more rows", self.config.task, len(examples), num_fewshot
            )
        return render_prompts(doc, examples, self.core_type, self.config.target_delimiter)

    def request_arguments(self, doc: dict, ctx: list[str]) -> list[tuple]:
        """(context, continuation) pairs of an item."""
        if self.missing_file:
            return [("missing", " file")]  # lm-eval needs one request a task
        return self._item(doc, ctx).requests

    def _item(self, doc: dict, prompts: list[str] | None = None) -> CoreItem:
        """The item's layout; built again where lm-eval took its requests from a cache."""
        if doc["index"] not in self._items:
            prompts = prompts or self.fewshot_context(doc, self.config.num_fewshot or 0)
            try:
                self._items[doc["index"]] = self._builder().build(prompts, self.core_type)
            except ValueError as error:
                raise ValueError(f"{self.config.task}, item {doc['index']}: {error}") from error
        return self._items[doc["index"]]

    def _tokenizer_path(self) -> str:
        metadata = self.config.metadata
        path = metadata.get("tokenizer") or metadata.get("pretrained")
        if not isinstance(path, str):
            raise ValueError(
                f"{self.config.task}: CORE cuts prompts at token borders, so it must know the tokenizer: give "
                f"--model_args pretrained=..., or metadata={{'pretrained': ...}} beside a model object"
            )
        return path

    def _builder(self) -> RequestBuilder:
        metadata = self.config.metadata
        return request_builder(
            self._tokenizer_path(),
            str(metadata.get("revision", "main")),
            bool(metadata.get("trust_remote_code", False)),
            metadata.get("add_bos_token"),
        )

    def process_results(self, doc: dict, results: list[tuple[float, bool]]) -> dict:
        """`acc` 0 or 1 and its centered score `(acc - baseline) / (1 - baseline)`; their means are the task's."""
        if self.missing_file:
            return {"acc": float("nan"), "centered": float("nan")}
        item = self._item(doc)
        if self.core_type == "language_modeling":
            acc = float(results[item.option_requests[0]][1])
        else:
            losses = item.mean_losses(results)
            acc = float(losses.index(min(losses)) == doc["gold"])
        return {"acc": acc, "centered": (acc - self.baseline) / (1 - self.baseline)}

    def doc_to_text(self, doc: dict) -> str:
        return "" if self.missing_file else self.fewshot_context(doc, 0)[0]

    def doc_to_target(self, doc: dict) -> str:
        return "" if self.missing_file else answer_text(doc, self.core_type)
