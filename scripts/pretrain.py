"""Pretrain a base model: accelerate launch --config_file accelerate_configs/cpu.yaml scripts/pretrain.py
--config recipes/tiny/pretrain.yaml"""

from nanochat_hf.configs import PretrainConfig
from nanochat_hf.pretrain import pretrain
from nanochat_hf.recipe import parse_recipe, run_command


def main() -> None:
    pretrain(*parse_recipe(PretrainConfig))


if __name__ == "__main__":
    run_command(main)
