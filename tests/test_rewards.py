"""Rewards: nanochat's answer rule, closed tool spans, and errors that name the reward and the row."""

import pytest

from nanochat_hf.rewards import (
    answer_format,
    checked,
    completion_text,
    exact_answer,
    extract_answer,
    is_correct,
    tool_used,
)

CALL = "<|python_start|>2+3<|python_end|><|output_start|>5<|output_end|>"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so\n#### 18", "18"),
        ("#### 1,234", "1234"),
        ("#### -7.5 dollars", "-7.5"),
        ("#### 10.", "10."),  # the point is part of the match upstream as well
        ("#### 1 and #### 2", "1"),
        ("####5", None),
        ("#### five", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_the_first_number_after_the_mark_counts(text, answer):
    assert extract_answer(text) == answer


def test_correctness_compares_text_after_dropping_commas():
    assert is_correct("#### 1,000", "1000") and is_correct("#### 1000", "work\n#### 1,000")
    assert not is_correct("#### 5.0", "5") and not is_correct("no answer", "5")
    with pytest.raises(ValueError, match="no number to compare"):
        is_correct("#### 5", " ")


def test_exact_answer_scores_strings_and_messages():
    messages = [
        {"role": "assistant", "content": [{"type": "python", "text": "2+3"}, {"type": "python_output", "text": "5"}]}
    ]
    told = [{"role": "assistant", "content": "5\n#### 5"}]
    completions = [f"{CALL}5\n#### 5<|assistant_end|>", "#### 6", "", messages, told]
    assert exact_answer(completions, answer=["5"] * 5, source=["x"] * 5) == [1.0, 0.0, 0.0, 0.0, 1.0]
    with pytest.raises(ValueError):
        exact_answer(["#### 1"], answer=["1", "2"])


def test_messages_become_text_with_markers():
    called = {
        "role": "assistant",
        "content": "Sum: ",
        "tool_calls": [{"function": {"arguments": {"expression": "2+3"}}}],
    }
    messages = [called, {"role": "tool", "content": "5"}, {"role": "assistant", "content": "5"}]
    assert completion_text(messages) == f"Sum: {CALL}5<|assistant_end|>"
    assert completion_text("as it is") == "as it is"


@pytest.mark.parametrize(
    ("completion", "well_formed", "used"),
    [
        (f"That makes {CALL}5.\n#### 5", 1.0, 1.0),
        (f"{CALL}5 {CALL}5\n#### 5<|assistant_end|>", 1.0, 1.0),
        ("#### 5", 1.0, 0.0),
        (f"{CALL}5", 0.0, 1.0),
        (f"{CALL}5\n#### 5 and more", 0.0, 1.0),
        (f"{CALL}5\n#### 5\n#### 5", 0.0, 1.0),
        ("<|python_start|>2+3\n#### 5", 0.0, 0.0),
        ("<|python_start|>2+<|python_end|>\n#### 5", 0.0, 0.0),  # the calculator declined
        (f"{CALL}<|output_end|>\n#### 5", 0.0, 0.0),
        ("<|output_start|>5<|output_end|>\n#### 5", 0.0, 0.0),
    ],
)
def test_format_and_tool(completion, well_formed, used):
    assert answer_format([completion]) == [well_formed]
    assert tool_used([completion]) == [used]


def test_checked_passes_good_rewards_through_under_their_name():
    reward = checked(exact_answer)
    assert reward.__name__ == "exact_answer"
    assert reward(prompts=["p"] * 2, completions=["#### 1", "#### 2"], answer=["1", "1"]) == [1.0, 0.0]


def test_checked_decodes_ids_so_that_markers_are_seen():
    reward = checked(tool_used, decode=lambda ids: CALL if ids == [1] else "plain")
    assert reward(completions=["", ""], completion_ids=[[1], [2]]) == [1.0, 0.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1"])
def test_checked_refuses_what_is_no_number_and_names_the_row(value):
    def odd(completions, **columns):
        return [0.0, value]

    with pytest.raises(ValueError, match="reward odd gave .* for row 1: 'second'"):
        checked(odd)(completions=["first", "second"])


def test_checked_names_the_row_a_reward_raised_on():
    def fragile(completions, answer, **columns):
        return [float(int(a) == len(c)) for c, a in zip(completions, answer, strict=True)]

    with pytest.raises(ValueError, match="reward fragile raised ValueError: .*row 1 of the batch: 'bb'"):
        checked(fragile)(completions=["a", "bb", "c"], answer=["1", "two", "1"])


def test_checked_wants_one_reward_per_completion():
    with pytest.raises(ValueError, match="gave 1 rewards for 2 completions"):
        checked(lambda completions, **columns: [1.0])(completions=["a", "b"])
