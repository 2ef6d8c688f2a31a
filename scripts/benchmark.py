"""Benchmarks: python scripts/benchmark.py pretrain --depth 4 [--any_setting value] [--output FILE]"""

import sys

from nanochat_hf.recipe import run_command


def main() -> None:
    from nanochat_hf.benchmark import benchmark  # inside, so that an import error ends as run_command says

    benchmark(sys.argv[1:])


if __name__ == "__main__":
    run_command(main)
