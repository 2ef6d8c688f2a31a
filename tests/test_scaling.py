"""The scaling plan against nanochat's published and golden numbers, and against the model it describes."""

import json

import pytest
from golden_models import golden_file

from nanochat_hf import NanoChatHFConfig, NanoChatHFForCausalLM
from nanochat_hf.scaling import ScalingPlan


def test_d20_of_the_published_report():
    plan = ScalingPlan.from_depth(20, 65536, architecture="2025-10")
    assert plan.num_parameters == 560_988_160
    assert plan.flops_per_token == pytest.approx(3.491758e9, rel=1e-6)
    assert (plan.num_steps, plan.num_tokens) == (21_400, 11_219_763_200)
    assert plan.total_flops == pytest.approx(3.917670e19, rel=1e-6)
    assert plan.lr_scale == 1.0


def test_plan_of_the_golden_run(golden):
    """nanochat's own run on the core_eval model logged these values."""
    meta = json.loads(golden_file(golden, "core_eval/meta_000200.json").read_text())
    model, user = meta["model_config"], meta["user_config"]
    if (user["depth"], model["vocab_size"], meta["total_batch_size"]) != (4, 8192, 16384):
        pytest.skip("the figures below are those of the run with depth 4, vocabulary 8,192 and 16,384 tokens a step")
    plan = ScalingPlan.from_depth(
        user["depth"],
        model["vocab_size"],
        model["sequence_len"],
        head_dim=user["head_dim"],
        window_pattern=model["window_pattern"],
        total_batch_tokens=meta["total_batch_size"],
        num_steps=user["num_iterations"],
    )
    assert plan.num_parameters == 11_534_466
    assert plan.flops_per_token == pytest.approx(3.774946e7, rel=1e-6)
    assert plan.lr_scale == pytest.approx(0.1768, abs=5e-5)
    assert plan.weight_decay == pytest.approx(0.861248, abs=5e-7)
    assert (plan.hidden_size, plan.num_heads) == (model["n_embd"], model["n_head"])


def test_batch_grows_with_the_model():
    batches = [ScalingPlan.from_depth(depth, 32768).total_batch_tokens for depth in (4, 12, 20, 26)]
    assert batches == sorted(batches) and batches[1] == 2**19
    assert all(batch & (batch - 1) == 0 for batch in batches), "each a power of two"


@pytest.mark.parametrize("architecture", ["2026-07", "2025-10"])
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_counts_equal_the_model(architecture, depth):
    plan = ScalingPlan.from_depth(depth, 512, 256, architecture=architecture, head_dim=64)
    model = NanoChatHFForCausalLM(
        NanoChatHFConfig(
            architecture=architecture,
            vocab_size=plan.vocab_size,
            hidden_size=plan.hidden_size,
            num_hidden_layers=depth,
            num_attention_heads=plan.num_heads,
            max_position_embeddings=256,
        )
    )
    assert sum(p.numel() for p in model.parameters()) == plan.num_parameters
    windows = [plan.sequence_length if kind != "sliding_attention" else plan.window_sizes[0]
               for kind in model.config.layer_types]  # fmt: skip
    assert tuple(windows) == plan.window_sizes
    if "sliding_attention" in model.config.layer_types:
        assert model.config.sliding_window == plan.window_sizes[0] + 1


def test_short_windows_longer_than_the_sequence_count_no_more_than_it():
    """Sequences of 64 tokens: windows are multiples of 128, and reach no further than full attention does."""
    short, full = (ScalingPlan.from_depth(4, 512, 64, window_pattern=pattern) for pattern in ("SL", "L"))
    assert short.window_sizes == (128, 64, 128, 64)
    assert short.flops_per_token == full.flops_per_token


@pytest.mark.parametrize("arguments", [{"depth": 0}, {"depth": 4, "architecture": "2024"}])
def test_bad_plans(arguments):
    with pytest.raises(ValueError, match="depth=0|valid: 2026-07, 2025-10"):
        ScalingPlan.from_depth(vocab_size=512, **arguments)
