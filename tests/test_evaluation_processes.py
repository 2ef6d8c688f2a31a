"""Evaluation on two processes that talk through gloo: the recipe's, and training's sample of ChatCORE.

python -m torch.distributed.run --nproc_per_node 2 tests/test_evaluation_processes.py FOLDER CORE_DATA
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lm_eval_runs import save
from test_core_score import core_data  # noqa: F401 - a fixture

from nanochat_hf import NanoChatHFForCausalLM
from nanochat_hf.configs import EvaluationConfig
from nanochat_hf.evaluation import mini_tasks
from nanochat_hf.evaluation.chat_sample import sample_chatcore
from nanochat_hf.evaluation.evaluate import evaluate


def run_on_two(folder: Path, data: Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, str(folder), str(data)], env=environment, capture_output=True, text=True, timeout=300
    )
    return done.stdout + done.stderr


@pytest.mark.slow
def test_two_processes_score_what_one_does(tmp_path, core_data, tiny_model, tiny_tokenizer):  # noqa: F811
    os.remove(core_data / "copa.jsonl")
    summaries = []
    for name in ("one", "two"):
        save(tiny_model, tiny_tokenizer, tmp_path / name / "base")
        if name == "two":
            said = run_on_two(tmp_path / name, core_data)
            assert said.count("mean centered score: not whole, missing core_copa (no copa.jsonl)") == 1, said[-3000:]
        else:
            evaluate(EvaluationConfig(run_dir=str(tmp_path / name), stages=["base"], core_data=str(core_data)))
        assert not list((tmp_path / name / "eval").glob("*.cache"))
        summaries.append(json.loads((tmp_path / name / "eval" / "core.json").read_text())["summary"])
    one, two = (summary["tasks"] for summary in summaries)
    assert len(one) == 21 and one.keys() == two.keys()
    assert all(one[name]["correct"] == two[name]["correct"] for name in one)
    samples = [json.loads((tmp_path / "two" / f"sample{rank}.json").read_text()) for rank in (0, 1)]
    assert len(samples[0]["tasks"]) == 3 and samples[1] == {"chatcore": None, "tasks": {}}


if __name__ == "__main__":
    run_dir, data = Path(sys.argv[1]), sys.argv[2]
    evaluate(EvaluationConfig(run_dir=str(run_dir), stages=["base"], core_data=data))
    mini_tasks.NUM_ARITHMETIC_ROWS = mini_tasks.NUM_CHAT_ROWS = 4
    from transformers import AutoTokenizer

    model, tokenizer = (each.from_pretrained(run_dir / "base") for each in (NanoChatHFForCausalLM, AutoTokenizer))
    sample = sample_chatcore(model, tokenizer, run_dir / "base", None, 2)
    (run_dir / f"sample{os.environ['RANK']}.json").write_text(json.dumps(sample))
