"""Benchmarks: one subcommand a file of this folder, each a table on the screen and JSON with `--output FILE`.

    python scripts/benchmark.py pretrain --depth 4 --output pretrain.json

A subcommand's module has `CONFIG`, a dataclass of `configs.py` with a field `output`, and `run(config)`, which returns
the figures and the table. The sides of a comparison take turns in one process, the work is shown to be the same, and
what is given is the median over the rounds. Times are no tests: measure on a machine that does nothing else.
"""

import importlib
import time
from collections.abc import Sequence

import torch
import transformers

from ..hardware import cpu_name
from ..recipe import RecipeError, nearest, parse_recipe
from ..stage import write_json

SUBCOMMANDS = ("attention", "core", "decode", "grpo", "packing", "pretrain")


def benchmark(argv: Sequence[str]) -> dict:
    """Run `SUBCOMMAND [--setting value ...]`; returns the figures.

    Raises:
        RecipeError: no such subcommand or setting.
    """
    name = argv[0] if argv else ""
    if name not in SUBCOMMANDS:
        hint = f"; did you mean `{nearest(name, SUBCOMMANDS)}`?" if name else ""
        raise RecipeError(f"benchmark `{name}` is not one of {', '.join(SUBCOMMANDS)}{hint}")
    module = importlib.import_module(f".{name}", __package__)
    config, settings = parse_recipe(module.CONFIG, argv=argv[1:])
    date = time.strftime("%Y-%m-%d")
    figures, table = module.run(config)
    figures = {"benchmark": name, "date": date, "machine": machine(), "settings": vars(config), **figures}
    print(f"{name}, {date}, {figures['machine']['name']}\n\n{table}")
    if config.output:
        write_json(config.output, figures)
    return figures


def machine() -> dict:
    """What the figures hold for: processor or GPU, threads, versions."""
    threads = torch.get_num_threads()
    return {
        "name": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu_name()}, {threads} threads",
        "num_threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
