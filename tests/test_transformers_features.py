"""What transformers offers every model works on ours, for both generations.

Run here: attention backends, activation checkpointing, torch.compile, meta-device initialisation, loading in other
dtypes, over several devices and quantised, resizing, what `forward` takes and gives beside the plain call. Elsewhere:
test_transformers_generation.py (what GenerationTesterMixin checks), test_transformers_tools.py (PEFT, pipelines, chat,
serve, continuous batching), test_parallel_plans.py (tensor parallelism and FSDP on two processes),
test_transformers_mixins.py (transformers' own ModelTesterMixin). Packed rows, caches, padding: test_modeling.py.

Not run, for want of hardware here: flash-attention (needs a GPU and its library; that it is declared, and asked for by
name where it is not installed, is checked) and flex attention's backward pass, which torch has on GPUs only.
"""

import copy

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM, QuantoConfig, TorchAoConfig
from transformers.utils import is_flash_attn_2_available

from nanochat_hf import NanoChatHFConfig, NanoChatHFForCausalLM, NanoChatHFModel

VOCABULARY = 300  # of `any_model`


@pytest.fixture
def folder(any_model, tmp_path):
    any_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def logits_of(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


# -- attention backends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "implementation", ["eager", "flex_attention", pytest.param("flex_attention, compiled", marks=pytest.mark.slow)]
)
def test_attention_backends_agree_with_sdpa(any_model, implementation):
    """Plain rows, left-padded rows and packed rows, longer than the short window; flex as written, and compiled.

    Each kind of row is compiled afresh: for a third kind in one process torch 2.13 writes C++ that no compiler takes,
    of transformers' Mistral as of ours.
    """
    implementation, _, is_compiled = implementation.partition(", ")
    ids = torch.randint(VOCABULARY, (2, 150))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    packed = torch.cat([torch.arange(n) for n in (5, 1, 140, 4)])[None].expand(2, -1)
    batches = [{}, {"attention_mask": mask}, {"position_ids": packed, "use_cache": False}]
    any_model.set_attn_implementation("sdpa")
    expected = [logits_of(any_model, ids, **batch) for batch in batches]
    any_model.set_attn_implementation(implementation)
    for batch, logits in zip(batches, expected, strict=True):
        real = batch.get("attention_mask", torch.ones_like(ids)).bool()
        torch._dynamo.reset()
        with torch.compiler.set_stance("default" if is_compiled else "force_eager"):
            found = logits_of(any_model, ids, **batch)
        torch.testing.assert_close(found[real], logits[real], atol=2e-5, rtol=0)


@pytest.mark.slow
def test_a_compiled_model_computes_its_rotary_tables_once(any_model):
    """Not once a layer, for q and for k, which took a GPU 13% of a training step."""
    ids = torch.randint(VOCABULARY, (2, 64))
    torch._dynamo.reset()
    _, sources = run_and_get_code(lambda: torch.compile(any_model)(ids, labels=ids, skip_logits=True).loss.backward())
    assert len(sources) == 2  # forward and backward
    assert "\n".join(sources).count(".cos()") == 1


def test_flash_attention_is_declared(any_model):
    assert any_model._supports_flash_attn
    if is_flash_attn_2_available():
        pytest.skip("flash-attention is installed; comparing it needs a GPU")
    with pytest.raises(ImportError, match="(?i)flash"):
        any_model.set_attn_implementation("flash_attention_2")


def test_every_layer_hands_the_positions_to_its_attention(any_model):
    """Flash attention takes no mask: it parts packed documents by the positions alone."""
    seen = []

    def record(module, query, key, value, attention_mask, **kwargs):
        seen.append(kwargs["position_ids"])
        return torch.zeros_like(query.transpose(1, 2)), None

    AttentionInterface.register("record", record)
    any_model.set_attn_implementation("record")
    packed = torch.cat([torch.arange(4), torch.arange(6)])[None]
    any_model(torch.arange(10)[None], position_ids=packed)
    assert len(seen) == 3 and all(torch.equal(position_ids, packed) for position_ids in seen)


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_recomputes_and_changes_no_gradient(any_model, use_reentrant):
    ids, calls = torch.randint(VOCABULARY, (2, 40)), []
    any_model.train()
    any_model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        any_model.zero_grad()
        any_model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: parameter.grad for name, parameter in any_model.named_parameters()}

    plain = gradients()
    assert len(calls) == 1
    any_model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:  # as PEFT and TRL do: a reentrant checkpoint needs an input that has a gradient
        any_model.enable_input_require_grads()
    checkpointed = gradients()
    assert len(calls) == 3
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_compiles_without_a_graph_break(make_model):
    """Forward, and backward with the loss of both kinds; `fullgraph` raises at the first break."""
    any_model = make_model("2026-07")  # has all that the older generation has
    ids = torch.randint(VOCABULARY, (2, 20))
    compiled = torch.compile(copy.deepcopy(any_model), fullgraph=True, backend="eager")
    for skip_logits in (False, True):
        arguments = {"input_ids": ids, "labels": ids, "use_cache": False, "skip_logits": skip_logits}
        loss, again = any_model(**arguments).loss, compiled(**arguments).loss
        loss.backward()
        again.backward()
        torch.testing.assert_close(again, loss)
    for ours, theirs in zip(any_model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, atol=1e-5, rtol=1e-4)
    mask = torch.ones_like(ids).triu(-10)
    torch.testing.assert_close(
        logits_of(compiled, ids, attention_mask=mask), logits_of(any_model, ids, attention_mask=mask)
    )


# -- initialisation and loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["2026-07", "2025-10"])
def test_initialised_from_the_meta_device_as_from_none(architecture):
    """No buffer is lost on the way and each initialiser runs: the same constants, the same means and deviations."""
    config = NanoChatHFConfig(architecture=architecture, vocab_size=64, hidden_size=48, num_hidden_layers=3)
    expected = NanoChatHFForCausalLM(config).state_dict()
    with torch.device("meta"):
        model = NanoChatHFForCausalLM(config)
    assert all(tensor.is_meta for tensor in model.state_dict().values()) and not list(model.buffers())
    model.to_empty(device="cpu")
    for module in model.modules():
        module._is_hf_initialized = False
    for parameter in model.parameters():
        parameter._is_hf_initialized = False
        parameter.data.fill_(torch.nan)
    model.init_weights()
    for name, tensor in model.state_dict().items():
        same, error = expected[name], 8 * expected[name].std(correction=0) / tensor.numel() ** 0.5
        assert (tensor.mean() - same.mean()).abs() <= error, name
        assert (tensor.std(correction=0) - same.std(correction=0)).abs() <= error, name
        assert torch.equal(tensor, same) or tensor.ndim > 1, name


def test_folder_opens_by_every_loading_option(any_model, folder):
    ids = torch.randint(VOCABULARY, (2, 30))
    expected = logits_of(any_model, ids)
    for options in ({}, {"low_cpu_mem_usage": True}, {"device_map": "auto"}, {"device_map": "cpu"}):
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        assert torch.equal(logits_of(model, ids), expected), options
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    backbone = AutoModel.from_pretrained(folder)
    assert type(backbone) is NanoChatHFModel
    assert torch.equal(backbone(ids).last_hidden_state, any_model.model(ids).last_hidden_state)


def test_layers_may_be_offloaded_to_disk(any_model, folder, tmp_path):
    """What `device_map` does with a model larger than memory; nothing but our layers' own inputs may be missed."""
    ids = torch.randint(VOCABULARY, (2, 30))
    places = {name: "cpu" for name, _ in any_model.model.named_children()}
    places |= {name: "cpu" for name, _ in any_model.model.named_parameters(recurse=False)} | {"layers.1": "disk"}
    places |= {"layers.0": "cpu", "layers.2": "cpu"}
    del places["layers"]
    places = {f"model.{name}": place for name, place in places.items()} | {"lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert model.model.layers[1].mlp.fc1.weight.is_meta
    assert torch.equal(logits_of(model, ids), logits_of(any_model, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(any_model, folder, dtype):
    """Everything is loaded in the dtype, logits stay fp32, and they are those of the full weights to its precision."""
    ids = torch.randint(VOCABULARY, (2, 40))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    logits, expected = logits_of(model, ids), logits_of(any_model, ids)
    assert logits.dtype == torch.float32
    error = (logits - expected).norm() / expected.norm()
    assert error < 8 * torch.finfo(dtype).eps  # each of a dozen roundings in a row is at most eps / 2
    output = model.generate(ids[:, :5], max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert output.shape == (2, 10)
    model.save_pretrained(folder.parent / "half")
    again = AutoModelForCausalLM.from_pretrained(folder.parent / "half", dtype="auto")
    assert again.dtype == dtype and torch.equal(logits_of(again, ids), logits)


@pytest.mark.parametrize("library", ["torchao", "optimum.quanto"])
def test_quantised_loading(any_model, folder, library):
    """Eight-bit weights; the head stays whole, as transformers does with every model."""
    pytest.importorskip(library)
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        quantisation = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        quantisation = QuantoConfig(weights="int8")
    ids = torch.randint(VOCABULARY, (2, 40))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation)
    weight, expected = model.model.layers[0].mlp.fc1.weight, logits_of(any_model, ids)
    assert type(weight) is not torch.nn.Parameter and type(model.lm_head.weight) is torch.nn.Parameter
    error = (logits_of(model, ids) - expected).norm() / expected.norm()
    assert 0 < error < 0.05
    assert model.generate(ids[:, :5], max_new_tokens=5, eos_token_id=None, pad_token_id=0).shape == (2, 10)


# -- the vocabulary --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean_resizing", [True, False])
def test_token_embeddings_grow_and_shrink(any_model, tmp_path, mean_resizing):
    """Old ids keep their logits, new ones can be used, a saved folder opens; value embeddings go along."""
    ids = torch.randint(VOCABULARY - 50, (2, 30))
    expected = logits_of(any_model, ids)
    any_model.resize_token_embeddings(VOCABULARY + 7, mean_resizing=mean_resizing)
    grown = logits_of(any_model, ids)
    assert any_model.config.vocab_size == VOCABULARY + 7 == grown.shape[-1]
    torch.testing.assert_close(grown[..., :VOCABULARY], expected)
    new = torch.full_like(ids, VOCABULARY + 6)
    loss = any_model(new, labels=new).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in any_model.named_parameters():
        assert len(parameter) != VOCABULARY, name
        if len(parameter) == VOCABULARY + 7:
            assert parameter.grad[-1].any() and 0 < parameter[VOCABULARY:].std() < 10 * parameter[:VOCABULARY].std()
    any_model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), ids), grown)
    any_model.resize_token_embeddings(VOCABULARY - 50)
    torch.testing.assert_close(logits_of(any_model, ids), expected[..., : VOCABULARY - 50])
    any_model.resize_token_embeddings(pad_to_multiple_of=64)
    assert {len(p) for name, p in any_model.named_parameters() if "embed" in name or "lm_head" in name} == {256}


def test_frozen_tables_stay_frozen_when_resized(any_model):
    any_model.requires_grad_(False)
    any_model.resize_token_embeddings(VOCABULARY + 7)
    assert not [name for name, parameter in any_model.named_parameters() if parameter.requires_grad]


# -- what forward takes and gives ------------------------------------------------------------------------------------


def test_hidden_states_and_attentions(any_model):
    """One state before and one after each layer, the last through the final norm; attention rows add up to one."""
    ids, seen = torch.randint(VOCABULARY, (2, 12)), []
    for layer in any_model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    any_model.set_attn_implementation("eager")
    output = any_model(ids, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4 and len(output.attentions) == 3
    assert all(torch.equal(a, b) for a, b in zip(output.hidden_states[1:-1], seen[:-1], strict=True))
    assert torch.equal(output.hidden_states[-1], any_model.model(ids).last_hidden_state)
    for weights in output.attentions:
        assert weights.shape == (2, 4, 12, 12) and not weights.triu(1).any()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12))
    assert any_model(ids).hidden_states is None
    as_tuple = any_model(ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.logits)


def test_embeddings_instead_of_ids(any_model):
    """Ids go beside them where value embeddings look tokens up; embeddings alone are then refused, never guessed."""
    ids = torch.randint(VOCABULARY, (2, 12))
    embeddings, expected = any_model.get_input_embeddings()(ids), logits_of(any_model, ids)
    assert torch.equal(logits_of(any_model, ids, inputs_embeds=embeddings), expected)
    assert not torch.allclose(logits_of(any_model, ids, inputs_embeds=embeddings.flip(1)), expected)
    if any_model.config.use_value_embeddings:
        with pytest.raises(ValueError, match="input_ids.*beside inputs_embeds"):
            any_model(inputs_embeds=embeddings)
    else:
        assert torch.equal(logits_of(any_model, None, inputs_embeds=embeddings), expected)


def test_only_the_logits_asked_for(any_model):
    ids = torch.randint(VOCABULARY, (2, 12))
    expected = logits_of(any_model, ids)
    torch.testing.assert_close(logits_of(any_model, ids, logits_to_keep=1), expected[:, -1:])
    positions = torch.tensor([0, 7, 3])
    torch.testing.assert_close(logits_of(any_model, ids, logits_to_keep=positions), expected[:, positions])
