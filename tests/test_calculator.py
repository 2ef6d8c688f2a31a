"""The calculator: nanochat's answers, and nothing beyond arithmetic and `.count()` whatever the text."""

import sys
import threading
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanochat_hf.calculator import MAX_EXPRESSION_CHARS, use_calculator


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("12*(3+4)", "84"),
        ("10/2", "5.0"),
        ("0.2*50", "10.0"),
        ("1,234 + 1", "1235"),
        (" 7 - 10 ", "-3"),
        ("-(-3)", "3"),
        ("560//10", "56"),
        (".5+5.", "5.5"),
        ("0.1+0.2", "0.30000000000000004"),
        ("42", "42"),
        ('"strawberry".count("r")', "3"),
        ("'banana'.count('an')", "2"),
        ('("cross-check").count("c")', "3"),
        ('"a,b,c".count(",")', "2"),
        ('"it\'s".count("\'")', "1"),
        ('"naïve".count("ï")', "1"),
        ('"abc".count("")', "4"),
    ],
)
def test_what_it_answers(expression, result):
    assert use_calculator(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "",
        " ",
        "1/0",
        "1.0/0",
        "5//0",
        "2**8",
        "2 * * 8",
        "1+",
        "()",
        "(1)(2)",
        "1 2",
        "007",
        "1e5",
        "1_000",
        "0x10",
        "3j",
        "1\n+1",
        "1+1\x00",
        "7%2",
        "1<2",
        "abs(1)",
        "__import__('os')",
        "(1).real",
        "'a'+'b'",
        "'a'*99999",
        "'abc'.upper()",
        "'abc'.count",
        "'abc'.count('a','b')",
        "'abc'.count('a', 0)",
        "'abc'.count('a').real",
        "('abc'.count('a')",
        "'abc').count('a')",
        "f'{x}'.count('a')",
        "b'abc'.count(b'a')",
        "'\\x61'.count('a')",
        "word.count('a')",
        "x='abc'.count('a')",
        "99999999999*99999999999",
        "9" * 400,
        "1" + "+1" * 200,
        "(" * 100 + "1" + ")" * 100 + "." * 60,
        "-" * 200 + "1",
        "9" * 200 + ".0",
    ],
)
def test_what_it_refuses(expression):
    assert use_calculator(expression) is None


def test_the_longest_expressions_are_quick():
    half = MAX_EXPRESSION_CHARS // 2
    longest = ["(" * (half - 1) + "1" + ")" * (half - 1), "9*" * half + "9", "1" + "-1" * (half - 1), "9" * (half * 2)]
    started = time.thread_time()  # of this thread alone, so that a busy machine fails nothing
    for expression in longest:
        use_calculator(expression)
    assert time.thread_time() - started < 1.0


def test_it_works_outside_the_main_thread():
    results = []
    worker = threading.Thread(target=lambda: results.append(use_calculator("1+(2*(3-4))")))
    worker.start()
    worker.join()
    assert results == ["-1"]


def test_it_answers_or_declines_near_the_recursion_limit():
    deep = "(1+" * 40 + "1" + ")" * 40

    def dive():
        try:
            return dive()
        except RecursionError:
            return use_calculator(deep)

    assert dive() in (None, "41")


# Pieces that could reach a name, an attribute or an import if any of them were evaluated.
_PIECES = st.sampled_from(
    ["1", "0", "9" * 18, ".", "+", "-", "*", "/", "//", "**", "(", ")", " ", ",", "%"]
    + ["'", '"', "a", ".count(", ".count", "f'", "\\", "\n", "\x00", "1e9", "0x", "é"]
    + ["__import__", "os", "lambda:", "[", "]", "{", "}", "import ", "eval("]
)
_EXPRESSIONS = st.one_of(
    st.text(max_size=300),
    st.text(alphabet="0123456789+-*/.() ,", max_size=300),
    st.lists(_PIECES, max_size=40).map("".join),
    st.builds(lambda a, b: f"{a!r}.count({b!r})", st.text(max_size=40), st.text(max_size=5)),
)


@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(_EXPRESSIONS)
@example("__import__('os').system('true')")
@example("().__class__.__bases__[0].__subclasses__()")
@example("'a'.count.__self__")
def test_fuzz_nothing_raises_hangs_or_reaches_beyond(expression):
    events, started = [], time.thread_time()
    _AUDITED.append(events)
    try:
        result = use_calculator(expression)
    finally:
        _AUDITED.pop()
    assert time.thread_time() - started < 1.0
    assert result is None or _is_number(result), (expression, result)
    assert not [e for e in events if e not in ("compile",)], (expression, events)


def _is_number(text):
    float(text)
    return len(text) < 40


_AUDITED: list[list[str]] = []  # the interpreter's own record of imports, opens, executions; hooks cannot be removed


def _hook(event, args):
    if _AUDITED:
        _AUDITED[-1].append(event)


sys.addaudithook(_hook)
