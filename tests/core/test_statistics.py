"""Means and Fisher matrices of a data set, merged over batches and workers."""

import pytest
import safetensors.torch
import torch
from torch import nn

import gradext
from gradext import EmbeddingFactors, GradFactors, GradStatistics, LayerFactors

from .common import squared


@pytest.fixture
def batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Tanh(), nn.Linear(9, 4)).double()
    data = torch.rand(17, 2, 4, dtype=torch.float64)

    def factors(x):
        return gradext.batch_layer_factors(model, x, loss=squared)

    return factors, data


def assert_same(first: GradStatistics, second: GradStatistics) -> None:
    assert first.count == second.count
    state, expected = first.state_dict(), second.state_dict()
    assert set(state) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-15)


def test_any_cut_and_any_order_of_merging_give_the_same(batches):
    factors, data = batches
    whole = GradStatistics(kron_fisher=True).partial_fit(factors(data))
    parts = GradStatistics(kron_fisher=True)
    for chunk in data.split([5, 0, 1, 11]):
        parts.partial_fit(factors(chunk))
    assert_same(parts, whole)
    workers = [GradStatistics(kron_fisher=True) for _ in range(3)]
    for worker, chunk in zip(workers, data.split([6, 4, 7]), strict=True):
        worker.partial_fit(factors(chunk))
    merged = GradStatistics(kron_fisher=True)
    for worker in reversed(workers):
        merged.merge(worker)
    assert_same(merged, whole)
    assert merged.merge(GradStatistics(kron_fisher=True)).count == 17


def test_they_are_those_of_the_gradients(batches):
    factors, data = batches
    statistics = GradStatistics(kron_fisher=True).partial_fit(factors(data))
    for name, f in factors(data).items():
        gradients = f.materialize()
        torch.testing.assert_close(statistics.mean[name], gradients.mean(0))
        torch.testing.assert_close(statistics.diag_fisher[name], gradients.square().mean(0))
    A, D = statistics.kron_fisher["3.weight"]
    linear = factors(data)["3.weight"]
    torch.testing.assert_close(A, linear.activation.T @ linear.activation / 17)
    torch.testing.assert_close(D, linear.delta.T @ linear.delta / 17)


def test_kronecker_factors_are_the_fisher_matrix_of_independent_factors():
    torch.manual_seed(0)
    a, d = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    # Every input with every delta: independent by construction.
    factors = GradFactors(a.repeat(5, 1), d.repeat_interleave(4, dim=0))
    A, D = factors.kron_fisher()
    flat = factors.materialize().flatten(1)
    torch.testing.assert_close(torch.kron(D, A), flat.T @ flat / 20)


def test_inverses_give_the_damped_quadratic_form(batches):
    factors, data = batches
    statistics = GradStatistics(mean=False, diag_fisher=False, kron_fisher=True).partial_fit(factors(data))
    A_inv, D_inv = statistics.kron_inverses(damping=0.01)["3.weight"]
    A, D = statistics.kron_fisher["3.weight"]
    damped = torch.kron(D + 0.1 * D.trace() / 4 * torch.eye(4), A + 0.1 * A.trace() / 9 * torch.eye(9))
    flat = factors(data)["3.weight"].materialize().flatten(1)
    expected = (flat @ torch.linalg.inv(damped) * flat).sum(1)
    torch.testing.assert_close(factors(data)["3.weight"].quadratic_kron(A_inv, D_inv), expected)


def test_state_survives_a_file(batches, tmp_path):
    factors, data = batches
    statistics = GradStatistics(kron_fisher=True).partial_fit(factors(data))
    torch.save(statistics.state_dict(), tmp_path / "state.pt")
    restored = GradStatistics(kron_fisher=True).load_state_dict(torch.load(tmp_path / "state.pt"))
    assert_same(restored, statistics)
    assert_same(restored.partial_fit(factors(data)), statistics.partial_fit(factors(data)))
    state = safetensors.torch.load(safetensors.torch.save(statistics.state_dict()))  # in an order of its own
    assert_same(GradStatistics(kron_fisher=True).load_state_dict(state), statistics)
    with pytest.raises(ValueError, match="state: expected"):
        GradStatistics().load_state_dict(statistics.state_dict())


def test_wrong_use_is_refused(batches):
    factors, data = batches
    with pytest.raises(ValueError, match="at least one of mean, diag_fisher, kron_fisher"):
        GradStatistics(mean=False, diag_fisher=False)
    statistics = GradStatistics()
    with pytest.raises(ValueError, match="mean: expected at least one sample"):
        _ = statistics.mean
    with pytest.raises(ValueError, match=r"kron_fisher: not gathered; make GradStatistics\(kron_fisher=True\)"):
        _ = statistics.kron_fisher
    statistics.partial_fit(factors(data))
    with pytest.raises(ValueError, match="factors: expected the layers"):
        statistics.partial_fit(LayerFactors({"3.weight": factors(data)["3.weight"]}))
    with pytest.raises(ValueError, match="same samples in every layer"):
        statistics.partial_fit({"0.weight": factors(data)["0.weight"], "3.weight": factors(data[:2])["3.weight"]})
    with pytest.raises(ValueError, match="other: expected one that gathers"):
        statistics.merge(GradStatistics(kron_fisher=True))
    assert statistics.count == 17


# --- what the factors of several layers, several references and embeddings add ---------------------------------------


def test_several_references_at_once(batches):
    factors, data = batches
    layers = factors(data)
    references = {name: torch.randn(5, *f.materialize().shape[1:]).double() for name, f in layers.items()}
    for k in range(5):
        one = {name: bank[k] for name, bank in references.items()}
        torch.testing.assert_close(layers.dot(references)[:, k], layers.dot(one))
        torch.testing.assert_close(layers.cosine(references)[:, k], layers.cosine(one))
        for name, f in layers.items():
            torch.testing.assert_close(f.cosine(references[name])[:, k], f.cosine(one[name]))
    whole = factors(data[:5])  # as many samples as references, which adding up would not tell apart
    for wrong in references["3.weight"][0], references["3.weight"][:1]:
        for method in layers.cosine, layers.dot, whole.dot:
            with pytest.raises(ValueError, match="one reference for every layer, or K for every layer"):
                method(references | {"3.weight": wrong})
    for method in layers.cosine, layers.dot:
        with pytest.raises(ValueError, match="reference: expected the layers"):
            method({"3.weight": references["3.weight"]})


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6])
def test_clipped_sums(batches, max_norm):
    factors, data = batches
    layers = factors(data)
    gradients = {name: f.materialize() for name, f in layers.items()}
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    scale = (max_norm / norms).clamp(max=1)
    for name, total in layers.clipped_sum(max_norm).items():
        torch.testing.assert_close(total, torch.einsum("b,b...->...", scale, gradients[name]))
    one = gradients["3.weight"].flatten(1).norm(dim=1)
    expected = torch.einsum("b,b...->...", (max_norm / one).clamp(max=1), gradients["3.weight"])
    torch.testing.assert_close(layers["3.weight"].clipped_sum(max_norm), expected)
    with pytest.raises(ValueError, match="max_norm: expected a positive number"):
        layers.clipped_sum(0.0)


def test_a_gradient_of_zero_is_not_clipped():
    factors = GradFactors(torch.zeros(2, 3), torch.ones(2, 4))
    assert torch.equal(factors.clipped_sum(1.0), torch.zeros(4, 3))


def test_layers_together(batches):
    factors, data = batches
    layers = factors(data)
    flat = torch.cat([f.materialize().flatten(1) for f in layers.values()], dim=1)
    sketches = torch.stack([layers.sketch(64, seed) for seed in range(300)])
    mean = (sketches @ sketches.mT).mean(0)
    # The standard error of the mean of 300 sketches is below ‖G‖‖H‖ (6/64 + 4/64²)^½ / √300 < 0.019 of the product.
    norms = flat.norm(dim=1)
    assert ((mean - flat @ flat.T).abs() / (norms[:, None] * norms)).max() < 5 * 0.019
    both = LayerFactors.cat([factors(data[:4]), factors(data[4:])])
    torch.testing.assert_close(both.norm(), layers.norm())
    torch.testing.assert_close(both.mean()["3.weight"], layers["3.weight"].materialize().mean(0))
    assert both.to(torch.float32)["3.weight"].dtype == torch.float32
    with pytest.raises(ValueError, match="parts: expected the layers"):
        LayerFactors.cat([layers, LayerFactors({"3.weight": layers["3.weight"]})])


def test_another_type_leaves_the_rows_of_an_embedding_where_they_are():
    factors = EmbeddingFactors(torch.tensor([[257, 2049], [4097, 3]]), torch.ones(2, 2, 3), 5000)
    for dtype in torch.float16, torch.bfloat16, torch.float64:
        other = factors.to(dtype)
        assert other.dtype == dtype
        assert torch.equal(other.materialize(), factors.materialize().to(dtype))
    assert factors.to("meta").device.type == "meta"


def test_indices_of_32_bits():
    model = torch.nn.Sequential(torch.nn.Embedding(6, 2))
    index, keys = torch.randint(0, 6, (5, 3)), {"loss": lambda output, _: output.square().flatten(1).sum(1)}
    wide, narrow = (gradext.batch_layer_factors(model, x, **keys)["0.weight"] for x in (index, index.int()))

    assert torch.equal(narrow.materialize(), wide.materialize())
    assert torch.equal(narrow.sketch(4), wide.sketch(4))


@pytest.mark.parametrize("other_T", [1, 4])
def test_products_of_embeddings_form_no_unit_vectors(other_T, monkeypatch):
    torch.manual_seed(0)
    first = EmbeddingFactors(torch.randint(0, 6, (5, 3)), torch.randn(5, 3, 2).double(), 6)
    second = EmbeddingFactors(torch.randint(0, 6, (4, other_T)), torch.randn(4, other_T, 2).double(), 6)
    expected = first.materialize().flatten(1) @ second.materialize().flatten(1).T
    both = EmbeddingFactors.cat([first, second]).materialize()
    torch.testing.assert_close(both, torch.cat([first.materialize(), second.materialize()]))
    monkeypatch.setattr(EmbeddingFactors, "delta", property(lambda self: pytest.fail("unit vectors were formed")))
    monkeypatch.setattr("gradext.backends.reference.BLOCK_ELEMENTS", 30)
    torch.testing.assert_close(first.gram(second), expected)
    assert first[:0].gram(second).shape == (0, 4)


def test_embeddings_keep_their_diagonal_and_tied_ones_join_it():
    torch.manual_seed(0)
    looked_up = EmbeddingFactors(torch.randint(0, 6, (5, 3)), torch.randn(5, 3, 2).double(), 6)
    head = GradFactors(torch.randn(4, 2).double(), torch.randn(4, 6).double())
    tied = GradFactors.add([looked_up[:4], head])
    alone = GradStatistics(kron_fisher=True).partial_fit({"embedding": looked_up})
    A, D = alone.kron_fisher["embedding"]
    assert D.shape == (6,)
    both = alone.partial_fit({"embedding": tied})
    A, D = both.kron_fisher["embedding"]
    pairs = [factors.kron_fisher() for factors in (looked_up, tied)]
    torch.testing.assert_close(A, (5 * pairs[0][0] + 4 * pairs[1][0]) / 9)
    torch.testing.assert_close(D, (5 * pairs[0][1].diag() + 4 * pairs[1][1]) / 9)
    again = GradStatistics(kron_fisher=True).partial_fit({"embedding": looked_up})
    again = GradStatistics(kron_fisher=True).load_state_dict(again.state_dict())
    A_inv, D_inv = again.kron_inverses()["embedding"]
    dense = torch.linalg.inv(torch.diag(1 / D_inv))
    gradients = tied.materialize()
    expected = torch.einsum("bvd,vw,bwe,de->b", gradients, dense, gradients, A_inv)
    torch.testing.assert_close(tied.quadratic_kron(A_inv, D_inv), expected)
