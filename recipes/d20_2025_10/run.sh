#!/usr/bin/env bash
# The whole line of the published d20 report, architecture 2025-10, and RL, on GPUs. Cost and figures: README.md.
#
#   bash recipes/d20_2025_10/run.sh            # a second call continues at the first stage that has not finished
#   bash recipes/d20_2025_10/run.sh --help     # your own text, conversations and benchmarks; another folder; starting over
set -eo pipefail
recipe=recipes/d20_2025_10
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/line.sh"
start_line "$@"

stage tokenizer python scripts/train_tokenizer.py --config $recipe/tokenizer.yaml "${text[@]}"
stage base "${launch[@]}" scripts/pretrain.py --config $recipe/pretrain.yaml "${text[@]}"
stage mid "${launch[@]}" scripts/sft.py --config $recipe/midtrain.yaml "${chat[@]}" "${exam[@]}"
stage sft "${launch[@]}" scripts/sft.py --config $recipe/sft.yaml "${chat[@]}" "${exam[@]}"
stage rl "${launch[@]}" scripts/grpo.py --config $recipe/grpo.yaml

# One process scores the models; its last record says that it has finished.
stage chatcore_rl python scripts/evaluate.py --config $recipe/eval.yaml "${core[@]}" "${exam[@]}"

finish_line
