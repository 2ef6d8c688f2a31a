"""Tokenizer: python scripts/train_tokenizer.py --config recipes/tiny/tokenizer.yaml [--any_setting value]"""

from nanochat_hf.configs import TokenizerConfig
from nanochat_hf.recipe import parse_recipe, run_command


def main() -> None:
    config, _ = parse_recipe(TokenizerConfig)
    from nanochat_hf.tokenizer_training import train_tokenizer  # after parsing: a mistyped recipe fails within seconds

    train_tokenizer(config)


if __name__ == "__main__":
    run_command(main)
