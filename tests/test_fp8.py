"""fp8 by torchao, emulated: which matrices it takes, and that it trains as without, up to its rounding."""

import pytest
import torch

from nanochat_hf.configs import PretrainConfig
from nanochat_hf.fp8 import convert_to_fp8
from nanochat_hf.optim import build_optimizer

CPU = torch.device("cpu")


def losses(model: torch.nn.Module, num_steps: int) -> list[float]:
    torch.manual_seed(1)
    rows = torch.randint(64, (4, 33)).cumsum(1) % 64  # the next token is no secret for long
    optimizer, found = build_optimizer(model.train(), lr_scale=0.1), []
    for _ in range(num_steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(rows[:, :-1], shift_labels=rows[:, 1:], use_cache=False, skip_logits=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_fp8_trains_like_bf16(tiny_model):
    pytest.importorskip("torchao.float8", reason="torchao is not installed")
    start = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}
    wanted = losses(tiny_model, 8)
    tiny_model.load_state_dict(start)
    converted = convert_to_fp8(tiny_model, CPU, emulate=True)
    assert len(converted) == 2 * 6 and all("gate" not in name and "lm_head" not in name for name in converted)
    assert tiny_model.state_dict().keys() == start.keys()
    found = losses(tiny_model, 8)
    assert found != wanted, "nothing was rounded"
    assert found == pytest.approx(wanted, abs=0.05) and wanted[-1] < wanted[0] - 0.2


def test_fp8_is_refused_where_it_cannot_run(tiny_model):
    with pytest.raises(ValueError, match="needs a GPU like an H100.*this is a CPU"):
        convert_to_fp8(tiny_model, CPU)
    assert PretrainConfig().fp8 is False
