"""An SFT stage in a process of its own that SIGKILL meets in the middle of a checkpoint.

python tests/killed_sft.py CONFIG.json ARGUMENTS.json N    # killed while checkpoint N is half written
"""

import json
import os
import signal
import sys
from pathlib import Path

from transformers import Trainer
from trl import SFTConfig

from nanochat_hf.configs_post_training import SFTStageConfig
from nanochat_hf.sft import run_sft


def kill_in_save(number: int) -> None:
    save, seen = Trainer._save_rng_state, [0]

    def half_saved(trainer, output_dir):
        save(trainer, output_dir)
        seen[0] += 1
        if seen[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer._save_rng_state = half_saved


if __name__ == "__main__":
    config, arguments = (json.loads(Path(path).read_text()) for path in sys.argv[1:3])
    kill_in_save(int(sys.argv[3]))
    run_sft(SFTStageConfig(**config), SFTConfig(**arguments), {})
