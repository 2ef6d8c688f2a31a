"""Preferences: accelerate launch scripts/dpo.py --config recipes/d24/dpo.yaml [--any_setting value]"""

from trl import DPOConfig

from nanochat_hf.configs_post_training import DPOStageConfig
from nanochat_hf.recipe import parse_recipe, run_command


def main() -> None:
    config, training_args, settings = parse_recipe(DPOStageConfig, DPOConfig)
    from nanochat_hf.dpo import run_dpo  # after parsing, so that a mistyped recipe fails within a second or two
    from nanochat_hf.hub import published

    with published(config.run_dir, settings):
        run_dpo(config, training_args, settings)


if __name__ == "__main__":
    run_command(main)
