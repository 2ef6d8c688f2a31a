"""NanoChatHF: nanochat's transformer, both generations, as a transformers model.

Embedding -> RMSNorm -> (smear) -> blocks -> (backout) -> RMSNorm -> head -> softcap. Norms have no weight, nothing has
a bias, and the switches of the configuration turn the 2026-07 generation into the 2025-10 one.

Shapes in comments: B batch, T time, D width, H heads, K key/value heads, d head size, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_nanochat_hf import NanoChatHFConfig

SMEAR_CHANNELS = 24  # channels of the embedding that decide how much of the left neighbour is mixed in
VALUE_GATE_CHANNELS = 12  # channels of the block input that gate the value embedding


def rms_norm(x: torch.Tensor, eps: float | None) -> torch.Tensor:
    """RMSNorm over the last dimension, without weight; eps None is torch's default for the dtype."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


linear = partial(nn.Linear, bias=False)


def initialized(layer: nn.Linear | nn.Embedding, initializer: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """The layer with an initializer of its own.

    transformers calls `_init_weights` only for modules that own parameters: a parent cannot do it for its children.
    """
    layer.initializer = initializer
    return layer


def matrix_initializer(config: NanoChatHFConfig, in_features: int, out_features: int, scale: float = 1.0) -> Callable:
    """Initializer of q, k, v and fc1: uniform (2026-07) or normal (2025-10)."""
    if config.architecture == "2026-07":
        bound = scale * math.sqrt(3 / config.hidden_size)
        return partial(init.uniform_, a=-bound, b=bound)
    return partial(init.normal_, std=min(1.0, math.sqrt(out_features / in_features)) / math.sqrt(in_features))


def check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Name an id out of range; only on a CPU, where looking costs nothing (CUDA stops with an assertion of its own)."""
    wrong = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
    if len(wrong):
        raise ValueError(f"input id {wrong[0].item()} is out of range: the vocabulary has {vocab_size} tokens")


def rotary_tables(config: NanoChatHFConfig, position_ids: torch.Tensor, dtype: torch.dtype):
    """Cosine and signed sine tables, each (B or 1, 1, T, d); computed per call, so there is no buffer to lose."""
    channels = torch.arange(0, config.head_dim, 2, device=position_ids.device, dtype=torch.float32)
    frequencies = 1.0 / (config.rope_parameters["rope_theta"] ** (channels / config.head_dim))
    angles = position_ids[:, None, :, None].float() * torch.cat((frequencies, -frequencies))
    tables = torch.stack((angles.cos(), angles.sin())).to(dtype)
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # What is viewed with strides has to lie in memory: else every layer's kernels would compute the tables anew.
        tables = tables.as_strided(tables.shape, tables.stride())
    return tables.unbind()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate (B, H, T, d) by minus the angle, halves not interleaved (nanochat's sign, not Llama's)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((x2, x1), dim=-1) * sin


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain attention, the reference of the faster backends; returns (B, T, H, d) and the weights (B, H, T, S)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class NanoChatHFAttention(nn.Module):
    """Causal attention with rotary positions, then QK norm; values optionally mixed with a value embedding."""

    def __init__(self, config: NanoChatHFConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling, self.is_causal = self.head_dim**-0.5, True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        width, q_width = config.hidden_size, config.num_attention_heads * self.head_dim
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = initialized(linear(width, q_width), matrix_initializer(config, width, q_width))
        self.k_proj = initialized(linear(width, kv_width), matrix_initializer(config, width, kv_width))
        self.v_proj = initialized(linear(width, kv_width), matrix_initializer(config, width, kv_width))
        self.o_proj = initialized(linear(q_width, width), init.zeros_)
        if config.has_value_embedding(layer_idx):
            gate_initializer = partial(init.uniform_, a=0.0, b=0.02)
            self.ve_gate = initialized(linear(VALUE_GATE_CHANNELS, config.num_key_value_heads), gate_initializer)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        value_embedding: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_time = hidden_states.shape[:-1]
        heads = (*batch_time, -1, self.head_dim)
        q = self.q_proj(hidden_states).view(heads).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(hidden_states).view(heads).transpose(1, 2)  # (B, K, T, d)
        v = self.v_proj(hidden_states).view(heads)  # (B, T, K, d)
        if value_embedding is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(hidden_states[..., :VALUE_GATE_CHANNELS]))  # (B, T, K)
            v = v + gate.unsqueeze(-1) * value_embedding.view(heads)
        v = v.transpose(1, 2)
        q = rms_norm(apply_rotary(q, *position_embeddings), self.config.rms_norm_eps)
        k = rms_norm(apply_rotary(k, *position_embeddings), self.config.rms_norm_eps)
        if self.config.qk_scale != 1:  # not folded into the scaling: nanochat rounds q and k, each on its own
            q, k = q * self.config.qk_scale, k * self.config.qk_scale
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out, weights = attention(
            self, q, k, v, attention_mask, scaling=self.scaling, sliding_window=self.sliding_window, **kwargs
        )
        return self.o_proj(out.reshape(*batch_time, -1)), weights


class NanoChatHFMLP(nn.Module):
    """Two matrices with a squared ReLU between them."""

    def __init__(self, config: NanoChatHFConfig):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.fc1 = initialized(linear(width, inner), matrix_initializer(config, width, inner, scale=0.4))
        self.fc2 = initialized(linear(inner, width), init.zeros_)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class NanoChatHFDecoderLayer(GradientCheckpointingLayer):
    """One block: attention and MLP, each on the normed stream, each added to it."""

    def __init__(self, config: NanoChatHFConfig, layer_idx: int):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn, self.mlp = NanoChatHFAttention(config, layer_idx), NanoChatHFMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(rms_norm(hidden_states, self.eps), **kwargs)[0]
        return hidden_states + self.mlp(rms_norm(hidden_states, self.eps))


class NanoChatHFPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the architecture, and the initialisation of each leaf module."""

    config_class = NanoChatHFConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoChatHFDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": NanoChatHFDecoderLayer, "attentions": NanoChatHFAttention}

    def _init_weights(self, module: nn.Module) -> None:
        initializer = getattr(module, "initializer", None)
        if initializer is not None:
            initializer(module.weight)
        elif isinstance(module, NanoChatHFModel):
            module.init_scalars()
        elif isinstance(module, nn.Linear | nn.Embedding):  # made by `resize_token_embeddings(mean_resizing=False)`
            init.normal_(module.weight, std=0.02)

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True) -> nn.Embedding:
        """Resize the value embeddings along with the token embedding and the head."""
        resized = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        for key, table in getattr(self.base_model, "value_embeds", {}).items():
            table = self._get_resized_embeddings(table, resized.num_embeddings, mean_resizing=mean_resizing)
            self.base_model.value_embeds[key] = table
        return resized


class NanoChatHFModel(NanoChatHFPreTrainedModel):
    """The backbone: token ids to hidden states (B, T, D), already through the final norm."""

    def __init__(self, config: NanoChatHFConfig):
        super().__init__(config)
        width, num_layers = config.hidden_size, config.num_hidden_layers
        token_std = 0.8 if config.architecture == "2026-07" else 1.0
        self.embed_tokens = initialized(nn.Embedding(config.vocab_size, width), partial(init.normal_, std=token_std))
        self.layers = nn.ModuleList(NanoChatHFDecoderLayer(config, i) for i in range(num_layers))
        if config.use_value_embeddings:
            bound, size = math.sqrt(3 / width), (config.vocab_size, config.num_key_value_heads * config.head_dim)
            uniform = partial(init.uniform_, a=-bound, b=bound)
            value_layers = filter(config.has_value_embedding, range(num_layers))
            self.value_embeds = nn.ModuleDict({str(i): initialized(nn.Embedding(*size), uniform) for i in value_layers})
        if config.use_residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.empty(num_layers))
            self.x0_lambdas = nn.Parameter(torch.empty(num_layers))
        if config.use_smear:
            self.smear_gate = initialized(linear(SMEAR_CHANNELS, 1), partial(init.uniform_, a=0.0, b=0.02))
            self.smear_lambda = nn.Parameter(torch.empty(1))
        if config.use_backout:
            self.backout_lambda = nn.Parameter(torch.empty(1))
        self.gradient_checkpointing = False
        self.post_init()

    def init_scalars(self) -> None:
        """Initialise the parameters this module owns itself."""
        depth = torch.linspace(0, 1, self.config.num_hidden_layers)
        if self.config.use_residual_scalars:
            init.copy_(self.resid_lambdas, 1.15 - 0.10 * depth)
            init.copy_(self.x0_lambdas, 0.20 - 0.15 * depth)
        if self.config.use_smear:
            init.zeros_(self.smear_lambda)
        if self.config.use_backout:
            init.constant_(self.backout_lambda, 0.2)

    @staticmethod
    def create_masks(config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **kwargs) -> dict:
        """A mask by layer type; the last layer is always full, so its cache sizes the full mask."""
        arguments = (config, inputs_embeds, attention_mask, past_key_values, position_ids)
        full_mask = create_causal_mask(*arguments, layer_idx=config.num_hidden_layers - 1)
        masks = {"full_attention": full_mask, "hybrid": full_mask}
        if "sliding_attention" in config.layer_types:
            masks["sliding_attention"] = create_sliding_window_causal_mask(*arguments)
        return masks

    def smear(self, x, attention_mask, position_ids, past_key_values) -> torch.Tensor:
        """Mix the left neighbour's embedding into each position; documents and padding do not leak.

        Args:
            x: normed embeddings (B, T, D).
            attention_mask: (B, seen + T) with 0 at padding, or None.
            position_ids: (B or 1, T), or None; a document starts at 0 and wherever they do not count on by one.
            past_key_values: its last layer keeps the last embedding between calls.
        """
        time, states = x.shape[1], x
        if past_key_values is not None:
            last_layer = self.config.num_hidden_layers - 1
            if len(past_key_values.layers) <= last_layer:
                raise ValueError("this cache has no place for smear's state; give DynamicCache(config=model.config)")
            states = past_key_values.update_conv_state(x.transpose(1, 2), last_layer, conv_kernel_size=1)
            states = states.transpose(1, 2)[:, -time - 1 :]
        first = time + 1 - states.shape[1]  # 1 where nothing came before x, else 0
        # Slices are taken in nanochat's order: gradients are then summed in its order, to the last bit.
        gate = torch.sigmoid(self.smear_gate(x[:, first:, :SMEAR_CHANNELS]))  # (B, T - first, 1)
        unmixed, rest, previous = x[:, :first], x[:, first:], states[:, :-1]
        if position_ids is not None:
            starts = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1) | (position_ids == 0)
            previous = previous * ~starts[:, first:].unsqueeze(-1)
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            real = F.pad(attention_mask, (1, 0))[:, -time - 1 : -1] != 0
            previous = previous * real[:, first:].unsqueeze(-1)
        mixed = rest + self.smear_lambda.to(x) * gate * previous
        return torch.cat((unmixed, mixed), dim=1) if first else mixed

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a batch.

        Args:
            input_ids: (B, T). The 2026-07 generation needs them even beside `inputs_embeds`, for value embeddings.
            attention_mask: (B, seen + T), 0 at padding; None means no padding.
            position_ids: (B or 1, T). Restarting positions part packed documents in a call without a mask (one of all
                ones joins them) and without an earlier cache.
            past_key_values: a cache made by `DynamicCache(config=model.config)` or by `generate`.
            inputs_embeds: (B, T, D) instead of the token embedding.

        Raises:
            ValueError: neither input_ids nor inputs_embeds, embeddings alone where value embeddings need ids, ids
                out of range (on a CPU), or a cache without a place for smear's state.
        """
        if input_ids is None and (inputs_embeds is None or self.config.use_value_embeddings):
            raise ValueError("give input_ids, beside inputs_embeds too: the value embeddings look tokens up")
        if input_ids is not None and input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            check_ids(input_ids, self.config.vocab_size)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if torch.is_autocast_enabled(inputs_embeds.device.type):
            # The residual stream runs in the compute dtype, as in nanochat, not in the embedding's fp32.
            inputs_embeds = inputs_embeds.to(torch.get_autocast_dtype(inputs_embeds.device.type))

        masks = attention_mask
        if not isinstance(attention_mask, dict):  # generate prepares the masks itself for compiled static caches
            masks = self.create_masks(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
        if use_cache and past_key_values is None:  # after the masks: with a cache they would not part packed documents
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        x = rms_norm(inputs_embeds, self.config.rms_norm_eps)
        if self.config.use_smear:
            x = self.smear(x, attention_mask, position_ids, past_key_values)
        if position_ids is None:
            position_ids = (torch.arange(x.shape[1], device=x.device) + seen).unsqueeze(0)
        x0, middle = x, self.config.num_hidden_layers // 2
        rotary = rotary_tables(self.config, position_ids, x.dtype)
        for i, layer in enumerate(self.layers):
            if self.config.use_residual_scalars:
                # To x's device as well: `device_map` may have put the layers on several.
                x = self.resid_lambdas[i].to(x) * x + self.x0_lambdas[i].to(x) * x0.to(x.device)
            has_value = self.config.has_value_embedding(i)
            value_embedding = self.value_embeds[str(i)](input_ids).to(x) if has_value else None
            x = layer(
                x,
                attention_mask=masks[self.config.layer_types[i]],
                position_ids=position_ids,  # flash attention parts packed documents by them, it takes no mask
                position_embeddings=rotary,
                value_embedding=value_embedding,
                past_key_values=past_key_values,
                **kwargs,
            )
            if self.config.use_backout and i == middle:
                x_middle = x
        if self.config.use_backout:
            x = x - self.backout_lambda.to(x) * x_middle.to(x.device)
        x = rms_norm(x, self.config.rms_norm_eps)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values)


class SoftcappedCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of softcapped logits, chunk by chunk: the (tokens, vocabulary) logits never exist whole.

    The gradients are computed in the forward pass, while a chunk's logits are still in the cache; the backward pass
    only scales them.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, chunk_tokens):
        compute_weight = weight.to(hidden.dtype)
        needs_grad, is_compiling = hidden.requires_grad or weight.requires_grad, torch.compiler.is_compiling()
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        if needs_grad:
            hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            h, target = hidden[chunk], targets[chunk, None]
            used, target = target != -100, target.clamp(min=0)
            saturation = (h @ compute_weight.T).float()  # (chunk, V)
            if is_compiling:  # a GPU's sigmoid is faster than its tanh; and a compiled gather's offsets may overflow
                saturation = 2 * torch.sigmoid(saturation * (2 / softcap)) - 1
                is_target = (torch.arange(weight.shape[0], device=target.device) == target).float()
                target_saturation = (saturation * is_target).sum(-1, keepdim=True)
            else:
                saturation.div_(softcap).tanh_()
                target_saturation = saturation.gather(1, target)
            exponentials = (saturation * softcap).exp_()  # softcapped: no maximum has to be taken off first
            normalizer = exponentials.sum(-1, keepdim=True)
            losses[chunk] = ((normalizer.log() - target_saturation * softcap) * used).squeeze(1)
            if needs_grad:
                grad = exponentials.div_(normalizer)  # softmax
                grad = grad - is_target if is_compiling else grad.scatter_add_(1, target, -torch.ones_like(normalizer))
                grad.mul_(saturation.square_().neg_().add_(1.0)).mul_(used)  # through the softcap
                grad = grad.to(hidden.dtype)
                hidden_grad[chunk] = grad @ compute_weight
                weight_grad += grad.T @ h
        if needs_grad:
            ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.mark_non_differentiable(losses)
        # Added up by the kernel of F.cross_entropy, in its order: the plain loss and this one agree to the last bits.
        return F.nll_loss(-losses[:, None], torch.zeros_like(targets), reduction="sum"), losses

    @staticmethod
    def backward(ctx, grad_sum, _):
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * grad_sum.to(hidden_grad.dtype), weight_grad * grad_sum, None, None, None


def softcapped_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float, chunk_tokens: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of `softcap * tanh(hidden @ weight.T / softcap)` against `targets`, without whole logits.

    Args:
        hidden: (..., D) states after the final norm, in the compute dtype.
        weight: (V, D) of the head; cast to the compute dtype once.
        targets: (...) token ids, -100 where there is none.
        chunk_tokens: by default as many as suit a CPU's cache, or a GPU.

    Returns:
        The sum in nats over real targets (differentiable) and the losses (...) in fp32, 0 where there is no target.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    chunk_tokens = chunk_tokens or (512 if flat.device.type == "cpu" else 8192)
    total, losses = SoftcappedCrossEntropy.apply(flat, weight, targets.reshape(-1), softcap, chunk_tokens)
    return total, losses.view(targets.shape)


class NanoChatHFForCausalLM(NanoChatHFPreTrainedModel, GenerationMixin):
    """The language model: backbone, untied head, softcapped fp32 logits."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    create_masks_for_generate = staticmethod(NanoChatHFModel.create_masks)

    def __init__(self, config: NanoChatHFConfig):
        super().__init__(config)
        self.model = NanoChatHFModel(config)
        self.vocab_size = config.vocab_size
        head_initializer = init.zeros_ if config.architecture == "2025-10" else partial(init.normal_, std=0.001)
        self.lm_head = initialized(linear(config.hidden_size, config.vocab_size), head_initializer)
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, **kwargs) -> dict:
        """The usual inputs; a prompt's ids go beside its embeddings, as value embeddings need them."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        embeds = inputs.get("inputs_embeds")
        if embeds is not None and input_ids.shape[1] >= embeds.shape[1]:
            inputs["input_ids"] = input_ids[:, -embeds.shape[1] :]
        return inputs

    def init_continuous_batching(self, *args, **kwargs):
        """As in transformers; a `ValueError` with smear, as pages have no place for its state, the last embedding."""
        if self.config.use_smear:
            raise ValueError(
                "continuous batching keeps keys and values in pages and has no place for smear's state; use generate() "
                "on left-padded batches (`transformers serve` without --continuous-batching), or a 2025-10 model"
            )
        return super().init_continuous_batching(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        shift_labels: torch.LongTensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        skip_logits: bool = False,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) in fp32 and, given labels, the loss.

        Args:
            labels: (B, T) token ids, shifted inside; -100 is ignored.
            shift_labels: (B, T) labels already shifted: position t's target is the token after t.
            num_items_in_batch: divisor of the summed loss; the number of targets by default.
            logits_to_keep: compute the logits of the last so many positions (0 = all), or at a list or mask of them.
            skip_logits: with labels, return the loss alone, computed chunk by chunk: whole logits are never in memory.
                No effect with a head that is not a plain linear layer, as with LoRA or tensor-parallel.
        The other arguments are `NanoChatHFModel.forward`'s. A batch without any target has loss 0.
        """
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        outputs = self.model(*inputs, use_cache=use_cache, **kwargs)
        hidden, softcap, loss, logits = outputs.last_hidden_state, self.config.final_logit_softcapping, None, None
        if labels is not None and shift_labels is None:
            shift_labels = labels[:, 1:]  # the last position has no target
        is_plain_head = type(self.lm_head) is nn.Linear and type(self.lm_head.weight) is nn.Parameter
        skip_logits = skip_logits and shift_labels is not None and is_plain_head
        if not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[kept] if getattr(kept, "ndim", 1) == 2 else hidden[:, kept]).float()
            logits = softcap * torch.tanh(logits / softcap)
        if shift_labels is not None:
            num_targets = shift_labels.shape[1]
            if num_items_in_batch is None:
                num_items_in_batch = (shift_labels != -100).sum().clamp(min=1)
            if skip_logits:
                total, _ = softcapped_cross_entropy(hidden[:, :num_targets], self.lm_head.weight, shift_labels, softcap)
            else:
                total = F.cross_entropy(logits[:, :num_targets].flatten(0, 1), shift_labels.flatten(), reduction="sum")
            loss = total / num_items_in_batch
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions)


__all__ = ["NanoChatHFPreTrainedModel", "NanoChatHFModel", "NanoChatHFForCausalLM"]
