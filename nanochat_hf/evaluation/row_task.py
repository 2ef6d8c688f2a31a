"""The lm-eval task our CORE and ChatCORE tasks share: rows in memory, prompts and scores by our own code.

lm-eval's `ConfigurableTask` renders prompts by Jinja and draws shots its own way; a task of nanochat's is exact only
when it does neither. What remains of `Task` is what the rest of lm-eval calls: documents, requests, scores.
"""

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig
from lm_eval.filters import build_filter_ensemble


class RowTask(Task):
    """A task over rows: dicts with an `index`, in evaluation order.

    Subclasses give `request_type`, `fewshot_context`, `request_arguments`, `process_results`, `doc_to_text` and
    `doc_to_target`. Scores are `acc` and `centered`, each a mean over items.
    """

    VERSION = 1.0
    request_type: str

    def __init__(self, config: dict, rows: list[dict]):
        self._config = TaskConfig(**config)
        self._docs = [{"index": index, **row} for index, row in enumerate(rows)]
        self._instances = None
        self.fewshot_rnd = None
        self._filters = [build_filter_ensemble("none", [["take_first", None]])]

    def request_arguments(self, doc: dict, ctx) -> list[tuple]:
        """The arguments of an item's requests, in the order `process_results` reads their answers."""
        raise NotImplementedError

    def construct_requests(self, doc: dict, ctx, metadata: tuple = (None, None, None), **kwargs) -> list[Instance]:
        """The item's requests as lm-eval's instances."""
        return [
            Instance(request_type=self.request_type, doc=doc, arguments=arguments, idx=idx, metadata=metadata)
            for idx, arguments in enumerate(self.request_arguments(doc, ctx))
        ]

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
