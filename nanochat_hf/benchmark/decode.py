"""Decoding: our loop beside transformers' `generate` with a dynamic cache, both greedy, one conversation and sixteen.

All read the same prompts in the model's own precision (fp32 on a CPU) and write the same number of tokens, past any
end of turn; `tokens_equal` says whether these are the same. On a CPU our loop takes part twice, as it is and compiled
(`speedup_batch_N` is of the latter, `speedup_eager_batch_N` of the former). On a GPU `generate` with a static cache,
compiled, takes part too, for models whose cache transformers can compile (2025-10). The time to compile is not in the
rates.

    python scripts/benchmark.py decode --model runs/tiny/rl --output decode.json
"""

import time
from itertools import islice
from statistics import median

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint import load_model
from ..configs import DecodeBenchmarkConfig
from ..data.corpus import load_corpus
from ..decode_compiled import COMPILED, CompiledStep, compile_decoding
from ..generation import Row, TurnTokens, decode
from ..sampling import Sampling
from ..tokenizer import encode_text

CONFIG = DecodeBenchmarkConfig
BATCH_SIZES = (1, 16)


def run(config: DecodeBenchmarkConfig) -> tuple[dict, str]:
    """Measure both sides at each batch size; returns the figures and their table."""
    if config.rounds < 1 or config.prompt_tokens < 1 or config.new_tokens < 2:
        raise ValueError("rounds and prompt_tokens must be 1 or more, new_tokens 2 or more")
    has_gpu = torch.cuda.is_available()
    model, tokenizer = load_model(config.model, "auto" if has_gpu else torch.float32)
    model = model.to("cuda" if has_gpu else "cpu").eval()
    room = model.config.max_position_embeddings
    if config.prompt_tokens + config.new_tokens > room:
        raise ValueError(f"prompt_tokens + new_tokens must be within the model's {room} tokens")
    prompts = make_prompts(tokenizer, config.prompt_tokens)
    batches = {size: compare(model, tokenizer, prompts[:size], config) for size in BATCH_SIZES}
    results = {f"speedup_batch_{size}": sides["generate"]["speedup"] for size, sides in batches.items()}
    if not has_gpu:
        for size, sides in batches.items():
            results[f"speedup_eager_batch_{size}"] = sides["generate"]["speedup"] / sides["ours, eager"]["speedup"]
    results |= {
        "tokens_equal": all(sides["generate"]["tokens_equal"] for sides in batches.values()),
        "compile_seconds": sum(side["compile_seconds"] for sides in batches.values() for side in sides.values()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_parameters": model.num_parameters(),
        "batches": {str(size): sides for size, sides in batches.items()},
    }
    return results, table(results)


def make_prompts(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[list[int]]:
    """As many beginnings of texts as the largest batch needs, each `num_tokens` long."""
    texts = (encode_text(tokenizer, text) for text in load_corpus("embedded", "validation"))
    start = [tokenizer.bos_token_id]
    return list(islice(((start + ids)[:num_tokens] for ids in texts if len(ids) >= num_tokens), max(BATCH_SIZES)))


def compare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], config: DecodeBenchmarkConfig
) -> dict:
    """All sides in turns, after three turns each to warm up; the median over the rounds counts."""
    runs = {
        "generate": lambda n: run_generate(model, prompts, n, "dynamic"),
        "ours": lambda n: run_ours(model, tokenizer, prompts, n),
    }
    if model.device.type == "cpu":
        runs["ours, eager"] = runs["ours"]
        compile_decoding(model)
        step = COMPILED.pop(model)
        runs["ours"] = lambda n: run_compiled(step, model, tokenizer, prompts, n)
    elif not getattr(model.config, "use_smear", False):
        runs["static, compiled"] = lambda n: run_generate(model, prompts, n, "static")
    tokens, figures = {}, {}
    for side, take_turn in runs.items():
        seconds = []
        for _ in range(3):  # to warm up, compile and record
            started = time.perf_counter()
            tokens[side] = take_turn(config.new_tokens)
            seconds.append(time.perf_counter() - started)
        is_compiled = side == "static, compiled" or (side == "ours" and "ours, eager" in runs)
        compile_seconds = seconds[0] - min(seconds[1:]) if is_compiled else 0.0
        figures[side] = {"compile_seconds": compile_seconds, "first": [], "all": []}
    for _ in range(config.rounds):
        for side, take_turn in runs.items():
            for what, num_tokens in (("first", 1), ("all", config.new_tokens)):
                if num_tokens == 1 and side == "static, compiled":
                    continue  # another length, another compilation
                started = time.perf_counter()
                take_turn(num_tokens)
                figures[side][what].append(time.perf_counter() - started)
    for side in figures.values():
        rate = config.new_tokens / median(side["all"])
        side["tokens_per_second"], side["tokens_per_second_per_stream"] = rate * len(prompts), rate
        first, side["seconds_by_round"] = side.pop("first"), side.pop("all")
        side["first_token_seconds"] = median(first) if first else None
    ours = figures["ours"]["tokens_per_second"]
    for side, its_tokens in tokens.items():
        figures[side]["tokens_equal"] = its_tokens == tokens["ours"]
        figures[side]["speedup"] = ours / figures[side]["tokens_per_second"]
    return figures


def run_generate(model: PreTrainedModel, prompts: list[list[int]], num_tokens: int, cache: str) -> list[list[int]]:
    ids = torch.tensor(prompts, device=model.device)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "cache_implementation": cache}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, **settings)
    return output[:, ids.shape[1] :].tolist()


def run_ours(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], num_tokens: int
) -> list[list[int]]:
    turn = TurnTokens(tokenizer)
    turn.ends = set()
    rows = [Row(prompt, turn, use_calculator=False) for prompt in prompts]
    for _ in decode(rows, model, Sampling(), None, num_tokens):
        pass
    return [row.completion.token_ids for row in rows]


def run_compiled(step: CompiledStep, model: PreTrainedModel, *arguments) -> list[list[int]]:
    COMPILED[model] = step
    try:
        return run_ours(model, *arguments)
    finally:
        del COMPILED[model]


def table(results: dict) -> str:
    """The figures as Markdown."""
    lines = ["| batch | side | tok/s | tok/s a stream | first token | ours over it | same tokens |"]
    lines.append("|---|---|--:|--:|--:|--:|---|")
    for size, sides in results["batches"].items():
        for side, figures in sides.items():
            first = figures["first_token_seconds"]
            cells = [
                size,
                side,
                f"{figures['tokens_per_second']:,.0f}",
                f"{figures['tokens_per_second_per_stream']:,.0f}",
                f"{1000 * first:.1f} ms" if first else "-",
                f"{figures['speedup']:.2f}x",
                "yes" if figures["tokens_equal"] else "NO",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{results['dtype']}, greedy; compiled in {results['compile_seconds']:.0f} s"
