#!/usr/bin/env bash
# The whole line on real prose, dialogues, GSM8K and ARC (../shared/data) on two CPU cores. What comes out: README.md.
#
#   bash recipes/small/run.sh            # a second call continues at the first stage that has not finished
#   bash recipes/small/run.sh --help     # your own text, conversations and benchmarks; another folder; starting over
set -eo pipefail
recipe=recipes/small
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/line.sh"
start_line "$@"

stage tokenizer python scripts/train_tokenizer.py --config $recipe/tokenizer.yaml "${text[@]}"
stage base "${launch[@]}" scripts/pretrain.py --config $recipe/pretrain.yaml "${text[@]}"
stage mid "${launch[@]}" scripts/sft.py --config $recipe/midtrain.yaml "${chat[@]}" "${exam[@]}"
stage sft "${launch[@]}" scripts/sft.py --config $recipe/sft.yaml "${chat[@]}" "${exam[@]}"
stage rl "${launch[@]}" scripts/grpo.py --config $recipe/grpo.yaml

# One process scores all four models; its last record says that it has finished.
stage chatcore_rl python scripts/evaluate.py --config $recipe/eval.yaml "${core[@]}" "${exam[@]}"

finish_line
