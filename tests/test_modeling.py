"""The model against nanochat's own outputs, and against itself: caches, padding, packed rows, initialisation."""

import pytest
import torch
from golden_models import checkpoint_of, expected_of, json_of, model_from, per_model
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import DynamicCache, StaticCache

from nanochat_hf import NanoChatHFConfig, NanoChatHFForCausalLM
from nanochat_hf.interop_checkpoint import nanochat_name, padded_vocab_size
from nanochat_hf.model.modeling_nanochat_hf import softcapped_cross_entropy
from nanochat_hf.scaling import count_flops_per_token, count_parameters, window_sizes

LOGITS, LOSS = 5e-6, 1e-6  # absolute, fp32 on a CPU


# -- nanochat's own outputs ------------------------------------------------------------------------------------------


@per_model("expected.pt")
@torch.no_grad()
def test_logits_and_losses_equal_nanochats(folder):
    model, expected = model_from(folder), expected_of(folder)
    ids = expected["input_ids"]
    output = model(ids, labels=ids)
    assert output.logits.dtype == torch.float32 and output.logits.shape == expected["logits"].shape
    torch.testing.assert_close(output.logits, expected["logits"], atol=LOGITS, rtol=0)
    shifted = model(ids[:, :-1], shift_labels=ids[:, 1:]).loss
    # In fp32 the golden mean itself is up to 1.2e-6 off the exact mean of its own logits: the order of the sum counts.
    chunked = model(ids, labels=ids, skip_logits=True).loss
    for loss in (output.loss, shifted, chunked):
        torch.testing.assert_close(loss, expected["loss"], atol=LOSS, rtol=0)
    if "token_losses" in expected:
        hidden = model.model(ids).last_hidden_state[:, :-1]
        _, losses = softcapped_cross_entropy(hidden, model.lm_head.weight, ids[:, 1:], 15.0)
        torch.testing.assert_close(losses, expected["token_losses"], atol=2 * LOGITS, rtol=0)


def greedy(model, ids, num_tokens, **kwargs):
    """New tokens of `generate`, greedy, never stopped by an end token."""
    model.generation_config.pad_token_id = 0
    with torch.no_grad():
        output = model.generate(ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, **kwargs)
    return output[:, ids.shape[1] :]


@pytest.mark.parametrize("softcap", [15.0, 80.0])
def test_the_compiled_loss_is_the_plain_one(softcap):
    """Compiled it takes other operations; three chunks, tokens without a target, logits up to the softcap."""
    torch.manual_seed(0)
    hidden, weight = 3 * torch.randn(70, 32), 3 * torch.randn(300, 32)
    targets = torch.randint(300, (70,))
    targets[[0, 30, 69]] = -100

    def whole(hidden, weight, targets, softcap, _):
        logits = softcap * torch.tanh(hidden @ weight.T / softcap)
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return losses.sum(), losses

    found = []
    for loss in (whole, softcapped_cross_entropy, torch.compile(softcapped_cross_entropy, backend="eager")):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        total, losses = loss(*leaves, targets, softcap, 30)
        (total / 67).backward()
        found.append((total.detach(), losses.detach(), *(leaf.grad for leaf in leaves)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-5)


@torch.no_grad()
def naive_greedy(model, ids, num_tokens):
    """The whole sequence through the model for every token, no cache."""
    for _ in range(num_tokens):
        logits = model(ids, use_cache=False, logits_to_keep=1).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, -num_tokens:]


@per_model("expected.pt")
def test_greedy_tokens_equal_nanochats(folder):
    model, expected = model_from(folder), expected_of(folder)
    prompt, tokens = expected["greedy_prompt"][None], expected["greedy_tokens"].tolist()
    assert naive_greedy(model, prompt, len(tokens))[0].tolist() == tokens
    assert greedy(model, prompt, len(tokens))[0].tolist() == tokens  # dynamic, with sliding layers where there are any
    assert greedy(model, prompt, len(tokens), cache_implementation="static")[0].tolist() == tokens
    assert greedy(model, prompt, len(tokens), use_cache=False)[0].tolist() == tokens


@per_model("expected.pt")
@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_in_a_left_padded_batch_of_mixed_lengths(folder, cache):
    """Beside shorter and longer prompts, one of them longer than the short window; every row as if alone."""
    model, expected = model_from(folder), expected_of(folder)
    prompt, tokens = expected["greedy_prompt"], expected["greedy_tokens"]
    long = max(8, min(model.config.sliding_window or 64, model.config.max_position_embeddings - len(tokens) - 1))
    prompts = [prompt, prompt[:3], expected["input_ids"][0, :1], expected["input_ids"].flatten()[: long + 1]]
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, one in enumerate(prompts):
        ids[row, width - len(one) :], mask[row, width - len(one) :] = one, 1
    kwargs = {} if cache is None else {"cache_implementation": cache}
    found = greedy(model, ids, len(tokens), attention_mask=mask, **kwargs)
    assert found[0].tolist() == tokens.tolist()
    for row, one in list(enumerate(prompts))[1:]:
        alone = naive_greedy(model, one[None], 12)
        assert found[row, :12].tolist() == alone[0].tolist(), f"row {row}"


@per_model("expected.pt")
def test_beams_and_several_sequences_equal_recomputation(folder):
    """Beam search reorders the cache at each step, smear's memory included; sampling draws several rows a prompt.

    The prompts are longer than the short window, so its layers' caches roll from the start.
    """
    model = model_from(folder)
    length = (model.config.sliding_window or 20) + 3
    ids = expected_of(folder)["input_ids"].flatten().repeat(2 * length)[: 2 * length].view(2, length)
    kwargs = {"max_new_tokens": 60, "eos_token_id": None, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    kwargs["pad_token_id"] = 0
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with_cache = model.generate(ids, attention_mask=mask, **kwargs)
    assert with_cache.shape == (4, length + 60)
    assert torch.equal(with_cache, model.generate(ids, attention_mask=mask, use_cache=False, **kwargs))
    kwargs |= {"num_beams": 1, "num_return_sequences": 3, "do_sample": True}
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        samples.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **kwargs))
    assert torch.equal(*samples)


@per_model("init_stats.json")
def test_initialisation_has_nanochats_statistics(folder):
    """Mean and deviation within six standard errors; the extremes within what so many draws vary by."""
    read, stats = checkpoint_of(folder), json_of(folder, "init_stats.json")
    torch.manual_seed(1)
    state = NanoChatHFForCausalLM(read.config).state_dict()
    assert {nanochat_name(name) for name in state} == set(stats)
    for name, tensor in state.items():
        expected = stats[nanochat_name(name)]
        n, std = tensor.numel(), expected["std"]
        spread = std + 1e-6 * abs(expected["mean"])
        error = 6 * spread * (2 / n) ** 0.5 + 1e-6
        assert abs(tensor.mean().item() - expected["mean"]) <= error, f"{name}: mean {tensor.mean()}, {expected}"
        if n > 1:
            assert abs(tensor.std(unbiased=False).item() - std) <= error, f"{name}: std {tensor.std()}, {expected}"
        uniform = expected["max"] - expected["min"] <= 3.5 * std
        slack = (30 / n) * (expected["max"] - expected["min"]) if uniform else 1.5 * std
        assert abs(tensor.min().item() - expected["min"]) <= slack + 1e-6, f"{name}: min {tensor.min()}, {expected}"
        assert abs(tensor.max().item() - expected["max"]) <= slack + 1e-6, f"{name}: max {tensor.max()}, {expected}"


@per_model("counts.json")
def test_counts_equal_nanochats(folder):
    """Parameters by group, FLOPs per token and windows; nanochat counts its padding rows, we have none."""
    config, counts = checkpoint_of(folder).config, json_of(folder, "counts.json")
    model, vocab_size = model_from(folder), config.vocab_size
    width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
    padding = padded_vocab_size(config) - vocab_size
    ours = count_parameters(
        config.num_hidden_layers,
        width,
        config.num_attention_heads,
        vocab_size,
        config.architecture,
        num_kv_heads=config.num_key_value_heads,
    )
    assert model.num_parameters() == sum(ours.values())
    value_layers = sum(config.has_value_embedding(i) for i in range(config.num_hidden_layers))
    if "num_scaling_params" in counts:
        theirs = counts["num_scaling_params"]
        assert ours["embedding"] == theirs["wte"] - padding * width
        assert ours["value_embedding"] == theirs["value_embeds"] - value_layers * padding * kv_width
        assert ours["lm_head"] == theirs["lm_head"] - padding * width
        assert ours["matrix"] == theirs["transformer_matrices"]
        assert ours["scalar"] == theirs["scalars"]
        assert sum(ours.values()) == theirs["total"] - padding * (2 * width + value_layers * kv_width)
    else:
        assert sum(ours.values()) == counts["num_params"] - 2 * padding * width
    windows = window_sizes(config.num_hidden_layers, config.max_position_embeddings, config.window_pattern)
    flops = count_flops_per_token(ours, windows, width, config.architecture == "2026-07")
    assert flops == counts["flops_per_token"] - 6 * padding * width
    if "window_sizes" in counts:
        assert [left for left, _ in counts["window_sizes"]] == list(windows)
        for layer, (left, right) in zip(model.model.layers, counts["window_sizes"], strict=True):
            ours, everything = layer.self_attn.sliding_window, left >= config.max_position_embeddings
            assert right == 0 and (ours == left + 1 or (ours is None and everything))


# -- the model against itself ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_windows_and_positions_reach_as_far_as_they_say(any_model):
    """A token's logits depend on tokens as far back as the windows of all layers together allow, and no later."""
    ids = torch.randint(300, (1, 200))
    reference = any_model(ids).logits
    for position in (0, 60, 150):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % 300
        different = (any_model(changed).logits - reference).abs().amax(-1)[0] > 1e-6
        assert not different[:position].any() and different[position:].all()  # the last layer sees everything


@torch.no_grad()
@pytest.mark.parametrize("make_cache", [DynamicCache, StaticCache])
@pytest.mark.parametrize("chunks", [[1] * 6 + [134, 60], [150, 1, 1, 1, 47], [199, 1]])
def test_cached_equals_uncached(any_model, make_cache, chunks):
    """In pieces of any size, beyond the short window, in a left-padded batch."""
    length = sum(chunks)
    ids, mask = torch.randint(300, (3, length)), torch.ones(3, length, dtype=torch.long)
    mask[1, :7] = mask[2, :140] = 0
    reference = any_model(ids, attention_mask=mask, use_cache=False).logits
    arguments = {"max_cache_len": length} if make_cache is StaticCache else {}
    cache, start, pieces = make_cache(config=any_model.config, **arguments), 0, []
    for size in chunks:
        end = start + size
        position_ids = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:]
        output = any_model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        pieces.append(output.logits)
        start = end
    real = mask.bool()
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    reference = any_model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(pieces, 1)[real], reference[real], atol=2e-5, rtol=0)


@torch.no_grad()
def test_padding_does_not_reach_a_row(any_model):
    """Logits of a row do not depend on what the padding left of it holds, nor on there being any."""
    ids, mask = torch.randint(300, (2, 40)), torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    reference = any_model(ids, attention_mask=mask, position_ids=position_ids).logits[0, 9:]
    other = ids.clone()
    other[0, :9] = 7
    for changed in (other, ids):
        found = any_model(changed, attention_mask=mask, position_ids=position_ids).logits[0, 9:]
        torch.testing.assert_close(found, reference)
    torch.testing.assert_close(any_model(ids[:1, 9:]).logits[0], reference, atol=1e-5, rtol=0)
    # Rotary positions are relative: without position ids the mask alone does, padding is not seen and not smeared.
    torch.testing.assert_close(any_model(ids, attention_mask=mask).logits[0, 9:], reference, atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_row_of_padding_is_finite_and_leaves_the_others_alone(any_model):
    ids, mask = torch.randint(300, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0] = 0
    for implementation in ("sdpa", "eager"):
        any_model.set_attn_implementation(implementation)
        logits = any_model(ids, attention_mask=mask).logits
        assert logits.isfinite().all()
        torch.testing.assert_close(logits[1], any_model(ids[1:]).logits[0], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("first_position", [0, 7])
def test_packed_documents_do_not_see_or_smear_one_another(any_model, implementation, first_position):
    """With and without a cache for what follows, and wherever the positions jump, not only where they start at 0."""
    any_model.set_attn_implementation(implementation)
    documents = [torch.randint(300, (1, n)) for n in (5, 1, 140, 54)]
    position_ids = torch.cat([torch.arange(document.shape[1]) for document in documents])[None] + first_position
    alone = torch.cat([any_model(document, use_cache=False).logits for document in documents], 1)
    for use_cache in (False, True):
        packed = any_model(torch.cat(documents, 1), position_ids=position_ids, use_cache=use_cache).logits
        torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_a_cache_without_a_place_for_smear_is_refused(make_model):
    with pytest.raises(ValueError, match=r"smear.*DynamicCache\(config=model.config\)"):
        make_model("2026-07")(torch.arange(9)[None], past_key_values=DynamicCache())


def test_a_batch_without_targets_has_loss_zero(any_model):
    ids = torch.randint(300, (2, 9))
    for skip_logits in (False, True):
        loss = any_model(ids, labels=torch.full_like(ids, -100), skip_logits=skip_logits).loss
        loss.backward()
        assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in any_model.parameters())


def test_chunked_loss_has_the_gradients_of_the_plain_one(any_model):
    ids = torch.randint(300, (2, 30))
    labels = ids.masked_fill(torch.rand(2, 30) < 0.3, -100)
    gradients = []
    for skip_logits in (False, True):
        any_model.zero_grad()
        any_model(ids, labels=labels, skip_logits=skip_logits).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in any_model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=2e-6, rtol=1e-4, msg=name)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"architecture": "2026-08"}, "2026-08.*2026-07, 2025-10"),
        ({"hidden_size": 100, "num_attention_heads": 6}, "num_attention_heads=6 does not divide hidden_size=100"),
        ({"hidden_size": 30, "num_attention_heads": 2}, "head_dim=15 is odd"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads=4 does not divide"),
        ({"num_attention_heads": 6, "num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"hidden_size": 16, "num_attention_heads": 2}, "hidden_size=16.*24"),
        ({"window_pattern": "SSXL"}, "window_pattern='SSXL'.*S.*L"),
        ({"window_pattern": "ssl"}, "window_pattern='ssl'"),
        ({"window_pattern": ""}, "window_pattern=''"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers"),
        ({"layer_types": 3 * ["chunked_attention"] + ["hybrid"]}, "layer_types=.*chunked_attention.*must be"),
        ({"layer_types": 4 * ["full_attention"]}, "layer_types=.*the last, with use_smear=True, hybrid"),
        ({"layer_types": 4 * ["hybrid"]}, "layer_types=.*each must be sliding_attention or full_attention"),
        ({"layer_types": 4 * ["sliding_attention"], "architecture": "2025-10"}, "use_smear=False, full_attention"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping=0.*at most 80"),
        ({"final_logit_softcapping": 100.0}, "final_logit_softcapping=100.*at most 80"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"head_dim": -16}, "head_dim=-16"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"intermediate_size": 0}, "intermediate_size=0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e5}}, "rope_type"),
        ({"hidden_sizes": 64}, "hidden_sizes.*hidden_size"),
    ],
)
def test_bad_configurations_are_refused_with_the_reason(fields, message):
    with pytest.raises(ValueError, match=message):
        NanoChatHFConfig(**{"vocab_size": 300, "hidden_size": 96, "num_hidden_layers": 4, **fields})


def test_what_is_left_out_has_the_generations_default():
    """Also beside a rotary type without its base, and beside layer types without the window they need."""
    config = NanoChatHFConfig(
        num_hidden_layers=2, layer_types=["sliding_attention", "hybrid"], window_pattern="L",
        rope_parameters={"rope_type": "default"},
    )  # fmt: skip
    assert config.rope_parameters["rope_theta"] == 100_000 and config.sliding_window == 513


def test_a_field_of_the_wrong_type_is_refused():
    with pytest.raises(StrictDataclassFieldValidationError, match="hidden_size"):
        NanoChatHFConfig(hidden_size="wide")


@pytest.mark.parametrize("bad", [-1, 300, 10**9])
def test_ids_out_of_range_are_named(any_model, bad):
    with pytest.raises(ValueError, match=f"{bad}.*300"):
        any_model(torch.tensor([[1, bad, 2]]))


def test_forward_without_ids_says_what_it_needs(any_model):
    with pytest.raises(ValueError, match="input_ids"):
        any_model()
