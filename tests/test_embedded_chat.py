"""Embedded chat data: right answers, disjoint halves, the same rows again."""

import re
from fractions import Fraction

import pytest

from nanochat_hf.calculator import use_calculator
from nanochat_hf.data import embedded_chat, identity
from nanochat_hf.data.arithmetic import ONE_STEP, TWO_STEPS, arithmetic_problems
from nanochat_hf.data.arithmetic_patterns import BOXES, MEN, PATTERNS, PLACES, THINGS, WOMEN
from nanochat_hf.data.messages import check_messages, messages_from_gsm8k, messages_from_mmlu
from nanochat_hf.rewards import extract_answer

SPLITS = ("train", "test")
GENERATORS = {
    "arithmetic": arithmetic_problems,
    "letter_counting": embedded_chat.letter_counting_problems,
    "multiple_choice": embedded_chat.multiple_choice_questions,
    "docstrings": embedded_chat.docstring_conversations,
    "identity": identity.identity_conversations,
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", GENERATORS)
def test_the_same_rows_again_another_seed_other_rows(name, split):
    generate = GENERATORS[name]
    rows = generate(split, 80)
    assert len(rows) == 80 and rows == generate(split, 80) != generate(split, 80, seed=1)
    with pytest.raises(ValueError, match="train and test"):
        generate("validation", 80)


def questions(rows):
    return {row["question"] if "question" in row else row["messages"][-2]["content"] for row in rows}


@pytest.mark.parametrize("name", GENERATORS)
def test_train_and_test_share_no_question(name):
    train, test = (GENERATORS[name](split, 110) for split in SPLITS)
    assert not questions(train) & questions(test)


@pytest.mark.parametrize("name", ["arithmetic", "letter_counting"])
@pytest.mark.parametrize("split", SPLITS)
def test_every_step_is_what_the_calculator_says_and_the_answer_follows(name, split):
    for row in GENERATORS[name](split, 3000):
        spans = re.findall(r"<<(.+?)=([^=]+?)>>([0-9]+)", row["answer"])
        assert 1 <= len(spans) <= 2
        for expression, output, shown in spans:
            assert use_calculator(expression) == output
            assert Fraction(output) == int(shown) >= 0
        assert row["final"] == spans[-1][2] == extract_answer(row["answer"])
        check_messages(messages_from_gsm8k(row))


@pytest.mark.parametrize("split", SPLITS)
def test_arithmetic_uses_only_numbers_of_the_question_or_of_the_step_before(split):
    for row in arithmetic_problems(split, 2000):
        known = re.findall(r"[0-9]+", row["question"])
        for expression, _, shown in re.findall(r"<<(.+?)=([^=]+?)>>([0-9]+)", row["answer"]):
            assert all(number in known for number in re.findall(r"[0-9]+", expression)), row
            known.append(shown)


def as_pattern(sentence):
    """A sentence with its names, things and numbers blanked out."""
    sentence = re.sub(r"[0-9]+", "#", sentence)
    sentence = re.sub(rf"\b({'|'.join(MEN + WOMEN)})\b", "NAME", sentence)
    sentence = re.sub(rf"\b({'|'.join(PLACES)})\b", "PLACE", sentence)
    sentence = re.sub(rf"\b({'|'.join(word for pair in THINGS for word in pair)})\b", "THING", sentence)
    sentence = re.sub(rf"\b({'|'.join(word for pair in BOXES for word in pair)})\b", "BOX", sentence)
    return re.sub(r"\b([Hh]e|[Ss]he|his|her|him)\b", "PRONOUN", sentence)


def test_no_sentence_pattern_of_a_test_problem_occurs_in_training():
    train, test = (
        {as_pattern(s) for row in arithmetic_problems(split, 8000) for s in re.split(r"(?<=[.?]) ", row["question"])}
        for split in SPLITS
    )
    assert len(train) > 60 and len(test) > 60
    assert not train & test
    for slot, patterns in PATTERNS.items():
        assert not set(patterns["train"]) & set(patterns["test"]), slot
        assert len(patterns["test"]) >= 2 <= len(patterns["train"])


def test_no_word_of_the_test_patterns_is_new():
    words = {
        which: {w.lower() for slot in PATTERNS.values() for p in slot[which] for w in re.findall(r"[A-Za-z]+", p)}
        for which in SPLITS
    }
    assert not words["test"] - words["train"]


def test_difficulty_follows_the_arguments():
    def share(predicate, **arguments):
        rows = arithmetic_problems("train", 1000, **arguments)
        return sum(map(predicate, rows)) / len(rows)

    def has_two_steps(row):
        return row["answer"].count("<<") == 2

    def has_spare_number(row):
        used = re.findall(r"[0-9]+", row["answer"])
        return any(number not in used for number in re.findall(r"[0-9]+", row["question"]))

    assert share(has_two_steps, two_steps=0.0) == 0.0 and share(has_two_steps, two_steps=1.0) == 1.0
    assert 0.3 < share(has_two_steps, two_steps=0.4) < 0.5
    assert share(has_spare_number, distractors=0.0) == 0.0 and share(has_spare_number, distractors=1.0) > 0.9
    with pytest.raises(ValueError, match="two_steps is a fraction between 0 and 1, got 2"):
        arithmetic_problems("train", 1, two_steps=2)


def test_arithmetic_has_every_kind_and_stays_short():
    rows = arithmetic_problems("train", 20_000)
    assert len(questions(rows)) == 20_000
    assert max(len(row["question"].split()) for row in rows) < 60
    signs = [tuple(re.findall(r"<<[0-9]+(.)", row["answer"])) for row in rows]
    assert len(set(signs)) >= 4 + 7 and len(set(ONE_STEP + TWO_STEPS)) == 13


@pytest.mark.parametrize("split", SPLITS)
def test_multiple_choice_has_one_right_answer_among_four_and_favours_no_letter(split):
    sentence_of = {}
    for module, name, sentence in embedded_chat.library_functions(split):
        sentence_of[name if module == "builtins" else f"{module}.{name}"] = sentence
    letters = [0] * 4
    for row in embedded_chat.multiple_choice_questions(split, 1000):
        assert len(set(row["choices"])) == 4
        asked, right = row["question"].removesuffix("?").split()[-1], row["choices"][row["answer"]]
        if row["question"].startswith("Which sentence"):
            assert sentence_of[asked] == right
        else:
            assert [choice for choice in row["choices"] if f"{choice}.{asked}" in sentence_of] == [right]
        letters[row["answer"]] += 1
        check_messages(messages_from_mmlu(row))
    assert min(letters) > 200


def test_functions_and_their_sentences_are_split_and_there_are_many():
    train, test = (embedded_chat.library_functions(split) for split in SPLITS)
    assert len(train) > 500 and len(test) > 120
    assert not {f[2] for f in train} & {f[2] for f in test}
    assert not {f[:2] for f in train} & {f[:2] for f in test}


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the square root of x.", "Return the square root of x."),
        ("Return the\nsquare root. And more.", "Return the square root."),
        ("sqrt(x) -> number\n\nReturn the square root.", "Return the square root."),
        ("Use os.path.join to join paths. More.", "Use os.path.join to join paths."),
        ("Pack the values v1, v2, ...", None),
        ("Short.", None),
        ("no capital letter at the start.", None),
        ("A" * 81 + ".", None),
        ("", None),
    ],
)
def test_first_sentence(docstring, sentence):
    assert embedded_chat.first_sentence(docstring) == sentence


def test_letters_are_counted_right_and_not_always_once():
    rows = embedded_chat.letter_counting_problems("train", 1000)
    results = []
    for row in rows:
        quoted = re.findall(r'"([a-z]+)"', row["question"])
        letter, word = sorted(quoted, key=len)
        assert str(word.count(letter)) == row["final"]
        results.append(row["final"])
    assert max(results.count(r) for r in set(results)) < 600


@pytest.mark.parametrize("split", SPLITS)
def test_small_talk_is_well_formed_and_bounded(split):
    rows = identity.identity_conversations(split)
    assert len(rows) > (300 if split == "train" else 100)
    for row in rows:
        check_messages(row["messages"])
    with pytest.raises(ValueError, match=f"has {len(rows)} rows, not 99999"):
        identity.identity_conversations(split, 99999)
