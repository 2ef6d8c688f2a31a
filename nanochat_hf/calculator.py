"""The calculator a model may call inside its turn: arithmetic, and `.count()` on string literals; nothing else.

The expression is parsed, never evaluated as code: arithmetic is walked node by node, a count is matched as a whole, so
no name, attribute or import can be reached. Size, depth and magnitude are bounded, so it is quick in any thread.

    use_calculator("12*(3+4)")                    -> "84"
    use_calculator("10/2")                        -> "5.0"      str() of the Python value, as nanochat prints it
    use_calculator('"strawberry".count("r")')     -> "3"
    use_calculator("2**8"), use_calculator("1/0") -> None       no output span
"""

import ast
import math
import operator
import re

MAX_EXPRESSION_CHARS = 256
MAX_DEPTH = 64
MAX_MAGNITUDE = 10**18  # beyond it the answer to a word problem is wrong anyway, and ints would grow without bound

_ARITHMETIC = re.compile(r"[0-9+\-*/.() ]+")
# A literal in quotes (perhaps in parentheses), `.count(`, another literal. No backslash, so no escapes to interpret.
_COUNT = re.compile(
    r"""\ *(?P<paren>\(\ *)?(?P<text>"[^"\\\n]*"|'[^'\\\n]*')\ *(?(paren)\)\ *)"""
    r"""\.\ *count\ *\(\ *(?P<part>"[^"\\\n]*"|'[^'\\\n]*')\ *\)\ *""",
    re.VERBOSE,
)
_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,  # nanochat's character set lets `//` through, and GSM8K has two of them
}
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class _Refused(Exception):
    """The expression is not one we evaluate."""


def use_calculator(expression: str) -> str | None:
    """The result of a tool call as text, or None when the calculator has no answer (then there is no output span).

    Args:
        expression: what stood between the python markers. Arithmetic of decimal numbers with `+ - * / //` and
            parentheses, commas dropped (`1,000+1`); or one string literal's `.count()` of another.

    Returns:
        `str()` of the Python value; None for anything else: other syntax, `**`, division by zero, results that are
        not finite or beyond 10**18, expressions over 256 characters or nested deeper than 64. Never raises.
    """
    if len(expression) > MAX_EXPRESSION_CHARS:
        return None
    count = _COUNT.fullmatch(expression)
    if count:
        return str(count["text"][1:-1].count(count["part"][1:-1]))
    arithmetic = expression.replace(",", "").strip(" ")
    if not _ARITHMETIC.fullmatch(arithmetic) or "**" in arithmetic:
        return None
    try:
        return str(_value(ast.parse(arithmetic, mode="eval").body, depth=0))
    except (_Refused, SyntaxError, ArithmeticError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, depth: int) -> int | float:
    if depth > MAX_DEPTH:
        raise _Refused
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        value = _BINARY[type(node.op)](_value(node.left, depth + 1), _value(node.right, depth + 1))
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        value = _UNARY[type(node.op)](_value(node.operand, depth + 1))
    else:
        raise _Refused
    if not math.isfinite(value) or abs(value) > MAX_MAGNITUDE:
        raise _Refused
    return value
