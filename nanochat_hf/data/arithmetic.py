"""Arithmetic word problems, made at run time: what the tiny line's model learns to solve with the calculator.

A problem is a few sentences with numbers, and a solution in GSM8K's form, so everything made for GSM8K serves it:

    Mia is 9 years old. Tom had 23 coins. He found 12 more. How many coins does Tom have now?
    That makes <<23+12=35>>35.
    #### 35

Both splits draw on the same names, things and verbs, but every sentence of a test problem follows a pattern that no
training problem follows, so the score measures reading, not recall. A result inside `<<>>` is what the calculator
prints (`6.0` for 12/2), the text after it the plain number.

    .venv/bin/python -m nanochat_hf.data.arithmetic      # ten problems of each split
"""

import random

from ..calculator import use_calculator
from .arithmetic_patterns import (
    BOXES,
    EARLY_DAYS,
    GAINED,
    LATE_DAYS,
    LOST,
    MEN,
    PATTERNS,
    PLACES,
    THINGS,
    WOMEN,
)

ONE_STEP = ("change", "change", "change", "of_them", "more_than", "difference", "together", "groups", "price", "share")
TWO_STEPS = ("change_twice", "change_twice", "groups_change", "money_left", "more_together", "share_after")


def arithmetic_problems(
    split: str, num_problems: int, seed: int = 0, two_steps: float = 0.35, distractors: float = 0.3
) -> list[dict]:
    """Word problems, none twice, the same ones for the same arguments on every machine.

    Args:
        split: "train" or "test"; they share no sentence pattern.
        num_problems: how many.
        seed: another seed gives other problems of the same split.
        two_steps: fraction of problems that need two calculator calls.
        distractors: fraction of problems with a sentence whose number does not matter.

    Returns:
        rows `{question, answer, final}`: `answer` is the solution in GSM8K's form, `final` the number after `####`.
    """
    if split not in ("train", "test"):
        raise ValueError(f"arithmetic problems have the splits train and test, not {split!r}")
    for name, fraction in (("two_steps", two_steps), ("distractors", distractors)):
        if not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
            raise ValueError(f"{name} is a fraction between 0 and 1, got {fraction!r}")
    rng = random.Random(f"{split} {seed}")
    problems: dict[str, dict] = {}
    while len(problems) < num_problems:
        story = _Story(rng, split)
        kind = rng.choice(TWO_STEPS if rng.random() < two_steps else ONE_STEP)
        getattr(story, kind)()
        if rng.random() < distractors:
            story.distract()
        problem = story.problem()
        problems[problem["question"]] = problem
    return list(problems.values())


class _Story:
    """One problem in the making: its people and things, the sentences said so far, and the calculator's steps."""

    def __init__(self, rng: random.Random, split: str):
        self.rng, self.split = rng, split
        self.sentences: list[str] = []
        self.steps: list[tuple[str, int]] = []
        hero = rng.choice(MEN + WOMEN)
        he, his, him, others = ("he", "his", "him", WOMEN) if hero in MEN else ("she", "her", "her", MEN)
        things, other_things = rng.sample(THINGS, 2)
        box = rng.choice(BOXES)
        self.words = {
            "n": hero,
            "he": he,
            "He": he.capitalize(),
            "his": his,
            "him": him,
            "other": rng.choice(others),  # the other pronoun, so that no sentence is ambiguous
            "thing": things[0],
            "things": things[1],
            "other_things": other_things[1],
            "box": box[0],
            "boxes": box[1],
            "place": rng.choice(PLACES),
            "early_day": rng.choice(EARLY_DAYS),
            "late_day": rng.choice(LATE_DAYS),
        }

    def problem(self) -> dict:
        spans = []
        for expression, value in self.steps:
            spans.append(f"<<{expression}={use_calculator(expression)}>>{value}")
        final = str(self.steps[-1][1])
        text = f"That makes {spans[0]}." if len(spans) == 1 else f"First {spans[0]}, then {spans[1]}."
        return {"question": " ".join(self.sentences), "answer": f"{text}\n#### {final}", "final": final}

    def say(self, slot: str, position: int | None = None, **numbers: int) -> None:
        """Add a sentence of the slot, or put it before the sentence at `position`."""
        pattern = self.rng.choice(PATTERNS[slot][self.split])
        verbs = {"gained": self.rng.choice(GAINED), "lost": self.rng.choice(LOST)}
        sentence = pattern.format(**self.words, **verbs, **numbers)
        self.sentences.insert(len(self.sentences) if position is None else position, sentence)

    def calculate(self, left: int, sign: str, right: int) -> int:
        value = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]
        self.steps.append((f"{left}{sign}{right}", value))
        return value

    def number(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def distract(self) -> None:
        """A number that does not matter: of a person before the story, of a place before it or before the question.

        Never between: after "There are 64 people at the lake." the next "12 of them" would be people.
        """
        if self.rng.random() < 0.5:
            self.say("distract_person", position=0, d=self.number(2, 99))
        else:
            self.say("distract_place", position=self.rng.choice((0, len(self.sentences) - 1)), d=self.number(2, 99))

    # What can happen. Each method says its sentences and records the steps that solve them.

    def event(self, have: int) -> int:
        if have > 4 and self.rng.random() < 0.5:
            amount = self.number(2, min(have - 1, 60))
            self.say("lose", x=amount)
            return self.calculate(have, "-", amount)
        amount = self.number(2, 60)
        self.say("gain", x=amount)
        return self.calculate(have, "+", amount)

    def change(self) -> None:
        have = self.number(5, 99)
        self.say("start", a=have)
        self.event(have)
        self.say("ask_now")

    def change_twice(self) -> None:
        have = self.number(5, 99)
        self.say("start", a=have)
        self.event(self.event(have))
        self.say("ask_now")

    def of_them(self) -> None:
        have = self.number(5, 99)
        amount = self.number(2, have - 1)
        self.say("lose_of", a=have, x=amount)
        self.calculate(have, "-", amount)
        self.say("ask_now")

    def _compare(self) -> tuple[int, int]:
        have = self.number(10, 90)
        self.say("has", a=have)
        if self.rng.random() < 0.5:
            amount = self.number(2, 50)
            self.say("has_more", x=amount)
            return have, self.calculate(have, "+", amount)
        amount = self.number(2, have - 2)
        self.say("has_fewer", x=amount)
        return have, self.calculate(have, "-", amount)

    def more_than(self) -> None:
        self._compare()
        self.say("ask_other")

    def more_together(self) -> None:
        first, second = self._compare()
        self.calculate(first, "+", second)
        self.say("ask_together")

    def difference(self) -> None:
        second = self.number(2, 90)
        first = self.number(second + 2, 99)
        self.say("both_have", a=first, b=second)
        self.calculate(first, "-", second)
        self.say("ask_difference")

    def together(self) -> None:
        first, second = self.number(2, 99), self.number(2, 99)
        self.say("both_have", a=first, b=second)
        self.calculate(first, "+", second)
        self.say("ask_together")

    def _groups(self) -> int:
        groups, each = self.number(2, 12), self.number(2, 20)
        swapped = self.rng.random() < 0.5  # the order of the factors follows the order of the sentence
        self.say("groups_each_first" if swapped else "groups", a=groups, b=each)
        return self.calculate(each, "*", groups) if swapped else self.calculate(groups, "*", each)

    def groups(self) -> None:
        self._groups()
        self.say("ask_all")

    def groups_change(self) -> None:
        self.event(self._groups())
        self.say("ask_now")

    def price(self) -> None:
        items, cents = self.number(2, 12), self.number(2, 30)
        self.say("price", a=items, b=cents)
        self.calculate(cents, "*", items)
        self.say("ask_price", a=items)

    def money_left(self) -> None:
        items, cents = self.number(2, 9), self.number(2, 9)
        purse = self.number(items * cents + 2, 99)
        self.say("money", a=items, b=cents, c=purse)
        self.calculate(purse, "-", self.calculate(items, "*", cents))
        self.say("ask_money")

    def share(self) -> None:
        friends, each = self.number(2, 12), self.number(2, 12)
        self.say("share", a=friends * each, b=friends)
        self.calculate(friends * each, "/", friends)
        self.say("ask_each")

    def share_after(self) -> None:
        friends, each = self.number(2, 9), self.number(3, 12)
        total = friends * each
        have = self.number(3, total - 2)
        self.say("start", a=have)
        self.say("gain", x=total - have)
        self.calculate(have, "+", total - have)
        self.say("share_all", b=friends)
        self.calculate(total, "/", friends)
        self.say("ask_each")


if __name__ == "__main__":
    for which in ("train", "test"):
        print(f"--- {which}")
        for row in arithmetic_problems(which, 10):
            print(f"{row['question']}\n    {row['answer']!r}")
