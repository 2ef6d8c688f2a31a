"""The lm-eval task our CORE and ChatCORE tasks share: rows in memory, prompts and scores by our own code.

lm-eval's `ConfigurableTask` renders prompts by Jinja and draws shots its own way; a task of nanochat's is exact only
when it does neither. What remains of `Task` is what the rest of lm-eval calls: documents, requests, scores.
"""

import hashlib
import json
import logging
import os
from functools import lru_cache
from pathlib import Path
from unittest import mock

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig
from lm_eval.filters import build_filter_ensemble
from transformers import AutoTokenizer, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class MissingData(ValueError):
    """A task's rows are not there; `name` is the file or data set."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


class RowTask(Task):
    """A task over rows, scored 0 or 1 an item.

    Subclasses give `request_type`, `load_rows`, `fewshot_context`, `request_arguments`, `score`, `doc_to_text` and
    `doc_to_target`, and name in `own_keys` the keys of their YAML that lm-eval does not know; `baseline`, the accuracy
    of guessing (0 to 1), is everyone's. Every document gets an `index`, its place in evaluation order.

    Alone, a task without its data raises. In a group that says `in_group: true` it is left out by name and its scores
    are nan, so that the group's mean cannot look whole.
    """

    VERSION = 1.0
    request_type: str
    own_keys: tuple[str, ...] = ()

    def __init__(self, config: dict):
        own = ("class", "baseline", "in_group", *self.own_keys)
        self.own = {key: value for key, value in config.items() if key in own}
        config = {key: value for key, value in config.items() if key not in own}
        self.baseline: float = self.own["baseline"]
        self.metadata: dict = dict(config.get("metadata") or {})  # the YAML's, and the model arguments
        self.missing: str | None = None
        try:
            rows = self.load_rows()
        except MissingData as error:
            if not self.own.get("in_group"):
                raise ValueError(f"{config['task']}: {error}") from error
            logger.warning("%s: no %s; it is left out, and the group's score reads nan", config["task"], error.name)
            self.missing = error.name
            config["task_alias"] = f"{config['task']} (no {error.name})"
            rows = [{}] * int(os.environ.get("WORLD_SIZE", "1"))  # lm-eval wants a document in every process
        plain = {key: value for key, value in self.own.items() if isinstance(value, (str, int, float))}
        config["metadata"] = self.metadata | {key: plain[key] for key in ("baseline", *self.own_keys) if key in plain}
        self._config = TaskConfig(**{"output_type": self.OUTPUT_TYPE, **config})
        self._docs = [{"index": index, **row} for index, row in enumerate(rows)]
        self._instances = None
        self.fewshot_rnd = None
        self._filters = [build_filter_ensemble("none", [["take_first", None]])]

    def load_rows(self) -> list[dict]:
        """All rows in evaluation order; `self.own` holds the YAML's keys.

        Raises:
            MissingData: they are not there.
        """
        raise NotImplementedError

    def data_dir(self, key: str, default: str | None = None) -> Path | None:
        """The folder that metadata `key` names, else the environment (`key` in capitals), else `default`."""
        folder = self.metadata.get(key) or os.environ.get(key.upper()) or default
        return Path(folder).expanduser() if folder else None

    def request_arguments(self, doc: dict, ctx) -> list[tuple]:
        """The arguments of an item's requests, in the order `score` reads their answers."""
        raise NotImplementedError

    def score(self, doc: dict, results: list) -> float:
        """The item's accuracy, 0 to 1, from the answers to its requests."""
        raise NotImplementedError

    def build_all_requests(
        self, *, limit: int | None = None, world_size: int = 1, tokenizer_name: str = "", **kwargs
    ) -> None:
        """As in lm-eval, without its progress bar: one a task, and the work is over in a moment.

        Raises:
            ValueError: fewer items than processes; said by all of them, so that none waits for another.
        """
        num_items = min(limit or len(self._docs), len(self._docs))
        if num_items < world_size:
            raise ValueError(
                f"{self.config.task}: {world_size} processes have {num_items} items to share; start at most "
                f"{num_items}, or give a larger --limit"
            )
        if kwargs.get("cache_requests"):
            tokenizer_name += self._digest()
        with mock.patch("lm_eval.api.task.tqdm", lambda documents, **_: documents):
            super().build_all_requests(limit=limit, world_size=world_size, tokenizer_name=tokenizer_name, **kwargs)

    def _digest(self) -> str:
        """What requests depend on; lm-eval's cache of requests knows no more than the names of task and tokenizer."""
        keys = ("pretrained", "tokenizer", "revision", "add_bos_token", "num_samples")
        settings = [self.config.generation_kwargs, self.missing, *map(self.metadata.get, keys)]
        content = json.dumps([settings, self._docs], sort_keys=True, default=str)
        return "-" + hashlib.sha256(content.encode()).hexdigest()[:16]

    def construct_requests(self, doc: dict, ctx, metadata: tuple = (None, None, None), **kwargs) -> list[Instance]:
        """The item's requests as lm-eval's instances."""
        kind, arguments = self.request_type, None
        if self.missing:
            kind, arguments = "loglikelihood", [("missing", " data")]  # lm-eval needs one request a task
        return [
            Instance(request_type=kind, doc=doc, arguments=argument, idx=idx, metadata=metadata)
            for idx, argument in enumerate(arguments or self.request_arguments(doc, ctx))
        ]

    def process_results(self, doc: dict, results: list) -> dict:
        """`acc` and its centered score `(acc - baseline) / (1 - baseline)`; their means are the task's."""
        acc = float("nan") if self.missing else float(self.score(doc, results))
        return {"acc": acc, "centered": (acc - self.baseline) / (1 - self.baseline)}

    def tokenizer_path(self) -> str:
        """Folder or Hub id of the model's tokenizer, from the model arguments."""
        path = self.metadata.get("tokenizer") or self.metadata.get("pretrained")
        if not isinstance(path, str):
            raise ValueError(
                f"{self.config.task} builds its prompts with the model's tokenizer and was not told which: give "
                f"--model_args pretrained=..., or metadata={{'pretrained': ...}} beside a model object"
            )
        return path

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer the model will use."""
        trust = bool(self.metadata.get("trust_remote_code", False))
        return load_tokenizer(self.tokenizer_path(), str(self.metadata.get("revision", "main")), trust)

    def aggregation(self) -> dict:
        return {"acc": mean, "centered": mean}

    def higher_is_better(self) -> dict:
        return {"acc": True, "centered": True}

    def test_docs(self) -> list[dict]:
        return self._docs

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True


@lru_cache(maxsize=4)
def load_tokenizer(path: str, revision: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """A tokenizer, opened once for all tasks."""
    return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
