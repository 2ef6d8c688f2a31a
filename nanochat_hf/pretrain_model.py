"""The model of a pretraining run as this machine runs it best: attention, fp8, compiled or not, whole or in pieces."""

from accelerate import Accelerator

from . import NanoChatHFForCausalLM
from .attention import use_row_attention
from .configs import PretrainConfig
from .fp8 import convert_to_fp8
from .fsdp import shard_model, wants_fsdp
from .hardware import has_compiler
from .pretrain_plan import model_config
from .scaling import ScalingPlan

CPU_COMPILE_FLOPS = 1e14  # a run shorter than this ends before torch.compile has paid for itself on a CPU


def build_model(
    plan: ScalingPlan, config: PretrainConfig, tokenizer, accelerator: Accelerator
) -> tuple[NanoChatHFForCausalLM, bool]:
    """A new model on the accelerator's device, and whether the training step should compile it.

    Raises:
        ValueError: `fp8` on a device without it, or without torchao; `compile` without a C++ compiler.
    """
    device = accelerator.device
    model = NanoChatHFForCausalLM(model_config(plan, config, tokenizer))
    use_row_attention(model)
    if config.fp8:
        convert_to_fp8(model, device)
    should_compile = config.compile
    if should_compile is None:
        should_compile = device.type == "cuda" or plan.total_flops > CPU_COMPILE_FLOPS
    if should_compile and not has_compiler():
        if config.compile:
            raise ValueError("`compile: true` needs a C++ compiler (Debian: apt install g++; or set CXX), or leave it")
        accelerator.print("not compiled, and slower for it: there is no C++ compiler (Debian: apt install g++)")
        should_compile = False
    if wants_fsdp(accelerator):
        shard_model(model, accelerator, should_compile)
        return model, False  # its layers are
    return model.to(device), should_compile
