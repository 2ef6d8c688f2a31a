"""Evaluation of a run, or lm-eval's command line with this project's model class and tasks.

python scripts/evaluate.py --config recipes/tiny/eval.yaml [--any_setting value]
python scripts/evaluate.py --model nanochat_hf --model_args pretrained=DIR --tasks core [any option of lm_eval]
"""

import sys

from nanochat_hf.configs import EvaluationConfig
from nanochat_hf.recipe import parse_recipe, run_command


def main() -> None:
    if {"--model", "-M"} & {each.split("=")[0] for each in sys.argv} or {"run", "ls", "validate"} & {*sys.argv[1:2]}:
        from nanochat_hf.evaluation.lm_eval_model import run_lm_eval

        return run_lm_eval()
    config, _ = parse_recipe(EvaluationConfig)
    from nanochat_hf.evaluation.evaluate import evaluate  # after parsing, so that a mistyped recipe fails at once

    evaluate(config)


if __name__ == "__main__":
    run_command(main)
