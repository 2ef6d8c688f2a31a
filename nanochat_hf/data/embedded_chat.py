"""Chat data every Python installation carries: its own functions and words, asked about in four ways.

The docstrings of the standard library give questions with short answers and four-choice questions, the words of the
language reference give letters to count; arithmetic and small talk have files of their own beside this one. Each
generator takes a split; what train and test ask about (functions, sentences, words) is disjoint. The same arguments
give the same rows on one Python version.

    python -c "from nanochat_hf.data.embedded_chat import *; print(multiple_choice_questions('test', 2))"
"""

import functools
import importlib
import inspect
import random
import re
import zlib
from collections import Counter

from ..calculator import use_calculator

# In every build of Python on every platform, and quick to import.
_MODULES = (
    "abc argparse ast atexit base64 binascii bisect builtins calendar cmath codecs collections colorsys configparser "
    "contextlib copy copyreg csv dataclasses datetime decimal difflib dis email enum errno filecmp fileinput fnmatch "
    "fractions functools gc getopt getpass gettext glob gzip hashlib heapq hmac html importlib inspect io ipaddress "
    "itertools json keyword linecache locale logging marshal math mimetypes numbers operator os os.path pathlib pickle "
    "pickletools pkgutil platform plistlib pprint py_compile pyclbr queue quopri random re reprlib runpy sched secrets "
    "select shelve shlex shutil signal socket stat statistics string struct subprocess sys sysconfig tarfile tempfile "
    "textwrap threading time timeit tokenize traceback tracemalloc types typing unicodedata urllib.parse uuid "
    "warnings weakref zipfile zlib"
).split()
_TYPES = (str, bytes, bytearray, list, tuple, dict, set, frozenset, int, float, complex, range, memoryview)
_DEFINED_IN = {"os": ("posix", "nt"), "os.path": ("posixpath", "ntpath", "genericpath"), "threading": ("_thread",)}

_TEST_SHARE = 5  # one in five functions and words is for test

DOCSTRING_QUESTIONS = {
    "train": ("What does {name} do?", "What is {name} for?", "Explain {name}.", "Tell me what {name} does."),
    "test": ("What does {name} do?", "Tell me about {name}."),
}
MODULE_QUESTION = "Which module has the function {name}?"
SENTENCE_QUESTION = "Which sentence describes {name}?"
LETTER_QUESTIONS = {
    "train": (
        'How many times does the letter "{letter}" occur in "{word}"?',
        'Count the letter "{letter}" in the word "{word}".',
        'How often does the letter "{letter}" occur in "{word}"?',
        'In the word "{word}", how often does the letter "{letter}" occur?',
    ),
    "test": (
        'In "{word}", how many times does the letter "{letter}" occur?',
        'In the word "{word}", count the letter "{letter}".',
    ),
}


def docstring_conversations(split: str, num_rows: int | None = None, seed: int = 0) -> list[dict]:
    """Rows `{messages}`: what a function does, answered by the first sentence of its docstring; None gives them all."""
    rows = []
    for module, name, sentence in library_functions(split):
        for pattern in DOCSTRING_QUESTIONS[split]:
            question = {"role": "user", "content": pattern.format(name=_full_name(module, name))}
            rows.append({"messages": [question, {"role": "assistant", "content": sentence}]})
    return take_rows(rows, num_rows, seed, "docstrings")


def multiple_choice_questions(split: str, num_rows: int, seed: int = 0) -> list[dict]:
    """Rows `{question, choices, answer}`, four choices, `answer` the index of the right one; none twice.

    Half ask which module has a function, half which sentence describes it. Wrong choices come from the same split.
    """
    functions = library_functions(split)
    owners = Counter(name for _, name, _ in _all_functions())
    modules = sorted({module for module, _, _ in functions if module in _MODULES})
    # A name that two modules have (json.dumps, pickle.dumps) has two right answers.
    owned = [f for f in functions if owners[f[1]] == 1 and f[0] in _MODULES and f[0] != "builtins"]
    rng = random.Random(f"{split} {seed}")
    rows: dict[tuple, dict] = {}
    while len(rows) < num_rows:
        if rng.random() < 0.5:
            module, name, _ = rng.choice(owned)
            question, right, wrong = MODULE_QUESTION.format(name=name), module, rng.sample(modules, 4)
        else:
            module, name, right = rng.choice(functions)
            question = SENTENCE_QUESTION.format(name=_full_name(module, name))
            # bytes.lower's sentence would describe str.lower too.
            wrong = [sentence for _, other, sentence in rng.sample(functions, 8) if other != name]
        wrong = list(dict.fromkeys(choice for choice in wrong if choice != right))[:3]
        if len(wrong) < 3:
            continue
        choices = [right, *wrong]
        rng.shuffle(choices)
        rows[(question, *choices)] = {"question": question, "choices": choices, "answer": choices.index(right)}
    return list(rows.values())


def letter_counting_problems(split: str, num_rows: int, seed: int = 0) -> list[dict]:
    """Rows `{question, answer, final}`: how often a letter occurs in a word; `answer` in GSM8K's form, none twice.

    The word stands in quotes in the question and in parentheses in the expression, so that byte-level BPE splits both
    the same way and a small model can copy it token by token.
    """
    _check_split(split)
    words = [word for word in _words() if _is_test(word) == (split == "test")]
    rng = random.Random(f"{split} {seed}")
    rows: dict[str, dict] = {}
    while len(rows) < num_rows:
        word = rng.choice(words)
        most_common = max(word, key=word.count)  # else nearly every answer would be 1
        letter = rng.choice([most_common, rng.choice(word), rng.choice("abcdefghijklmnopqrstuvwxyz")])
        question = rng.choice(LETTER_QUESTIONS[split]).format(word=word, letter=letter)
        expression = f'("{word}").count("{letter}")'
        result = use_calculator(expression)
        answer = f"I count <<{expression}={result}>>{result}.\n#### {result}"
        rows[question] = {"question": question, "answer": answer, "final": result}
    return list(rows.values())


def take_rows(rows: list[dict], num_rows: int | None, seed: int, what: str) -> list[dict]:
    """The first `num_rows` (None: all) of the shuffled rows; asking for more than there are is a ValueError."""
    if num_rows is not None and num_rows > len(rows):
        raise ValueError(f"{what} has {len(rows)} rows, not {num_rows}; ask for fewer rows, or for more epochs")
    random.Random(seed).shuffle(rows)
    return rows[:num_rows]


def library_functions(split: str) -> list[tuple[str, str, str]]:
    """(module, name, sentence) of every function of the split; no sentence is in both splits."""
    _check_split(split)
    return [f for f in _all_functions() if _is_test(f[2]) == (split == "test")]


@functools.cache
def _all_functions() -> tuple[tuple[str, str, str], ...]:
    owners = [(importlib.import_module(module), module) for module in _MODULES]
    owners += [(type_, type_.__name__) for type_ in _TYPES]
    found = {}
    for owner, module in owners:
        names = getattr(owner, "__all__", None) or vars(owner)
        for name in sorted(name for name in names if not name.startswith("_")):
            value = getattr(owner, name, None)
            if not inspect.isroutine(value):
                continue
            home = getattr(value, "__module__", None)
            is_own = isinstance(owner, type) or home in (module, f"_{module}", *_DEFINED_IN.get(module, ()))
            sentence = first_sentence(inspect.getdoc(value) or "")
            if is_own and sentence:
                found[module, name] = sentence
    return tuple((module, name, sentence) for (module, name), sentence in sorted(found.items()))


def first_sentence(docstring: str) -> str | None:
    """The docstring's first full sentence when it is fit for a short answer (15 to 80 characters), else None."""
    for paragraph in docstring.split("\n\n")[:2]:
        sentence = re.match(r"[A-Z].*?\.(?=\s|$)", " ".join(paragraph.split()))
        is_whole = sentence and not re.search(r"\.\.$|\b(e\.g|i\.e|etc|vs)\.$", sentence[0])
        if is_whole and 15 <= len(sentence[0]) <= 80 and sentence[0].isascii():
            return sentence[0]
    return None


@functools.cache
def _words() -> tuple[str, ...]:
    from pydoc_data.topics import topics

    counts = Counter(word for text in topics.values() for word in re.findall(r"\b[a-z]{3,9}\b", text))
    return tuple(sorted(word for word, count in counts.items() if count >= 3))


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"embedded chat data has the splits train and test, not {split!r}")


def _full_name(module: str, name: str) -> str:
    return name if module == "builtins" else f"{module}.{name}"


def _is_test(key: str) -> bool:
    return zlib.crc32(key.encode()) % _TEST_SHARE == 0
