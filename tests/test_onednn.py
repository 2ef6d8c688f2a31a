"""Products by oneDNN: the same numbers as PyTorch's own, and only where they are meant to be."""

import pytest
import torch
import torch.nn.functional as F

from nanochat_hf import onednn
from nanochat_hf.onednn import MIN_ROWS, has_onednn, multiply, onednn_products, pack, padded_rows

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN (mkldnn)")


@pytest.fixture(autouse=True)
def any_cpu_and_size(monkeypatch):
    """Small matrices too, which only some CPUs leave to oneDNN, and on any CPU."""
    monkeypatch.setattr(onednn, "MIN_ELEMENTS", {torch.backends.cpu.get_cpu_capability(): 0})
    monkeypatch.setattr(onednn, "cpu_name", lambda: "AMD EPYC")


def test_intels_cpus_and_other_types_are_left_to_pytorch(monkeypatch):
    cpu = torch.device("cpu")
    assert has_onednn(cpu, torch.float32) and not has_onednn(cpu, torch.bfloat16)
    monkeypatch.setattr(onednn, "cpu_name", lambda: "Intel(R) Xeon(R) Processor")
    assert not has_onednn(cpu, torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("rows", [(1,), (3,), (17,), (2, 40)])
def test_a_packed_matrix_gives_the_same_product(rows):
    x, matrix = torch.randn(*rows, 48), torch.randn(100, 48)
    expected = F.linear(x, matrix)
    torch.testing.assert_close(multiply(x, pack(matrix)), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(multiply(x, matrix), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def calls(monkeypatch):
    """The inputs' shapes that oneDNN multiplied."""
    shapes = []
    monkeypatch.setattr(onednn, "multiply", lambda x, matrix: shapes.append(tuple(x.shape)) or multiply(x, matrix))
    return shapes


@torch.no_grad()
def test_a_models_logits_are_the_same(tiny_model, calls):
    tiny_model.eval()
    ids = torch.randint(tiny_model.config.vocab_size, (2, 20))
    expected = tiny_model(ids).logits
    assert not calls
    with onednn_products(tiny_model):
        logits = tiny_model(ids).logits
    assert len(calls) > 6 * tiny_model.config.num_hidden_layers
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_inputs_of_any_length_need_few_kernels(tiny_model, calls):
    """A kernel is compiled, and kept, for every number of rows: lengths share them, and each keeps its own rows."""
    matrix = torch.randn(24, 32)
    with onednn_products(tiny_model):
        for rows in range(MIN_ROWS, 1025):
            x = torch.randn(1, rows, 32)
            torch.testing.assert_close(F.linear(x, matrix), x @ matrix.T, atol=1e-5, rtol=1e-5)
    assert len(calls) == 1025 - MIN_ROWS and len(set(calls)) < 45
    assert all(rows <= padded_rows(rows) < 1.45 * rows for rows in range(MIN_ROWS, 4097))
    assert all(padded_rows(rows) <= 1.125 * rows for rows in range(64, 4097))


@torch.no_grad()
def test_matrices_too_small_for_this_cpu_stay_with_pytorch(tiny_model, calls, monkeypatch):
    monkeypatch.setattr(onednn, "MIN_ELEMENTS", {torch.backends.cpu.get_cpu_capability(): 100})
    x = torch.randn(MIN_ROWS, 10)
    with onednn_products(tiny_model):
        F.linear(x, torch.randn(9, 10))
        assert not calls
        F.linear(x, torch.randn(10, 10))
    assert len(calls) == 1


def test_gradients_autocast_few_rows_and_biases_stay_with_pytorch(tiny_model, calls):
    ids = torch.randint(tiny_model.config.vocab_size, (2, 20))
    with onednn_products(tiny_model):
        tiny_model(ids, labels=ids).loss.backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), onednn_products(tiny_model):
        tiny_model(ids)
    with torch.no_grad(), onednn_products(tiny_model):
        tiny_model(ids[:1, :3])
        F.linear(torch.randn(40, 8), torch.randn(8, 8), torch.randn(8))
        F.linear(torch.randn(40, 8).bfloat16(), torch.randn(8, 8).bfloat16())
    assert not calls
