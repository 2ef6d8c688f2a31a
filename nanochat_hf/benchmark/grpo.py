"""RL rollouts: our decoding beside stock TRL's, which calls `generate` on every repeated prompt; the same tokens.

TRL's side is GRPOTrainer's own generation: left-padded prompts, a dynamic cache, sampling until the last row has ended.
Ours reads each question once, grows its cache in place, and rows leave as they end. Ours samples first; then TRL's is
led through the same tokens by a logits processor, so that the work is equal.

    python scripts/benchmark.py grpo --output grpo.json
    python scripts/benchmark.py grpo --model runs/tiny/sft --output grpo.json
"""

import os
import tempfile
import time
from itertools import islice
from statistics import median

import datasets
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from trl import GRPOConfig, GRPOTrainer

from .. import NanoChatHFConfig, NanoChatHFForCausalLM
from ..checkpoint import generation_settings, load_model
from ..configs import GRPOBenchmarkConfig
from ..data.arithmetic import arithmetic_problems
from ..data.corpus import load_corpus
from ..generation import generate_completions
from ..hardware import supports_bf16
from ..scaling import ScalingPlan
from ..tokenizer import encode_prompt, train_bpe

CONFIG = GRPOBenchmarkConfig
NUM_TOKENIZER_DOCUMENTS = 2000


class Led(LogitsProcessor):
    """Leaves each row one choice: the token it is to write; after its end the last one, which `generate` pads over.

    Args:
        completions: token ids a row.
    """

    def __init__(self, completions: list[list[int]]):
        longest = max(map(len, completions))
        self.targets = torch.tensor([ids + [ids[-1]] * (longest - len(ids)) for ids in completions])  # (rows, longest)
        self.step = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        chosen = self.targets[:, self.step, None].to(scores.device)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def run(config: GRPOBenchmarkConfig) -> tuple[dict, str]:
    """Measure both sides in turn; returns the figures and their table."""
    model, tokenizer = prepare_model(config)
    rows = arithmetic_problems("train", config.num_prompts, seed=0)
    prompts = [[{"role": "user", "content": row["question"]}] for row in rows]
    repeated = [prompt for prompt in prompts for _ in range(config.num_generations)]
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in repeated]
    trainer = stock_trainer(config, model, tokenizer, prompts)

    def ours() -> list[list[int]]:
        with trainer.accelerator.autocast():
            completions = generate_completions(
                model,
                tokenizer,
                prompt_ids,
                config.max_completion_length,
                temperature=1.0,
                top_k=50,
                seed=1,
                with_logprobs=True,  # as rollouts do
            )
        return [completion.token_ids for completion in completions]

    def stock(written: list[list[int]]) -> list[list[int]]:
        generate, led = type(model).generate, LogitsProcessorList([Led(written)])
        model.generate = lambda **inputs: generate(model, **inputs, logits_processor=led)
        try:
            return trainer._generate_single_turn(prompt_ids, None, {}, config.num_generations)[0]
        finally:
            del model.generate

    written = ours()
    # A row that our loop stopped at its end is as long there; the others ran into the limit.
    same = stock(written) == written
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    for round_number in range(config.rounds):
        sides = [("ours", ours), ("trl", lambda: stock(written))]
        for name, side in sides[:: 1 if round_number % 2 == 0 else -1]:
            started = time.perf_counter()
            side()
            synchronize(model)
            seconds[name].append(time.perf_counter() - started)
    num_tokens = sum(map(len, written))
    results = {
        "speedup": median(seconds["trl"]) / median(seconds["ours"]),
        "same_tokens": same,
        "num_completions": len(written),
        "completion_tokens": num_tokens,
        "mean_completion_length": num_tokens / len(written),
        "prompt_tokens": sum(map(len, prompt_ids)),
        "bf16": bool(trainer.args.bf16),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "sides": {
            name: {
                "seconds": median(values),
                "seconds_by_round": values,
                "tokens_per_second": num_tokens / median(values),
            }
            for name, values in seconds.items()
        },
    }
    return results, table(results)


def prepare_model(config: GRPOBenchmarkConfig):
    """The model of the folder, or an untrained one with a tokenizer trained on the spot.

    An untrained model never ends its turn: every completion then has the full length.
    """
    if config.model is not None:
        model, tokenizer = load_model(config.model)
    else:
        torch.manual_seed(0)
        documents = islice(iter(load_corpus("embedded", "train")), NUM_TOKENIZER_DOCUMENTS)
        tokenizer = train_bpe(documents, config.vocab_size)
        plan = ScalingPlan.from_depth(
            config.depth, config.vocab_size, 512, architecture=config.architecture, head_dim=config.head_dim,
            window_pattern="L",
        )  # fmt: skip
        model = NanoChatHFForCausalLM(
            NanoChatHFConfig(
                architecture=config.architecture, vocab_size=config.vocab_size, hidden_size=plan.hidden_size,
                num_hidden_layers=plan.depth, num_attention_heads=plan.num_heads, max_position_embeddings=512,
                window_pattern="L", bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
    model.generation_config = generation_settings(tokenizer)
    return model.eval(), tokenizer


def stock_trainer(config: GRPOBenchmarkConfig, model, tokenizer, prompts: list) -> GRPOTrainer:
    """TRL's trainer as it comes, in nanochat's settings."""
    is_cpu = not torch.cuda.is_available()
    args = GRPOConfig(
        output_dir=os.path.join(tempfile.gettempdir(), "grpo-benchmark"), use_cpu=is_cpu,
        bf16=supports_bf16(torch.device("cpu" if is_cpu else "cuda")), activation_checkpointing=False,
        num_generations=config.num_generations, per_device_train_batch_size=len(prompts) * config.num_generations,
        max_completion_length=config.max_completion_length, temperature=1.0, top_k=50, beta=0.0, report_to="none",
    )  # fmt: skip
    return GRPOTrainer(
        model=model,
        args=args,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
    )


def synchronize(model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def table(results: dict) -> str:
    """The figures as Markdown."""
    lines = ["| | seconds | tokens/s |", "|---|--:|--:|"]
    for name, side in results["sides"].items():
        lines.append(f"| {name} | {side['seconds']:.2f} | {side['tokens_per_second']:,.0f} |")
    return "\n".join(
        [
            *lines,
            "",
            f"speedup: {results['speedup']:.2f}x; same tokens: {results['same_tokens']}; {results['num_completions']} "
            f"completions of {results['mean_completion_length']:.1f} tokens on average; "
            f"{'bf16' if results['bf16'] else 'fp32'}",
        ]
    )
