"""Train a ladder of depths at fixed FLOPs and draw its isoFLOP curves: python scripts/sweep.py
--config recipes/ladder/sweep.yaml"""

from nanochat_hf.configs import SweepConfig
from nanochat_hf.pretrain import pretrain
from nanochat_hf.recipe import parse_recipe, run_command
from nanochat_hf.sweep import finish_sweep, ladder


def main() -> None:
    config, settings = parse_recipe(SweepConfig)
    for rung in ladder(config, settings):
        pretrain(*rung)
    if not config.plan:
        finish_sweep(config, settings)


if __name__ == "__main__":
    run_command(main)
