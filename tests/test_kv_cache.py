"""The growing cache holds and hands out what transformers' DynamicCache does, through every operation we use."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from nanochat_hf import NanoChatHFConfig
from nanochat_hf.kv_cache import MIN_SPARE_TOKENS, growing_cache, select_rows

BATCH, HEADS, HEAD_DIM = 3, 2, 4
CONFIG = NanoChatHFConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, window_pattern="SSSL", sliding_window=9
)


@pytest.fixture
def caches():
    return growing_cache(CONFIG), DynamicCache(config=CONFIG)


def feed(caches, num_tokens, batch=BATCH):
    """The same new keys, values and smear states into both caches; what attention sees must agree."""
    for layer in range(CONFIG.num_hidden_layers):
        k, v = torch.randn(2, batch, HEADS, num_tokens, HEAD_DIM).unbind(0)
        ours, theirs = (cache.update(k, v, layer) for cache in caches)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    states = torch.randn(batch, 32, num_tokens)
    ours, theirs = (
        cache.update_conv_state(states, CONFIG.num_hidden_layers - 1, conv_kernel_size=1) for cache in caches
    )
    assert torch.equal(ours, theirs)
    for layer in range(CONFIG.num_hidden_layers):
        assert caches[0].get_seq_length(layer) == caches[1].get_seq_length(layer)
        assert caches[0].get_mask_sizes(1, layer) == caches[1].get_mask_sizes(1, layer)


def test_prefill_then_tokens_past_window_and_spare_room(caches):
    feed(caches, 5)
    for _ in range(2 * MIN_SPARE_TOKENS):
        feed(caches, 1)
    feed(caches, 20)
    feed(caches, 1)


@pytest.mark.parametrize("rows", [[2, 0], [1], [0, 0, 1, 1, 2, 2]])
def test_rows_are_dropped_and_repeated_with_their_smear_state(caches, rows):
    feed(caches, 12)
    feed(caches, 1)
    for cache in caches:
        select_rows(cache, torch.tensor(rows))
    for _ in range(3):
        feed(caches, 1, batch=len(rows))


def test_a_cropped_cache_goes_on_from_its_new_end():
    config = LlamaConfig(num_hidden_layers=1)
    caches = growing_cache(config), DynamicCache(config=config)
    first, second = torch.randn(2, 1, HEADS, 6, HEAD_DIM).unbind(0)
    for cache in caches:
        cache.update(first, first, 0)
        cache.crop(-4)
    ours, theirs = (cache.update(second, second, 0)[0] for cache in caches)
    assert torch.equal(ours, theirs) and ours.shape[2] == 8


def test_a_token_does_not_move_the_cache():
    """The point of the exercise: no copy of what is there already."""
    cache = growing_cache(CONFIG)
    new = torch.randn(BATCH, HEADS, 3, HEAD_DIM)
    before = cache.update(new, new, 0)[0].data_ptr()
    assert cache.update(new[:, :, :1], new[:, :, :1], 0)[0].data_ptr() == before


def test_recording_the_past_is_refused():
    cache = growing_cache(CONFIG)
    cache.activate_past_recording()
    new = torch.randn(BATCH, HEADS, 3, HEAD_DIM)
    with pytest.raises(ValueError, match="DynamicCache"):
        cache.update(new, new, 0)
