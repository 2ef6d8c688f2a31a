"""One process of two that hold a model together: tensor-parallel, then as FSDP2 does; both must be the whole model.

torchrun --nproc_per_node 2 tests/parallel_plans.py FOLDER     # FOLDER/<architecture>: model folders
"""

import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from nanochat_hf import NanoChatHFForCausalLM

ROWS = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))


def gradients_of(model) -> dict[str, torch.Tensor]:
    """Whole gradients of the mean loss over ROWS."""
    model.train()
    model(ROWS, labels=ROWS, use_cache=False).loss.backward()
    whole = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        whole[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return whole


def compare(folder: Path, **parallel: int) -> None:
    whole = NanoChatHFForCausalLM.from_pretrained(folder)
    model = NanoChatHFForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**parallel))
    sharded = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert sharded, "nothing was sharded"
    with torch.no_grad():
        mask = torch.ones_like(ROWS)
        mask[0, :7] = 0
        for arguments in ({}, {"attention_mask": mask}):
            real = arguments.get("attention_mask", mask * 0 + 1).bool()
            logits, expected = model(ROWS, **arguments).logits[real], whole(ROWS, **arguments).logits[real]
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
        losses = [each(ROWS, labels=ROWS, skip_logits=True).loss for each in (model, whole)]
        torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
        arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        tokens = model.generate(ROWS[:, :9], **arguments)
        assert torch.equal(tokens, whole.generate(ROWS[:, :9], **arguments))
    expected = gradients_of(whole)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-3, msg=name)
    print(f"{folder.name} {parallel}: {sharded} of {len(expected)} parameters sharded, agrees")


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).iterdir()):
        compare(path, tp_size=2)
        compare(path, fsdp_size=2)
    torch.distributed.destroy_process_group()
