"""GradFactors: every method against the gradients written out, in every branch, and differentiable."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gradext.backends.reference as reference_backend
from gradext import GradFactors, LayerFactors
from gradext.backends.reference import BLOCK_ELEMENTS

# B, T, O, I such that T > 1 takes the Gram form (T small beside O and I) and the written form (T large).
SHAPES = [(5, 1, 4, 3), (5, 1, 2, 6), (5, 2, 8, 9), (5, 7, 3, 4), (5, 40, 2, 3), (1, 7, 1, 1)]
SMALL_BLOCK = 50  # so that even these shapes are cut into several blocks


@pytest.fixture(params=[BLOCK_ELEMENTS, SMALL_BLOCK], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(reference_backend, "BLOCK_ELEMENTS", request.param)
    monkeypatch.setattr(reference_backend, "GRADIENT_ELEMENTS", 16 * request.param)


def make(B, T, O, I, seed=0, dtype=torch.float64) -> GradFactors:
    generator = torch.Generator().manual_seed(seed)
    activation = torch.randn(B, T, I, generator=generator, dtype=torch.float64)
    delta = torch.randn(B, T, O, generator=generator, dtype=torch.float64)
    return GradFactors(activation.to(dtype), delta.to(dtype))


def written(factors: GradFactors) -> Tensor:
    a, d = (x if x.ndim == 3 else x.unsqueeze(1) for x in (factors.activation, factors.delta))
    return torch.einsum("bto,bti->boi", d.double(), a.double())


def random(*shape, seed=5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(n: int, seed: int) -> Tensor:
    root = random(n, n, seed=seed)
    return root @ root.T + torch.eye(n, dtype=torch.float64)


# Every method, as a function of the factors and as one of the gradients written out.
def methods(B, T, O, I) -> dict:
    R, W, bias = random(O, I), random(3, O, I), random(3)
    left, right = random(O, 2), random(I, 3)
    diag, A, D, weights = random(O, I).abs(), positive(I, 1), positive(O, 2), random(B)
    other = make(4, 3, O, I, seed=8)
    single = make(4, 1, O, I, seed=9)
    return {
        "materialize": (lambda f: f.materialize(), lambda G: G),
        "sq_norm": (lambda f: f.sq_norm(), lambda G: G.square().sum((1, 2))),
        **{
            f"norm {p}": (lambda f, p=p: f.norm(p), lambda G, p=p: torch.linalg.vector_norm(G.flatten(1), p, dim=1))
            for p in (1, 2, 3, math.inf)
        },
        "dot": (lambda f: f.dot(R), lambda G: (G * R).sum((1, 2))),
        "cosine": (lambda f: f.cosine(R), lambda G: torch.cosine_similarity(G.flatten(1), R.flatten()[None])),
        "gram": (lambda f: f.gram(), lambda G: G.flatten(1) @ G.flatten(1).mT),
        "gram other": (lambda f: f.gram(other), lambda G: G.flatten(1) @ written(other).flatten(1).mT),
        "gram single": (lambda f: f.gram(single), lambda G: G.flatten(1) @ written(single).flatten(1).mT),
        "linear": (lambda f: f.linear(W, bias), lambda G: torch.nn.functional.linear(G.flatten(1), W.flatten(1), bias)),
        "project": (lambda f: f.project(left, right), lambda G: left.T @ G @ right),
        "sum": (lambda f: f.sum(), lambda G: G.sum(0)),
        "weighted sum": (lambda f: f.sum(weights), lambda G: (G * weights[:, None, None]).sum(0)),
        "mean": (lambda f: f.mean(), lambda G: G.mean(0)),
        "diag_fisher": (lambda f: f.diag_fisher(), lambda G: G.square().mean(0)),
        "quadratic": (lambda f: f.quadratic(diag), lambda G: (G.square() * diag).sum((1, 2))),
        "quadratic_kron": (
            lambda f: f.quadratic_kron(A, D),
            lambda G: (G.mT @ D @ G @ A).diagonal(dim1=1, dim2=2).sum(1),
        ),
        "sketch": (lambda f: f.sketch(6, seed=3), lambda G: sketch_written(G, 6, 3)),
    }


def sketch_written(G: Tensor, dim: int, seed: int) -> Tensor:
    """The sketch of each of the O·I unit gradients, combined: it is linear in G."""
    _, O, I = G.shape
    rows, columns = torch.eye(O, dtype=G.dtype), torch.eye(I, dtype=G.dtype)
    units = GradFactors(columns.repeat(O, 1), rows.repeat_interleave(I, dim=0))
    return G.flatten(1) @ units.sketch(dim, seed)


NAMES = list(methods(*SHAPES[0]))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_gradients_written_out(name, shape):
    method, expected = methods(*shape)[name]
    factors = make(*shape)
    torch.testing.assert_close(method(factors), expected(written(factors)), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("shape", [(3, 1, 4, 3), (3, 2, 4, 5), (3, 9, 2, 3)])
@pytest.mark.parametrize("name", NAMES)
def test_derivatives_in_the_factors(name, shape):
    method, _ = methods(*shape)[name]
    factors = make(*shape)
    inputs = [factors.activation.requires_grad_(), factors.delta.requires_grad_()]
    assert torch.autograd.gradcheck(lambda a, d: method(GradFactors(a, d)), inputs, fast_mode=True)
    if name != "norm inf":  # piecewise linear
        assert torch.autograd.gradgradcheck(lambda a, d: method(GradFactors(a, d)), inputs, fast_mode=True)


@pytest.mark.parametrize(("T", "p"), [(1, 1), (1, 2), (1, 3), (2, 1), (2, 3)])
def test_norms_of_long_equal_rows_do_not_drift(T, p):
    factors = GradFactors(torch.full((2, T, 3), 0.3), torch.full((2, T, 300_001), 0.786))
    exact = torch.linalg.vector_norm(written(factors.to(torch.float64)).flatten(1), p, dim=1)
    torch.testing.assert_close(factors.norm(p).double(), exact, rtol=1e-5, atol=0)


def test_derivatives_in_the_arguments():
    for shape in (3, 1, 4, 3), (3, 9, 2, 3):
        factors, (B, _, O, I) = make(*shape), shape
        for function, *tensors in (
            (factors.dot, random(O, I)),
            (factors.cosine, random(O, I)),
            (factors.linear, random(2, O, I), random(2)),
            (factors.project, random(O, 2), random(I, 2)),
            (factors.sum, random(B)),
            (factors.quadratic, random(O, I)),
            (factors.quadratic_kron, random(I, I), random(O, O)),
            (lambda R, f=factors: LayerFactors(layer=f).cosine({"layer": R}), random(O, I)),
        ):
            assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("T", [1, 5])
def test_norms_of_a_zero_gradient_have_derivative_zero(T):
    activation, delta = torch.zeros(2, T, 3, requires_grad=True), torch.zeros(2, T, 4, requires_grad=True)
    factors = GradFactors(activation, delta)
    value = factors.norm().sum() + LayerFactors(layer=factors).norm().sum() + factors.cosine(torch.ones(4, 3)).sum()
    for gradient in torch.autograd.grad(value, (activation, delta)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_narrow_factors_lose_only_what_their_type_lost(name, dtype):
    """The result is that of the same narrow factors in double precision, up to rounding in single."""
    for shape in (5, 1, 4, 3), (5, 7, 3, 4):
        method, expected = methods(*shape)[name]
        factors = make(*shape, dtype=dtype)
        other = make(4, 3, *shape[2:], seed=8)
        if name.startswith("gram o"):
            narrow = GradFactors(other.activation.to(dtype), other.delta.to(dtype))
            result, exact = factors.gram(narrow), written(factors).flatten(1) @ written(narrow).flatten(1).mT
        elif name.startswith("gram s"):
            continue
        else:
            result, exact = method(factors), expected(written(factors))
        # Gradients themselves and their projections keep the type of the factors.
        rounding = torch.finfo(dtype).eps if name in ("materialize", "project") else 1e-6
        scale = exact.abs().amax().item()
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=8 * rounding * scale)


def test_gram_of_two_types_is_taken_in_the_wider():
    factors, other = make(4, 2, 5, 3), make(3, 1, 5, 3, seed=8)
    for dtype in torch.float32, torch.bfloat16:
        narrow = GradFactors(other.activation.to(dtype), other.delta.to(dtype))
        exact = written(factors).flatten(1) @ written(narrow).flatten(1).mT
        torch.testing.assert_close(factors.gram(narrow), exact)
    assert other.to(torch.float16).gram(other.to(torch.bfloat16)).dtype == torch.float32


def test_sketch_does_not_depend_on_the_batch_and_takes_any_seed():
    factors = make(9, 3, 5, 4)
    for seed in 0, -1, 2**40, 2**63 - 1, -(2**63), 2**70 + 1:
        whole = factors.sketch(16, seed)
        parts = torch.cat([factors[b : b + 2].sketch(16, seed) for b in range(0, 9, 2)])
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(whole, factors.sketch(16, seed + 1))
    assert factors.sketch(1).shape == (9, 1)


def test_sketch_is_the_same_for_ever():
    """Stored sketches stay comparable: the projection of one unit gradient to 8 numbers, for two seeds."""
    factors = GradFactors(torch.eye(3)[2:], torch.eye(4)[1:2])
    found = [factors.sketch(8, seed).round().int().flatten().tolist() for seed in (0, 1)]
    assert found == [[0, 0, -1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1), (2, 2, 3), (12,), (1, 12)])
def test_gradients_themselves_have_the_sketch_of_their_factors(shape):
    factors = make(5, 3, shape[0], math.prod(shape[1:]))
    gradients = GradFactors.of(factors.materialize().reshape(5, *shape))
    for seed in 0, 2**70:
        torch.testing.assert_close(gradients.sketch(7, seed), factors.sketch(7, seed), rtol=1e-12, atol=1e-12)


def test_sketches_of_layers_do_not_depend_on_their_order():
    layers = {"b": make(5, 1, 4, 3), "a": make(5, 2, 2, 6), "c": make(5, 1, 1, 2)}
    expected = LayerFactors(layers).sketch(7, seed=1)
    for names in ("a", "b", "c"), ("c", "b", "a"):
        torch.testing.assert_close(LayerFactors((name, layers[name]) for name in names).sketch(7, seed=1), expected)


@pytest.mark.medium
@pytest.mark.parametrize("dim", [1, 2, 7, 16])
@pytest.mark.parametrize("kind", ["one row", "one column", "full", "two by two"])
def test_sketch_keeps_inner_products_on_average_within_the_variance_stated(kind, dim):
    O, I = {"one row": (1, 6), "one column": (6, 1), "full": (5, 6), "two by two": (2, 2)}[kind]
    G, H = make(1, 4, O, I, seed=1), make(1, 4, O, I, seed=2)
    pairs = [(G, H), (G, G)]
    if kind == "two by two":  # the crosswise collisions that make the bound tight
        swap = GradFactors(torch.eye(2, dtype=torch.float64)[None], torch.eye(2, dtype=torch.float64).flip(0)[None])
        pairs = [(swap, swap), (GradFactors(swap.delta, swap.delta), swap)]
    seeds = range(300)
    for first, second in pairs:
        values = torch.cat([(first.sketch(dim, s) * second.sketch(dim, s)).sum(1) for s in seeds])
        exact = (written(first) * written(second)).sum()
        bound = (6 / dim + 4 / dim**2) * (first.sq_norm() * second.sq_norm()).item()
        assert (values.mean() - exact).abs() < 4 * math.sqrt(bound / len(seeds))
        assert values.var() < 1.2 * bound


# --- branches and memory ---------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Multiply-adds of the products, and the largest tensor made (a view is not)."""

    def __init__(self):
        super().__init__()
        self.work = self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.elements = max(self.elements, result.numel())
            if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
                self.work += result.numel() * args[0].shape[-1]
            elif func is torch.ops.gradext.outer_sum.default:
                self.work += result.numel() * args[0].shape[1]
        return result


@pytest.mark.parametrize(
    ("B", "C", "T", "S", "O", "I", "forms"),
    [
        (6, 6, 2, 2, 30, 40, "positions"),
        (6, 400, 3, 3, 30, 40, "positions"),  # many columns
        (6, 6, 60, 60, 6, 5, "gradients"),
        (40, 30, 20, 40, 8, 9, "gradients"),
    ],
)
@pytest.mark.parametrize("at_once", [2000, 4000])
def test_gram_takes_the_cheaper_form_in_bounded_memory(monkeypatch, B, C, T, S, O, I, forms, at_once):
    monkeypatch.setattr(reference_backend, "BLOCK_ELEMENTS", 2000)
    monkeypatch.setattr(reference_backend, "GRADIENT_ELEMENTS", at_once)
    factors, other = make(B, T, O, I), make(C, S, O, I, seed=1)
    with Largest() as seen:
        reference_backend.gram(factors.delta, factors.activation, other.delta, other.activation)
    by_positions = B * C * T * S * (O + I)
    step = max(1, at_once // (O * I))
    rows = 1 if step >= C else math.ceil(B / step)
    by_gradients = (B * C + B * T + rows * C * S) * O * I
    assert seen.work == min(by_positions, by_gradients) == {"positions": by_positions, "gradients": by_gradients}[forms]
    inputs = max(B * T, C * S) * max(O, I)
    assert seen.elements <= max(at_once, inputs, O * I, B * C)


@pytest.mark.parametrize("samples_at_once", [1, 2, 4, 6])
def test_gram_of_a_batch_with_itself_takes_half_of_the_products(monkeypatch, samples_at_once):
    monkeypatch.setattr(reference_backend, "GRADIENT_ELEMENTS", samples_at_once * 6 * 5)
    factors = make(6, 60, 6, 5)
    with Largest() as seen:
        gram = reference_backend.gram(factors.delta, factors.activation, factors.delta, factors.activation)
    flat = written(factors).flatten(1)
    torch.testing.assert_close(gram, flat @ flat.T)
    starts = range(0, 6, samples_at_once)
    sizes = [min(samples_at_once, 6 - b) for b in starts]
    products = sum(sizes[i] * sizes[j] for i in range(len(sizes)) for j in range(i, len(sizes)))
    formed = sum(sum(sizes[i:]) for i in range(len(sizes)))
    assert seen.work == (products + formed * 60) * 6 * 5


@pytest.mark.parametrize(("T", "O", "I", "by_gram"), [(2, 20, 30, True), (50, 4, 6, False)])
def test_sq_norm_takes_the_cheaper_form_in_bounded_memory(monkeypatch, T, O, I, by_gram):
    monkeypatch.setattr(reference_backend, "BLOCK_ELEMENTS", 500)
    factors = make(64, T, O, I)
    with Largest() as seen:
        reference_backend.sq_norm(factors.delta, factors.activation)
    assert seen.work == 64 * T * (T * (O + I) if by_gram else O * I)
    assert seen.elements <= max(500, T * T if by_gram else O * I)


@pytest.mark.parametrize(("T", "pieces"), [(63, 1), (64, 2), (70, 2), (130, 4), (300, 4)])
def test_sq_norm_takes_half_of_large_gram_matrices(T, pieces):
    factors = make(3, T, 400, 500)
    with Largest() as seen:
        found = reference_backend.sq_norm(factors.delta, factors.activation)
    torch.testing.assert_close(found, written(factors).square().sum((1, 2)), rtol=1e-12, atol=0)
    size = math.ceil(T / pieces)
    ends = [(t, min(t + size, T)) for t in range(0, T, size)]
    by_gram = sum((end - t) * end for t, end in ends) * 900
    assert seen.work == 3 * min(by_gram, T * 400 * 500)
    assert by_gram < T * 400 * 500 or T == 300


def test_what_passes_through_gradients_holds_few_of_them(monkeypatch):
    monkeypatch.setattr(reference_backend, "BLOCK_ELEMENTS", 2000)
    factors = make(64, 4, 30, 40)
    for name in "norm 3", "diag_fisher", "quadratic":
        method, _ = methods(64, 4, 30, 40)[name]
        with Largest() as seen:
            method(factors)
        assert seen.elements <= 64 * 4 * 64, name


# --- bookkeeping -----------------------------------------------------------------------------------------------------


def test_indexing_keeps_the_batch_dimension():
    for T in 1, 3:
        factors = make(5, T, 4, 3)
        G = written(factors)
        mask = torch.tensor([True, False, True, False, False])
        one = factors.norm().argmax()
        for index, kept in (
            *((2, [2]), (-1, [4]), (slice(1, 4), [1, 2, 3]), ([0, 3], [0, 3]), (mask, [0, 2])),
            *((one, [one.item()]), (np.int64(3), [3]), (np.array([1, 2]), [1, 2]), (torch.tensor([4]), [4])),
        ):
            torch.testing.assert_close(factors[index].materialize(), G[kept])
        assert len(factors[5:]) == 0
        whole = slice(None)
        for index in (2, whole), (whole, 0), (whole, slice(0, 2)), ([0, 1], whole), None, torch.zeros(2, 2).long():
            with pytest.raises(IndexError, match="index: expected an integer, a slice"):
                factors[index]


def test_cat_pads_positions_without_changing_anything():
    parts = [make(2, 3, 4, 5, seed=1), make(3, 1, 4, 5, seed=2), make(0, 2, 4, 5), make(1, 7, 4, 5, seed=3)]
    joined = GradFactors.cat(parts)
    assert joined.positions == 7
    torch.testing.assert_close(joined.materialize(), torch.cat([written(p) for p in parts]))
    torch.testing.assert_close(joined.sq_norm(), torch.cat([p.sq_norm() for p in parts]))
    assert GradFactors.cat([parts[1], parts[1]]).positions == 1
    with pytest.raises(ValueError, match="at least one"):
        GradFactors.cat([])


def test_conversions():
    factors = make(2, 3, 4, 5)
    assert factors.to(torch.float32).dtype == torch.float32
    assert factors.to("meta").device.type == "meta"
    assert not GradFactors(factors.activation.requires_grad_(), factors.delta).detach().norm().requires_grad
    assert repr(factors) == "GradFactors(B=2, O=4, I=5, T=3, dtype=torch.float64, device=cpu)"
    assert tuple(factors.shape) == (2, 4, 5)


@pytest.mark.parametrize("shape", [(0, 1, 4, 3), (0, 3, 4, 3), (2, 0, 4, 3), (2, 3, 0, 3), (2, 1, 4, 0)])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("norm inf", "mean", "diag_fisher")])
def test_empty_factors(name, shape):
    method, expected = methods(*shape)[name]
    factors = make(*shape)
    torch.testing.assert_close(method(factors), expected(written(factors)))


def test_means_of_nothing_are_refused():
    for method in "mean", "diag_fisher":
        with pytest.raises(ValueError, match=f"{method}: expected at least one sample"):
            getattr(make(0, 2, 4, 3), method)()


def test_wrong_arguments_are_refused_by_name():
    factors = make(2, 3, 4, 5)
    for p in 0.5, 0, -1, math.nan:
        with pytest.raises(ValueError, match="p: expected a number of at least 1"):
            factors.norm(p)
    with pytest.raises(ValueError, match=r"other: expected factors of \[O, I\] = \[4, 5\], but got \[5, 4\]"):
        factors.gram(make(2, 3, 5, 4))
    with pytest.raises(ValueError, match=r"other: expected factors on cpu, but got them on meta"):
        factors.gram(factors.to("meta"))
    with pytest.raises(ValueError, match=r"left: expected shape \[4, any\]"):
        factors.project(random(5, 2), random(5, 2))
    with pytest.raises(ValueError, match=r"right: expected shape \[5, any\]"):
        factors.project(random(4, 2), random(4, 2))
    with pytest.raises(ValueError, match="dim: expected a positive integer"):
        factors.sketch(0)
    with pytest.raises(ValueError, match=r"weights: expected shape \(2,\)"):
        factors.sum(random(3))
    with pytest.raises(ValueError, match=r"diag: expected shape \[4, 5\]"):
        factors.quadratic(random(5))
    with pytest.raises(ValueError, match="reference: expected shape"):
        factors.dot(random(5, 4))
    with pytest.raises(ValueError, match=r"A_inv: expected shape \[5, 5\]"):
        factors.quadratic_kron(positive(4, 0), positive(4, 0))
    with pytest.raises(ValueError, match="expected shapes"):
        GradFactors(random(2, 3, 5), random(2, 4))


# --- several layers --------------------------------------------------------------------------------------------------


def test_layers_together_are_their_gradients_concatenated():
    layers = LayerFactors(a=make(4, 1, 3, 5), b=make(4, 6, 2, 3, seed=1))
    other = LayerFactors(a=make(3, 2, 3, 5, seed=2), b=make(3, 1, 2, 3, seed=3))
    flat, other_flat = (torch.cat([written(f).flatten(1) for f in x.values()], dim=1) for x in (layers, other))
    R = {"b": random(2, 3), "a": random(3, 5)}
    reference = torch.cat([R["a"].flatten(), R["b"].flatten()])
    for found, expected in (
        (layers.sq_norm(), flat.square().sum(1)),
        (layers.norm(), flat.norm(dim=1)),
        (layers.dot(R), flat @ reference),
        (layers.cosine(R), torch.cosine_similarity(flat, reference[None])),
        (layers.gram(), flat @ flat.T),
        (layers.gram(other), flat @ other_flat.T),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_one_reference_for_a_bias_of_one_number():
    bias = GradFactors.of(torch.tensor([[2.0], [3.0]]))
    layers = LayerFactors({"0": GradFactors(torch.ones(2, 4), torch.ones(2, 1)), "0.bias": bias})
    reference = {"0": torch.ones(1, 4), "0.bias": torch.ones(1)}
    bank = {name: value.unsqueeze(0) for name, value in reference.items()}
    for method in "dot", "cosine":
        one, several = (getattr(layers, method)(references) for references in (reference, bank))
        assert several.shape == (2, 1)
        torch.testing.assert_close(several[:, 0], one)


def test_layers_that_are_not_there_are_named():
    layers = LayerFactors(a=make(4, 1, 3, 5))
    with pytest.raises(KeyError, match=r"'b'; there are: a"):
        layers["b"]
    with pytest.raises(ValueError, match=r"reference: expected the layers \['a'\], but got \['b'\]"):
        layers.dot({"b": random(3, 5)})
    with pytest.raises(ValueError, match=r"other: expected the layers"):
        layers.gram(LayerFactors(b=make(4, 1, 3, 5)))


def test_cosines_stay_in_their_range():
    factors = make(200, 3, 4, 5, dtype=torch.float32)
    for b in range(0, 200, 20):
        value = factors[b].cosine(factors[b].materialize()[0] * 3)
        assert 1 - 1e-6 < value.item() <= 1
