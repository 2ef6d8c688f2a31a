"""Yardsticks: bits per byte, CORE and ChatCORE as lm-eval tasks, and the lm-eval model class that scores them fast.

Nothing is imported here: lm-eval is heavy, and `bpb` alone must stay light enough for the training loop.
"""

import sys
from pathlib import Path

# Python puts a script's own folder first on the path, where scripts/evaluate.py would hide the library `evaluate`.
_SCRIPTS = str(Path(__file__).parents[2] / "scripts")
sys.path[:] = [folder for folder in sys.path if folder != _SCRIPTS]

TASKS_DIR = Path(__file__).with_name("tasks")  # for lm-eval's --include_path
CORE_DATA_DIR = "~/.cache/nanochat_hf/core"  # where scripts/get_core_data.py puts CORE's files, unless told otherwise
BITS_PER_BYTE = Path(__file__).with_name("bits_per_byte")  # for evaluate.load
