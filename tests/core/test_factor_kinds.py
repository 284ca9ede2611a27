"""Every kind of factors, alone, summed and joined: each method against the gradients written out, in fp64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradext import EmbeddingFactors, GradFactors
from gradext.backends import reference
from gradext.factors import (
    ConvFactors,
    Coverage,
    LayerFactors,
    LayerGrads,
    SumFactors,
    Windows,
    WrittenFactors,
    inner,
)
from gradext.factors.products import flat_form

D64 = torch.float64


def random(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D64)


class Case(NamedTuple):
    """Factors from tensors, and the gradients [B, *shape] that they stand for, both differentiable in the tensors."""

    tensors: tuple[Tensor, ...]
    build: Callable[..., GradFactors]
    written: Callable[..., Tensor]
    roles: str  # of the tensors: a(ctivation), d(elta), g(radient)

    @property
    def factors(self) -> GradFactors:
        return self.build(*self.tensors)

    @property
    def gradients(self) -> Tensor:
        return self.written(*self.tensors)


def product(B: int, T: int, O: int, I: int, shape: tuple[int, ...] | None = None, seed: int = 0) -> Case:
    return Case(
        (random(B, T, I, seed=seed), random(B, T, O, seed=seed + 1)),
        lambda a, d: GradFactors(a, d, shape),
        lambda a, d: torch.einsum("bto,bti->boi", d, a).reshape(B, *(shape or (O, I))),
        "ad",
    )


def gradients(B: int, *shape: int, seed: int = 0) -> Case:
    return Case((random(B, *shape, seed=seed),), GradFactors.of, lambda g: g, "g")


def embedding(B: int, T: int, V: int, D: int, shape: tuple | None = None, by_columns=False, seed: int = 0) -> Case:
    index = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))

    def written(rows: Tensor) -> Tensor:
        found = torch.einsum("btv,btd->bvd", F.one_hot(index, V).double(), rows)
        found = found.mT if by_columns else found
        return found if shape is None else found.reshape(B, *shape)

    return Case(
        (random(B, T, D, seed=seed),), lambda rows: EmbeddingFactors(index, rows, V, shape, by_columns), written, "g"
    )


def convolution(B: int, groups: int = 1, size: int = 5, channels: int = 4, shape: tuple | None = None, seed=0) -> Case:
    weight = torch.zeros(4, channels // groups, 3, dtype=D64)
    windows = Windows((3,), (2,), (1,), ((1, 1),))
    options = {"stride": 2, "padding": 1, "groups": groups}
    image = random(B, channels, size, seed=seed)
    plain = random(*F.conv1d(image, weight, **options).shape, seed=seed + 1)

    def written(image: Tensor, plain: Tensor) -> Tensor:
        unfolded = F.pad(image, (1, 1)).unfold(2, 3, 2)  # [B, C, T, 3]
        by_group = unfolded.unflatten(1, (groups, -1)), plain.unflatten(1, (groups, -1))
        found = torch.einsum("bgctk,bgpt->bgpck", *by_group).flatten(1, 2)
        return found if shape is None else found.reshape(B, *shape)

    def build(image: Tensor, plain: Tensor) -> GradFactors:
        form = tuple(weight.shape)
        factors = ConvFactors(image, plain, windows, groups, shape or form, form)
        return factors if groups == 1 else factors.compact()

    return Case((image, plain), build, written, "ad")


def summed(*cases: Case) -> Case:
    starts = [0, *torch.tensor([len(case.tensors) for case in cases]).cumsum(0).tolist()]

    def each(tensors):
        return ((c, tensors[i:j]) for c, i, j in zip(cases, starts, starts[1:], strict=False))

    return Case(
        tuple(tensor for case in cases for tensor in case.tensors),
        lambda *tensors: GradFactors.add([case.build(*own) for case, own in each(tensors)]),
        lambda *tensors: sum(case.written(*own) for case, own in each(tensors)),
        "".join(case.roles for case in cases),
    )


CASES: dict[str, Callable[[int], Case]] = {
    "product": lambda B: product(B, 1, 4, 3),
    "product of positions": lambda B: product(B, 5, 4, 3),
    "product of no position": lambda B: product(B, 0, 4, 3),
    "product, one output": lambda B: product(B, 5, 1, 3),
    "product, one input": lambda B: product(B, 5, 4, 1),
    "product of a weight of another shape": lambda B: product(B, 2, 6, 4, (2, 3, 4)),
    "scalar": lambda B: gradients(B),
    "vector": lambda B: gradients(B, 5),
    "matrix": lambda B: gradients(B, 4, 3),
    "three dimensions": lambda B: gradients(B, 2, 3, 2),
    "embedding": lambda B: embedding(B, 5, 4, 3),
    "embedding, one position": lambda B: embedding(B, 1, 4, 3),
    "embedding, no position": lambda B: embedding(B, 0, 4, 3),
    "embedding, one column": lambda B: embedding(B, 5, 4, 1),
    "embedding, one row": lambda B: embedding(B, 5, 1, 3),
    "embedding of a weight of another shape": lambda B: embedding(B, 5, 4, 6, (1, 4, 2, 3)),
    "embedding by columns": lambda B: embedding(B, 5, 4, 3, by_columns=True),
    "convolution": lambda B: convolution(B),
    "convolution of one position": lambda B: convolution(B, size=1),
    "convolution of a weight of another shape": lambda B: convolution(B, shape=(2, 2, 12)),
    "grouped convolution": lambda B: convolution(B, groups=2),
    "tied embedding": lambda B: summed(embedding(B, 5, 4, 3), product(B, 2, 4, 3)),
    "tied embedding, head of one position": lambda B: summed(embedding(B, 5, 4, 3), product(B, 1, 4, 3)),
    "tied embedding, nothing looked up": lambda B: summed(embedding(B, 0, 4, 3), product(B, 1, 4, 3)),
    "tied embedding by columns": lambda B: summed(embedding(B, 5, 3, 4, by_columns=True), product(B, 2, 4, 3)),
    "two look-ups and two products": lambda B: summed(
        embedding(B, 5, 4, 3), product(B, 2, 4, 3), embedding(B, 2, 4, 3, seed=3), product(B, 1, 4, 3, seed=4)
    ),
    "products of two shapes": lambda B: summed(product(B, 2, 6, 4, (2, 3, 4)), product(B, 1, 2, 12, (2, 3, 4), seed=3)),
    "convolution beside a product": lambda B: summed(convolution(B, channels=20), product(B, 2, 4, 60, (4, 20, 3))),
    "convolution beside an embedding": lambda B: summed(
        convolution(B, channels=20), embedding(B, 2, 4, 60, (4, 20, 3))
    ),
    "written beside a product": lambda B: summed(gradients(B, 4, 3), product(B, 2, 4, 3)),
    "written beside an embedding": lambda B: summed(embedding(B, 5, 4, 3), gradients(B, 4, 3), gradients(B, 4, 3)),
}


def positive(n: int, seed: int) -> Tensor:
    root = random(n, n, seed=seed)
    return root @ root.T + torch.eye(n, dtype=D64)


def units(form: tuple[int, ...]) -> GradFactors:
    """The gradients that have a one in one place each."""
    O, I = flat_form(form)
    rows, columns = torch.eye(O, dtype=D64), torch.eye(I, dtype=D64)
    return GradFactors(columns.repeat(O, 1), rows.repeat_interleave(I, dim=0), form)


def methods(B: int, form: tuple[int, ...], matrix: tuple[int, int]) -> dict:
    """Every method, as a function of the factors and as one of the gradients [B, N], N the parameter's elements."""
    O, I = matrix
    N = math.prod(form)
    R, bank, bias, diag, weights = random(*form), random(2, *form), random(2), random(*form).abs(), random(B)
    left, right, A, D = random(O, 2), random(I, 3), positive(I, 1), positive(O, 2)
    other = random(2, *form, seed=8)

    def matrices(G):
        return G.reshape(len(G), O, I)

    return {
        "materialize": (lambda f: f.materialize().reshape(len(f), N), lambda G: G),
        "sq_norm": (lambda f: f.sq_norm(), lambda G: G.square().sum(1)),
        **{
            f"norm {p}": (
                lambda f, p=p: f.norm(p),
                lambda G, p=p: torch.linalg.vector_norm(G, p, dim=1) if G.shape[1] else G.sum(1),
            )
            for p in (1, 2, 3, math.inf)
        },
        "dot": (lambda f: f.dot(R), lambda G: G @ R.flatten()),
        "dot bank": (lambda f: f.dot(bank), lambda G: G @ bank.reshape(2, N).T),
        "cosine": (lambda f: f.cosine(R), lambda G: torch.cosine_similarity(G, R.reshape(1, N))),
        "gram": (lambda f: f.gram(), lambda G: G @ G.T),
        "gram written": (lambda f: f.gram(GradFactors.of(other)), lambda G: G @ other.reshape(2, N).T),
        "written gram": (lambda f: GradFactors.of(other).gram(f), lambda G: other.reshape(2, N) @ G.T),
        "linear": (lambda f: f.linear(bank, bias), lambda G: F.linear(G, bank.reshape(2, N), bias)),
        "project": (lambda f: f.project(left, right), lambda G: left.T @ matrices(G) @ right),
        "random project": (
            lambda f: f.project(2, seed=3).flatten(1),
            lambda G: G @ units(form).project(2, seed=3).flatten(1),
        ),
        "full project": (lambda f: f.project(100, seed=3).flatten(1), lambda G: G),
        "sketch": (lambda f: f.sketch(6, seed=3), lambda G: G @ units(form).sketch(6, seed=3)),
        "sum": (lambda f: f.sum().flatten(), lambda G: G.sum(0)),
        "weighted sum": (lambda f: f.sum(weights).flatten(), lambda G: weights @ G),
        "mean": (lambda f: f.mean().flatten(), lambda G: G.mean(0)),
        "clipped_sum": (
            lambda f: f.clipped_sum(2.0).flatten(),
            lambda G: ((2 / G.norm(dim=1)).clamp_max(1)[:, None] * G).sum(0),
        ),
        "diag_fisher": (lambda f: f.diag_fisher().flatten(), lambda G: G.square().mean(0)),
        "quadratic": (lambda f: f.quadratic(diag), lambda G: G.square() @ diag.flatten()),
        "quadratic_kron": (
            lambda f: f.quadratic_kron(A, D),
            lambda G: (matrices(G).mT @ D @ matrices(G) @ A).diagonal(dim1=1, dim2=2).sum(1),
        ),
        "quadratic_kron diagonals": (
            lambda f: f.quadratic_kron(A.diagonal(), D.diagonal()),
            lambda G: torch.einsum("boi,o,i->b", matrices(G).square(), D.diagonal(), A.diagonal()),
        ),
    }


NAMES = list(methods(1, (1,), (1, 1)))


@pytest.fixture(params=[False, True], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 20)


def check(case: Case, name: str) -> None:
    factors, G = case.factors, case.gradients
    method, expected = methods(len(G), tuple(G.shape[1:]), tuple(factors.shape[1:]))[name]
    N = math.prod(G.shape[1:])
    torch.testing.assert_close(method(factors), expected(G.reshape(len(G), N)), rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_every_method_equals_that_of_the_gradients_written_out(case, B):
    for name in NAMES:
        check(CASES[case](B), name)


@pytest.mark.parametrize("case", CASES)
def test_of_no_samples(case):
    for name in NAMES:
        if name == "mean" or name == "diag_fisher":
            with pytest.raises(ValueError, match=f"{name}: expected at least one sample"):
                getattr(CASES[case](0).factors, name)()
        else:
            check(CASES[case](0), name)


@pytest.mark.medium
@pytest.mark.parametrize("case", CASES)
def test_derivatives(case):
    found = CASES[case](2)
    form, matrix = tuple(found.gradients.shape[1:]), tuple(found.factors.shape[1:])
    if not sum(tensor.numel() for tensor in found.tensors):
        return
    inputs = [tensor.requires_grad_() for tensor in found.tensors]
    for name, (method, _) in methods(2, form, matrix).items():

        def function(*tensors, method=method):
            return method(found.build(*tensors))

        if name.startswith("norm") or name in ("cosine", "clipped_sum"):
            if not found.gradients.abs().sum():
                continue
            if name == "norm inf":  # piecewise linear
                assert torch.autograd.gradcheck(function, inputs, fast_mode=True), name
                continue
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True), name
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True), name


@pytest.mark.parametrize("first", CASES)
def test_gram_between_kinds(first):
    one = CASES[first](3)
    for second in CASES:
        other = CASES[second](2)
        if one.gradients.shape[1:] == other.gradients.shape[1:]:
            expected = one.gradients.reshape(3, -1) @ other.gradients.reshape(2, -1).T
            torch.testing.assert_close(one.factors.gram(other.factors), expected, rtol=1e-11, atol=1e-11)


def looked_up(B: int, T: int, V: int, D: int, padding_idx: int | None = None, seed: int = 0) -> Case:
    """An embedding whose indices repeat, and the rows of whose padding are zero."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, max(1, min(V, T // 2)), (B, T), generator=generator)

    def build(rows: Tensor) -> GradFactors:
        rows = rows if padding_idx is None else rows * (index != padding_idx).unsqueeze(2)
        return EmbeddingFactors(index, rows, V)

    def written(rows: Tensor) -> Tensor:
        return torch.einsum("btv,btd->bvd", F.one_hot(index, V).double(), build(rows).delta_rows)

    return Case((random(B, T, D, seed=seed),), build, written, "g")


# Whether gradients are written for a Gram matrix: of small vocabularies, and not of large ones.
LOOKED_UP: dict[str, tuple[bool, Callable[[int, int], Case]]] = {
    "embedding, small": (True, lambda B, seed: looked_up(B, 61, 7, 5, seed=seed)),
    "embedding, padding": (True, lambda B, seed: looked_up(B, 61, 7, 5, padding_idx=1, seed=seed)),
    "embedding, large": (False, lambda B, seed: looked_up(B, 3, 501, 5, seed=seed)),
    "tied, small": (True, lambda B, seed: summed(looked_up(B, 61, 7, 5, seed=seed), product(B, 59, 7, 5, seed=seed))),
    "tied, large": (
        False,
        lambda B, seed: summed(looked_up(B, 3, 501, 5, seed=seed), product(B, 2, 501, 5, seed=seed)),
    ),
    "tied, no look-up": (False, lambda B, seed: summed(looked_up(B, 0, 501, 5), product(B, 2, 501, 5, seed=seed))),
}


@pytest.mark.parametrize("at_once", [None, 70])
@pytest.mark.parametrize("B", [0, 1, 3, 5])
@pytest.mark.parametrize("name", LOOKED_UP)
def test_embeddings_and_sums_are_written_where_that_is_less_work(name, B, at_once, monkeypatch):
    """The form that is less work is taken, in blocks of the size allowed, and each agrees with the gradients."""
    small, build = LOOKED_UP[name]
    if at_once is not None:
        monkeypatch.setattr(reference, "GRADIENT_ELEMENTS", at_once)
    one, other = build(B, 1), build(2, 2)
    G, H, bank = one.gradients.flatten(1), other.gradients.flatten(1), random(40, *one.gradients.shape[1:])
    W = bank.flatten(1)
    calls = {
        "gram": (lambda: one.factors.gram(), G @ G.T),
        "gram other": (lambda: one.factors.gram(other.factors), G @ H.T),
        "gram written": (lambda: one.factors.gram(GradFactors.of(bank)), G @ W.T),
        "written gram": (lambda: GradFactors.of(bank).gram(one.factors), W @ G.T),
        "linear": (lambda: one.factors.linear(bank), G @ W.T),
        "sq_norm": (lambda: one.factors.sq_norm(), G.square().sum(1)),
        "dot": (lambda: one.factors.dot(bank), G @ W.T),
        "cosine": (lambda: one.factors.cosine(bank), torch.cosine_similarity(G[:, None], W[None], dim=2)),
    }
    written: list[int] = []
    original = GradFactors._written_wide
    monkeypatch.setattr(GradFactors, "_written_wide", lambda self: written.append(len(self)) or original(self))
    pairs: list[GradFactors] = []
    of_pair = inner.per_sample
    monkeypatch.setattr(inner, "per_sample", lambda x, y: pairs.append(x) or of_pair(x, y))
    for call, (function, expected) in calls.items():
        written.clear()
        pairs.clear()
        torch.testing.assert_close(function(), expected, rtol=1e-11, atol=1e-11, msg=call)
        if call in ("gram", "gram other") and B > 1:
            assert bool(written) == small, call
            assert not written or at_once is None or max(written) * G.shape[1] <= at_once, call
        if call == "sq_norm" and at_once is None:
            assert bool(pairs) == (name.startswith("tied") and not small)
    for less in (-1, math.inf):  # whatever is chosen
        monkeypatch.setattr(inner, "_may_write", lambda x: True)
        monkeypatch.setattr(inner, "_by_gradients_work", lambda x, y, less=less: less)
        monkeypatch.setattr(inner, "_writing_work", lambda x, less=less: less)
        for call, (function, expected) in calls.items():
            torch.testing.assert_close(function(), expected, rtol=1e-11, atol=1e-11, msg=call)


def test_gradients_larger_than_a_block_are_not_written(monkeypatch):
    case = LOOKED_UP["tied, small"][1](3, 1)
    G = case.gradients.flatten(1)
    monkeypatch.setattr(reference, "GRADIENT_ELEMENTS", G.shape[1] - 1)
    monkeypatch.setattr(GradFactors, "_written_wide", lambda self: pytest.fail("gradients were written"))
    torch.testing.assert_close(case.factors.gram(), G @ G.T, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("first", CASES)
def test_cat_and_add_of_kinds(first):
    one = CASES[first](2)
    for second in CASES:
        other, third = CASES[second](3), CASES[second](2)
        if one.gradients.shape[1:] != other.gradients.shape[1:]:
            continue
        joined = GradFactors.cat([one.factors, other.factors, one.factors[:0]])
        torch.testing.assert_close(joined.materialize(), torch.cat([one.gradients, other.gradients]))
        torch.testing.assert_close(joined.sq_norm(), torch.cat([one.factors.sq_norm(), other.factors.sq_norm()]))
        added = GradFactors.add([one.factors, third.factors])
        torch.testing.assert_close(added.materialize(), one.gradients + third.gradients)
        for factors, G in (joined, joined.materialize()), (added, one.gradients + third.gradients):
            assert factors.materialize().shape == G.shape
            torch.testing.assert_close(factors.norm(), G.reshape(len(G), -1).norm(dim=1), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(factors.sum(), G.sum(0))
            torch.testing.assert_close(factors[[1, 0]].materialize(), G[[1, 0]])


@pytest.mark.parametrize("case", CASES)
def test_bookkeeping(case):
    factors, G = CASES[case](4).factors, CASES[case](4).gradients
    assert len(factors) == 4
    assert factors.shape[0] == 4
    assert math.prod(factors.shape) == G.numel()
    assert factors.nbytes == sum(tensor.nbytes for tensor in factors._tensors())
    assert "dtype=torch.float64" in repr(factors)
    mask = torch.tensor([True, False, True, False])
    for index, kept in (slice(1, 3), [1, 2]), (mask, [0, 2]), (2, [2]), ([3, 0], [3, 0]):
        torch.testing.assert_close(factors[index].materialize(), G[kept])
    half = factors.to(torch.float32)
    assert half.dtype == torch.float32
    assert type(half) is type(factors)
    torch.testing.assert_close(half.materialize().double(), G, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(factors.regrouped(2).materialize(), G.unflatten(0, (2, 2)).sum(1))
    torch.testing.assert_close(factors.detach().materialize(), G)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_into_memory_that_is_given(case, dtype):
    found = CASES[case](3)
    G = found.gradients
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    shapes = {tuple(G.shape), (*G.shape[:1], *found.factors.shape[1:])}
    for shape in shapes:
        for out in (
            torch.full(shape, 7.0, dtype=dtype),
            torch.full((*shape, 2), 7.0, dtype=dtype)[..., 0],
            torch.full((3, 2, *shape[1:]), 7.0, dtype=dtype)[:, 1],
            torch.full(shape[::-1], 7.0, dtype=dtype).permute(*range(len(shape))[::-1]),
        ):
            factors = found.factors
            assert factors.materialize(out=out) is out
            torch.testing.assert_close(out.double(), G.reshape(shape), **tolerance)
    assert found.factors.materialize(dtype=dtype).dtype == dtype
    torch.testing.assert_close(found.factors.materialize(dtype=dtype).double(), G, **tolerance)
    with pytest.raises(ValueError, match="expected"):
        found.factors.materialize(out=torch.empty(3, *G.shape[1:], 2))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_lose_only_what_they_lost(case, dtype):
    for name in NAMES:
        narrow = CASES[case](3).factors.to(dtype)
        if name == "gram written" or name == "written gram":
            continue
        G = narrow.to(D64).materialize()
        method, expected = methods(3, tuple(G.shape[1:]), tuple(narrow.shape[1:]))[name]
        rounding = torch.finfo(dtype).eps if name in ("project", "materialize") else 2e-06
        exact = expected(G.reshape(3, math.prod(G.shape[1:])))
        scale = max(exact.abs().max().item(), 1e-3)
        torch.testing.assert_close(method(narrow).double(), exact, rtol=0, atol=8 * rounding * scale, msg=name)


# --- other forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_reshaped_transposed_and_placed(case):
    found = CASES[case](3)
    factors, G = found.factors, found.gradients
    form = tuple(G.shape[1:])
    flat = math.prod(form)
    for shape in (flat,), (1, flat), (1, *form):
        reshaped = factors.reshaped(shape)
        torch.testing.assert_close(reshaped.materialize(), G.reshape(3, *shape))
        torch.testing.assert_close(reshaped.reshaped(form).materialize(), G)
        torch.testing.assert_close(reshaped.norm(), G.reshape(3, flat).norm(dim=1))
        torch.testing.assert_close(reshaped.sum(), G.sum(0).reshape(shape))
    with pytest.raises(ValueError, match="weight_shape: expected as many elements"):
        factors.reshaped((flat + 1,))
    for one in range(len(form)):
        for two in range(len(form)):
            transposed = factors.transposed(one, two)
            expected = G.transpose(one + 1, two + 1)
            torch.testing.assert_close(transposed.materialize(), expected)
            torch.testing.assert_close(transposed.gram(), G.reshape(3, flat) @ G.reshape(3, flat).T)
            torch.testing.assert_close(transposed.sum(), expected.sum(0))
        for start, after in (0, 0), (2, 0), (0, 1), (1, 2):
            size = start + form[one] + after
            placed = factors.placed(start, size, one)
            expected = torch.zeros(3, *form[:one], size, *form[one + 1 :], dtype=D64)
            expected.narrow(one + 1, start, form[one]).copy_(G)
            torch.testing.assert_close(placed.materialize(), expected)
            torch.testing.assert_close(placed.norm(), G.reshape(3, flat).norm(dim=1))
            torch.testing.assert_close(placed.sum(), expected.sum(0))
            other = random(*expected.shape[1:])
            torch.testing.assert_close(placed.dot(other), (expected * other).reshape(3, -1).sum(1))
        with pytest.raises(ValueError, match="start, size: expected"):
            factors.placed(1, form[one], one)


def test_forms_that_stay_factors():
    P, E, C = product(3, 2, 6, 4).factors, embedding(3, 5, 6, 4).factors, convolution(3).factors
    for factors in P, E, C:
        assert type(factors.placed(1, 9)) is type(factors)
        assert type(factors.placed(1, 9, 1)) is type(factors)
        assert type(factors.reshaped((1, *factors._form)).placed(1, 9, 1)) is type(factors)
    for factors in P, E:
        assert type(factors.transposed()) is type(factors)
    assert type(P.reshaped((2, 3, 4)).placed(1, 4)) is GradFactors
    assert type(P.reshaped((6, 2, 2)).placed(1, 4, 1)) is GradFactors
    assert type(P.reshaped((2, 3, 4)).placed(1, 4, 1)) is WrittenFactors


# --- sums ------------------------------------------------------------------------------------------------------------


def test_the_kinds_that_a_sum_takes():
    P, E, W = product(2, 2, 4, 3), embedding(2, 5, 4, 3), gradients(2, 4, 3)
    assert type(GradFactors.add([P.factors])) is GradFactors
    stacked = GradFactors.add([P.factors, P.factors])
    assert type(stacked) is GradFactors
    assert stacked.positions == 4
    looked_up = GradFactors.add([E.factors, E.factors])
    assert type(looked_up) is EmbeddingFactors
    assert looked_up.positions == 10
    assert type(GradFactors.add([W.factors, W.factors])) is WrittenFactors
    assert type(GradFactors.add([W.factors, E.factors, P.factors])) is WrittenFactors
    tied = GradFactors.add([E.factors, P.factors])
    assert type(tied) is SumFactors
    again = GradFactors.add([tied, P.factors, tied])
    assert [type(part) for part in again.parts] == [EmbeddingFactors, GradFactors]
    assert again.positions == 16
    assert repr(tied).startswith("SumFactors(EmbeddingFactors(B=2, O=4, I=3, T=5")
    mixed = GradFactors.add([E.factors.to(torch.float32), P.factors])
    assert mixed.dtype == D64
    W.factors.gradients.fill_(1.0)
    before = W.tensors[0].clone()
    GradFactors.add([W.factors, P.factors])
    assert torch.equal(W.tensors[0], before)


def test_sums_are_refused_with_a_reason():
    P, E = product(2, 2, 4, 3).factors, embedding(2, 5, 4, 3).factors
    for function in GradFactors.add, GradFactors.cat, SumFactors:
        with pytest.raises(ValueError, match="parts: expected at least one"):
            function([])
        with pytest.raises(ValueError, match=r"one parameter's shape, but got \[4, 3\] and \[3, 4\]"):
            function([P, E.transposed()])
    with pytest.raises(ValueError, match="parts: expected the same samples in all, but got 2 and 1"):
        GradFactors.add([P, E[:1]])
    with pytest.raises(ValueError, match="expected one of each kind"):
        SumFactors([P, P])
    with pytest.raises(ValueError, match="index, delta_rows: expected shapes"):
        EmbeddingFactors(torch.zeros(2, 3).long(), torch.zeros(2, 4, 3), 5)
    with pytest.raises(ValueError, match="gradients: expected floating-point numbers"):
        GradFactors.of(torch.zeros(2, 3).long())


def test_parts_that_cancel_leave_no_negative_norm():
    for seed in range(20):
        E = embedding(3, 5, 4, 3, seed=seed)
        opposite = GradFactors(*(x.float() for x in (-E.factors.activation, E.factors.delta)))
        factors = GradFactors.add([E.factors.to(torch.float32), opposite])
        assert (factors.sq_norm() >= 0).all()
        assert (factors.norm() < 1e-2).all()


VOCABULARY = 5000


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_nothing_is_one_hot_nor_of_the_gradients_size(tied, by_columns, monkeypatch, largest_result):
    monkeypatch.setattr(F, "one_hot", lambda *_: pytest.fail("unit vectors were formed"))
    V, B, T, D = VOCABULARY, 4, 6, 8
    factors: GradFactors = EmbeddingFactors(torch.randint(0, V, (B, T)), random(B, T, D), V)
    if tied:
        factors = GradFactors.add([factors, GradFactors(random(B, 2, D), random(B, 2, V))])
    left, right, A, D_inv = random(V, 3), random(D, 2), positive(D, 1), random(V).abs()
    if by_columns:
        factors, left, right, A, D_inv = factors.transposed(), right, left, D_inv, A
    R, weights = random(*factors.shape[1:]), random(B)
    other = factors[:1]
    calls = {
        "sq_norm": lambda: factors.sq_norm(),
        "norm": lambda: factors.norm(),
        "dot": lambda: factors.dot(R),
        "cosine": lambda: factors.cosine(R),
        "gram": lambda: factors.gram(),
        "gram other": lambda: factors.gram(other),
        "project": lambda: factors.project(left, right),
        "random project": lambda: factors.project(4),
        "sketch": lambda: factors.sketch(16),
        "quadratic_kron": lambda: factors.quadratic_kron(A, D_inv),
        "sum": lambda: factors.sum(weights),
        "clipped_sum": lambda: factors.clipped_sum(1.0),
    }
    if not tied:
        calls["kron_fisher"] = factors.kron_fisher
    for name, call in calls.items():
        with largest_result() as seen:
            call()
        assert seen.elements <= max(V * D, B * 2 * V), name  # the weight's, and the head's deltas
    with largest_result() as seen:
        factors.materialize()
    assert seen.elements == B * V * D


def test_kron_fisher_of_every_kind():
    """A and D of the positions, an embedding's one-hot side as its diagonal."""
    for case in CASES.values():
        factors = case(3).factors
        A, D = factors.kron_fisher()
        activation, delta = (x.flatten(0, 1) for x in factors._explicit())
        expected = activation.T @ activation / (3 * max(1, factors.positions)), delta.T @ delta / 3
        for found, matrix in zip((A, D), expected, strict=True):
            found = found.diag_embed() if found.ndim == 1 else found
            torch.testing.assert_close(found, matrix, rtol=1e-11, atol=1e-11)
    A, D = embedding(3, 5, 4, 3).factors.kron_fisher()
    assert (A.shape, D.shape) == ((3, 3), (4,))


# --- random projections ----------------------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize(("rank", "O", "I"), [(1, 6, 5), (2, 6, 5), (4, 6, 5), (4, 3, 9), (4, 1, 9), (70, 90, 2)])
def test_random_projections_keep_inner_products_within_the_variance_stated(rank, O, I):
    pairs = [(product(1, T, O, I, seed=1).factors, product(1, T, O, I, seed=4).factors) for T in (1, 3)]
    pairs += [(G, G) for G, _ in pairs]
    r, s = (math.inf if rank >= n else rank for n in (O, I))
    for G, H in pairs:
        values = torch.cat([(G.project(rank, seed=k) * H.project(rank, seed=k)).sum((1, 2)) for k in range(300)])
        bound = (2 / r + 2 / s + 4 / (r * s)) * (G.sq_norm() * H.sq_norm()).item()
        assert (values.mean() - G.gram(H)).abs() <= 4 * math.sqrt(bound / 300) + 1e-9
        assert values.var() <= 1.2 * bound + 1e-9


def test_random_projections_are_the_same_for_ever():
    """Stored ones stay comparable: by three seeds, of one unit gradient, by more than 64 signs too."""
    factors = GradFactors(torch.eye(9)[4:5], torch.eye(300)[123:124])
    found = [(factors.project(2, seed=k) * 2).round().int().flatten().tolist() for k in (0, 2, 3)]
    assert found == [[-1, 1, 1, -1], [-1, -1, -1, -1], [1, -1, -1, 1]]
    wide = factors.project(130, seed=5)
    assert wide.shape == (1, 130, 9)
    assert (wide[0, :, 4] > 0).nonzero().flatten().tolist()[-5:] == [120, 125, 127, 128, 129]
    assert torch.equal(GradFactors.of(factors.materialize()).project(130, seed=5), wide)
    for seed in -1, 2**70:
        assert not torch.equal(factors.project(9, seed=seed), factors.project(9, seed=seed + 1))
    with pytest.raises(ValueError, match="rank: expected a positive integer"):
        factors.project(0)


def test_layers_are_projected_by_name():
    layers = LayerFactors({name: case(3).factors for name, case in CASES.items()})
    flat = torch.cat([CASES[name](3).gradients.reshape(3, -1) for name in sorted(CASES)], dim=1)
    torch.testing.assert_close(layers.project(1000) @ layers.project(1000).T, flat @ flat.T)
    some = LayerFactors({name: layers[name] for name in ("vector", "tied embedding")})
    assert some.project(2, seed=4).shape == (3, 4 + 2)
    whole = layers.project(2, seed=4)
    start = 0
    for name in sorted(layers):
        width = math.prod(layers[name].project(2).shape[1:])
        if name in some:
            alone = LayerFactors({name: layers[name]}).project(2, seed=4)
            torch.testing.assert_close(alone, whole[:, start : start + width])
        start += width
    assert start == whole.shape[1]
    matrices = {"vector": (random(5, 2), random(1, 1)), "tied embedding": (random(4, 2), random(3, 2))}
    found = some.project(matrices)
    expected = torch.cat([some[n].project(*matrices[n]).flatten(1) for n in ("tied embedding", "vector")], dim=1)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="matrices: expected the layers"):
        some.project({})


# --- several layers --------------------------------------------------------------------------------------------------


def test_layers_of_every_kind_together():
    layers = LayerFactors({name: case(3).factors for name, case in CASES.items()})
    flat = torch.cat([case(3).gradients.reshape(3, -1) for case in CASES.values()], dim=1)
    shapes = {name: case(3).gradients.shape[1:] for name, case in CASES.items()}
    R = {name: random(*shape) for name, shape in shapes.items()}
    reference_row = torch.cat([R[name].flatten() for name in layers])
    torch.testing.assert_close(layers.sq_norm(), flat.square().sum(1))
    torch.testing.assert_close(layers.norm(), flat.norm(dim=1))
    torch.testing.assert_close(layers.gram(), flat @ flat.T)
    torch.testing.assert_close(layers.dot(R), flat @ reference_row)
    torch.testing.assert_close(layers.cosine(R), torch.cosine_similarity(flat, reference_row[None]))
    clipped = layers.clipped_sum(1.5)
    assert {name: total.shape for name, total in clipped.items()} == shapes
    found = torch.cat([clipped[name].flatten() for name in layers])
    torch.testing.assert_close(found, ((1.5 / flat.norm(dim=1)).clamp_max(1)[:, None] * flat).sum(0))
    torch.testing.assert_close(layers.samples([2, 0]).norm(), layers.norm()[[2, 0]])
    torch.testing.assert_close(LayerFactors.cat([layers, layers.samples(0)]).norm(), layers.norm()[[0, 1, 2, 0]])
    grads = layers.materialize()
    assert all(torch.equal(grads[name], layers[name].materialize()) for name in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_many_layers_of_one_position(dtype):
    """Looked at together; one at a time where a number is out of range, or zero."""
    products = [product(4, 1, 3 + k, 5, seed=k).factors.to(dtype) for k in range(3)]
    layers = LayerFactors(
        {str(k): factors for k, factors in enumerate(products)}, bias=gradients(4, 6).factors.to(torch.float32)
    )
    for size in 1.0, 1e20, 0.0:
        layers["1"].activation[2] *= size
        layers["1"].delta[2] *= 1 / size if size else 1
        flat = torch.cat([factors.to(D64).materialize().flatten(1) for factors in layers.values()], dim=1)
        torch.testing.assert_close(layers.norm().double(), flat.norm(dim=1), rtol=1e-5, atol=0)
        torch.testing.assert_close(layers.sq_norm().double(), flat.square().sum(1), rtol=1e-5, atol=0)
    mixed = LayerFactors({**layers, "wide": product(4, 1, 2, 2).factors})
    assert mixed.norm().dtype == D64


def test_layers_norm_is_differentiable():
    cases = {name: case(2) for name, case in CASES.items()}
    inputs = [t.requires_grad_() for case in cases.values() for t in case.tensors if t.numel()]
    values = LayerFactors({name: case.factors for name, case in cases.items()}).norm()
    flat = torch.cat([case.gradients.reshape(2, -1) for case in cases.values()], dim=1)
    found, expected = (torch.autograd.grad(norm.sum(), inputs) for norm in (values, flat.norm(dim=1)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_coverage_is_kept_and_shown():
    coverage = Coverage(left_out={"frozen.weight": "does not require grad"})
    layers = LayerFactors({"a.weight": product(4, 1, 3, 2).factors}, coverage=coverage)
    assert repr(layers) == (
        "LayerFactors(\n  a.weight: GradFactors(B=4, O=3, I=2, T=1, dtype=torch.float64, device=cpu)\n"
        "  left out: frozen.weight: does not require grad\n)"
    )
    for same in (
        *(layers.to(torch.float32), layers.detach(), layers.samples(slice(2)), LayerFactors.cat([layers, layers])),
        *(layers.materialize(), layers.sum(), layers.mean(), layers.clipped_sum(1.0)),
    ):
        assert same.coverage is coverage
    assert repr(layers.materialize()) == (
        "LayerGrads(\n  a.weight: [4, 3, 2], torch.float64, cpu\n  left out: frozen.weight: does not require grad\n)"
    )
    layers.coverage = Coverage()
    assert "left out" not in repr(layers)
    assert repr(LayerFactors()) == "LayerFactors()"
    assert LayerGrads(a=torch.ones(2)).coverage == Coverage()
    assert layers.nbytes == layers["a.weight"].nbytes
    with pytest.raises(ValueError, match="at least one layer"):
        LayerFactors().norm()


# --- numbers whose squares leave the range of their type -------------------------------------------------------------

# Sizes of activations and deltas, with gradients of about 1e-30 to 1e30.
EXTREMES = [(1e20, 1e-20), (1e-20, 1e20), (1e25, 1e-25), (1e15, 1e-25), (1e-15, 1e-15), (1e18, 1e-20), (1e30, 1e-3)]
WIDE_EXTREMES = [(1e200, 1e-200), (1e-190, 1e190), (1e100, 1e-250), (1e-140, 1e-130), (1e250, 1e-20)]


def sizes_of(case: Case, activation: float, delta: float) -> list[float]:
    return [{"a": activation, "d": delta, "g": activation * delta}[role] for role in case.roles]


@pytest.mark.medium
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("recorded", [False, True])
def test_factors_of_extreme_sizes(dtype, recorded):
    """Norms, cosines and clipped sums have the digits of the type wherever the gradients are in its range."""
    kind = torch.float32 if dtype == torch.bfloat16 else dtype
    for (name, case), sizes in itertools.product(CASES.items(), WIDE_EXTREMES if dtype == D64 else EXTREMES):
        case, scale, where = case(3), sizes[0] * sizes[1], f"{name}, {sizes}"
        each = sizes_of(case, *sizes)
        tensors = [(t * size).to(dtype) for t, size in zip(case.tensors, each, strict=True)]
        factors = case.build(*(t.clone().requires_grad_(recorded) for t in tensors))
        if dtype == torch.bfloat16 and type(factors) is WrittenFactors and len(tensors) > 1:
            continue  # their sum is rounded
        exact = case.build(*(t.double() / size for t, size in zip(tensors, each, strict=True)))
        G = exact.materialize().flatten(1) if exact.materialize().ndim > 1 else exact.materialize()[:, None]
        tolerance = {"rtol": 1e-5 if kind == torch.float32 else 1e-12, "atol": 0, "msg": where}
        norms = (factors.norm() / scale).double()
        torch.testing.assert_close(norms, G.norm(dim=1), **tolerance)
        torch.testing.assert_close((factors.norm(1) / scale).double(), G.abs().sum(1), **tolerance)
        reference = random(*exact._form)
        cosine = torch.cosine_similarity(G, reference.reshape(1, -1))
        for size in (1.0, 1e-30, 1e30) if kind == torch.float32 else (1.0, 1e-250, 1e250):
            found = factors.cosine((reference * size).to(kind)).double()
            torch.testing.assert_close(found, cosine, rtol=0, atol=3e-6, msg=where)
        limit = 0.5 * scale * (G.norm(dim=1).mean().item() or 1.0)
        clipped = ((limit / scale / G.norm(dim=1).clamp_min(1e-300)).clamp_max(1)[:, None] * G).sum(0)
        found = (factors.clipped_sum(limit) / scale).flatten().double()
        torch.testing.assert_close(found, clipped, rtol=0, atol=1e-5 * clipped.abs().max().item() + 1e-30, msg=where)
        if 1e-10 < scale < 1e10:
            squares = (factors.sq_norm() / scale / scale).double()
            torch.testing.assert_close(squares, G.square().sum(1), **tolerance)
        layers = LayerFactors(a=factors, b=factors)
        torch.testing.assert_close((layers.norm() / scale).double(), 2**0.5 * G.norm(dim=1), **tolerance)
        pair = {"a": reference.to(kind), "b": reference.to(kind)}
        torch.testing.assert_close(layers.cosine(pair).double(), cosine, rtol=0, atol=3e-6, msg=where)


@pytest.mark.parametrize("T", [1, 3])
def test_products_of_extreme_factors(T):
    """What multiplies factors with factors: Gram matrices, Fisher diagonals and quadratic forms."""
    for a, d in (1e20, 1e-20), (1e-22, 1e22), (1e30, 1e-31):
        ordinary, other = product(3, T, 4, 3).factors, product(2, T, 4, 3, seed=7).factors
        factors, others = (GradFactors((f.activation * a).float(), (f.delta * d).float()) for f in (ordinary, other))
        scale, diag, A, D = a * d, random(4, 3).abs(), positive(3, 1), positive(4, 2)
        mixed = GradFactors(other.activation.float(), other.delta.float())
        for found, expected, power in (
            (factors.gram(), ordinary.gram(), 2),
            (factors.gram(others), ordinary.gram(other), 2),
            (factors.gram(mixed), ordinary.gram(other), 1),
            (mixed.gram(factors), other.gram(ordinary), 1),
            (factors.diag_fisher(), ordinary.diag_fisher(), 2),
            (factors.quadratic(diag), ordinary.quadratic(diag), 2),
            (factors.quadratic_kron(A, D), ordinary.quadratic_kron(A, D), 2),
        ):
            torch.testing.assert_close(found.double() / scale**power, expected, rtol=3e-5, atol=1e-5)


@pytest.mark.parametrize("T", [1, 3])
def test_samples_and_positions_of_different_sizes(T):
    """One sample in the range, one out of it, one zero; and positions that are each out of it in another way."""
    activation, delta = random(4, T, 3), random(4, T, 5)
    size = torch.tensor([1.0, 1e22, 1e-22, 0.0], dtype=D64)[:, None, None]
    factors = GradFactors((activation * size).float(), (delta / torch.where(size == 0, 1, size)).float())
    expected = GradFactors(activation, delta).norm() * (size.flatten() > 0)
    torch.testing.assert_close(factors.norm().double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(factors.sq_norm().double(), expected.square(), rtol=1e-5, atol=0)
    assert factors.cosine(random(5, 3).float())[3] == 0
    each = torch.tensor([1e22, 1.0, 1e-22], dtype=D64)[:T, None]
    factors = GradFactors((activation * each).float(), (delta / each).float())
    torch.testing.assert_close(factors.norm().double(), GradFactors(activation, delta).norm(), rtol=1e-5, atol=0)


def test_cosines_of_tiny_gradients():
    for size in (1e-4, 1e-12, 1e-18):
        factors = GradFactors(torch.full((2, 5), size), torch.full((2, 3), size))
        torch.testing.assert_close(factors.cosine(factors.materialize()[0]), torch.ones(2))
        torch.testing.assert_close(factors.cosine(-factors.materialize()), -torch.ones(2, 2))
        layers = LayerFactors(a=factors, b=GradFactors.of(torch.full((2, 3), size * size)))
        torch.testing.assert_close(
            layers.cosine({name: f.materialize()[0] for name, f in layers.items()}), torch.ones(2)
        )


def test_what_is_not_finite_stays_so():
    for T in 1, 3:
        activation, delta = random(4, T, 3).float(), random(4, T, 5).float()
        activation[1, 0, 0], activation[2, 0, 1], delta[3, 0, 0] = math.nan, math.inf, 1e38
        activation[3] *= 1e30
        factors = GradFactors(activation, delta)
        exact = GradFactors(activation[:1].double(), delta[:1].double()).norm()
        for found in factors.norm(), LayerFactors(a=factors, b=GradFactors.of(torch.zeros(4, 2))).norm():
            torch.testing.assert_close(found[:1].double(), exact, rtol=1e-5, atol=0)
            assert not found[1:].isfinite().any()


def test_derivatives_of_norms_of_extreme_factors():
    for T in 1, 3:
        ordinary = product(3, T, 4, 3)
        inputs = [t.requires_grad_() for t in ordinary.tensors]
        expected = torch.autograd.grad(ordinary.factors.norm().sum(), inputs)
        leaves = [
            (t * s).float().detach().requires_grad_() for t, s in zip(ordinary.tensors, (1e20, 1e-20), strict=True)
        ]
        found = torch.autograd.grad(GradFactors(*leaves).norm().sum(), leaves)
        for one, size, other in zip(found, (1e20, 1e-20), expected, strict=True):
            torch.testing.assert_close(one.double() * size, other, rtol=1e-4, atol=1e-5)
