"""FSDP2: every process holds a piece of each parameter, of its gradient and of its optimizer state.

For models of which a whole copy is too much for one device. torch's `fully_shard` is called here, not through
`Accelerator.prepare`: Accelerate would silently run DDP on CPUs, and so the tests on two CPU processes run what GPUs
run. FSDP averages the gradients; the optimizer gathers Muon's matrices at their owners (`optim_shards.py`).

    ACCELERATE_USE_CPU=true accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 2 ...
"""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from . import NanoChatHFForCausalLM


def wants_fsdp(accelerator: Accelerator) -> bool:
    """Whether the launcher's configuration says `distributed_type: FSDP` and there is more than one process.

    Raises:
        ValueError: it asks for FSDP1, which flattens matrices: Muon needs them as they are.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP") or accelerator.num_processes == 1:
        return False
    if FullyShardedDataParallelPlugin().fsdp_version != 2:
        raise ValueError("FSDP version 1 flattens matrices, and Muon needs them whole: set fsdp_version: 2")
    return True


def shard_model(model: NanoChatHFForCausalLM, accelerator: Accelerator, should_compile: bool) -> None:
    """Divide a model, in place and onto the device, among all processes: layer by layer, embeddings apart.

    Args:
        model: whole and equal in every process, still on the CPU so that no device ever holds it whole.
        should_compile: compile each layer; the hooks between layers, which gather them, stay eager.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    reshards = FullyShardedDataParallelPlugin().reshard_after_forward
    # Layers travel in bf16, half the traffic, and are cast once. What is summed over tokens (embeddings) stays fp32.
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layer_policy = bf16 if accelerator.mixed_precision == "bf16" else MixedPrecisionPolicy()
    for layer in model.model.layers:
        if should_compile:
            layer.compile()
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshards, mp_policy=layer_policy)
    for embedding in (module for module in model.modules() if isinstance(module, torch.nn.Embedding)):
        fully_shard(embedding, mesh=mesh, reshard_after_forward=reshards)
    fully_shard(model, mesh=mesh)


def whole_model(model: NanoChatHFForCausalLM) -> NanoChatHFForCausalLM | None:
    """The model as it is saved: itself or, of one in pieces, a whole copy on the first process's CPU, None elsewhere.

    All processes must call it.
    """
    if not isinstance(model, FSDPModule):
        return model
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank():
        return None
    with torch.device("meta"):
        copy = NanoChatHFForCausalLM(model.config)
    copy.load_state_dict(state, assign=True)
    return copy


def load_whole_state(model: NanoChatHFForCausalLM, state: dict[str, torch.Tensor]) -> None:
    """Load whole tensors into a model that may be in pieces."""
    if isinstance(model, FSDPModule):
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(state)
