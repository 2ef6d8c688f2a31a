"""Midtraining or SFT: accelerate launch scripts/sft.py --config recipes/tiny/sft.yaml [--any_setting value]"""

from trl import SFTConfig

from nanochat_hf.configs_post_training import SFTStageConfig
from nanochat_hf.recipe import parse_recipe, run_command


def main() -> None:
    config, training_args, settings = parse_recipe(SFTStageConfig, SFTConfig)
    from nanochat_hf.hub import published
    from nanochat_hf.sft import run_sft  # after parsing, so that a mistyped recipe fails within a second or two

    with published(config.run_dir, settings):
        run_sft(config, training_args, settings)


if __name__ == "__main__":
    run_command(main)
