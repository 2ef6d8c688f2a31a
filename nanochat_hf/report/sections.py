"""The report's sections in the order of nanochat's own training report, each made from one stage record.

A section of a stage that did not run says so in one line; a figure that does not exist is "-". Settings stand under our
names, as recipe and command line gave them; results the table below does not know follow under their own names.
"""

import time
from collections.abc import Callable, Iterable

from ..evaluation.noise import error_of_share
from ..tokenizer_evaluation import evaluation_tables
from . import published
from .formatting import bullets, duration, flatten, mebibytes, number, percent, quote, table
from .metrics import tasks_of
from .run_records import RunRecords

# record -> (key of a result, its name in the report, its format), in nanochat's order
RESULTS: dict[str, list[tuple[str, str, Callable]]] = {
    "tokenizer": [
        ("vocab_size", "vocab_size", number),
        ("num_special_tokens", "num_special_tokens", number),
        ("train_seconds", "train_time", duration),
        ("token_bytes_min", "token_bytes_min", number),
        ("token_bytes_max", "token_bytes_max", number),
        ("token_bytes_mean", "token_bytes_mean", number),
        ("token_bytes_std", "token_bytes_std", number),
    ],
    "base": [
        ("num_parameters", "Number of parameters", number),
        ("flops_per_token", "Number of FLOPs per token", "{:e}".format),
        ("num_steps", "Calculated number of iterations", number),
        ("tokens", "Number of training tokens", number),
        ("tokens_per_parameter", "Tokens : Params ratio", number),
        ("world_size", "DDP world size", number),
        ("untrained_val_bpb", "Validation bpb before training", number),
        ("min_val_bpb", "Minimum validation bpb", number),
        ("val_bpb", "Final validation bpb", number),
        ("core", "CORE metric estimate", number),
        ("mfu", "MFU %", percent),
        ("total_flops", "Total training flops", "{:e}".format),
        ("training_seconds", "Total training time", duration),
        ("tokens_per_second", "Tokens per second", number),
    ],
    "mid": [
        ("num_steps", "Number of iterations", number),
        ("world_size", "DDP world size", number),
        ("min_val_bpb", "Minimum validation bpb", number),
        ("val_bpb", "Final validation bpb", number),
    ],
    "sft": [
        ("num_rows", "Training rows", number),
        ("num_steps", "Number of iterations", number),
        ("train_loss", "Training loss", number),
        ("val_loss", "Validation loss", number),
    ],
    "rl": [
        ("num_problems", "Training problems", number),
        ("num_steps", "Number of iterations", number),
        ("reward_first", "Mean reward of the first three steps", number),
        ("reward_last", "Mean reward of the last three steps", number),
        ("uniform_groups", "Questions whose answers all got the same reward", percent),
        ("empty_groups", "Questions whose answers were all empty", percent),
    ],
    "dpo": [
        ("num_pairs", "Training pairs", number),
        ("num_steps", "Number of iterations", number),
        ("margin", "Margin on held-out pairs", number),
        ("accuracy", "Held-out pairs with a margin above 0", percent),
    ],
}
COST = [("seconds", "Wall clock of the stage", duration), ("peak_memory_mib", "Peak memory usage", mebibytes)]


def stage_section(records: RunRecords, title: str, name: str) -> str:
    """Settings and results of a training stage."""
    if name not in records:
        return not_run(title)
    cost = records.cost(name)
    results = dict(flatten(records.results(name))) | {key: cost.get(key) for key in ("seconds", "peak_memory_mib")}
    known = [*RESULTS[name], *COST]
    shown = {key for key, _, _ in known}
    further = [(key, number(value)) for key, value in results.items() if key not in shown and not is_table(key)]
    parts = [heading(records, title, name), settings(records, name), results_table(name, known, results)]
    parts += [bullets(further)] if further else []
    return "\n\n".join([*parts, *mixture_table(records.results(name)), *pass_table(records.curve(name))])


def results_table(name: str, known: list[tuple[str, str, Callable]], results: dict) -> str:
    """Results of a record, and the published run's beside them where it had this stage."""
    theirs = published.RESULTS.get(name)
    rows = []
    for key, label, form in known:
        sides = [results, theirs] if theirs else [results]
        rows.append([label, *("-" if side.get(key) is None else form(side[key]) for side in sides)])
    return table(["Result", "This run", published.NAME][: len(rows[0])], rows)


def is_table(key: str) -> bool:
    """Whether a flattened result belongs to a table."""
    tables = ("train_mixture.", "validation_mixture.", "pass@", "before.pass@")
    return key.split(".")[0] == "evaluation" or key.startswith(tables)


def pass_table(curve: list[dict]) -> list[str]:
    """pass@k on held-out problems before, during and after RL; empty where it was not scored."""
    scored = [line for line in curve if "pass@1" in line]
    if not scored:
        return []
    names = [name for name in scored[0] if name.startswith("pass@")]
    rows = [[number(line["step"]), *(number(line[name]) for name in names)] for line in scored]
    return [table(["Step", *names], rows)]


def mixture_table(results: dict) -> list[str]:
    """What a stage learned from: rows and tokens a source, and what was cut or left out; empty without a mixture."""
    mixture, held_out = results.get("train_mixture"), results.get("validation_mixture", {})
    if mixture is None:
        return []
    total = sum(mixture["tokens"].values()) or 1
    rows = [
        [source, number(count), number(mixture["tokens"][source]), percent(mixture["tokens"][source] / total)]
        + [number(held_out.get("rows", {}).get(source))]
        for source, count in mixture["rows"].items()
    ]
    left_out = ", ".join(f"{key} {number(value)}" for key, value in mixture.items() if isinstance(value, int))
    header = ["Source", "Rows", "Tokens", "Share of tokens", "Validation rows"]
    return [table(header, rows)] + ([f"Training rows: {left_out}."] if left_out else [])


def tokenizer_evaluation(records: RunRecords) -> str:
    """Bytes per token by text type, beside GPT-2's and GPT-4's tokenizers."""
    title = "Tokenizer evaluation"
    if "tokenizer" not in records:
        return not_run(title)
    evaluation = records.results("tokenizer").get("evaluation")
    tables = evaluation_tables(evaluation) if evaluation else "This run recorded no comparison."
    return f"{heading(records, title, 'tokenizer')}\n\n{tables}"


def base_loss(records: RunRecords) -> str:
    """Bits per byte on both splits, and the seven prompts continued."""
    title = "Base model loss"
    if "base_loss" not in records:
        return not_run(title)
    results = records.results("base_loss")
    figures = results_table("base_loss", [("train_bpb", "train bpb", number), ("val_bpb", "val bpb", number)], results)
    texts = [
        sample if isinstance(sample, str) else f"{sample['prompt']}{sample['completion']}"
        for sample in results.get("samples", [])
    ]
    samples = "\n\n".join(f"sample {index}:\n\n{quote(text)}" for index, text in enumerate(texts))
    return "\n\n".join([heading(records, title, "base_loss"), figures, samples or "No samples were recorded."])


def base_evaluation(records: RunRecords) -> str:
    """CORE and each task with its standard error, and the published score of the same task beside it."""
    title = "Base model evaluation"
    if "core" not in records:
        return not_run(title)
    mean, stderr = (records.results("core").get(key) for key in ("core", "core_stderr"))
    rows = [["CORE metric", number(mean), "-", number(stderr), "-", "-"]]
    for name, task in tasks_of(records, "core").items():
        theirs = published.CORE.get(name.removeprefix("core_"))
        accuracy, items = task.get("accuracy"), task.get("num_items")
        error = number(error_of_share(accuracy, items)) if items else "-"
        rows.append([name, number(task["centered"]), number(accuracy), error, number(items), number(theirs)])
    is_core = any(name.removeprefix("core_") in published.CORE for name in tasks_of(records, "core"))
    if is_core:
        rows[0][-1] = number(published.SUMMARY["CORE"]["base"])
    header = ["Task", "Centered", "Accuracy", "Standard error", "Items", f"{published.NAME}, centered"]
    steps = records.results("base").get("num_steps") if "base" in records else None
    model = f"Model: `{records.records['core'].get('model_name', 'base')}` (step {number(steps)})"
    parts = [heading(records, title, "core"), settings(records, "core"), model, table(header, rows)]
    if not is_core:
        parts.append(
            "These are this project's embedded mini tasks: they exercise CORE's three kinds of question and "
            "cannot be compared with anyone's CORE."
        )
    return "\n\n".join(parts)


def chat_evaluation(records: RunRecords, stage: str) -> str:
    """ChatCORE of a stage: accuracy a task with its standard error."""
    title, name = f"Chat evaluation {stage}", f"chatcore_{stage}"
    if name not in records:
        return not_run(title)
    rows = []
    for task, figures in tasks_of(records, name).items():
        accuracy, items = figures["accuracy"], figures.get("num_items")
        error = number(error_of_share(accuracy, items)) if items else "-"
        centered, in_form = number(figures.get("centered")), number(figures.get("format"))
        theirs = published.SUMMARY.get(published.row_name(task), {}).get(stage)
        rows.append([task, number(accuracy), error, centered, number(items), in_form, number(theirs)])
    mean, stderr = (records.results(name).get(key) for key in ("chatcore", "chatcore_stderr"))
    is_chatcore = any(published.row_name(row[0]) in published.CHATCORE_TASKS for row in rows)
    theirs = published.SUMMARY["ChatCORE"].get(stage) if is_chatcore else None
    rows.append(["ChatCORE metric", "-", number(stderr), number(mean), "-", "-", number(theirs)])
    header = ["Task", "Accuracy", "Standard error", "Centered", "Problems", "In form", published.NAME]
    asked = settings(records, name, protocol(records, name))
    return "\n\n".join([heading(records, title, name), asked, table(header, rows)])


def protocol(records: RunRecords, name: str) -> list[tuple[str, str]]:
    """How an evaluation asked its model, from lm-eval's own record; empty where the record has none."""
    record = records.records[name]
    kwargs = [c["generation_kwargs"] for c in record.get("configs", {}).values() if c.get("generation_kwargs")]
    lengths = sorted({k["max_gen_toks"] for k in kwargs if "max_gen_toks" in k})
    temperatures = sorted({k.get("temperature", 1.0) if k.get("do_sample") else 0.0 for k in kwargs})
    lines = [
        ("model", record.get("model_name")),
        ("dtype", record.get("config", {}).get("model_dtype")),
        ("temperature", ", ".join(map(number, temperatures))),
        ("max_new_tokens", ", ".join(map(number, lengths))),
    ]
    return [(key, value) for key, value in lines if value]


def paired_test(paired: dict | None) -> str:
    """Whether RL helped: the exact test on the problems where SFT and RL differ."""
    if paired is None:
        return "SFT and RL on the same problems: not compared, one of them was not evaluated."
    return (
        f"SFT and RL on the same {paired['num_problems']} arithmetic problems: both right {paired['both_right']}, "
        f"only SFT right {paired['only_sft_right']}, only RL right {paired['only_rl_right']}, "
        f"both wrong {paired['both_wrong']}; difference {paired['difference']:+.4f} "
        f"(standard error {paired['difference_stderr']:.4f}), "
        f"exact two-sided McNemar test p = {paired['p_value']:.3g}."
    )


def samples(records: RunRecords) -> str:
    """The final model's answers."""
    title = "Sample chat"
    if "samples" not in records:
        return not_run(title)
    answers = records.results("samples")["answers"]
    text = "\n\n".join(f"**{answer['question']}**\n\n{quote(answer['answer'])}" for answer in answers)
    return f"{heading(records, title, 'samples')}\n\nModel: `{records.results('samples')['stage']}`, greedy.\n\n{text}"


def settings(records: RunRecords, name: str, more: Iterable[tuple[str, str]] = ()) -> str:
    """The explicit settings of a stage, and what else belongs in their list."""
    said = [(key, number(value)) for key, value in flatten(records.settings(name)) if key != "run_dir"] + list(more)
    return "**Settings**\n\n" + (bullets(said) if said else "All at their defaults (nanochat_hf/configs.py).")


def heading(records: RunRecords, title: str, name: str) -> str:
    """Section title and when its stage finished, local time."""
    finished = records.records[name].get("finished")
    return f"## {title}\ntimestamp: {timestamp(finished)}"


def not_run(title: str) -> str:
    """The section of a stage that did not run."""
    return f"## {title}\n\nThis run has not run this stage."


def timestamp(seconds: float | None) -> str:
    """Local date and time."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
