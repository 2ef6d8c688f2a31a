"""Publish a run: python scripts/publish.py --run runs/tiny --repo_id me/tiny-chat --dry_run"""

from nanochat_hf.configs import PublishConfig
from nanochat_hf.recipe import parse_recipe, run_command


def main() -> None:
    config, _ = parse_recipe(PublishConfig)
    from nanochat_hf.hub import publish  # after parsing, so that a mistyped flag fails at once

    publish(config)


if __name__ == "__main__":
    run_command(main)
