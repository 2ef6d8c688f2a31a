"""One token for every row of a batch: the model's forward pass at T = 1, written for speed.

With one token a row, most of `model(...)` is the cost of its many small operations, not of arithmetic. Here q, k, v and
the value gate come out of one matrix product, q and k are rotated and normed together, scalars are numbers, sums are
folded into products, and no mask is built where none is needed. The result is the model's own up to rounding; the
cache is the one its forward pass fills and goes on using.

    step = DecodeStep(model) if can_step(model) else None
    logits = step(ids, positions, cache, mask)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, PreTrainedModel

from .model.modeling_nanochat_hf import SMEAR_CHANNELS, VALUE_GATE_CHANNELS
from .onednn import MIN_PACKED, has_onednn, min_elements, multiply, pack


def can_step(model: PreTrainedModel) -> bool:
    """Whether `DecodeStep` computes what this model does: ours, with no layer replaced (LoRA, quantised) or hooked."""
    if getattr(model.config, "model_type", None) != "nanochat_hf":
        return False
    modules = list(model.modules())
    return (
        all(type(m) is nn.Linear for m in modules if hasattr(m, "in_features"))
        and all(type(p) is nn.Parameter for p in model.parameters())  # no tensor-parallel or sharded ones
        and not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
        and model.config.hidden_act == "relu2"
    )


class Buffers:
    """What a step sees as its cache: buffers of a fixed size, and the place in them that is next."""

    def __init__(
        self, pairs: list[list[torch.Tensor]], smear_state: torch.Tensor | None, end: torch.Tensor, num_used: int
    ):
        self.pairs, self.smear_state, self.end, self.num_used = pairs, smear_state, end, num_used

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> list[torch.Tensor]:
        """As a cache's: the new key and value (B, K, 1, d) into the buffers, whose used part is returned."""
        for buffer, new in zip(self.pairs[layer], (key, value), strict=True):
            buffer.index_copy_(2, self.end, new)
        return [buffer[:, :, : self.num_used] for buffer in self.pairs[layer]]

    def update_conv_state(self, state: torch.Tensor, layer: int, conv_kernel_size: int) -> torch.Tensor:
        """As a cache's: the last embedding and the new one, (B, D, 2)."""
        states = torch.cat((self.smear_state, state), dim=-1)
        self.smear_state.copy_(state)
        return states


class DecodeStep:
    """Reads the weights when made: make it anew after they have changed.

    Under autocast the weights are cast once, here, and not at every step.

    Args:
        with_softcap: without, logits keep their order and not their size: enough to find the likeliest.
        num_rows: about so many rows will be decoded together.
    """

    can_pack = True
    min_capacity = 256  # tokens that `advance`'s buffers hold at first; doubled when they are used up

    def __init__(self, model: PreTrainedModel, with_softcap: bool = True, num_rows: int = 1):
        # What a step needs of the configuration is read once: transformers looks every attribute up twice.
        config, self.with_softcap = model.config, with_softcap
        self.softcap, self.qk_scale, self.head_dim = config.final_logit_softcapping, config.qk_scale, config.head_dim
        self.num_layers, self.hidden_size = config.num_hidden_layers, config.hidden_size
        device = model.device.type
        autocast = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if autocast else model.dtype
        backbone = model.model
        self.embedding = backbone.embed_tokens.weight
        self.min_packed = None  # elements of a matrix from which on oneDNN multiplies by it
        if self.can_pack and has_onednn(model.device, self.dtype):
            self.min_packed = MIN_PACKED if num_rows == 1 else min_elements()
        self.head = self._packed(model.lm_head.weight)
        self.eps = config.rms_norm_eps
        eps = torch.finfo(self.dtype).eps if self.eps is None else self.eps
        self.floors = {width: torch.tensor((width * eps) ** 0.5) for width in (config.hidden_size, config.head_dim)}
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.scalars = None
        if config.use_residual_scalars:
            self.scalars = list(zip(backbone.resid_lambdas.tolist(), backbone.x0_lambdas.tolist(), strict=True))
        self.backout = backbone.backout_lambda.item() if config.use_backout else 0.0
        self.smear_gate = None
        if config.use_smear:
            self.smear_gate, self.smear_scale = backbone.smear_gate.weight.to(self.dtype), backbone.smear_lambda.item()
        channels = torch.arange(0, self.head_dim, 2, device=model.device, dtype=torch.float32)
        frequencies = 1.0 / (config.rope_parameters["rope_theta"] ** (channels / self.head_dim))
        self.frequencies = torch.cat((frequencies, frequencies))
        self.signs = torch.cat((torch.ones_like(channels), -torch.ones_like(channels)))
        self.value_embeddings = [
            backbone.value_embeds[str(i)].weight if config.has_value_embedding(i) else None
            for i in range(config.num_hidden_layers)
        ]
        self.layers = [[self._packed(matrix) for matrix in self._layer_weights(layer)] for layer in backbone.layers]
        self.windows = [layer.self_attn.sliding_window for layer in backbone.layers]

    def _layer_weights(self, layer: nn.Module) -> tuple[torch.Tensor, ...]:
        """Four matrices (out, in): q, k, v and value gate as one, o, fc1 and fc2."""
        attention = layer.self_attn
        joint = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        if hasattr(attention, "ve_gate"):  # it reads the first channels only
            gate = attention.ve_gate.weight
            joint.append(F.pad(gate, (0, self.hidden_size - VALUE_GATE_CHANNELS)))
        return torch.cat(joint), *(linear.weight for linear in (attention.o_proj, layer.mlp.fc1, layer.mlp.fc2))

    def _packed(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix as `_multiply` takes it."""
        matrix = matrix.detach().to(self.dtype)
        return matrix if self.min_packed is None or matrix.numel() < self.min_packed else pack(matrix)

    def _multiply(self, x: torch.Tensor, matrix: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, in) by a matrix (out, in), `plus` (B, out) added."""
        if matrix.is_mkldnn:
            product = multiply(x, matrix)
            return product if plus is None else product.add_(plus)
        return F.linear(x, matrix) if plus is None else torch.addmm(plus, x, matrix.t())

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: Cache, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits (B, V) fp32 of the token after each row's newest.

        Args:
            ids: (B,) the newest token of every row.
            positions: (B,) its position in the row, padding not counted; 1 or more.
            cache: what the model has read; the new token is added.
            mask: (B, seen + 1) with 0 at padding, or None.
        """
        if mask is not None:
            mask = torch.zeros(mask.shape, dtype=self.dtype, device=mask.device).masked_fill_(mask == 0, float("-inf"))
            mask = mask[:, None, None]

        def mask_of(layer: int, num_keys: int) -> torch.Tensor | None:
            if mask is None or num_keys == mask.shape[-1]:
                return mask
            return mask[..., -num_keys:].clone()  # CUDA's kernel reads 16 bytes at a time, from a multiple of 16

        with torch.autocast(ids.device.type, enabled=False):
            return self.compute(ids, positions, cache, mask_of)

    def advance(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        pairs: list[list[torch.Tensor]],
        smear_state: torch.Tensor | None,
        end: torch.Tensor,
        is_real: torch.Tensor,
    ) -> torch.Tensor:
        """As a call, over buffers of keys and values.

        Args:
            pairs: a layer's keys and values, (B, K, capacity, d) each; written to.
            smear_state: (B, D, 1) the last embedding, or None without smear; written to.
            end: (1,) the newest token's place in the buffers.
            is_real: (B, used) False at padding; the buffers are read so far.
        """
        place = torch.arange(is_real.shape[1], device=ids.device)
        sees = (is_real & (place <= end))[:, None, None]  # (B, 1, 1, capacity)
        masks = {}
        for window in set(self.windows):
            in_window = sees if window is None else sees & (place > end - window)
            masks[window] = torch.zeros_like(sees, dtype=self.dtype).masked_fill_(~in_window, float("-inf"))
        buffers = Buffers(pairs, smear_state, end, is_real.shape[1])
        return self.compute(ids, positions, buffers, lambda layer, num_keys: masks[self.windows[layer]])

    def compute(self, ids, positions, cache, mask_of: Callable[[int, int], torch.Tensor | None]) -> torch.Tensor:
        """A call without its preparations.

        Args:
            cache: has `update` and `update_conv_state`.
            mask_of: of a layer and its number of keys; what is added to the scores, (B, 1, 1, keys), or None.
        """
        batch, head_dim = len(ids), self.head_dim
        num_qk = self.num_heads + self.num_kv_heads
        qk_width, kv_width = num_qk * head_dim, self.num_kv_heads * head_dim
        angles = positions[:, None, None] * self.frequencies  # (B, 1, d)
        cos, sin = angles.cos().to(self.dtype), angles.sin().mul_(self.signs).to(self.dtype)
        x = self._norm(F.embedding(ids, self.embedding).to(self.dtype))  # (B, D)
        if self.smear_gate is not None:
            states = cache.update_conv_state(x[:, :, None], self.num_layers - 1, conv_kernel_size=1)
            gate = torch.sigmoid(F.linear(x[:, :SMEAR_CHANNELS], self.smear_gate))
            x = torch.addcmul(x, gate, states[:, :, -2], value=self.smear_scale)
        x0 = x
        for i, (joint, out, fc1, fc2) in enumerate(self.layers):
            if self.scalars is not None:
                resid_scale, x0_scale = self.scalars[i]
                x = (x0 * x0_scale).add_(x, alpha=resid_scale)
            projected = self._multiply(self._norm(x), joint)
            qk = projected[:, :qk_width].view(batch, num_qk, head_dim)
            v = projected[:, qk_width : qk_width + kv_width].view(batch, self.num_kv_heads, head_dim)
            if self.value_embeddings[i] is not None:
                gate = torch.sigmoid(projected[:, qk_width + kv_width :]).unsqueeze(-1)  # (B, K, 1)
                v = torch.addcmul(
                    v, gate, F.embedding(ids, self.value_embeddings[i]).to(self.dtype).view_as(v), value=3
                )
            qk = (qk * cos).addcmul_(qk.roll(head_dim // 2, -1), sin)
            qk = self._norm(qk, self.qk_scale)
            qk, v = qk[:, :, None], v[:, :, None]  # (B, heads, 1, d)
            k, v = cache.update(qk[:, self.num_heads :], v, i)
            attended = self._attend(qk[:, : self.num_heads], k, v, mask_of(i, k.shape[2]))
            x = self._multiply(attended.view(batch, -1), out, plus=x)
            x = self._multiply(F.relu(self._multiply(self._norm(x), fc1)).square_(), fc2, plus=x)
            if i == self.num_layers // 2:
                x_middle = x
        if self.backout:
            x = torch.add(x, x_middle, alpha=-self.backout)
        logits = self._multiply(self._norm(x), self.head).float()
        return self.apply_softcap(logits) if self.with_softcap else logits

    def apply_softcap(self, logits: torch.Tensor) -> torch.Tensor:
        """In place."""
        return logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        enable_gqa = self.num_heads != self.num_kv_heads
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)

    def _norm(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """RMSNorm of the last dimension, times `scale`."""
        width = x.shape[-1]
        if x.dtype != torch.float32 or x.is_cuda:
            return F.rms_norm(x, (width,), eps=self.eps) * scale
        # On a CPU `rms_norm` is ten small operations; sqrt(mean + eps), written as a hypotenuse, takes four.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.hypot(length, self.floors[width]).mul_(width**-0.5 / scale)
