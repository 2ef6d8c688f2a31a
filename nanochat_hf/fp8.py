"""fp8 training by torchao: the layers' large matrix products in 8 bits, each tensor with a scale of its own.

From depth 20 up nanochat gained about 5% at equal quality; smaller models lose. Weights, names and checkpoints are as
before: masters stay fp32, and what is rounded to fp8 is rounded anew in each product.
"""

import torch
from transformers import PreTrainedModel


def convert_to_fp8(model: PreTrainedModel, device: torch.device, emulate: bool = False) -> list[str]:
    """Let a NanoChatHF model's layers multiply in fp8; the head, embeddings and gates stay as they are.

    Args:
        device: where the model will run.
        emulate: compute what an fp8 GPU would, on any device, slowly.

    Returns:
        The names of the layers that were converted.

    Raises:
        ValueError: the device multiplies no fp8 matrices (NVIDIA GPUs do from compute capability 8.9 on), or torchao is
            not installed.
    """
    if not emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise ValueError(
            f"fp8 needs a GPU like an H100 (compute capability 8.9 or newer), this is {name}: leave it out"
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ValueError('fp8 needs torchao: pip install -c constraints.txt -e ".[fp8]"') from error
    converted = [
        name
        for name, module in model.named_modules()
        if ".layers." in name
        and isinstance(module, torch.nn.Linear)
        and module.in_features % 16 == module.out_features % 16 == 0  # what fp8 kernels take; gates are smaller
    ]
    config = Float8LinearConfig(emulate=emulate)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in converted)
    return converted
