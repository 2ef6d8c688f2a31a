#!/usr/bin/env bash
# Tokenizer and base model of depth 24, architecture 2026-07, on GPUs. What it costs and what comes out: README.md beside this file.
#
#   bash recipes/d24/run.sh            # a second call continues at the first stage that has not finished
#   bash recipes/d24/run.sh --help     # your own text, another folder, starting over
set -eo pipefail
recipe=recipes/d24
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/line.sh"
start_line "$@"

stage tokenizer python scripts/train_tokenizer.py --config $recipe/tokenizer.yaml "${text[@]}"
stage base "${launch[@]}" scripts/pretrain.py --config $recipe/pretrain.yaml "${text[@]}"

finish_line
