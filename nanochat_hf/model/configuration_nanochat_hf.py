"""Configuration of NanoChatHF: one class for both nanochat generations.

`architecture` chooses a preset; a field left at None takes the preset's value, and the resolved value is what
`config.json` stores, so a saved model never depends on a default. `2026-07` is the newest generation, `2025-10` the one
of the published d20 report (also transformers' native `nanochat`).
"""

import difflib
import re

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

PRESETS = {
    "2026-07": {
        "rope_theta": 100_000.0,
        "qk_scale": 1.2,
        "window_pattern": "SSSL",
        "use_value_embeddings": True,
        "use_residual_scalars": True,
        "use_smear": True,
        "use_backout": True,
    },
    "2025-10": {
        "rope_theta": 10_000.0,
        "qk_scale": 1.0,
        "window_pattern": "L",
        "use_value_embeddings": False,
        "use_residual_scalars": False,
        "use_smear": False,
        "use_backout": False,
    },
}


@strict
class NanoChatHFConfig(PreTrainedConfig):
    """What a NanoChatHF model is.

    Args:
        architecture: preset of the fields below that are None: `2026-07` or `2025-10`.
        vocab_size: rows of the embedding and of the head (no padding rows).
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP; 4 * hidden_size by default.
        head_dim: width of a head, even; hidden_size / num_attention_heads by default.
        num_key_value_heads: grouped-query attention when fewer than num_attention_heads.
        max_position_embeddings: training length T in tokens; the short window derives from it.
        window_pattern: `S` (short window) and `L` (everything) tiled over the layers; the last layer is always `L`.
        sliding_window: tokens a short-window query sees, itself included: ceil(T/4/128)*128 + 1 by default.
        rope_parameters: {"rope_type": "default", "rope_theta": base of the rotary embedding}.
        rms_norm_eps: of every norm; torch's default for the dtype, as in nanochat, where None.
        qk_scale: factor on the normalised queries and on the normalised keys.
        use_value_embeddings: every second layer (the last included) mixes a token embedding into its values.
        use_residual_scalars: learned weights of the stream and of the first embedding before each block.
        use_smear: each position mixes in its left neighbour's embedding.
        use_backout: a learned share of the middle layer's output is subtracted before the final norm.
        final_logit_softcapping: logits become `c * tanh(logits / c)`.

    Raises:
        ValueError: an unknown architecture, a size below 1, heads that do not divide the width, an odd head size, a
            window pattern with other letters, layer types that nanochat does not have.
    """

    model_type = "nanochat_hf"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.self_attn.ve_gate": "colwise",
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
        "value_embeds.*.weight": "embedding_colwise",  # a slice of each vector: the values of a process's own heads
        "value_embeds.*": "local_params",
    }
    base_model_fsdp_plan = {
        "embed_tokens": "free_full_weight",
        "value_embeds.*": "free_full_weight",
        "layers.*": "free_full_weight",
    }  # the head stays in the root's group: the chunked loss reads its weight without calling it

    architecture: str = "2026-07"
    vocab_size: int = 32768
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "relu2"
    max_position_embeddings: int = 2048
    window_pattern: str | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    rope_parameters: dict | None = None
    rms_norm_eps: float | int | None = None
    qk_scale: float | int | None = None
    use_value_embeddings: bool | None = None
    use_residual_scalars: bool | None = None
    use_smear: bool | None = None
    use_backout: bool | None = None
    final_logit_softcapping: float | int = 15.0
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        for name in kwargs:  # tools may add keys of their own to a config.json: only a misspelling is an error
            meant = difflib.get_close_matches(name, NanoChatHFConfig.__annotations__, n=1, cutoff=0.85)
            if meant:
                raise ValueError(f"{name} is no field of NanoChatHFConfig; did you mean {meant[0]}?")
        if self.architecture not in PRESETS:
            raise ValueError(f"architecture={self.architecture!r} is unknown; valid: {', '.join(PRESETS)}")
        preset = dict(PRESETS[self.architecture])
        default_theta = preset.pop("rope_theta")
        rope_theta = kwargs.pop("rope_theta", default_theta)
        self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta} | (self.rope_parameters or {})
        if self.rope_parameters["rope_type"] != "default":
            raise ValueError(f"rope_parameters={self.rope_parameters}: only rope_type 'default' exists in nanochat")
        for name, value in preset.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        sizes = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        sizes += "head_dim max_position_embeddings sliding_window"
        for name in sizes.split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.hidden_size < 24 and (self.use_smear or self.use_value_embeddings):
            raise ValueError(f"hidden_size={self.hidden_size}: smear and value gates read 24 channels; give 24 or more")
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._derive_head_dim()
        self._derive_windows()
        if not 0 < self.final_logit_softcapping <= 80:  # the fused loss takes exponentials of the logits as they are
            raise ValueError(f"final_logit_softcapping={self.final_logit_softcapping} must be above 0 and at most 80")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings=True is not nanochat: the head is untied; set it to False")
        if not self.use_value_embeddings:  # a rule that names nothing draws a warning
            for name in ("base_model_tp_plan", "base_model_fsdp_plan"):
                rules = getattr(self, name).items()
                setattr(
                    self, name, {rule: style for rule, style in rules if not re.search("value_embeds|ve_gate", rule)}
                )
        super().__post_init__(**kwargs)

    def _derive_head_dim(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None:
            if self.hidden_size % heads:
                raise ValueError(
                    f"num_attention_heads={heads} does not divide hidden_size={self.hidden_size}; give a number of "
                    f"heads that does, or head_dim"
                )
            self.head_dim = self.hidden_size // heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings need an even head size")
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")

    def _derive_windows(self) -> None:
        pattern = self.window_pattern
        if not pattern or set(pattern) - {"S", "L"}:
            raise ValueError(f"window_pattern={pattern!r}: only the letters S (short window) and L (full) are allowed")
        num_layers = self.num_hidden_layers
        # A `hybrid` layer's cache holds keys, values and a convolution state: the last embedding, for smear.
        last = "hybrid" if self.use_smear else "full_attention"
        if self.layer_types is None:
            letters = (pattern * num_layers)[: num_layers - 1]
            self.layer_types = ["sliding_attention" if letter == "S" else "full_attention" for letter in letters]
            self.layer_types.append(last)
        if len(self.layer_types) != num_layers:
            raise ValueError(f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is {num_layers}")
        if self.layer_types[-1] != last or set(self.layer_types[:-1]) - {"sliding_attention", "full_attention"}:
            raise ValueError(
                f"layer_types={self.layer_types}: each must be sliding_attention or full_attention, and the last, with "
                f"use_smear={self.use_smear}, {last}"
            )
        if self.sliding_window is None and "sliding_attention" in self.layer_types:
            # nanochat's window counts the keys to the left; transformers counts the query too.
            self.sliding_window = -(-self.max_position_embeddings // 512) * 128 + 1

    @property
    def n_positions(self) -> int:
        """Longest input in tokens: positions are rotary, and nanochat allows ten times the training length.

        lm-eval cuts prompts at this, where a config has it, and at max_position_embeddings where not.
        """
        return 10 * self.max_position_embeddings

    def has_value_embedding(self, layer_idx: int) -> bool:
        """Whether this layer mixes a value embedding: every second one, counted so that the last does."""
        return self.use_value_embeddings and layer_idx % 2 == (self.num_hidden_layers - 1) % 2


__all__ = ["NanoChatHFConfig"]
