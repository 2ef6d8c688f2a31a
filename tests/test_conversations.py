"""Rows to messages per source, nanochat's mixture order, and bad rows named or counted."""

import json
import random

import datasets
import numpy as np
import pytest
from golden_models import golden_file

from nanochat_hf.data import rows as rows_module
from nanochat_hf.data.conversations import SOURCES, build_mixture
from nanochat_hf.data.messages import (
    check_messages,
    messages_from_arc,
    messages_from_gsm8k,
    messages_from_messages,
    messages_from_mmlu,
    render_multiple_choice,
)

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"id": "c1", "type": "function", "function": {"name": "calculator", "arguments": {"expression": "2+3"}}}


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def write_jsonl(path, rows):
    """Dicts are written as JSON, bytes as they are."""
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return str(path)


# One row to messages.


def test_gsm8k_spans_become_calls_as_in_the_golden_case(golden):
    cases = [
        json.loads(line)["conversation"]["messages"]
        for line in open(golden_file(golden, "tokenizer/render_cases.jsonl"))
    ]
    (solved,) = [case for case in cases if isinstance(case[-1]["content"], list)]
    answer = "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nShe earned <<0.2*50=10>>10.\n#### 10"
    assert messages_from_gsm8k({"question": solved[0]["content"], "answer": answer}) == solved


def test_gsm8k_conversations_and_choice_prompts_encode_to_the_golden_ids(golden, shared_data):
    from nanochat_hf.interop_tokenizer import from_tiktoken_pickle
    from nanochat_hf.tokenizer import encode_conversation, encode_prompt

    tokenizer = from_tiktoken_pickle(golden_file(golden, "core_eval/tokenizer.pkl"))
    tasks = json.loads(golden_file(golden, "core_eval/chat_expected.json").read_text())["tasks"]

    def shuffled(name, count):
        rows = [json.loads(line) for line in open(shared_data / "eval" / name)]
        order = datasets.Dataset.from_dict({"i": range(len(rows))}).shuffle(seed=42)["i"][:count]
        return [rows[i] for i in order]

    expected = tasks["GSM8K"]["conversation_ids_and_masks"]
    files = [shuffled(f"gsm8k_{split}.jsonl", len(expected)) for split in ("train", "test")]
    encoded = [[encode_conversation(tokenizer, messages_from_gsm8k(row)) for row in rows] for rows in files]
    assert [[list(pair) for pair in rows] for rows in encoded if [list(p) for p in rows] == expected] == [expected]
    for task, name, to_messages in (
        ("ARC-Easy", "arc_easy_test.jsonl", messages_from_arc),
        ("ARC-Challenge", "arc_challenge_test.jsonl", messages_from_arc),
        ("MMLU", "mmlu_test.jsonl", messages_from_mmlu),
    ):
        rows = shuffled(name, len(tasks[task]["correct"]))
        messages = [to_messages(row) for row in rows]
        assert encode_prompt(tokenizer, messages[0][:-1]) == tasks[task]["first_prompt_ids"]
        right = [int(m[-1]["content"] == p) for m, p in zip(messages, tasks[task]["predicted"], strict=True)]
        assert right == tasks[task]["correct"]


def test_choices_prompt():
    prompt = render_multiple_choice("Which?", "AB", ["one", "two"])
    assert prompt == (
        "Multiple Choice question: Which?\n- one=A\n- two=B\n\nRespond only with the letter of the correct answer."
    )
    with pytest.raises(ValueError, match="2 choices need as many letters, got 3"):
        render_multiple_choice("Which?", "ABC", ["one", "two"])


def test_mmlu_plain_and_nested():
    row = {"question": "Which?", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 2}
    assert messages_from_mmlu(row) == messages_from_mmlu({"train": row})
    assert messages_from_mmlu(row)[1]["content"] == "C"
    with pytest.raises(ValueError, match="index of one of 4 choices, got 4"):
        messages_from_mmlu({**row, "answer": 4})


@pytest.mark.parametrize("labels", [list("ABCD"), list("1234"), list("ABC")])
def test_arc_keeps_the_labels_of_the_row(labels):
    choices = {"text": [f"choice {label}" for label in labels], "label": labels}
    question, answer = messages_from_arc({"id": "x", "question": "Q", "choices": choices, "answerKey": labels[1]})
    assert answer["content"] == labels[1] and f"- choice {labels[1]}={labels[1]}\n" in question["content"]
    with pytest.raises(ValueError, match="answerKey"):
        messages_from_arc({"question": "Q", "choices": choices, "answerKey": "E"})


def test_null_keys_of_arrow_are_dropped():
    row = {"messages": [{**USER, "tool_calls": None}, {**ANSWER, "tool_calls": None}], "other": 1}
    assert messages_from_messages(row) == [USER, ANSWER]


# The check.


@pytest.mark.parametrize(
    "messages",
    [
        [USER, ANSWER],
        [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER, ANSWER],
        [USER, {**ANSWER, "content": [{"type": "python", "text": "1"}, {"type": "python_output", "text": "1"}]}],
        [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "5"}, ANSWER],
    ],
)
def test_good_conversations_pass(messages):
    check_messages(messages)


PYTHON, OUTPUT, TEXT = ({"type": t, "text": "5"} for t in ("python", "python_output", "text"))
BAD = {
    "at least one message": [],
    "message 0 must be of the user": [ANSWER, USER],
    "neighbouring messages of the user": [USER, USER, ANSWER],
    "message 2 must be of the user": [USER, ANSWER, ANSWER],
    "must be the assistant's answer": [USER, ANSWER, USER],
    "message 0 .user. is empty": [{**USER, "content": " \n"}, ANSWER],
    "message 1 .assistant. is empty": [USER, {**ANSWER, "content": ""}],
    "message 1 .assistant. is empty ": [USER, {**ANSWER, "content": [{"type": "text", "text": ""}]}],
    "content must be text or a list of parts": [USER, {"role": "assistant"}],
    "role of system, user": [USER, {"role": "asistant", "content": "x"}],
    "tool call without its output; add a part": [USER, {**ANSWER, "content": [PYTHON, TEXT]}],
    "tool call without its output; add a part ": [USER, {**ANSWER, "content": [TEXT, PYTHON]}],
    "tool call without its output; add a message": [USER, {"role": "assistant", "tool_calls": [CALL]}, ANSWER],
}


@pytest.mark.parametrize("problem", BAD)
def test_bad_conversations_are_refused_with_the_reason(problem):
    with pytest.raises(ValueError, match=problem.strip()):
        check_messages(BAD[problem])


def test_gsm8k_call_without_output():
    with pytest.raises(ValueError, match="tool call without its output: '<<2[+]3>>'"):
        messages_from_gsm8k({"question": "Q", "answer": "<<2+3>>5\n#### 5"})


# The mixture.


def conversation(text):
    return {"messages": [{"role": "user", "content": text}, ANSWER]}


def texts(mixture):
    return [messages[0]["content"] for messages in mixture["messages"]]


def test_order_is_nanochats(tmp_path):
    """Each source permuted as datasets does with seed 42, cut, listed, then one list shuffled by random.Random(42)."""
    sources = {"a": (100, 30, 2), "b": (50, 40, 1)}
    recipe, expected = [], []
    for name, (size, rows, epochs) in sources.items():
        path = tmp_path / f"{name}.jsonl"
        write_jsonl(path, [conversation(f"{name}{i}") for i in range(size)])
        recipe.append({"source": "messages", "dataset": str(path), "rows": rows, "epochs": epochs})
        train = [f"{name}{i}" for i in range(size) if i % 20 != 19]
        permuted = [train[i] for i in np.random.default_rng(42).permutation(len(train))]
        expected += permuted[:rows] * epochs
    random.Random(42).shuffle(expected)
    counts = {}
    mixture = build_mixture(recipe, "train", counts=counts)
    assert texts(mixture) == expected
    assert counts == {"messages:a": {"rows": 60, "skipped": 0}, "messages:b": {"rows": 40, "skipped": 0}}
    assert mixture["source"].count("messages:a") == 60
    assert texts(build_mixture(recipe, "train", seed=1)) != expected


def test_max_rows_takes_what_is_there(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [conversation(str(i)) for i in range(40)])
    sources = [{"source": "messages", "dataset": str(path), key: 1000} for key in ("max_rows", "rows")]
    assert len(build_mixture(sources[:1], "train")) == 38
    assert len(build_mixture([sources[0] | {"max_rows": 7}], "train")) == 7
    with pytest.raises(ValueError, match="has 38 rows, not 1000"):
        build_mixture(sources[1:], "train")
    for wrong in (sources[0] | sources[1], {"source": "identity", "max_rows": 5}):
        with pytest.raises(ValueError, match="max_rows is for data sets, instead of rows"):
            build_mixture([wrong], "train")


def test_train_and_test_share_nothing_and_lose_nothing(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [conversation(str(i)) for i in range(100)])
    recipe = [{"source": "messages", "dataset": path, "epochs": 3}]
    train, test = (texts(build_mixture(recipe, split)) for split in ("train", "test"))
    assert sorted(set(train), key=int) == [str(i) for i in range(100) if i % 20 != 19] and len(train) == 3 * 95
    assert sorted(test, key=int) == ["19", "39", "59", "79", "99"]


def test_every_embedded_source_in_one_mixture():
    recipe = [{"source": name, "rows": 60} for name, source in SOURCES.items() if source.generate]
    recipe[0] |= {"two_steps": 1.0, "distractors": 0.0, "seed": 3}
    train, test = build_mixture(recipe, "train"), build_mixture(recipe, "test")
    assert len(train) == 300 and len(test) == 15
    assert not set(texts(train)) & {t for t in texts(test) if "ello" not in t and t != "Hey!"}
    solved = [m[-1]["content"] for m, s in zip(train["messages"], train["source"], strict=True) if s == "arithmetic"]
    assert len(solved) == 60
    assert all([part["type"] for part in parts].count("python") == 2 for parts in solved)


def test_real_files(shared_data):
    chat = {"source": "messages", "dataset": str(shared_data / "chat"), "rows": 300}
    recipe = [
        chat,
        {"source": "gsm8k", "dataset": str(shared_data / "eval/gsm8k_train.jsonl"), "rows": 200},
        {"source": "arc", "dataset": str(shared_data / "eval/arc_easy_train.jsonl"), "rows": 100},
        {"source": "mmlu", "dataset": str(shared_data / "eval/mmlu_dev.jsonl")},
    ]
    counts = {}
    mixture = build_mixture(recipe, "train", counts=counts)
    assert [v["rows"] for v in counts.values()] == [300, 200, 100, 271] and len(mixture) == 871
    assert set(counts) == {"messages:chat", "gsm8k:gsm8k_train", "arc:arc_easy_train", "mmlu:mmlu_dev"}


def test_parquet_with_parts_and_tool_calls(tmp_path):
    rows = [
        conversation("a")["messages"],
        [USER, {**ANSWER, "tool_calls": [CALL]}, {"role": "tool", "content": "5"}, ANSWER],
    ]
    datasets.Dataset.from_list([{"messages": m} for m in rows]).to_parquet(tmp_path / "a.parquet")
    mixture = build_mixture([{"source": "messages", "dataset": str(tmp_path)}])
    assert sorted(len(messages) for messages in mixture["messages"]) == [2, 4]


def test_hub_data_set_uses_its_own_test_split(monkeypatch):
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        row = {"question": split, "subject": "", "choices": ["a", "b", "c", "d"], "answer": 1}
        nested = name == "auxiliary_train"
        return datasets.Dataset.from_list([{"train": row} if nested else row] * 40)

    monkeypatch.setattr(rows_module.datasets, "load_dataset", load_dataset)
    recipe = [{"source": "mmlu", "rows": 40}]
    assert len(build_mixture(recipe, "train")) == 40 and len(build_mixture(recipe, "test")) == 2
    assert asked == [("cais/mmlu", "auxiliary_train", "train"), ("cais/mmlu", "all", "validation")]


# Bad rows and bad recipes.


@pytest.fixture
def broken(tmp_path):
    good = [conversation(str(i)) for i in range(18)]
    good[4], good[7] = b'{"messages": [', {"text": "no messages"}
    return write_jsonl(tmp_path / "broken.jsonl", good)


def test_a_bad_row_stops_with_its_line(broken):
    with pytest.raises(ValueError) as error:
        build_mixture([{"source": "messages", "dataset": broken}])
    message = str(error.value)
    assert "broken.jsonl:5: not JSON" in message or "broken.jsonl:8: no column `messages`; the row has text" in message
    assert "1 more rows are bad too" in message and "on_bad_row: skip" in message


def test_bad_rows_are_skipped_counted_and_said(broken, caplog):
    counts = {}
    mixture = build_mixture([{"source": "messages", "dataset": broken}], on_bad_row="skip", counts=counts)
    assert len(mixture) == 16 and counts == {"messages:broken": {"rows": 16, "skipped": 2}}
    assert "2 of 18 rows skipped" in caplog.text


@pytest.mark.parametrize(
    "row",
    [b"[1, 2]", b"", b'{"messages": "\xff"}', {"messages": "Hi"}, {"messages": [1, 2]}, {"messages": [None, ANSWER]}],
)
def test_rows_of_another_shape_are_bad_rows_too(tmp_path, row):
    path = write_jsonl(tmp_path / "a.jsonl", [conversation("good"), row, conversation("good too")])
    counts = {}
    build_mixture([{"source": "messages", "dataset": path}], on_bad_row="skip", counts=counts)
    assert counts["messages:a"] == {"rows": 2, "skipped": 1}
    with pytest.raises(ValueError, match="a.jsonl:2: "):
        build_mixture([{"source": "messages", "dataset": path}])


@pytest.mark.parametrize("source", ["mmlu", "arc", "gsm8k"])
def test_a_row_of_another_source_names_the_missing_column(tmp_path, source):
    path = write_jsonl(tmp_path / "a.jsonl", [conversation("x"), conversation("y")])
    with pytest.raises(ValueError, match="a.jsonl:[12]: no column `question`; the row has messages"):
        build_mixture([{"source": source, "dataset": path}])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ([], "mixture is empty: no sources"),
        (["arithmetic"], "entry 0 must say `source:`"),
        ([{"source": "arithmetik", "rows": 5}], "unknown source 'arithmetik'; did you mean 'arithmetic'"),
        ([{"source": "arithmetic", "row": 5}], "unknown key 'row', did you mean 'rows'"),
        ([{"source": "arithmetic", "rows": 5, "two_steps": "half"}], "two_steps is a fraction .* got 'half'"),
        ([{"source": "identity", "two_steps": 0.5}], "unknown key 'two_steps'"),
        ([{"source": "arithmetic"}], "say how many, e.g. rows: 1000"),
        ([{"source": "arithmetic", "rows": 0}], "rows must be a whole number of at least 1, got 0"),
        ([{"source": "arithmetic", "rows": "5"}], "rows must be a whole number"),
        ([{"source": "identity", "epochs": 1.5}], "epochs must be a whole number"),
        ([{"source": "identity", "rows": 10**6}], "ask for fewer rows, or"),
        ([{"source": "messages"}], "messages needs `dataset:`"),
        ([{"source": "messages", "dataset": "./nowhere.jsonl"}], "no file or folder ./nowhere.jsonl"),
        ([{"source": "gsm8k"}], "cannot load openai/gsm8k .main. split train from the Hub: .*Without a network"),
    ],
)
def test_bad_recipes(recipe, message):
    with pytest.raises(ValueError, match=message):
        build_mixture(recipe)


def test_more_rows_than_there_are_and_files_that_are_none(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [conversation(str(i)) for i in range(10)])
    with pytest.raises(ValueError, match="messages:a has 10 rows, not 11"):
        build_mixture([{"source": "messages", "dataset": path, "rows": 11}])
    with pytest.raises(ValueError, match="the test mixture is empty"):
        build_mixture([{"source": "messages", "dataset": path}], "test")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty.jsonl has no rows"):
        build_mixture([{"source": "messages", "dataset": str(tmp_path / "empty.jsonl")}])
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match="no .jsonl or .parquet file"):
        build_mixture([{"source": "messages", "dataset": str(tmp_path / "a.csv")}])
    with pytest.raises(ValueError, match="on_bad_row is error or skip"):
        build_mixture([{"source": "messages", "dataset": path}], on_bad_row="ignore")


def own_rows(split, num_rows):
    return [conversation(f"{split} {i}") for i in range(num_rows)]


def test_a_function_of_ones_own_is_a_source():
    source = {"source": "test_conversations.own_rows", "rows": 20}
    assert sorted(texts(build_mixture([source])), key=lambda text: int(text.split()[1])) == [
        f"train {i}" for i in range(20)
    ]
    assert texts(build_mixture([source], "test")) == ["test 0"]
    with pytest.raises(ValueError, match="entry 0: source 'test_conversations.own_row': .* did you mean own_rows"):
        build_mixture([{**source, "source": "test_conversations.own_row"}])
    with pytest.raises(ValueError, match="unknown key 'seed'"):
        build_mixture([{**source, "seed": 1}])
