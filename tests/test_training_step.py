"""One optimizer step: each weight is cast once however many batches there are, and bf16 costs no quality."""

from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_runs import curve, small_run
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat_hf import optim, pretrain, training_step
from nanochat_hf.optim import Schedule, build_optimizer
from nanochat_hf.training_step import TrainingStep


class CastsTo16Bits(TorchDispatchMode):
    """Counts casts to bf16 by the address of what is cast."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.counts[args[0].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


def test_the_layers_weights_are_cast_once_a_step(tiny_model):
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    optimizer = build_optimizer(tiny_model.train(), dtype=torch.float32)
    step = TrainingStep(
        accelerator, tiny_model, optimizer, Schedule("2026-07", 10), num_batches=3, should_compile=False
    )
    rows = torch.randint(512, (3, 1, 9))
    with CastsTo16Bits() as casts:
        step(({"input_ids": row[:, :-1], "shift_labels": row[:, 1:]} for row in rows), 0)
    AcceleratorState._reset_state()
    matrices = [m.weight for m in tiny_model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(matrices) == 13 and {casts.counts[weight.data_ptr()] for weight in matrices} == {1}


@pytest.mark.slow
def test_bf16_reaches_the_bits_per_byte_of_fp32(tmp_path, tiny_tokenizer, monkeypatch):
    """Half a percent at most, at equal tokens; where the CPU has no bf16 instructions, it is computed slowly."""
    bpb = {}
    for bf16 in (False, True):
        for module in (training_step, optim):
            monkeypatch.setattr(module, "supports_bf16", lambda device, bf16=bf16: bf16)
        changes = dict(depth=2, head_dim=64, num_steps=150, eval_every_steps=0, eval_tokens=16384, dataset="embedded")
        changes |= dict(total_batch_tokens=1024, device_batch_size=16, sequence_length=64)
        run_dir, config, settings = small_run(tmp_path, tiny_tokenizer, f"bf16-{bf16}", **changes)
        pretrain.pretrain(config, settings)
        curves = curve(run_dir, "val_bpb")
        bpb[bf16] = curves[150]
        assert bpb[bf16] < 0.8 * curves[0]
    print(f"bits per byte: fp32 {bpb[False]:.4f}, bf16 {bpb[True]:.4f}")
    assert bpb[True] <= 1.005 * bpb[False]
    assert bpb[True] != bpb[False], "bf16 was not used"
