#!/usr/bin/env bash
# Which size makes the best of a compute budget: three depths at two budgets, on a CPU. What comes out: README.md beside this file.
#
#   bash recipes/ladder/run.sh            # a second call continues at the first run that has not finished
#   bash recipes/ladder/run.sh --help     # your own text, another folder, starting over
set -eo pipefail
recipe=recipes/ladder
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/line.sh"
start_line "$@"

stage tokenizer python scripts/train_tokenizer.py --config $recipe/tokenizer.yaml "${text[@]}"
stage sweep "${launch[@]}" scripts/sweep.py --config $recipe/sweep.yaml "${text[@]}"
