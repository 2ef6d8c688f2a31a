#!/usr/bin/env bash
# A base model of depth 4 beside nanochat's own run of the same shape, on a CPU. What it costs and what comes out: README.md beside this file.
#
#   bash recipes/d4/run.sh            # a second call continues at the first stage that has not finished
#   SEED=1 bash recipes/d4/run.sh --output_dir runs/d4_seed1   # another initialisation
#   bash recipes/d4/run.sh --help     # your own text, another folder, starting over
set -eo pipefail
recipe=recipes/d4
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/line.sh"
start_line "$@"

stage tokenizer python scripts/train_tokenizer.py --config $recipe/tokenizer.yaml "${text[@]}"
stage base "${launch[@]}" scripts/pretrain.py --config $recipe/pretrain.yaml "${text[@]}" --seed "${SEED:-42}"

finish_line
