"""CORE's task files: python scripts/get_core_data.py [--output DIR] [--source URL, ZIP OR FOLDER] [--sha256 HEX]"""

from nanochat_hf.configs import CoreDataConfig
from nanochat_hf.recipe import parse_recipe, run_command


def main() -> None:
    config, _ = parse_recipe(CoreDataConfig)
    from nanochat_hf.evaluation.core_data import get_core_data

    get_core_data(config)


if __name__ == "__main__":
    run_command(main)
