"""The decoding step over fixed buffers: the growing cache's logits, rows that leave, buffers that fill up.

On a GPU as a graph, on a CPU the same code unrecorded.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nanochat_hf import decode_compiled
from nanochat_hf.decode_compiled import compile_decoding
from nanochat_hf.decode_graph import GraphStep
from nanochat_hf.decode_step import DecodeStep
from nanochat_hf.generation import Row, TurnTokens, decode, generate_completions
from nanochat_hf.kv_cache import growing_cache, select_rows
from nanochat_hf.sampling import Sampling

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def padded(tiny_tokenizer):
    """Ids and mask (4, 150): one row longer than the model's short window (129), the others padded on the left."""
    ids = torch.randint(len(tiny_tokenizer), (4, 150))
    mask = torch.ones(4, 150, dtype=torch.long)
    for row, num_padding in enumerate((0, 20, 120, 149)):
        mask[row, :num_padding] = 0
    return ids, mask


def read(model, ids, mask):
    cache = growing_cache(model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
def test_the_growing_caches_logits(device, tiny_model, padded, monkeypatch):
    monkeypatch.setattr(DecodeStep, "min_capacity", 4)
    model = tiny_model.to(device)
    ids, mask = (x.to(device) for x in padded)
    lengths, num_steps, leaving_at = mask.sum(1), 120, 20
    plain, plain_cache, graph_cache = DecodeStep(model), read(model, ids, mask), read(model, ids, mask)
    graph = GraphStep(DecodeStep(model), graph_cache)
    capacities = set()
    for i in range(num_steps):
        if i == leaving_at:
            kept = torch.tensor([2, 0], device=device)
            graph.store()
            for cache in (plain_cache, graph_cache):
                select_rows(cache, kept)
            mask, lengths = mask[kept], lengths[kept]
        new = torch.randint(model.config.vocab_size, (len(mask),), device=device)
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        expected = plain(new, lengths + i, plain_cache, mask)
        torch.testing.assert_close(graph(new, lengths + i, mask), expected, atol=2e-5, rtol=1e-5)
        capacities.add(graph.capacity)
    assert capacities == {256, 512}, "the buffers filled up once"
    graph.store()
    graph.store()
    assert graph_cache.get_seq_length() == plain_cache.get_seq_length() == 150 + num_steps
    for ours, theirs in zip(graph_cache.layers, plain_cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, atol=2e-5, rtol=1e-5)
    more = torch.randint(model.config.vocab_size, (2, 3), device=device)
    after = [model(more, past_key_values=cache).logits for cache in (plain_cache, graph_cache)]
    torch.testing.assert_close(*after, atol=2e-5, rtol=1e-5)


@pytest.mark.gpu
def test_a_gpu_writes_what_a_cpu_writes(tiny_model, tiny_tokenizer):
    prompts = [[0, *range(10, 10 + n)] for n in (3, 140, 3, 60)]
    settings = {"temperature": 1.0, "top_k": 20, "seed": 3}
    expected = generate_completions(tiny_model, tiny_tokenizer, prompts, 200, **settings)
    completions = generate_completions(tiny_model.cuda(), tiny_tokenizer, prompts, 200, **settings)
    assert [c.token_ids for c in completions] == [c.token_ids for c in expected]


@pytest.fixture
def single_version():
    """PyTorch keeps eight compiled versions of a function and then raises: here one."""
    with torch._dynamo.config.patch(recompile_limit=1):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("library", ["oneDNN", "MKL"])
def test_compiled_decoding_writes_the_same(library, tiny_model, tiny_tokenizer, monkeypatch, single_version):
    """One row and several, padded, past the short window, greedy and sampled, rows that end early.

    Several rows' products are this CPU's choice of library; here each of the two is taken.
    """
    if library == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN (mkldnn)")
    chosen = []
    monkeypatch.setattr(decode_compiled, "has_onednn", lambda *kind: chosen.append(library) or library == "oneDNN")
    prompts = [[0, *range(10, 10 + n)] for n in (3, 140, 3)]
    many = [
        (prompts[:1], {}),
        (prompts, {}),
        (prompts, {"temperature": 1.0, "top_k": 20, "seed": 3, "repetition_penalty": 1.1}),
    ]
    expected = [generate_completions(tiny_model, tiny_tokenizer, p, 60, **settings) for p, settings in many]
    compile_decoding(tiny_model, batch_sizes=[1])

    def write(p, settings):
        return [c.token_ids for c in generate_completions(tiny_model, tiny_tokenizer, p, 60, **settings)]

    for (p, settings), rows in zip(many, expected, strict=True):
        assert write(p, settings) == [c.token_ids for c in rows]
    with ThreadPoolExecutor(3) as pool:  # as in the Space: several answers at once
        written = pool.map(lambda prompt: write([prompt], {}), [prompts[1]] * 6)
        assert all(rows == [expected[1][1].token_ids] for rows in written)
    assert chosen == [library]  # asked once, for three rows
    cache, row = growing_cache(tiny_model.config), Row(prompts[1], TurnTokens(tiny_tokenizer), use_calculator=False)
    for _ in decode([row], tiny_model, Sampling(), None, 5, cache):
        pass
    assert cache.get_seq_length() == len(prompts[1]) + len(row.completion.token_ids) - 1, "the caller's cache goes on"


@pytest.mark.slow
def test_compiled_decoding_outgrows_a_short_context(tiny_model, tiny_tokenizer):
    """Buffers for fewer tokens than are read at once, then full ones."""
    prompts = [[0, 10, 11], [0, 12]]
    expected = [c.token_ids for c in generate_completions(tiny_model, tiny_tokenizer, prompts, 40)]
    tiny_model.config.max_position_embeddings = 8
    compile_decoding(tiny_model)
    assert [c.token_ids for c in generate_completions(tiny_model, tiny_tokenizer, prompts, 40)] == expected


def test_where_compiling_is_switched_off_the_step_runs_as_it_is(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(decode_compiled, "has_compiler", lambda: True)
    prompts = [[0, *range(10, 10 + n)] for n in (3, 140)]
    expected = [c.token_ids for c in generate_completions(tiny_model, tiny_tokenizer, prompts, 20)]
    compile_decoding(tiny_model)
    with torch.compiler.set_stance("force_eager"):
        assert [c.token_ids for c in generate_completions(tiny_model, tiny_tokenizer, prompts, 20)] == expected


def test_only_a_plain_fp32_model_is_compiled(tiny_model):
    with pytest.raises(ValueError, match="in torch.bfloat16 on cpu"):
        compile_decoding(tiny_model.to(torch.bfloat16))


def test_compiling_needs_a_compiler(tiny_model, monkeypatch):
    monkeypatch.setattr(decode_compiled, "has_compiler", lambda: False)
    with pytest.raises(ValueError, match="apt install g"):
        compile_decoding(tiny_model)
    assert tiny_model not in decode_compiled.COMPILED
