"""A reward for programs: HumanEval-style tests passed, each program run confined (`evaluation/code_execution.py`).

    mixture: [{source: code, dataset: problems.jsonl}]      # rows {prompt, canonical_solution, test, entry_point}
    rewards: [nanochat_hf.code_reward.tests_passed]

Naming this reward in a recipe is consent to run what the model writes on this machine.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from .evaluation.code_execution import passes_tests
from .rewards import Completion, completion_text

_TURN_TOKENS = re.compile(r"<\|\w+\|>")


def tests_passed(
    completions: Sequence[Completion],
    prompts: Sequence[list[dict]],
    test: Sequence[str | None],
    entry_point: Sequence[str | None],
    **columns,
) -> list[float]:
    """1 where the completion's code passes the row's tests, else 0; 0 for rows without tests (a mixed recipe).

    Args:
        prompts: the conversations so far; the last message is the HumanEval prompt, whose imports the program gets.
        test: a `check` function for each row.
        entry_point: the function it is called with.
    """

    def passed(row: int) -> float:
        if not test[row]:
            return 0.0
        text = _TURN_TOKENS.sub("", completion_text(completions[row]))
        return float(passes_tests(prompts[row][-1]["content"], text, test[row], entry_point[row]))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(passed, range(len(completions))))
