"""ChatCORE as lm-eval tasks: ARC-Easy, ARC-Challenge, MMLU, GSM8K and HumanEval in nanochat's chat protocol.

    python scripts/evaluate.py --model nanochat_hf --model_args pretrained=DIR --tasks chatcore \
        --confirm_run_unsafe_code
    lm_eval --model hf --model_args pretrained=DIR,trust_remote_code=True --apply_chat_template \
        --include_path nanochat_hf/evaluation/tasks --tasks chatcore_gsm8k

Questions become one user turn of the model's own chat template. Choices: the likeliest of the letters after the
assistant token. The others: greedy generation, with the calculator where the model runs it (`--model nanochat_hf`).
Rows come from the Hub, or from `CHATCORE_DATA_DIR`, a folder of .jsonl files with rows of the same shape.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from math import comb
from pathlib import Path
from statistics import fmean

from datasets import Dataset, load_dataset

from ..data.messages import (
    LETTERS,
    messages_from_arc,
    messages_from_gsm8k,
    messages_from_humaneval,
    messages_from_mmlu,
)
from ..rewards import answer_format, extract_answer, is_correct
from .code_execution import passes_tests
from .json_lines import read_json_lines
from .row_task import MissingData, RowTask

SHUFFLE_SEED = 42
SAMPLING = {"temperature": 1.0, "top_k": 50}


def shuffled(rows: list[dict]) -> list[dict]:
    """Rows in nanochat's order, that of `Dataset.shuffle(seed=42)`."""
    order = Dataset.from_dict({"row": list(range(len(rows)))}).shuffle(seed=SHUFFLE_SEED)["row"]
    return [rows[i] for i in order]


class ChatTask(RowTask):
    """A chat task, configured by its YAML.

    Keys beside lm-eval's `task`, `dataset_path`, `dataset_name` and `test_split` (where the rows lie on the Hub):
    `row_format` (a key of the class's `formats`), `baseline`, `data_file` (in `CHATCORE_DATA_DIR`), or `rows` (a
    function that returns them).
    """

    own_keys = ("row_format", "data_file", "rows", "dataset_path", "dataset_name", "test_split")
    formats: dict[str, Callable[[dict], list[dict]]]

    def __init__(self, config: dict):
        if config["row_format"] not in self.formats:
            raise ValueError(
                f"{config['task']}: row_format={config['row_format']!r} is none of {', '.join(self.formats)}"
            )
        super().__init__(config)

    def load_rows(self) -> list[dict]:
        """Rows of the YAML's function, of the local file, or of the Hub, in nanochat's order."""
        if "rows" in self.own:
            named_rows = enumerate(self.own["rows"]())
        elif folder := self.data_dir("chatcore_data_dir"):
            named_rows = self._read(folder / self.own["data_file"])
        else:
            named_rows = ((f"{self.own['dataset_path']} row {i}", row) for i, row in enumerate(self._fetch()))
        rows = []
        for where, row in named_rows:
            try:
                self.check(row)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{where}: no {self.own['row_format']} row: {error}") from error
            rows.append(row)
        return rows if "rows" in self.own else shuffled(rows)

    def _read(self, path: Path) -> Iterator[tuple[str, dict]]:
        if not path.is_file():
            raise MissingData(path.name, f"no file {path}; CHATCORE_DATA_DIR must hold it, or be unset to use the Hub")
        return read_json_lines(path)

    def _fetch(self) -> list[dict]:
        name = self.own["dataset_path"]
        try:
            return load_dataset(name, self.own.get("dataset_name"), split=self.own["test_split"]).to_list()
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise MissingData(
                name,
                f"data set {name} cannot be had ({reason}); set CHATCORE_DATA_DIR to a folder with "
                f"{self.own['data_file']}",
            ) from error

    def check(self, row: dict) -> None:
        """Refuse a row that cannot be asked or scored, by an error that says why."""
        self.messages(row)

    def messages(self, row: dict) -> list[dict]:
        """The row as a conversation: the question, then the reference answer."""
        return self.formats[self.own["row_format"]](row)

    def fewshot_context(
        self,
        doc: dict,
        num_fewshot: int = 0,
        system_instruction: str | None = None,
        chat_template: Callable | None = None,
        **kwargs,
    ) -> str:
        """The conversation up to the assistant's turn, by the model's chat template."""
        if self.missing:
            return ""
        messages = self.messages(doc)[:1]
        if system_instruction:
            messages = [{"role": "system", "content": system_instruction}, *messages]
        if chat_template is not None:
            return chat_template(messages)
        tokenizer = self.tokenizer()
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{self.config.task} is a chat task and {self.tokenizer_path()} has no chat template; evaluate a chat "
                f"model, or save a chat_template.jinja beside its tokenizer"
            )
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def doc_to_text(self, doc: dict) -> str:
        return "" if self.missing else self.messages(doc)[0]["content"]

    def doc_to_target(self, doc: dict) -> str:
        if self.missing:
            return ""
        content = self.messages(doc)[1]["content"]
        return content if isinstance(content, str) else content[-1]["text"].strip()


class ChatChoiceTask(ChatTask):
    """Right when the right letter is the likeliest of the letters."""

    OUTPUT_TYPE = "multiple_choice"
    request_type = "loglikelihood"
    formats = {"arc": messages_from_arc, "mmlu": messages_from_mmlu}

    def check(self, row: dict) -> None:
        """As for every task; and there must be a choice."""
        super().check(row)
        if len(self.letters(row)) < 2:
            raise ValueError(f"needs at least two choices, found {self.letters(row)}")

    def letters(self, row: dict) -> list[str]:
        """What the model may answer; ARC's rows bring their own labels."""
        if self.own["row_format"] == "arc":
            return list(row["choices"]["label"])
        return list(LETTERS[: len(row["choices"])])

    def request_arguments(self, doc: dict, ctx: str) -> list[tuple]:
        """(conversation, letter) pairs."""
        return [(ctx, letter) for letter in self.letters(doc)]

    def score(self, doc: dict, results: list[tuple[float, bool]]) -> float:
        """1.0 when the first of the likeliest letters is the right one."""
        likelihoods = [likelihood for likelihood, _ in results]
        letter = self.letters(doc)[likelihoods.index(max(likelihoods))]
        return float(letter == self.messages(doc)[1]["content"])


class ChatGenerateTask(ChatTask):
    """Right when the generated answer passes; with `--metadata '{"num_samples": n}'`, n > 1, also pass@1 to pass@n.

    Generation settings are the YAML's `generation_kwargs`: greedy. Several samples are drawn instead, as in nanochat's
    RL where `--gen_kwargs` says nothing else.
    """

    OUTPUT_TYPE = "generate_until"
    request_type = "generate_until"
    formats = {"gsm8k": messages_from_gsm8k}

    def __init__(self, config: dict):
        super().__init__(config)
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be 1 or more, got {self.num_samples}")

    def check(self, row: dict) -> None:
        """As for every task; and a GSM8K row must state its number."""
        super().check(row)
        if self.has_format and extract_answer(row["answer"]) is None:
            raise ValueError(f"its answer must end with `#### number`, found {row['answer'][-40:]!r}")

    @property
    def has_format(self) -> bool:
        return self.own["row_format"] == "gsm8k"

    @property
    def num_samples(self) -> int:
        return int(self.metadata.get("num_samples", 1))

    def request_arguments(self, doc: dict, ctx: str) -> list[tuple]:
        """(conversation, generation settings), once a sample."""
        settings = dict(self.config.generation_kwargs)
        if self.num_samples > 1:
            settings = SAMPLING | settings | {"do_sample": True}
        return [(ctx, deepcopy(settings)) for _ in range(self.num_samples)]

    def is_right(self, doc: dict, completion: str) -> bool:
        """GSM8K: the number after the first `####` is the reference's."""
        return is_correct(completion, extract_answer(doc["answer"]))

    def score(self, doc: dict, results: list[str]) -> float:
        """The share of right samples."""
        return sum(self.is_right(doc, completion) for completion in results) / len(results)

    def process_results(self, doc: dict, results: list[str]) -> dict:
        """`acc`, `centered`; of GSM8K `format`, the share of answers in its form (a final `####`, tool spans closed);
        and with several samples `pass@k`: the chance that k of them hold a right one."""
        scores = super().process_results(doc, results)
        if self.has_format:
            scores["format"] = float("nan") if self.missing else fmean(answer_format(results))
        if self.num_samples > 1 and not self.missing:
            wrong = round((1 - scores["acc"]) * self.num_samples)
            scores |= {f"pass@{k}": 1 - comb(wrong, k) / comb(self.num_samples, k) for k in self._ks()}
        return scores

    def _ks(self) -> range:
        return range(1, self.num_samples + 1) if self.num_samples > 1 else range(0)

    def _more_scores(self) -> list[str]:
        return ["format"] * self.has_format + [f"pass@{k}" for k in self._ks()]

    def aggregation(self) -> dict:
        mean = super().aggregation()["acc"]
        return super().aggregation() | dict.fromkeys(self._more_scores(), mean)

    def higher_is_better(self) -> dict:
        return super().higher_is_better() | dict.fromkeys(self._more_scores(), True)


class ChatCodeTask(ChatGenerateTask):
    """HumanEval: the program must pass the row's tests. Runs model-written code, so lm-eval asks for
    `--confirm_run_unsafe_code`; see `code_execution.py` for what confines it."""

    UNSAFE_CODE = True
    formats = {"humaneval": messages_from_humaneval}

    def is_right(self, doc: dict, completion: str) -> bool:
        """Whether the completion's code passes the tests."""
        return passes_tests(doc["prompt"], completion, doc["test"], doc["entry_point"])
