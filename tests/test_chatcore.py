import json
import os
import random
import socket
import time

import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager
from lm_eval_runs import expected_of, flags, golden_folder, run, save

from nanochat_hf.configs import EvaluationConfig
from nanochat_hf.evaluation import TASKS_DIR, chatcore, mini_tasks
from nanochat_hf.evaluation.chat_sample import sample_chatcore
from nanochat_hf.evaluation.code_execution import extract_code, import_lines, passes_tests, runs_to_the_end
from nanochat_hf.evaluation.evaluate import evaluate, summarize
from nanochat_hf.evaluation.lm_eval_model import NanoChatHFLM
from nanochat_hf.tokenizer import encode_prompt

MMLU_ROW = {"question": "What is 2+2?", "choices": ["3", "4", "5", "6"], "answer": 1}
ARC_ROW = {"question": "Which?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "3"}
GSM8K_ROW = {"question": "Two and three?", "answer": "That is <<2+3=5>>5.\n#### 5"}
HUMANEVAL_ROW = {
    "prompt": 'import math\n\ndef one():\n    """Return 1."""\n',
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
    "entry_point": "one",
}
FILES = {
    "arc_easy_test": ARC_ROW,
    "arc_challenge_test": ARC_ROW,
    "mmlu_test": MMLU_ROW,
    "gsm8k_test": GSM8K_ROW,
    "humaneval_test": HUMANEVAL_ROW,
}


class SayingModel:
    """An lm-eval model that answers as told: letters by the log-likelihoods of `letters`, questions by `texts`."""

    def __new__(cls, folder, letters=(), texts=()):
        lm = NanoChatHFLM(folder, device="cpu")
        lm.loglikelihood = lambda requests, **_: [(letters[i % len(letters)], False) for i in range(len(requests))]
        lm.generate_until = lambda requests, **_: [texts[i % len(texts)] for i in range(len(requests))]
        return lm


@pytest.fixture
def folder(tmp_path, tiny_model, tiny_tokenizer):
    return save(tiny_model, tiny_tokenizer, tmp_path / "model")


@pytest.fixture
def rows_dir(tmp_path, monkeypatch):
    """A folder with one row a task, as CHATCORE_DATA_DIR."""
    rows = tmp_path / "rows"
    rows.mkdir()
    for name, row in FILES.items():
        (rows / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("CHATCORE_DATA_DIR", str(rows))
    return rows


@pytest.mark.parametrize("num_items", [20, pytest.param(None, marks=pytest.mark.slow)])
def test_letters_and_their_logits_equal_the_golden_ones(golden, shared_data, tmp_path, monkeypatch, num_items):
    expected = expected_of(golden, "chat_expected.json")
    lm = NanoChatHFLM(golden_folder(golden, tmp_path / "model"), device="cpu")
    monkeypatch.setenv("CHATCORE_DATA_DIR", str(shared_data / "eval"))
    tasks = {"chatcore_arc_easy": "ARC-Easy", "chatcore_arc_challenge": "ARC-Challenge", "chatcore_mmlu": "MMLU"}
    num_items = num_items or max(len(expected[name]["predicted"]) for name in tasks.values())
    results = run(lm, list(tasks), limit=num_items)
    for task, name in tasks.items():
        assert flags(results, task) == [int(flag) for flag in expected[name]["correct"]][:num_items]
        samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
        prompt = lm.tokenizer(samples[0]["arguments"][0][0], add_special_tokens=False)["input_ids"]
        assert prompt == expected[name]["first_prompt_ids"]
        likelihoods = [[answer[0] for answer in sample["filtered_resps"]] for sample in samples]
        for values, sample, letter in zip(likelihoods, samples, expected[name]["predicted"], strict=False):
            assert sample["arguments"][values.index(max(values))][1] == letter
        # A log-likelihood is the logit less the row's normaliser, which all letters share.
        for values, logits in zip(likelihoods, expected[name]["letter_logits"], strict=False):
            assert [v - values[0] for v in values] == pytest.approx([x - logits[0] for x in logits], abs=1e-4)
        with torch.no_grad():
            normaliser = lm.model(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1].logsumexp(-1).item()
        assert [v + normaliser for v in likelihoods[0]] == pytest.approx(expected[name]["letter_logits"][0], abs=1e-4)


def test_generation_prompts_equal_the_golden_ones(golden, shared_data, tmp_path, monkeypatch):
    wanted = expected_of(golden, "chat_expected.json")["GSM8K"]["prompt_ids"]
    lm = SayingModel(golden_folder(golden, tmp_path / "model"), texts=["#### 1"])
    monkeypatch.setenv("CHATCORE_DATA_DIR", str(shared_data / "eval"))
    samples = run(lm, ["chatcore_gsm8k"], limit=len(wanted))["samples"]["chatcore_gsm8k"]
    prompts = [sample["arguments"][0][0] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    assert [lm.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts] == wanted


def test_choices_are_the_likeliest_letter(folder, rows_dir):
    tasks = ["chatcore_mmlu", "chatcore_arc_easy"]
    results = run(SayingModel(folder, letters=[-3.0, -1.0, -2.0, -4.0]), ["chatcore_mmlu"])
    assert flags(results, "chatcore_mmlu") == [1]
    results = run(SayingModel(folder, letters=[-3.0, -2.0, -1.0]), ["chatcore_arc_easy"])
    assert flags(results, "chatcore_arc_easy") == [1]
    (sample,) = results["samples"]["chatcore_arc_easy"]
    assert [argument[1] for argument in sample["arguments"]] == ["1", "2", "3"], "ARC's rows bring their labels"
    # Equally likely letters: the first.
    assert flags(run(SayingModel(folder, letters=[-1.0]), tasks[:1]), "chatcore_mmlu") == [0]


def test_prompts_are_the_tokenizers_conversations(folder, rows_dir, tiny_tokenizer):
    lm = SayingModel(folder, texts=["#### 5"])
    plain = run(lm, ["chatcore_gsm8k"])["samples"]["chatcore_gsm8k"][0]["arguments"][0][0]
    templated = run(lm, ["chatcore_gsm8k"], apply_chat_template=True)["samples"]["chatcore_gsm8k"][0]["arguments"][0][0]
    assert plain == templated == "<|bos|><|user_start|>Two and three?<|user_end|><|assistant_start|>"
    wanted = encode_prompt(tiny_tokenizer, [{"role": "user", "content": "Two and three?"}])
    assert tiny_tokenizer(plain, add_special_tokens=False)["input_ids"] == wanted


def test_the_whole_group(folder, rows_dir):
    lm = SayingModel(folder, letters=[-1.0, -2.0, -3.0], texts=["```python\ndef one():\n    return 1\n```\n#### 5"])
    with pytest.raises(ValueError, match="marked as unsafe"):
        run(lm, ["chatcore"])
    results = run(lm, ["chatcore"], confirm_run_unsafe_code=True)
    accuracy = {name: figures["acc,none"] for name, figures in results["results"].items() if name != "chatcore"}
    assert accuracy["chatcore_gsm8k"] == accuracy["chatcore_humaneval"] == 1
    centered = [results["results"][name]["centered,none"] for name in accuracy]
    assert results["groups"]["chatcore"]["centered,none"] == pytest.approx(sum(centered) / 5)


def test_rows_are_in_nanochats_order(rows_dir, folder):
    import datasets

    rows = [GSM8K_ROW | {"question": f"Question {i}"} for i in range(20)]
    (rows_dir / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = run(SayingModel(folder, texts=["#### 5"]), ["chatcore_gsm8k"])["samples"]["chatcore_gsm8k"]
    order = datasets.Dataset.from_list(rows).shuffle(seed=42)["question"]
    assert [sample["doc"]["question"] for sample in samples] == list(order)


def test_several_samples_give_pass_at_k(folder, rows_dir):
    lm = SayingModel(folder, texts=["#### 5", "#### 6", "none", "#### 6"])
    results = run(lm, ["chatcore_gsm8k"], metadata={"num_samples": 4})
    (sample,) = results["samples"]["chatcore_gsm8k"]
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 50}
    assert all(settings.items() <= argument[1].items() for argument in sample["arguments"]), "greedy ones are all alike"
    figures = results["results"]["chatcore_gsm8k"]
    assert figures["acc,none"] == 0.25
    assert [figures[f"pass@{k},none"] for k in (1, 2, 3, 4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_missing_rows_are_named(folder, rows_dir):
    (rows_dir / "mmlu_test.jsonl").unlink()
    lm = SayingModel(folder, letters=[-1.0], texts=["#### 5"])
    with pytest.raises(ValueError, match="chatcore_mmlu: no file .*mmlu_test.jsonl"):
        run(lm, ["chatcore_mmlu"])
    results = run(lm, ["chatcore"], confirm_run_unsafe_code=True)
    record = summarize(results, "chatcore", "chatcore")
    assert record["chatcore"] is None
    assert record["missing"] == ["chatcore_mmlu (no mmlu_test.jsonl)"]
    assert len(record["tasks"]) == 4


def test_broken_rows_are_named(folder, rows_dir):
    (rows_dir / "mmlu_test.jsonl").write_text(json.dumps(MMLU_ROW | {"answer": 4}) + "\n")
    with pytest.raises(ValueError, match="mmlu_test.jsonl, line 1: no mmlu row: `answer` must be the index"):
        run(SayingModel(folder, letters=[-1.0]), ["chatcore_mmlu"])
    (rows_dir / "mmlu_test.jsonl").write_text("{")
    with pytest.raises(ValueError, match="mmlu_test.jsonl, line 1 is not JSON"):
        run(SayingModel(folder, letters=[-1.0]), ["chatcore_mmlu"])


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("mmlu", [1], "found list instead of an object"),
        ("mmlu", MMLU_ROW | {"choices": 4}, "no mmlu row: object of type 'int'"),
        ("mmlu", MMLU_ROW | {"choices": ["3"], "answer": 0}, r"needs at least two choices, found \['A'\]"),
        ("arc_easy", ARC_ROW | {"choices": {"text": []}}, "no arc row: 'label'"),
        ("gsm8k", GSM8K_ROW | {"answer": "Five."}, "its answer must end with `#### number`, found 'Five.'"),
    ],
)
def test_a_broken_row_is_named_by_its_line(rows_dir, task, row, message):
    path = rows_dir / f"{task}_test.jsonl"
    path.write_text(path.read_text() * 9 + json.dumps(row) + "\n" + path.read_text() * 9)
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False)
    with pytest.raises(ValueError, match=f"{task}_test.jsonl, line 10: .*{message}"):
        manager.load([f"chatcore_{task}"])


def test_no_samples_are_refused(rows_dir):
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False, metadata={"num_samples": 0})
    with pytest.raises(ValueError, match="num_samples must be 1 or more, got 0"):
        manager.load(["chatcore_gsm8k"])


def test_a_tokenizer_without_chat_template_is_refused(tmp_path, tiny_model, tiny_tokenizer, rows_dir):
    folder = save(tiny_model, tiny_tokenizer, tmp_path / "bare")
    os.remove(os.path.join(folder, "chat_template.jinja"))
    with pytest.raises(ValueError, match="has no chat template"):
        run(SayingModel(folder, letters=[-1.0]), ["chatcore_mmlu"])


def test_the_recipe_writes_a_record_a_model(tmp_path, tiny_model, tiny_tokenizer, monkeypatch, capsys):
    for name in ("NUM_CORE_ROWS", "NUM_ARITHMETIC_ROWS", "NUM_CHAT_ROWS"):
        monkeypatch.setattr(mini_tasks, name, 6)
    for stage in ("base", "sft"):
        save(tiny_model, tiny_tokenizer, tmp_path / stage)
    config = EvaluationConfig(run_dir=str(tmp_path), stages=["base", "sft"])
    evaluate(config)
    core = json.loads((tmp_path / "eval" / "core.json").read_text())["summary"]
    assert set(core["tasks"]) == {"core_mini_next_line", "core_mini_last_word", "core_mini_which_module"}
    assert core["core"] == pytest.approx(sum(task["centered"] for task in core["tasks"].values()) / 3)
    chat = json.loads((tmp_path / "eval" / "chatcore_sft.json").read_text())["summary"]
    assert {name.removeprefix("chatcore_mini_") for name in chat["tasks"]} == {
        "multiple_choice",
        "arithmetic",
        "letter_counting",
    }
    for task in (*core["tasks"].values(), *chat["tasks"].values()):
        assert task["num_items"] == len(task["correct"]) == 6
        assert task["accuracy"] == pytest.approx(sum(task["correct"]) / 6)
    capsys.readouterr()
    evaluate(config)
    assert (
        capsys.readouterr().out
        == "core: finished before, nothing to do\nchatcore_sft: finished before, nothing to do\n"
    )


def test_the_recipes_gen_kwargs_are_for_the_real_tasks(tmp_path, tiny_model, tiny_tokenizer, rows_dir, monkeypatch):
    for name in ("NUM_CORE_ROWS", "NUM_ARITHMETIC_ROWS", "NUM_CHAT_ROWS"):
        monkeypatch.setattr(mini_tasks, name, 2)
    save(tiny_model, tiny_tokenizer, tmp_path / "sft")
    settings = {"eval_data": str(rows_dir), "limit": 2, "gen_kwargs": "repetition_penalty=1.2"}
    evaluate(EvaluationConfig(run_dir=str(tmp_path), stages=["sft"], **settings))
    record = json.loads((tmp_path / "eval" / "chatcore_sft.json").read_text())
    asked = {task: config.get("generation_kwargs") for task, config in record["configs"].items()}
    assert asked["chatcore_gsm8k"]["repetition_penalty"] == 1.2 and not asked["chatcore_gsm8k"]["do_sample"]
    assert "repetition_penalty" not in asked["chatcore_mini_arithmetic"]
    assert record["settings"]["gen_kwargs"] == "repetition_penalty=1.2"


def test_a_sample_leaves_the_trainings_random_numbers_alone(folder, tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(mini_tasks, "NUM_ARITHMETIC_ROWS", 4)
    states = []
    for _ in range(2):
        states.append((random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()))
        if len(states) == 1:
            assert len(sample_chatcore(tiny_model, tiny_tokenizer, folder, None, 2)["tasks"]) == 3
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": ["basis"]}, "'basis' is none of base, mid, sft, rl, dpo; did you mean 'base'"),
        ({"stages": ["mid"]}, "holds no model yet; run the mid stage first"),
        ({"stages": [], "core_data": "nowhere"}, "core_data=nowhere: no such folder"),
    ],
)
def test_bad_recipes_are_refused_before_any_work(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(EvaluationConfig(run_dir=str(tmp_path), **settings))


def test_mini_rows_are_not_trained_on():
    from nanochat_hf.data.arithmetic import arithmetic_problems
    from nanochat_hf.data.embedded_chat import letter_counting_problems, multiple_choice_questions

    for rows, make in (
        (mini_tasks.arithmetic_rows(), arithmetic_problems),
        (mini_tasks.letter_counting_rows(), letter_counting_problems),
        (mini_tasks.multiple_choice_rows(), multiple_choice_questions),
    ):
        assert len(rows) >= 200
        trained = {row["question"] for row in make("train", 2000)}
        assert not trained & {row["question"] for row in rows}


def test_humaneval_programs():
    assert import_lines("import math\nfrom a import b\n\ndef f():\n    import os\n") == "import math\nfrom a import b"
    assert extract_code("Sure:\n```python\nx = 1\n```\nDone.") == "x = 1"
    assert extract_code("  x = 1 ") == "x = 1"
    row = HUMANEVAL_ROW
    solution = row["prompt"] + row["canonical_solution"]
    assert passes_tests(row["prompt"], solution, row["test"], row["entry_point"])
    assert not passes_tests(row["prompt"], solution.replace("1\n", "2\n"), row["test"], row["entry_point"])


def test_the_golden_solutions_pass(shared_data):
    path = shared_data / "eval" / "humaneval_test.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    rows = [json.loads(line) for line in path.read_text().splitlines()][:10]
    for row in rows:
        (_, answer) = chatcore.messages_from_humaneval(row)
        assert passes_tests(row["prompt"], answer["content"], row["test"], row["entry_point"]), row["task_id"]


ATTACKS = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "process": "import subprocess\nsubprocess.run(['touch', '{outside}'])",
    "system": "import os\nos.system('touch {outside}')",
    "spawn": "import _posixsubprocess",
    "memory": "x = [0] * 10**9",
    "slow memory": "x = []\nwhile True: x.append(str(len(x)) * 10**5)",
    "write outside": "open('{outside}', 'w').write('x')",
    "write by descriptor": "import os\nos.write(os.open('{outside}', os.O_WRONLY | os.O_CREAT), b'x')",
    "change folder": "import os\nos.chdir(os.path.dirname('{outside}'))\nopen('outside', 'w').write('x')",
    "change folder by descriptor": "import os\nos.fchdir(os.open(os.path.dirname('{outside}'), os.O_RDONLY))\n"
    "open('outside', 'w').write('x')",
    "write beside a descriptor": "import os\nfolder = os.open(os.path.dirname('{outside}'), os.O_RDONLY)\n"
    "os.open('outside', os.O_WRONLY | os.O_CREAT, dir_fd=folder)",
    "sqlite": "import sqlite3\nsqlite3.connect('{outside}').execute('create table a (b)')",
    "dbm": "import dbm\ndbm.open('{outside}', 'c')",
    "history": "import readline\nreadline.write_history_file('{outside}')",
    "fifo": "import os\nos.mkfifo('{outside}')",
    "node": "import os\nos.mknod('{outside}')",
    "shared memory": "from multiprocessing.shared_memory import SharedMemory\nSharedMemory(create=True, size=1)",
    "remove": "import os\nos.remove('{victim}')",
    "rename": "import os\nos.rename('{victim}', '{outside}')",
    "large file": "open('a', 'w').write('x' * 2**22)",
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
    "leave early": "import os\nos._exit(0)",
    "exit": "raise SystemExit(0)",
    "pickle": "import os, pickle\n"
    "class Evil:\n    def __reduce__(self): return os.system, ('touch {outside}',)\n"
    "pickle.loads(pickle.dumps(Evil()))",
    "kill": "import os\nos.kill(os.getppid(), 9)",
    "ctypes": "import ctypes\nctypes.CDLL(None).kill(1, 9)",
    "secret": "import os\nos.write(1, b'0' * 32)\nos._exit(0)",
    "stolen secret": "import os\nfor i in range(3, 9):\n    try: os.write(i + 1, os.read(i, 32))\n"
    "    except OSError: pass\nos._exit(0)",
    "stolen secret, exit": "import os\nos.write(4, os.read(3, 32))\nraise SystemExit(0)",
    "another exit": "import sys\ndel sys.modules['posix']\nimport posix\nposix._exit(0)",
    "own exception": "import builtins, os\nbuiltins.BaseException = ValueError\nos.write(4, os.read(3, 32))\n"
    "raise SystemExit(0)",
    "jump": "import sys\nsys.settrace(lambda *a: None)",
    "signal": "import signal\nsignal.raise_signal(signal.SIGKILL)",
    "environment": "import os\nassert 'A_SECRET' in os.environ",
}
ENDLESS = {
    "loop": "while True: pass",
    "flood": "while True: print('x' * 10**5)",
    "deaf": "import signal, time\nfor s in (1, 2, 3, 15): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_fail_and_touch_nothing(attack, tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "1")
    victim, outside = tmp_path / "victim", tmp_path / "outside"
    victim.write_text("here")
    tmp_path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = ATTACKS[attack].replace("{outside}", str(outside)).replace("{victim}", str(victim))
        assert not runs_to_the_end(program.replace("{port}", str(server.getsockname()[1])), timeout_seconds=5)
        server.settimeout(0.01)
        with pytest.raises(TimeoutError):
            server.accept()
    assert victim.read_text() == "here" and not outside.exists()


@pytest.mark.parametrize("attack", ENDLESS)
def test_endless_programs_end(attack):
    started = time.monotonic()
    assert not runs_to_the_end(ENDLESS[attack], timeout_seconds=0.5)
    assert time.monotonic() - started < 20


def test_honest_programs_run():
    program = "from typing import *\nimport math, re, hashlib, collections, random, json, tempfile\n"
    program += "print(hashlib.md5(b'a').hexdigest())\nopen('note', 'w').write('x')\nassert open('note').read() == 'x'"
    program += "\ntempfile.TemporaryFile().write(b'x')"
    assert runs_to_the_end(program, timeout_seconds=30)
