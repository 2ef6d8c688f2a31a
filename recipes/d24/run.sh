#!/usr/bin/env bash
# The whole line at depth 24, architecture 2026-07 (one SFT stage, no midtraining), on GPUs. Cost and figures: README.md.
#
#   bash recipes/d24/run.sh            # a second call continues at the first stage that has not finished
#   bash recipes/d24/run.sh --help     # your own text, conversations and benchmarks; another folder; starting over
set -eo pipefail
recipe=recipes/d24
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/line.sh"
start_line "$@"

stage tokenizer python scripts/train_tokenizer.py --config $recipe/tokenizer.yaml "${text[@]}"
stage base "${launch[@]}" scripts/pretrain.py --config $recipe/pretrain.yaml "${text[@]}"
# A midtraining first, which this generation does without (then sft, below, takes --start_from mid):
# stage mid "${launch[@]}" scripts/sft.py --config $recipe/midtrain.yaml "${chat[@]}" "${exam[@]}"
stage sft "${launch[@]}" scripts/sft.py --config $recipe/sft.yaml "${chat[@]}" "${exam[@]}"
stage rl "${launch[@]}" scripts/grpo.py --config $recipe/grpo.yaml
# Instead of the line above, RL on three kinds of problem:
# stage rl "${launch[@]}" scripts/grpo.py --config $recipe/grpo_mixed.yaml
# A last stage beyond nanochat, preferences; it starts from sft (start_from in its YAML):
# stage dpo "${launch[@]}" scripts/dpo.py --config $recipe/dpo.yaml

# One process scores the models; its last record says that it has finished.
stage chatcore_rl python scripts/evaluate.py --config $recipe/eval.yaml "${core[@]}" "${exam[@]}"

finish_line
