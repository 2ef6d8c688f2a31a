"""Ten steps of a small model on given rows, by one process or, through torchrun, by two that share the work.

torchrun --nproc_per_node 2 tests/ten_steps.py RESULT.pt    # each with the whole model, and with a piece of it (FSDP2)
"""

import sys

import torch
from accelerate import Accelerator

from nanochat_hf import NanoChatHFConfig, NanoChatHFForCausalLM
from nanochat_hf.fsdp import shard_model, whole_model
from nanochat_hf.optim import MAX_GRAD_NORM, Schedule, build_optimizer
from nanochat_hf.training_step import TrainingStep

ROWS, LENGTH, VOCABULARY, STEPS = 32, 16, 256, 10


def ten_steps(accelerator: Accelerator, architecture: str, num_batches: int, in_pieces: bool = False) -> dict:
    """Losses, final weights and orthogonalised matrices of all processes, in fp32 throughout."""
    world_size, rank = accelerator.num_processes, accelerator.process_index
    torch.manual_seed(0)
    rows = torch.randint(VOCABULARY, (ROWS, LENGTH + 1))
    model = NanoChatHFForCausalLM(
        NanoChatHFConfig(
            architecture=architecture, vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == 1 or parameter.std() < 0.01:
                # Zeros would leave x0_lambdas without a gradient but rounding, which AdamW scales up to full steps.
                parameter.add_(0.1 * torch.randn_like(parameter))
    if in_pieces:
        shard_model(model, accelerator, should_compile=False)
    optimizer = build_optimizer(
        model,
        lr_scale=0.03,
        dtype=torch.float32,
        max_grad_norm=MAX_GRAD_NORM[architecture],
        shares_work=world_size > 1,
    )
    step = TrainingStep(accelerator, model, optimizer, Schedule(architecture, STEPS), num_batches, False)
    losses = []
    for i in range(STEPS):
        parts = rows.chunk(world_size)[rank].chunk(num_batches)
        losses.append(step(({"input_ids": p[:, :-1], "shift_labels": p[:, 1:]} for p in parts), i))
    count = torch.tensor(optimizer.num_orthogonalized)
    whole = whole_model(model)
    return {
        "losses": losses,
        "weights": whole.state_dict() if whole else None,
        "num_orthogonalized": accelerator.reduce(count, "sum").item(),
        "own_orthogonalized": optimizer.num_orthogonalized,
        "state_numel": sum(v.numel() for state in optimizer.state.values() for v in state.values()),
    }


if __name__ == "__main__":
    processes = Accelerator(cpu=True, mixed_precision="no")
    results = {
        (name, in_pieces): ten_steps(processes, name, num_batches=1, in_pieces=in_pieces)
        for name in ("2026-07", "2025-10")
        for in_pieces in (False, True)
    }
    if processes.is_main_process:
        torch.save(results, sys.argv[1])
