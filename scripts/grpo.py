"""RL: accelerate launch scripts/grpo.py --config recipes/tiny/grpo.yaml [--any_setting value]"""

from trl import GRPOConfig

from nanochat_hf.configs_post_training import GRPOStageConfig
from nanochat_hf.recipe import parse_recipe, run_command


def main() -> None:
    config, training_args, settings = parse_recipe(GRPOStageConfig, GRPOConfig)
    from nanochat_hf.grpo import run_grpo  # after parsing, so that a mistyped recipe fails within a second or two
    from nanochat_hf.hub import published

    with published(config.run_dir, settings):
        run_grpo(config, training_args, settings)


if __name__ == "__main__":
    run_command(main)
