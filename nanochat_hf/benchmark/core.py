"""CORE: our scoring beside one item at a time, and beside lm-eval's own `hf` model; the same items, the same answers.

- one by one: an item's prompts as one padded batch, whole logits, a loss at every token: how nanochat evaluates
- lm_eval: `--model hf` at the fastest of several batch sizes, found on a sample of the requests beforehand
- ours: `--model nanochat_hf`

All three share one model in memory (fp32) and go from the tasks' rows to a right/wrong flag an item.

    CORE_DATA_DIR=DIR python scripts/benchmark.py core --model runs/tiny/base --max_per_task 10 --output core.json
"""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from ..configs import CoreBenchmarkConfig
from ..evaluation.core import CoreTask, request_builder
from ..evaluation.core_prompts import fewshot_rows, render_prompts, scored_starts
from ..evaluation.core_score import Flags, build_requests, load_core, mean_centered, score_tasks
from ..evaluation.lm_eval_model import NanoChatHFLM

CONFIG = CoreBenchmarkConfig
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
SAMPLE_EVERY = 8  # of the requests, to find lm-eval's batch size
MAX_LOGITS_BYTES = 2**31  # larger batches of lm-eval's are not tried: it keeps two copies of its logits


def run(config: CoreBenchmarkConfig) -> tuple[dict, str]:
    """Measure the three sides; returns the figures and their table.

    Raises:
        ValueError: no model given, a count below 1, or none of the task files at hand.
    """
    if not config.model:
        raise ValueError("--model is missing: a model folder, or a Hub id")
    if config.max_per_task < 1 or config.rounds < 1:
        raise ValueError(f"max_per_task={config.max_per_task} and rounds={config.rounds} must be at least 1")
    lm = NanoChatHFLM(config.model, dtype="float32", device="cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_core(config.model, config.core_data)
    tasks = {name: task for name, task in loaded.items() if not task.missing}
    # lm-eval's own class around the same weights; prompts are cut where ours are.
    theirs = HFLM(lm.model, tokenizer=lm.tokenizer, max_length=lm.max_length - 1, backend="causal")
    seconds_of_sizes = find_batch_size(theirs, build_requests(tasks, config.max_per_task)[::SAMPLE_EVERY])
    batch_size = theirs.batch_size_per_gpu
    sides: dict[str, Callable[[int], Flags]] = {
        "one by one": lambda limit: score_one_by_one(lm, tasks, limit),
        f"lm_eval, batch size {batch_size}": lambda limit: score_tasks(theirs, tasks, limit),
        "ours": lambda limit: score_tasks(lm, tasks, limit),
    }
    for score in sides.values():
        score(1)  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    flags: dict[str, Flags] = {}
    names = list(sides)
    for i in range(config.rounds):
        for name in names[i % 3 :] + names[: i % 3]:
            started = time.perf_counter()
            flags[name] = sides[name](config.max_per_task)
            seconds[name].append(time.perf_counter() - started)
            print(f"round {i + 1}, {name}: {seconds[name][-1]:.1f} s", flush=True)
    single, stock, ours = (median(seconds[name]) for name in names)
    accuracy = {name: sum(each) / len(each) for name, each in flags["ours"].items()}
    different = [
        f"{task}[{i}]"
        for task, ours_of_task in flags["ours"].items()
        for i, flag in enumerate(ours_of_task)
        if any(flags[name][task][i] != flag for name in names)
    ]
    figures = {
        "speedup_over_one_by_one": single / ours,
        "speedup_over_lm_eval": stock / ours,
        "items_equal": not different,
        "items_that_differ": different,
        "num_items": sum(map(len, flags["ours"].values())),
        "lm_eval_batch_size": batch_size,
        "lm_eval_seconds_by_batch_size": seconds_of_sizes,
        "seconds": dict(zip(("one_by_one", "lm_eval", "ours"), (single, stock, ours), strict=True)),
        "seconds_by_round": dict(zip(("one_by_one", "lm_eval", "ours"), seconds.values(), strict=True)),
        "accuracy": accuracy,
        "core": mean_centered(loaded, accuracy),
        "missing": [task.missing for task in loaded.values() if task.missing],
    }
    return figures, table(figures, seconds)


def score_one_by_one(lm: NanoChatHFLM, tasks: dict[str, CoreTask], limit: int) -> Flags:
    """Right or wrong, an item a forward pass."""
    builder = request_builder(lm.tokenizer, None)
    flags: Flags = {}
    for name, task in tasks.items():
        rows = task.test_docs()[:limit]
        flags[name] = []
        for row in rows:
            examples = fewshot_rows(rows, row["index"], task.config.num_fewshot or 0)
            prompts = render_prompts(row, examples, task.core_type, task.config.target_delimiter)
            sequences = [encoding.ids for encoding in builder.encode([builder.prefix + p for p in prompts])]
            starts = scored_starts(sequences, task.core_type)
            if task.core_type == "language_modeling":
                sequences = sequences[1:]
            num_scored = [len(ids) - start for ids, start in zip(sequences, starts, strict=True)]
            means, greedy = score_batch(lm, [ids[-lm.max_length :] for ids in sequences], num_scored)
            right = greedy[0] if task.core_type == "language_modeling" else means.index(min(means)) == row["gold"]
            flags[name].append(int(right))
    return flags


@torch.inference_mode()
def score_batch(
    lm: NanoChatHFLM, sequences: Sequence[list[int]], num_scored: Sequence[int]
) -> tuple[list[float], list[bool]]:
    """Mean loss of each sequence's last tokens, and whether all of those are the argmax; one forward pass."""
    width = max(map(len, sequences))
    ids = torch.tensor([each + [0] * (width - len(each)) for each in sequences], device=lm.model.device)
    logits = lm.model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    best = logits.argmax(-1)
    means, greedy = [], []
    for row, (each, count) in enumerate(zip(sequences, num_scored, strict=True)):
        scored = slice(len(each) - 1 - count, len(each) - 1)
        means.append(losses[row, scored].mean().item())
        greedy.append(bool((best[row, scored] == ids[row, 1:][scored]).all()))
    return means, greedy


def find_batch_size(lm: HFLM, requests: Sequence[Instance]) -> dict[int, float]:
    """Give lm-eval's model the batch size that scores the requests fastest; returns the seconds of each tried."""
    longest = max(len(lm.tokenizer("".join(request.args))["input_ids"]) for request in requests)
    bytes_a_row = longest * lm.model.config.get_text_config().vocab_size * 4
    seconds: dict[int, float] = {}
    lm.loglikelihood(requests[:2], disable_tqdm=True)  # warm-up
    for size in BATCH_SIZES:
        best = min(seconds, key=seconds.get, default=size)
        if size > 4 * best or (seconds and size * bytes_a_row > MAX_LOGITS_BYTES):
            break
        lm.batch_size_per_gpu = size
        started = time.perf_counter()
        lm.loglikelihood(requests, disable_tqdm=True)
        seconds[size] = time.perf_counter() - started
    lm.batch_size_per_gpu = min(seconds, key=seconds.get)
    return seconds


def table(figures: dict, seconds: dict[str, list[float]]) -> str:
    """The figures as Markdown."""
    ours = median(seconds["ours"])
    lines = ["| | seconds | by round | items/s | ours is faster |", "|---|--:|--:|--:|--:|"]
    for name, each in seconds.items():
        rounds = " ".join(f"{s:.1f}" for s in each)
        speed = figures["num_items"] / median(each)
        lines.append(f"| {name} | {median(each):.1f} | {rounds} | {speed:.2f} | {median(each) / ours:.2f}x |")
    if figures["items_equal"]:
        lines.append(f"\nall {figures['num_items']} items have the same flag on every side")
    else:
        lines.append(f"\nNOT THE SAME WORK: flags differ at {', '.join(figures['items_that_differ'])}")
    core = "not whole, no " + ", ".join(figures["missing"]) if figures["core"] is None else f"{figures['core']:.4f}"
    return "\n".join(lines) + f"\nCORE: {core}"
