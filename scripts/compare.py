"""Models side by side: python scripts/compare.py A B [C ...], each a run, or a results file or folder of lm-eval's"""

import sys

from nanochat_hf.recipe import run_command


def main() -> None:
    from nanochat_hf.evaluation.compare import compare

    if {"--help", "-h"} & set(sys.argv):
        return print(__doc__)
    print(compare(sys.argv[1:]))


if __name__ == "__main__":
    run_command(main)
