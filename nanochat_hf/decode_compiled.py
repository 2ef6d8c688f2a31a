"""Decoding on a CPU by compiled code: the whole step in one call, with the weights built in.

A step is hundreds of small operations, and Python's part of each costs as much as the arithmetic. Compiled they become
a handful of loops, and the matrix products are packed for the very shape. That takes 10 to 60 seconds for every batch
size, so it is asked for: by `compile_decoding`, once a model.

    compile_decoding(model, batch_sizes=[1])
    completions = generate_completions(model, tokenizer, prompts, max_new_tokens=512)
"""

from collections.abc import Iterable
from threading import Lock
from types import FunctionType
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._inductor import config as inductor
from transformers import PreTrainedModel

from .decode_graph import GraphStep
from .decode_step import DecodeStep, can_step
from .hardware import has_compiler
from .kv_cache import growing_cache
from .onednn import has_onednn, pack

KEYS_AT_ONCE = 16  # buffers are read up to a multiple of this
COMPILING = Lock()  # of several answers that need the same code one compiles it


class CompiledStep(DecodeStep, nn.Module):
    """A `DecodeStep` over buffers, compiled when it is first called with a batch size and a capacity.

    A module, and its matrices parameters, for what is built into the code are a module's parameters.
    """

    can_pack = False  # its own way of packing: `options`

    def __init__(self, model: PreTrainedModel):
        nn.Module.__init__(self)
        DecodeStep.__init__(self, model, with_softcap=False)
        self.head = model.lm_head.weight
        # Buffers of another capacity: compiled again. As long as what is read at once, PyTorch would take it for fixed.
        self.min_capacity = max(2 * KEYS_AT_ONCE, model.config.max_position_embeddings)
        for i, matrices in enumerate(self.layers):
            self.layers[i] = [nn.Parameter(matrix, requires_grad=False) for matrix in matrices]
            for j, matrix in enumerate(self.layers[i]):
                self.register_parameter(f"layer_{i}_{j}", matrix)
        self.codes: dict[tuple[int, int], FunctionType] = {}  # by batch size and capacity

    def advance(self, ids, positions, pairs, smear_state, end, is_real) -> torch.Tensor:
        """As of a `DecodeStep`, but the logits are not softcapped: `apply_softcap`, where more counts than order."""
        shape = tuple(is_real.shape)
        if shape not in self.codes:
            with COMPILING, inductor.patch(options(len(ids))):  # given to `torch.compile` they come too late for some
                if shape not in self.codes:
                    self.codes[shape] = self._compile(ids, positions, pairs, smear_state, end, is_real)
        num_used = -(-(int(end) + 1) // KEYS_AT_ONCE) * KEYS_AT_ONCE
        is_real = is_real[:, :num_used].contiguous()
        return self.codes[shape](self, ids, positions, pairs, smear_state, end, is_real)

    def _compile(self, ids, positions, pairs, smear_state, end, is_real) -> FunctionType:
        """`DecodeStep.advance` for arguments of these shapes, but any length of `is_real` up to the capacity.

        What `torch.compile` returns checks its arguments anew before every call, 7% of a step of sixteen rows
        (2026-11-28); this is the code behind it.
        """
        is_real = is_real[:, :KEYS_AT_ONCE].clone()
        torch._dynamo.mark_dynamic(is_real, 1)
        pairs = [[torch.empty_like(buffer) for buffer in pair] for pair in pairs]  # compiling calls it once
        smear_state = None if smear_state is None else smear_state.clone()
        # A function of its own: of one PyTorch compiles eight versions and no more.
        advance = FunctionType(DecodeStep.advance.__code__.replace(), DecodeStep.advance.__globals__)
        compiled = torch.compile(advance, dynamic=False, fullgraph=True)
        compiled(self, ids, positions, pairs, smear_state, torch.zeros_like(end), is_real)
        versions = torch._dynamo.eval_frame._debug_get_cache_entry_list(advance)  # none with TORCHDYNAMO_DISABLE=1
        return FunctionType(versions[0].code, advance.__globals__) if versions else advance

    def _multiply(self, x, matrix, plus=None):
        """The sum by itself: within a product the matrix would not be packed."""
        product = F.linear(x, matrix)
        return product if plus is None else plus + product

    def _attend(self, q, k, v, mask):
        """As sums: one query a row is too little for the CPU's attention kernel."""
        q = q.view(len(q), self.num_kv_heads, -1, 1, self.head_dim)  # (B, K, heads of one key, 1, d)
        scores = (q * k[:, :, None]).sum(-1) * self.head_dim**-0.5 + mask
        return (scores.softmax(-1)[..., None] * v[:, :, None]).sum(-2)

    def _norm(self, x, scale=1.0):
        return F.rms_norm(x, (x.shape[-1],), eps=self.eps) * scale


def options(batch_size: int) -> dict:
    """Inductor's settings. Of its matrix products its own are the fastest for one row, a library's for several."""
    common = {"freezing": True, "cpp_wrapper": True}
    if batch_size == 1:
        return common | {"max_autotune": True, "max_autotune_gemm_backends": "CPP"}
    if not has_onednn(torch.device("cpu"), torch.float32):
        return common  # MKL, with packed matrices
    # The cache of compiled graphs cannot hold weights in oneDNN's layout.
    return common | {"post_grad_custom_post_pass": use_onednn, "fx_graph_cache": False}


def use_onednn(graph: fx.Graph) -> None:
    """Let oneDNN do the products with built-in matrices, which Inductor leaves to MKL: on AMD half the time."""
    linear, module = torch.ops.mkldnn._linear_pointwise.default, graph.owning_module
    for node in list(graph.nodes):
        if str(node.target) != "mkl._mkl_linear" or node.args[3] is not None:
            continue
        x, _, weight, *_ = node.args  # the second is packed for MKL
        name = f"onednn_{node.name}"
        module.register_buffer(name, pack(getattr(module, weight.target)))
        with graph.inserting_before(node):
            new = graph.call_function(linear, (x, graph.get_attr(name), None, "none", [], ""))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


COMPILED: WeakKeyDictionary[PreTrainedModel, CompiledStep] = WeakKeyDictionary()


@torch.no_grad()
def compile_decoding(model: PreTrainedModel, batch_sizes: Iterable[int] = ()) -> None:
    """From now on decoding with this model runs compiled, with its weights as they are now.

    For each batch size PyTorch keeps up to a copy of the weights, to the end of the process.

    Args:
        batch_sizes: those to compile for now; for others it happens before their second token.

    Raises:
        ValueError: another kind of model, or one that is not in fp32 on a CPU; no C++ compiler.
    """
    if not can_step(model) or model.device.type != "cpu" or model.dtype != torch.float32:
        raise ValueError(
            f"compiled decoding is for nanochat_hf models in fp32 on a CPU, without adapters or quantised layers; this "
            f"is {model.config.model_type} in {model.dtype} on {model.device.type}"
        )
    if not has_compiler():
        raise ValueError(
            "compiled decoding needs a C++ compiler (Debian: apt install g++; or set CXX), or do without it"
        )
    step = COMPILED[model] = CompiledStep(model.eval())
    for batch_size in batch_sizes:
        cache, ids = growing_cache(model.config), torch.zeros(batch_size, 1, dtype=torch.long)
        model(ids, past_key_values=cache, use_cache=True)
        GraphStep(step, cache)(ids[:, 0], torch.ones_like(ids[:, 0]), None)
