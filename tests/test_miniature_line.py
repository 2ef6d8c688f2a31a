"""The whole line end to end, in miniature: the tiny recipe's own YAML files with a smaller model and fewer steps."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, SFTConfig

from nanochat_hf.configs import (
    EvaluationConfig,
    PretrainConfig,
    ReportConfig,
    TokenizerConfig,
)
from nanochat_hf.configs_post_training import GRPOStageConfig, SFTStageConfig
from nanochat_hf.evaluation import mini_tasks
from nanochat_hf.evaluation.evaluate import evaluate
from nanochat_hf.grpo import run_grpo
from nanochat_hf.pretrain import pretrain
from nanochat_hf.recipe import parse_recipe
from nanochat_hf.report import build_report
from nanochat_hf.sft import run_sft
from nanochat_hf.tokenizer_training import train_tokenizer

MODELS = ("base", "mid", "sft", "rl")
ROWS = 12
TINY = Path(__file__).parents[1] / "recipes" / "tiny"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A finished run of the tiny recipe, each stage cut down to seconds."""
    folder = tmp_path_factory.mktemp("line") / "run"

    def parsed(stem, *types, **flags):
        arguments = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
        return parse_recipe(*types, argv=["--config", str(TINY / f"{stem}.yaml"), "--run_dir", str(folder), *arguments])

    train_tokenizer(parsed("tokenizer", TokenizerConfig, vocab_size=512, max_chars=500_000)[0])
    small = {"depth": 1, "sequence_length": 128, "device_batch_size": 8, "total_batch_tokens": 1024}
    steps = {"num_steps": 4, "eval_tokens": 1024, "eval_every_steps": 2, "save_every_steps": 2}
    pretrain(*parsed("pretrain", PretrainConfig, **small, **steps))
    for stem in ("midtrain", "sft"):
        config, arguments, settings = parsed(
            stem, SFTStageConfig, SFTConfig, max_steps=2, max_length=128, validation_rows=4, logging_steps=1
        )
        config.mixture = [{**source, "rows": ROWS} for source in config.mixture]
        run_sft(config, arguments, settings)
    config, arguments, settings = parsed(
        "grpo", GRPOStageConfig, GRPOConfig, max_steps=2, gradient_accumulation_steps=1, max_completion_length=8
    )
    config.mixture = [{**source, "rows": ROWS} for source in config.mixture]
    run_grpo(config, arguments, settings)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NUM_CORE_ROWS", "NUM_ARITHMETIC_ROWS", "NUM_CHAT_ROWS"):
            patch.setattr(mini_tasks, name, 3)
        evaluate(parsed("eval", EvaluationConfig)[0])
    build_report(ReportConfig(run_dir=str(folder), questions=["Who are you?"]))
    return folder


def test_every_stage_opens_anywhere(run_dir):
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(run_dir / name)
        tokenizer = AutoTokenizer.from_pretrained(run_dir / name, trust_remote_code=True)
        assert model.config.vocab_size == len(tokenizer) == 512
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert model.generate(**prompt, max_new_tokens=4, min_new_tokens=4).shape[1] == prompt["input_ids"].shape[1] + 4


def test_metrics_have_the_promised_keys(run_dir):
    metrics = json.loads((run_dir / "metrics.json").read_text())
    promised = {
        "tokenizer": {"vocab_size", "seconds", "bytes_per_token"},
        "base": {"val_bpb", "untrained_val_bpb", "tokens", "tokens_per_second"},
        "mid": {"val_bpb"},
        "sft": {"multiple_choice_accuracy", "arithmetic_accuracy", "num_arithmetic_problems"},
        "rl": {
            "multiple_choice_accuracy",
            "arithmetic_accuracy",
            "num_arithmetic_problems",
            "reward_first",
            "reward_last",
        },
        "core": {"core", "core_mini_next_line"},
        "chatcore": {"chatcore", "chatcore_mini_arithmetic"},
    }
    for stage, keys in promised.items():
        missing = (keys | {"seconds", "peak_memory_mib"}) - metrics[stage].keys()
        assert not missing, f"{stage} lacks {missing}"
    assert metrics["total_seconds"] > 0
    assert metrics["base"]["tokens"] == 4 * 1024


def test_the_report_tells_every_stage(run_dir):
    report = (run_dir / "report.md").read_text()
    headings = [line.removeprefix("## ") for line in report.splitlines() if line.startswith("## ")]
    for heading in ("Environment", "Tokenizer training", "Base model training", "Midtraining", "Chat SFT", "Summary"):
        assert heading in headings
    assert "not run" not in report.lower()
    assert {path.name for path in (run_dir / "plots").iterdir()} >= {"loss.png", "bpb.png", "reward.png"}
