"""The report on a run folder made here: every section, honest gaps, the paired test, the wall clock."""

import json
import math
from statistics import stdev

import pytest

from nanochat_hf.configs import ReportConfig
from nanochat_hf.report import build_report, sections
from nanochat_hf.report.formatting import duration, number, quote, table
from nanochat_hf.report.metrics import compare_arithmetic, sign_test
from nanochat_hf.report.run_records import RunRecords

START = 1_700_000_000.0

SECTIONS = [
    "# nanochat-hf training report",
    "## Environment",
    "### Git Information",
    "### Hardware",
    "### Software",
    "### Bloat",
    "## Tokenizer training",
    "## Tokenizer evaluation",
    "## Base model training",
    "## Base model loss",
    "## Base model evaluation",
    "## Midtraining",
    "## Chat evaluation mid",
    "## Chat SFT",
    "## Chat evaluation sft",
    "## Chat RL",
    "## Chat evaluation rl",
    "## Summary",
    "Total wall clock time:",
]


def write_record(run_dir, name, results, minute=0, settings=None):
    record = {
        "stage": name,
        "started": START + 60 * minute,
        "finished": START + 60 * minute + 30,
        "seconds": 30.0,
        "peak_memory_mib": 512.5,
        "settings": settings or {},
        "results": results,
    }
    (run_dir / "eval").mkdir(parents=True, exist_ok=True)
    (run_dir / "eval" / f"{name}.json").write_text(json.dumps(record))


def chat_results(num_right, total=200):
    flags = [int(index < num_right) for index in range(total)]
    tasks = {
        "chatcore_mini_arithmetic": {
            "accuracy": num_right / total,
            "centered": 0.0,
            "num_items": total,
            "correct": flags,
        },
        "chatcore_mini_multiple_choice": {"accuracy": 0.3, "centered": 0.0667, "num_items": 100},
    }
    return {"chatcore": 0.25, "tasks": tasks}


@pytest.fixture
def run_dir(tmp_path):
    """A whole run's records and curves, without its models."""
    run = tmp_path / "run"
    evaluation = {
        "rows": [
            {"text": "news", "bytes": 100, "tokens": 40, "bytes_per_token": 2.5, "reference_tokens": {"GPT-2": 50}}
        ],
        "missing": {"GPT-4": "no network"},
    }
    tokenizer = {"vocab_size": 2048, "num_special_tokens": 9, "bytes_per_token": 3.1, "evaluation": evaluation}
    write_record(run, "tokenizer", tokenizer, 0, {"vocab_size": 2048})
    base = {
        "val_bpb": 1.5,
        "untrained_val_bpb": 3.2,
        "tokens": 1_000_000,
        "tokens_per_second": 5000.0,
        "flops_per_token": 3e7,
    }
    write_record(run, "base", base, 1, {"depth": 4, "dataset": "embedded"})
    samples = [{"prompt": "The capital of France is", "completion": " ```Paris```"}]
    write_record(run, "base_loss", {"train_bpb": 1.4, "val_bpb": 1.5, "samples": samples}, 2)
    core_tasks = {"core_mini_copa": {"accuracy": 0.6, "centered": 0.2, "num_items": 40}}
    write_record(run, "core", {"core": 0.2, "core_stderr": 0.15, "tasks": core_tasks}, 3)
    mixture = {
        "rows": {"arithmetic": 30, "identity": 10},
        "tokens": {"arithmetic": 900, "identity": 100},
        "truncated": 2,
    }
    held_out = {"rows": {"arithmetic": 3}, "tokens": {"arithmetic": 90}}
    mid = {"val_bpb": 0.9, "num_steps": 100, "train_mixture": mixture, "validation_mixture": held_out}
    write_record(run, "mid", mid, 4, {"mixture": [{"source": "arithmetic", "rows": 30}, {"source": "identity"}]})
    write_record(run, "sft", {"num_rows": 600, "train_loss": 1.0, "val_loss": 1.1}, 5)
    write_record(run, "rl", {"reward_first": 0.4, "reward_last": 0.6}, 6)
    write_record(run, "chatcore_mid", chat_results(40), 7)
    write_record(run, "chatcore_sft", chat_results(100), 8)
    write_record(run, "chatcore_rl", chat_results(130), 9)
    answers = [{"question": "Who are you?", "answer": "I am | a <script>model</script>.", "finished": True}]
    write_record(run, "samples", {"stage": "rl", "answers": answers}, 10)
    (run / "logs").mkdir()
    lines = [{"step": step, "loss": 9.0 - step, "lr_factor": 1.0} for step in range(4)]
    (run / "logs" / "base.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_report_has_every_section_in_nanochats_order(run_dir, capsys):
    build_report(ReportConfig(run_dir=str(run_dir), hourly_rate=2.0))
    report = (run_dir / "report.md").read_text()
    places = [report.index(section) for section in SECTIONS]
    assert places == sorted(places)
    assert "0.1957" in report and "$2.00/hour" in report
    for plot in ("loss", "learning_rate", "core_by_task"):
        assert f"plots/{plot}.png" in report and (run_dir / "plots" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
    assert not (run_dir / "plots" / "reward.png").exists()
    assert "| news | 100 | 50 | 2.00 | 40 | 2.50 | +20.0% |" in report
    assert "cannot be compared" in report
    assert "| CORE metric | 0.2000 | - | 0.1500 | - | - |" in report
    assert "| Number of parameters | " in report and " | 560,988,160 |" in report
    assert "| val bpb | 1.5000 | 0.8119 |" in report and "| Validation loss | " in report and " | 1.0118 |" in report
    assert "| ChatCORE metric | - | - | 0.2500 | - | - | - |" in report, "mini tasks are not ChatCORE"
    assert "- mixture: source=arithmetic rows=30; source=identity" in report
    assert "| arithmetic | 30 | 900 | 90.00% | 3 |\n| identity | 10 | 100 | 10.00% | - |" in report
    assert "Training rows: truncated 2." in report
    assert "| CORE | - | - | - | - | 0.1957 | - | - |" in report  # mini tasks stand in a row of their own
    assert "| CORE (embedded mini tasks) | 0.2000 | - | - | - | - | - | - |" in report
    printed = capsys.readouterr().out
    assert "Who are you?" in printed and "Total" not in printed


def test_the_page_stands_alone_and_runs_nothing_of_the_models(run_dir):
    build_report(ReportConfig(run_dir=str(run_dir)))
    page = (run_dir / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3 and "plots/" not in page
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "<td>0.1957</td>" in page


def test_metrics_have_the_promised_keys(run_dir):
    build_report(ReportConfig(run_dir=str(run_dir)))
    metrics = json.loads((run_dir / "metrics.json").read_text())
    promised = {
        "tokenizer": {"vocab_size", "seconds", "bytes_per_token"},
        "base": {"val_bpb", "untrained_val_bpb", "tokens", "tokens_per_second"},
        "mid": {"val_bpb"},
        "sft": {"multiple_choice_accuracy", "arithmetic_accuracy", "num_arithmetic_problems"},
        "rl": {
            "multiple_choice_accuracy",
            "arithmetic_accuracy",
            "num_arithmetic_problems",
            "reward_first",
            "reward_last",
        },
        "core": {"core", "core_mini_copa"},
        "chatcore": {"chatcore", "chatcore_mini_arithmetic"},
    }
    for stage, keys in promised.items():
        assert keys | {"seconds", "peak_memory_mib"} <= metrics[stage].keys(), stage
    assert metrics["sft"]["arithmetic_accuracy"] == 0.5 and metrics["rl"]["arithmetic_accuracy"] == 0.65
    assert metrics["rl"]["num_arithmetic_problems"] == 200
    assert metrics["sft"]["arithmetic_stderr"] == pytest.approx(math.sqrt(0.25 / 199))
    assert metrics["core"]["core_mini_copa"] == 0.2
    assert metrics["core"]["core_stderr"] == 0.15 and metrics["core"]["num_items"] == {"core_mini_copa": 40}
    assert metrics["chatcore"]["stage"] == "rl" and metrics["chatcore"]["chatcore_mini_arithmetic"] == 0.65
    assert metrics["rl"]["paired_test_sft_to_rl"]["only_rl_right"] == 30
    assert metrics["total_seconds"] == 10 * 30


def test_stages_that_did_not_run_are_said_so(tmp_path):
    write_record(tmp_path, "tokenizer", {"vocab_size": 300})
    build_report(ReportConfig(run_dir=str(tmp_path)))
    report = (tmp_path / "report.md").read_text()
    assert [section for section in SECTIONS if section not in report] == []
    assert report.count("This run has not run this stage.") == 10
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics) == {"tokenizer", "total_seconds"}
    row = next(line for line in report.splitlines() if line.startswith("| CORE "))
    assert row == "| CORE | - | - | - | - | 0.1957 | - | - |"


def test_a_figure_that_is_none_stays_one(run_dir):
    write_record(
        run_dir, "core", {"core": math.nan, "tasks": {"core_copa": {"accuracy": math.nan, "centered": math.nan}}}
    )
    build_report(ReportConfig(run_dir=str(run_dir)))
    metrics = json.loads((run_dir / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["core"]["core"] is None
    report = (run_dir / "report.md").read_text()
    assert "| core_copa | - | - | - | - | 0.3200 |" in report and "| CORE metric | - | - | - | - | 0.1957 |" in report


def test_published_tasks_stand_beside_the_published_scores(run_dir):
    tasks = {"chatcore_arc_easy": {"accuracy": 0.4, "centered": 0.2, "num_items": 9}}
    write_record(run_dir, "chatcore_sft", {"chatcore": 0.2, "tasks": tasks})
    section = sections.chat_evaluation(RunRecords(run_dir), "sft")
    assert "| chatcore_arc_easy | 0.4000 |" in section and section.count("| 0.3969 |") == 1
    assert section.splitlines()[-1] == "| ChatCORE metric | - | - | 0.2000 | - | - | 0.0985 |"


def test_paired_test_counts_problems_and_is_exact(run_dir):
    paired = compare_arithmetic(RunRecords(run_dir), "sft", "rl")
    assert (paired["both_right"], paired["only_sft_right"], paired["only_rl_right"], paired["both_wrong"]) == (
        100,
        0,
        30,
        70,
    )
    assert paired["p_value"] == pytest.approx(2 / 2**30)
    differences = [0] * (paired["num_problems"] - 30) + [1] * 30  # problem by problem
    assert paired["difference_stderr"] == pytest.approx(stdev(differences) / paired["num_problems"] ** 0.5)
    # Binomial(10, 1/2): P(X <= 2) = (1 + 10 + 45) / 1024
    assert sign_test(2, 8) == sign_test(8, 2) == pytest.approx(2 * 56 / 1024)
    assert sign_test(0, 0) == sign_test(5, 5) == 1.0
    assert 0 < sign_test(1000, 1400) < 1e-14


def test_paired_test_refuses_different_problems(run_dir):
    write_record(run_dir, "chatcore_rl", chat_results(100, total=250))
    with pytest.raises(ValueError, match="200 arithmetic problems and rl on 250"):
        compare_arithmetic(RunRecords(run_dir), "sft", "rl")


def test_wall_clock_sums_sessions_that_did_something(run_dir):
    events = [
        (0, "session_start", "abc"),
        (1, "stage_start", "tokenizer"),
        (61, "stage_end", "tokenizer"),
        (62, "session_end", ""),
        (1000, "session_start", "abc"),  # nothing left to do
        (1003, "session_end", ""),
        (1500, "session_start", "abc"),  # refused: a wrong setting
        (1501, "stage_start", "base"),
        (1508, "session_end", ""),
        (2000, "session_start", "def"),  # interrupted
        (2001, "stage_start", "base"),
        (2039, "stage_saved", "base"),
        (2040, "session_end", ""),
        (3000, "session_start", "def (dirty)"),
        (3001, "stage_start", "base"),
        (3090, "stage_end", "base"),
        (3100, "report_start", ""),
    ]
    lines = [json.dumps({"time": START + time, "event": event, "name": name}) for time, event, name in events]
    (run_dir / "sessions.jsonl").write_text("\n".join(lines) + "\n")
    records = RunRecords(run_dir)
    assert records.total_seconds(now=START + 3105) == 62 + 40 + 105
    assert [session.commit for session in records.sessions(START)] == ["abc", "def", "def (dirty)"]
    (run_dir / "sessions.jsonl").write_text("\n".join(lines[:-1]) + "\n")  # killed before the report
    assert RunRecords(run_dir).total_seconds(now=START + 9999) == 62 + 40 + 90


def test_a_resumed_curve_counts_each_step_once(run_dir):
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "val_bpb": 1.0}, {"step": 2, "loss": 1.9}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_dir / "logs" / "base.jsonl").write_text(text + '{"step": 3, "lo')
    assert RunRecords(run_dir).curve("base") == [lines[0], lines[3], lines[2]]


def test_environment_describes_the_machine_that_did_the_work(run_dir):
    build_report(ReportConfig(run_dir=str(run_dir)))
    path = run_dir / "environment.json"
    environment = json.loads(path.read_text())
    assert environment["Software"]["torch"] != "not installed"
    environment["Hardware"]["CPU"] = "another machine"
    path.write_text(json.dumps(environment))
    build_report(ReportConfig(run_dir=str(run_dir)))
    assert "another machine" in (run_dir / "report.md").read_text()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda run: None, "no such folder"),
        (lambda run: run.mkdir(), "no finished stage"),
        (lambda run: write_broken(run, '{"half'), "is not JSON"),
        (lambda run: write_broken(run, "[1]"), "no stage record"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(tmp_path, prepare, message):
    run = tmp_path / "run"
    prepare(run)
    with pytest.raises(ValueError, match=message):
        build_report(ReportConfig(run_dir=str(run)))


def write_broken(run, text):
    (run / "eval").mkdir(parents=True)
    (run / "eval" / "base.json").write_text(text)


def test_answers_come_from_the_last_chat_model(tmp_path, tiny_model, tiny_tokenizer):
    write_record(tmp_path, "sft", {})
    tiny_model.save_pretrained(tmp_path / "sft")
    tiny_tokenizer.save_pretrained(tmp_path / "sft")
    config = ReportConfig(run_dir=str(tmp_path), questions=["Who are you?", "What is 2 + 2?"])
    build_report(config)
    record = json.loads((tmp_path / "eval" / "samples.json").read_text())
    assert record["results"]["stage"] == "sft"
    assert [answer["question"] for answer in record["results"]["answers"]] == config.questions
    build_report(config)
    assert json.loads((tmp_path / "eval" / "samples.json").read_text()) == record
    build_report(ReportConfig(run_dir=str(tmp_path), questions=["Hello?"]))
    assert len(json.loads((tmp_path / "eval" / "samples.json").read_text())["results"]["answers"]) == 1


def test_figures_as_text():
    assert [number(v) for v in (1234567, 0.81184, 3.49e9, None, math.nan, True, "", 2e-5)] == [
        *("1,234,567", "0.8118", "3.490000e+09", "-", "-", "True", "(empty)", "2e-05"),
    ]
    assert [duration(v) for v in (56.81, 724, 13080, 59.99)] == ["56.8s", "12m04s", "3h38m", "60.0s"]
    assert table(["a"], [["x | y\nz"]]).splitlines()[-1] == "| x \\| y z |"
    assert quote("a ```` b").startswith("`````text\n")


def test_pass_at_k_is_a_table_before_during_and_after():
    from nanochat_hf.report.sections import pass_table

    curve = [{"step": 0, "pass@1": 0.25, "pass@2": 0.5, "mean/exact_answer": 0.25}, {"step": 1, "reward": 0.3}]
    (told,) = pass_table([*curve, {"step": 2, "pass@1": 0.5, "pass@2": 0.75}])
    assert told.splitlines()[0] == "| Step | pass@1 | pass@2 |" and len(told.splitlines()) == 4
    assert "0.7500" in told.splitlines()[-1]
    assert pass_table(curve[1:]) == []


def test_the_report_says_how_models_were_asked(run_dir):
    kwargs = {"max_gen_toks": 96, "do_sample": False}
    record = json.loads((run_dir / "eval" / "chatcore_rl.json").read_text())
    record |= {"model_name": "runs/x/rl", "config": {"model_dtype": "torch.float32"}, "settings": {"limit": 40}}
    record["configs"] = {"letters": {"generation_kwargs": None}, "sums": {"generation_kwargs": kwargs}}
    (run_dir / "eval" / "chatcore_rl.json").write_text(json.dumps(record))
    records = RunRecords(run_dir)
    said = "- limit: 40\n- model: runs/x/rl\n- dtype: torch.float32\n- temperature: 0.0000\n- max_new_tokens: 96"
    assert said in sections.chat_evaluation(records, "rl")
    assert not sections.protocol(records, "chatcore_sft"), "a record without lm-eval's own"
    base = json.loads((run_dir / "eval" / "base.json").read_text())
    base["results"]["num_steps"] = 1234
    (run_dir / "eval" / "base.json").write_text(json.dumps(base))
    assert "Model: `base` (step 1,234)" in sections.base_evaluation(RunRecords(run_dir))
