"""Convert models: python scripts/convert.py from_nanochat --checkpoint DIR [--step N] [--tokenizer DIR] --output DIR
(or to_nanochat, from_transformers, to_transformers --checkpoint DIR --output DIR)"""

import sys

from nanochat_hf.configs import ConvertConfig
from nanochat_hf.interop import convert
from nanochat_hf.recipe import parse_recipe, run_command


def main() -> None:
    argv = sys.argv[1:]
    if {"--help", "-h"} & set(argv):
        print(__doc__ + "\n")
    direction = argv.pop(0) if argv and not argv[0].startswith("-") else None
    convert(direction, parse_recipe(ConvertConfig, argv=argv)[0])


if __name__ == "__main__":
    run_command(main)
