"""Report of a run: python scripts/report.py --run_dir runs/tiny"""

from nanochat_hf.configs import ReportConfig
from nanochat_hf.recipe import parse_recipe, run_command


def main() -> None:
    config, _ = parse_recipe(ReportConfig)
    from nanochat_hf.report import build_report  # after parsing, so that a mistyped flag fails at once

    build_report(config)


if __name__ == "__main__":
    run_command(main)
