"""Benchmarks: python scripts/benchmark.py attention|core|decode|grpo|packing|pretrain [--setting value] [--output FILE]

`pretrain --help` lists the settings of one.
"""

import sys

from nanochat_hf.recipe import run_command


def main() -> None:
    if sys.argv[1:2] in (["--help"], ["-h"]):
        return print(__doc__)
    from nanochat_hf.benchmark import benchmark  # inside, so that an import error ends as run_command says

    benchmark(sys.argv[1:])


if __name__ == "__main__":
    run_command(main)
