"""Pretrain a base model: accelerate launch --config_file accelerate_configs/cpu.yaml scripts/pretrain.py
--config recipes/tiny/pretrain.yaml"""

from nanochat_hf.configs import PretrainConfig
from nanochat_hf.hub import published
from nanochat_hf.pretrain import pretrain
from nanochat_hf.recipe import parse_recipe, run_command


def main() -> None:
    config, settings = parse_recipe(PretrainConfig)
    with published(config.run_dir, settings):
        pretrain(config, settings)


if __name__ == "__main__":
    run_command(main)
