"""Rows of the embedded mini tasks: a yardstick for the tiny recipe that needs no download.

`core_mini` has one task of each kind CORE knows, made of the embedded corpus's validation documents (text that no
embedded run trains on). They exercise the same code as the 22 real tasks and tell a trained model from an untrained
one; they cannot be compared with anyone's CORE. `chatcore_mini` asks the test halves of the embedded chat data.

    python -c "from nanochat_hf.evaluation.mini_tasks import *; print(next_line_rows()[0])"
"""

import random
import re

from ..data.arithmetic import arithmetic_problems
from ..data.embedded_chat import letter_counting_problems, multiple_choice_questions
from ..data.embedded_text import embedded_documents

NUM_CORE_ROWS = 150
NUM_ARITHMETIC_ROWS = 500
NUM_CHAT_ROWS = 200
MAX_CONTEXT_LINES = 8


def _documents() -> list[list[str]]:
    """Held-out documents as lines, long enough to ask about."""
    documents = [text.split("\n") for text in embedded_documents("validation")]
    return [lines for lines in documents if len(lines) >= 6]


def next_line_rows() -> list[dict]:
    """multiple_choice: which line goes on? The wrong ones are lines of other documents."""
    rng = random.Random("next_line")
    documents = _documents()
    pool = sorted({line for lines in documents for line in lines if _is_telling(line)})
    rows = []
    for lines in rng.sample(documents, len(documents)):
        index = rng.randrange(3, len(lines))
        wrong = [line for line in rng.sample(pool, 8) if line not in lines][:3]
        if not _is_telling(lines[index]) or len(wrong) < 3:
            continue
        choices = [lines[index], *wrong]
        rng.shuffle(choices)
        rows.append({"query": _before(lines, index), "choices": choices, "gold": choices.index(lines[index])})
    return rows[:NUM_CORE_ROWS]


def last_word_rows() -> list[dict]:
    """language_modeling: the last word of a line, one that the lines before it have used already."""
    rng = random.Random("last_word")
    documents = _documents()
    rows = []
    for lines in rng.sample(documents, len(documents)):
        found = []
        for index in range(3, len(lines)):
            match = re.search(r" ([A-Za-z_]{3,})$", lines[index])
            context = _before(lines, index) + "\n" + (lines[index][: match.start()] if match else "")
            if match and re.search(rf"\b{match[1]}\b", context):
                found.append({"context": context, "continuation": match[1]})
        if found:
            rows.append(rng.choice(found))
    return rows[:NUM_CORE_ROWS]


def which_module_rows() -> list[dict]:
    """schema: which module's name stands above these lines of its source?"""
    rng = random.Random("which_module")
    sources = [lines for lines in _documents() if lines[0].startswith("# ")]
    modules = sorted({lines[0] for lines in sources})
    rows = []
    for lines in rng.sample(sources, len(sources)):
        body = "\n".join(lines[1:4]).strip("\n")
        if not body.strip():
            continue
        options = [lines[0], rng.choice([name for name in modules if name != lines[0]])]
        rng.shuffle(options)
        rows.append({"context_options": options, "continuation": body, "gold": options.index(lines[0])})
    return rows[:NUM_CORE_ROWS]


def arithmetic_rows() -> list[dict]:
    """Word problems whose sentence patterns no training problem has."""
    return arithmetic_problems("test", NUM_ARITHMETIC_ROWS)


def multiple_choice_rows() -> list[dict]:
    """Four-choice questions about functions no training question is about."""
    return multiple_choice_questions("test", NUM_CHAT_ROWS)


def letter_counting_rows() -> list[dict]:
    """Words no training row counts letters in."""
    return letter_counting_problems("test", NUM_CHAT_ROWS)


def _before(lines: list[str], index: int) -> str:
    return "\n".join(lines[max(0, index - MAX_CONTEXT_LINES) : index])


def _is_telling(line: str) -> bool:
    return len(line.strip()) >= 8
