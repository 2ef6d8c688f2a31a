"""What transformers' GenerationTesterMixin checks of every generative model, under its names, on both generations.

The released source package does not carry the mixin (test_transformers_mixins.py says what it carries): its checks are
written here. In test_modeling.py, against golden tokens or recomputation: greedy, beam search, sampling, several return
sequences, left padding, dynamic and static caches, cache continuation in pieces.

Not run: contrastive, constrained and group beam search and DoLa (no longer part of transformers), encoder-decoder and
multimodal checks, flash-attention and multi-device checks and offloaded caches (no GPU), quantised caches (their layers
hold no windows and no state of smear).
"""

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationMixin, StaticCache

ARGUMENTS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
VOCABULARY = 300  # of `any_model`


@pytest.fixture
def ids():
    return torch.randint(VOCABULARY, (2, 11))


def generate(model, ids, num_tokens=12, **kwargs):
    return model.generate(ids, max_new_tokens=num_tokens, **ARGUMENTS | kwargs)


def test_inherits_generation_mixin(any_model):
    assert isinstance(any_model, GenerationMixin) and any_model.can_generate()


@pytest.mark.parametrize("kind", [{}, {"num_beams": 2}, {"do_sample": True}, {"do_sample": True, "num_beams": 2}])
def test_generate_dict_outputs_use_cache(any_model, ids, kind):
    """Scores, logits, hidden states and attentions of each step come along and have the shapes of the step."""
    any_model.set_attn_implementation("eager")
    output = generate(
        any_model, ids, 4, **kind, return_dict_in_generate=True, output_scores=True, output_logits=True,
        output_hidden_states=True, output_attentions=True,
    )  # fmt: skip
    rows = 2 * kind.get("num_beams", 1)
    assert output.sequences.shape == (2, 15) and output.past_key_values.get_seq_length() == 14
    assert len(output.scores) == len(output.logits) == len(output.hidden_states) == len(output.attentions) == 4
    assert all(step.shape == (rows, VOCABULARY) and step.isfinite().all() for step in output.logits)
    assert [states[0].shape for states in output.hidden_states] == [(rows, 11, 48)] + 3 * [(rows, 1, 48)]
    assert [weights[0].shape[-2:] for weights in output.attentions] == [(11, 11), (1, 12), (1, 13), (1, 14)]


def test_past_key_values_format(any_model, ids):
    cache = any_model(ids).past_key_values
    assert len(cache) == 3 and cache.get_seq_length() == 11
    assert all(layer.keys.shape == layer.values.shape == (2, 2, 11, 12) for layer in cache.layers)


@pytest.mark.parametrize("make_cache", [DynamicCache, StaticCache])
def test_generate_continue_from_past_key_values(any_model, ids, make_cache):
    """A conversation goes on from a kept cache: the same tokens as in one go."""
    expected = generate(any_model, ids, 12)
    assert all(len(row.unique()) > 1 for row in expected[:, 11:]), "saying one thing only would pass any test here"
    arguments = {"max_cache_len": 40} if make_cache is StaticCache else {}
    cache = make_cache(config=any_model.config, **arguments)
    first = generate(any_model, ids, 5, past_key_values=cache)
    assert torch.equal(generate(any_model, first, 7, past_key_values=cache), expected)


def test_generate_continue_from_a_cropped_cache(any_model, ids):
    """An edited turn: the cache, smear's state with it, is cut back and another text goes on from there."""
    cache = DynamicCache(config=any_model.config)
    cache.activate_past_recording()
    generate(any_model, ids, 5, past_key_values=cache)
    cache.crop(6 - cache.get_seq_length())
    other = torch.cat([ids[:, :6], ids.flip(1)], dim=1)
    assert torch.equal(generate(any_model, other, past_key_values=cache), generate(any_model, other))


@pytest.mark.parametrize("static", [False, True])
def test_generate_from_inputs_embeds(any_model, ids, static):
    """With the prompt's ids beside them; the embeddings decide what is generated, not the ids."""
    cache = {"cache_implementation": "static"} if static else {}
    embeddings, expected = any_model.get_input_embeddings()(ids), generate(any_model, ids)
    found = generate(any_model, ids, inputs_embeds=embeddings, **cache)
    assert torch.equal(found[:, -12:], expected[:, -12:])
    other = generate(any_model, ids, inputs_embeds=embeddings.flip(1), **cache)
    assert not torch.equal(other[:, -12:], expected[:, -12:])


def test_generate_from_inputs_embeds_alone(any_model, ids):
    embeddings = any_model.get_input_embeddings()(ids)
    if any_model.config.use_value_embeddings:
        with pytest.raises(ValueError, match="input_ids.*beside inputs_embeds"):
            generate(any_model, None, inputs_embeds=embeddings)
    else:
        assert torch.equal(generate(any_model, None, inputs_embeds=embeddings), generate(any_model, ids)[:, -12:])


def test_generate_without_input_ids(any_model):
    any_model.generation_config.bos_token_id = 1
    assert torch.equal(generate(any_model, None), generate(any_model, torch.tensor([[1]])))


def test_generate_with_and_without_position_ids(any_model, ids):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    without = generate(any_model, ids, attention_mask=mask)
    assert torch.equal(generate(any_model, ids, attention_mask=mask, position_ids=positions), without)


def test_right_padding_is_the_users_to_avoid_but_training_rows_may_have_it(any_model, ids):
    """Right padding, as collators for training make it, changes nothing before it."""
    padded, mask = torch.cat([ids, ids], 1), torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1)
    logits = any_model(padded, attention_mask=mask).logits[:, :11]
    torch.testing.assert_close(logits, any_model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [11, 140])
def test_assisted_decoding_matches_greedy_search(any_model, length):
    """A draft model's guesses are taken back where they are wrong, from windows that have rolled on too."""
    assistant, prompt = copy.deepcopy(any_model), torch.randint(VOCABULARY, (1, length))
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert torch.equal(generate(any_model, prompt, 60, assistant_model=assistant), generate(any_model, prompt, 60))


def test_prompt_lookup_decoding_matches_greedy_search(any_model, ids):
    prompt = torch.cat([ids[:1], ids[:1]], dim=1)
    assert torch.equal(generate(any_model, prompt, prompt_lookup_num_tokens=3), generate(any_model, prompt))


def test_generate_compile_model_forward_fullgraph(any_model, ids):
    """What `generate` compiles for a static cache: one step, without a graph break, the same tokens."""
    expected = generate(any_model, ids, cache_implementation="static")
    any_model.forward = torch.compile(any_model.forward, fullgraph=True, backend="eager")
    assert torch.equal(generate(any_model, ids, cache_implementation="static"), expected)


def test_eager_matches_sdpa_generate(any_model, ids):
    expected = generate(any_model, ids)
    any_model.set_attn_implementation("eager")
    assert torch.equal(generate(any_model, ids), expected)


def test_custom_4d_attention_mask(any_model, ids):
    """A mask of one's own, of shape (batch, 1, time, time) as the backends take it, is used as it is."""
    mask = torch.zeros(2, 1, 11, 11).masked_fill(torch.ones(11, 11).triu(1).bool(), torch.finfo(torch.float32).min)
    expected = any_model(ids).logits
    torch.testing.assert_close(any_model(ids, attention_mask=mask).logits, expected, atol=1e-5, rtol=0)
    mask[..., 0] = mask[..., 0, -1:]  # nobody sees the first token but itself
    mask[..., 0, 0] = 0
    assert not torch.allclose(any_model(ids, attention_mask=mask).logits[:, 1:], expected[:, 1:], atol=1e-3)


def test_generation_beyond_the_training_length(any_model):
    """Rotary positions go on, sliding windows roll: cached equals recomputed past `max_position_embeddings` too."""
    ids = torch.randint(VOCABULARY, (1, 250))
    with_cache = generate(any_model, ids, 16)
    assert torch.equal(with_cache, generate(any_model, ids, 16, use_cache=False))
    assert torch.equal(with_cache, generate(any_model, ids, 16, cache_implementation="static"))


def test_stops_at_every_end_token_and_pads_the_rest(any_model, ids):
    free = generate(any_model, ids)
    end = [free[0, 13].item(), free[1, 16].item()]
    found = generate(any_model, ids, eos_token_id=end)
    for row in range(2):
        stop = next(i for i in range(11, 23) if free[row, i].item() in end)
        assert torch.equal(found[row, : stop + 1], free[row, : stop + 1]) and not found[row, stop + 1 :].any()
