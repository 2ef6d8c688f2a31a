#!/usr/bin/env bash
# Tokenizer, base model of depth 12 (2026-07) and a LoRA adapter on it, on GPUs. Cost and figures: README.md.
#
#   bash recipes/d12/run.sh            # a second call continues at the first stage that has not finished
#   bash recipes/d12/run.sh --help     # your own text and conversations, another folder, starting over
set -eo pipefail
recipe=recipes/d12
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/line.sh"
start_line "$@"

stage tokenizer python scripts/train_tokenizer.py --config $recipe/tokenizer.yaml "${text[@]}"
stage base "${launch[@]}" scripts/pretrain.py --config $recipe/pretrain.yaml "${text[@]}"
stage sft "${launch[@]}" scripts/sft.py --config $recipe/sft_lora.yaml "${chat[@]}" "${exam[@]}"

finish_line
