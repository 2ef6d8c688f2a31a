"""Talk to a model: `python scripts/chat.py --model runs/tiny/rl`, one answer with `--prompt "..."` or piped input."""

from nanochat_hf.configs import ChatConfig
from nanochat_hf.recipe import parse_recipe, run_command
from nanochat_hf.terminal import chat


def main() -> None:
    config, _ = parse_recipe(ChatConfig)
    chat(config)


if __name__ == "__main__":
    run_command(main)
