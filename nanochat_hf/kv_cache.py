"""A key/value cache for decoding: transformers' DynamicCache whose layers own spare room to grow into.

`DynamicCache` concatenates, so every new token copies the whole cache: on a CPU, with hundreds of rows, that copy
costs more than the model. Here a new token is written into room allocated ahead, and attention sees a view.
Everything else (masks, windows, smear's conv state, row selection) stays transformers' own.

    cache = growing_cache(model.config)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
"""

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
)

MIN_SPARE_TOKENS = 64


class _Room:
    """One tensor (batch, heads, capacity, head_dim), of which the part before `end` is in use."""

    def __init__(self):
        self.buffer: torch.Tensor | None = None
        self.end = 0
        self.view: torch.Tensor | None = (
            None  # what the layer holds; if it holds anything else, it was cut or reordered
        )

    def append(self, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """`held` and `new`, joined along time, without copying `held` unless the room is full or not its home."""
        num_held = held.shape[-2] if held.numel() else 0
        num_new = new.shape[-2]
        if self.buffer is None or held is not self.view or self.end + num_new > self.buffer.shape[2]:
            needed = num_held + num_new
            batch, heads, _, head_dim = new.shape
            self.buffer = new.new_empty(batch, heads, needed + max(MIN_SPARE_TOKENS, needed // 4), head_dim)
            if num_held:
                self.buffer[:, :, :num_held] = held
            self.end = num_held
        self.buffer[:, :, self.end : self.end + num_new] = new
        self.end += num_new
        return self.buffer[:, :, self.end - num_held - num_new : self.end]


class _GrowsInPlace:
    """Replaces a dynamic layer's concatenation; put before it in the bases."""

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.key_room, self.value_room = _Room(), _Room()
        return self.key_room.append(self.keys, key_states), self.value_room.append(self.values, value_states)

    def _hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys = self.key_room.view = keys
        self.values = self.value_room.view = values

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = self._append(key_states, value_states)
        self._hold(keys, values)
        return keys, values


class _GrowingLayer(_GrowsInPlace, DynamicLayer):
    pass


class _GrowingHybridLayer(_GrowsInPlace, LinearAttentionAndFullAttentionLayer):
    pass


class _GrowingSlidingLayer(_GrowsInPlace, DynamicSlidingWindowLayer):
    def update(self, key_states, value_states, *args, **kwargs):
        if self.record_past:
            raise ValueError("growing_cache cannot record past states for a rollback; use DynamicCache(config=...)")
        keys, values = self._append(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        # A query reaches sliding_window keys back, itself included: the next one needs one key less than that.
        self._hold(keys[:, :, -self.sliding_window + 1 :], values[:, :, -self.sliding_window + 1 :])
        return keys, values


_GROWING = {
    DynamicLayer: _GrowingLayer,
    DynamicSlidingWindowLayer: _GrowingSlidingLayer,
    LinearAttentionAndFullAttentionLayer: _GrowingHybridLayer,
}


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """`DynamicCache(config=config)` that grows in place; layer kinds unknown here stay as transformers made them."""
    cache = DynamicCache(config=config)
    cache.layers = [_grow_in_place(layer) for layer in cache.layers]
    return cache


def _grow_in_place(layer: CacheLayerMixin) -> CacheLayerMixin:
    """The layer with our `update`, and the windows and state counts transformers has read off the config."""
    growing_class = _GROWING.get(type(layer))
    if growing_class is None:
        return layer
    growing = growing_class.__new__(growing_class)
    vars(growing).update(vars(layer))
    return growing


def select_rows(cache: DynamicCache, rows: torch.Tensor) -> None:
    """Keep or repeat batch rows of a cache, in the given order.

    Args:
        rows: (new batch,) int64 indices into the present batch; an index may occur several times.

    `reorder_cache` and not `batch_select_indices`: in transformers 5.23 the latter leaves conv states (our smear's
    memory) where they were.
    """
    cache.reorder_cache(rows)
