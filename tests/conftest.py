"""Shared fixtures. All offline; golden outputs and real data are read from ../shared, skipped where it is absent."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Outputs of nanochat itself; NANOCHAT_HF_GOLDEN names another folder of the same layout."""
    folder = Path(os.environ.get("NANOCHAT_HF_GOLDEN", REPOSITORY.parent / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip(f"no golden outputs at {folder} (set NANOCHAT_HF_GOLDEN)")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Small real data sets for tests."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A 512-token tokenizer with the chat template, trained on a few hundred embedded documents."""
    from itertools import islice

    from nanochat_hf.data.corpus import load_corpus
    from nanochat_hf.tokenizer import train_bpe

    return train_bpe(islice(iter(load_corpus("embedded", "train")), 300), vocab_size=512)


@pytest.fixture
def tiny_model(tiny_tokenizer):
    """A 2-layer model of the newest generation with every path alive: zero-initialised parts are filled with noise."""
    from nanochat_hf import NanoChatHFConfig, NanoChatHFForCausalLM

    config = NanoChatHFConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    model = NanoChatHFForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == 1 or parameter.std() < 0.01:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def make_model():
    """Three layers, two key/value groups, every path alive, windows shorter than 200 tokens; by generation."""
    from nanochat_hf import NanoChatHFConfig, NanoChatHFForCausalLM

    def make(architecture: str):
        config = NanoChatHFConfig(
            architecture=architecture,
            vocab_size=300,
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
        )
        model = NanoChatHFForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            # Squared activations are positive: a larger fc2 would add the same vector everywhere, and drown the tokens.
            std = 0.02 if "fc2" in name else 0.2
            torch.nn.init.normal_(parameter, mean=0.3 if parameter.ndim == 1 else 0.0, std=std)
        return model

    return make


@pytest.fixture(params=["2026-07", "2025-10"])
def any_model(request, make_model):
    return make_model(request.param)
