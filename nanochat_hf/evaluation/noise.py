"""How sure a score is, and whether two scores differ: standard errors, paired differences, the exact sign test."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

SURE = 0.05  # a difference with a larger two-sided p-value is called noise


@dataclass(frozen=True)
class Difference:
    """One score less another.

    Attributes:
        value: the difference of the means.
        stderr: its standard error; nan where a single item gives none.
        p_value: how often equally good models would differ at least as much.
        is_paired: whether the same items were compared one by one.
    """

    value: float
    stderr: float
    p_value: float
    is_paired: bool

    @property
    def is_noise(self) -> bool:
        return not self.p_value <= SURE


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the values' mean, as lm-eval gives it; nan for fewer than two values."""
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def error_of_share(share: float, num_items: int) -> float:
    """The same of `num_items` flags of which this share is 1."""
    return math.sqrt(share * (1 - share) / (num_items - 1)) if num_items > 1 else math.nan


def error_of_mean(errors: Sequence[float]) -> float:
    """Standard error of the mean of independent scores, e.g. of a group's tasks, from their own standard errors."""
    return math.hypot(*errors) / len(errors)


def paired_difference(before: Sequence[float], after: Sequence[float]) -> Difference:
    """`after` less `before`, item by item; of right/wrong flags the p-value is exact, else that of a normal mean."""
    changes = [b - a for a, b in zip(before, after, strict=True)]
    value, stderr = sum(changes) / len(changes), standard_error(changes)
    if set(before) | set(after) <= {0, 1}:
        p_value = sign_test(changes.count(-1), changes.count(1))
    else:
        p_value = normal_test(value, stderr)
    return Difference(value, stderr, p_value, is_paired=True)


def unpaired_difference(before: float, before_stderr: float, after: float, after_stderr: float) -> Difference:
    """`after` less `before` where only means are known: wider than a paired difference on the same items."""
    stderr = math.hypot(before_stderr, after_stderr)
    return Difference(after - before, stderr, normal_test(after - before, stderr), is_paired=False)


def mean_difference(differences: Sequence[Difference], scales: Sequence[float]) -> Difference:
    """The mean of independent differences, each times its scale, e.g. of the tasks of a group."""
    values = [scale * difference.value for scale, difference in zip(scales, differences, strict=True)]
    errors = [scale * difference.stderr for scale, difference in zip(scales, differences, strict=True)]
    value, stderr = sum(values) / len(values), error_of_mean(errors)
    return Difference(value, stderr, normal_test(value, stderr), all(d.is_paired for d in differences))


def normal_test(value: float, stderr: float) -> float:
    """Two-sided p-value of a normal mean; 1 where the standard error is unknown."""
    if value == 0 or math.isnan(stderr):
        return 1.0
    return math.erfc(abs(value) / stderr / math.sqrt(2)) if stderr else 0.0


def sign_test(losses: int, wins: int) -> float:
    """Two-sided binomial p-value of `wins` against `losses` under equal chances, exact in integers (McNemar)."""
    total = losses + wins
    tail = sum(math.comb(total, k) for k in range(min(losses, wins) + 1))
    return min(1.0, 2 * tail / 2**total)
