"""`iter_layer_grads`: chunks within a memory budget, in order, with targets and reductions."""

from collections import UserDict

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradext

from .common import squared


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10)).double()


class Largest(TorchDispatchMode):
    """The size in bytes of the largest tensor that any operation returned."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.nbytes = max(self.nbytes, value.nbytes)
        return result


def test_any_cut_gives_the_gradients_of_the_whole():
    model, data = network(), torch.rand(57, 20, dtype=torch.float64)
    expected = gradext.batch_layer_grads(model, data, loss=squared)
    one = sum(p.numel() for p in model.parameters()) * 8
    for cut in (57,), (1, 56), (20, 0, 20, 17):
        chunks = gradext.iter_layer_grads(model, data.split(cut), loss=squared, memory_budget=9 * one)
        found = [{name: value.clone() for name, value in chunk.items()} for chunk in chunks]
        assert len(found) > 4
        for name, value in expected.items():
            torch.testing.assert_close(torch.cat([chunk[name] for chunk in found]), value, rtol=1e-12, atol=1e-14)


def test_targets_and_reduced_factors():
    model, data = network(), torch.rand(50, 20, dtype=torch.float64)
    target = torch.rand(50, 10, dtype=torch.float64)
    expected = gradext.batch_layer_factors(model, data, loss="mse", target=target).norm()
    pairs = zip(data.split(30), target.split(30), strict=True)
    norms = gradext.iter_layer_grads(
        model, pairs, paired=True, loss="mse", memory_budget=20_000, reduce=lambda factors: factors.norm()
    )
    norms = list(norms)
    assert len(norms) > 2
    torch.testing.assert_close(torch.cat(norms), expected)


def test_named_inputs():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 4)

        def forward(self, x, scale):
            return self.a(x) * scale

    model, x, scale = Named(), torch.rand(40, 5), torch.rand(40, 1)
    expected = gradext.batch_layer_grads(model, {"scale": scale, "x": x}, loss=squared)["a.weight"]
    for batch in {"scale": scale, "x": x}, UserDict(scale=scale, x=x):  # a tokenizer's output is of the latter type
        for cut in ["x", "scale"], None:  # of several inputs each is taken whole, unless it is said which are cut
            chunks = gradext.iter_layer_grads(model, [batch], loss=squared, memory_budget=3000, cut=cut)
            found = [chunk["a.weight"].clone() for chunk in chunks]
            assert (len(found) > 1) == (cut is not None)
            torch.testing.assert_close(torch.cat(found), expected)


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 5)

    def forward(self, x, shift):
        return self.a(x + shift[: x.shape[1]].mean(0))


def test_what_happens_to_have_as_many_rows_is_not_cut():
    """Constants for all samples, of as many rows as there are samples."""
    model, x, shift = Shifted(), torch.rand(40, 40, 5), torch.rand(40, 5)
    expected = gradext.batch_layer_grads(model, (x, shift), loss=squared)["a.weight"]
    chunks = gradext.iter_layer_grads(model, [(x, shift)], loss=squared, memory_budget=40_000, cut=[0])
    found = [chunk["a.weight"].clone() for chunk in chunks]
    assert len(found) > 1
    torch.testing.assert_close(torch.cat(found), expected)


@pytest.mark.parametrize(
    ("cut", "message"),
    [(["y"], "'y'"), ([1], "as many samples"), ([7], "7"), (["target"], "'target'")],
)
def test_wrong_cuts_are_refused(cut, message):
    batch = (torch.rand(4, 3, 5), torch.rand(3, 5), 2.0)
    with pytest.raises(ValueError, match=f"cut: expected.*{message}"):
        list(gradext.iter_layer_grads(Shifted(), [batch], loss=squared, cut=[0, *cut]))


@pytest.mark.parametrize("reduce", [None, lambda factors: factors.norm()])
def test_no_tensor_is_larger_than_the_budget_whatever_the_batch(reduce):
    model, budget = network(), 200_000
    for size in 100, 4000:
        data = [torch.rand(size, 20, dtype=torch.float64)]
        with Largest() as largest:
            for _ in gradext.iter_layer_grads(model, data, loss=squared, memory_budget=budget, reduce=reduce):
                pass
        assert 0 < largest.nbytes <= budget


def test_memory_is_reused_between_chunks():
    model, data = network(), torch.rand(64, 20, dtype=torch.float64)
    chunks = gradext.iter_layer_grads(model, [data], loss=squared, memory_budget=200_000)
    pointers = {chunk["0.weight"].data_ptr() for chunk in chunks}
    assert len(pointers) == 1


def test_biases_of_layers_that_are_added_up():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(20, 3), nn.Linear(20, 3)

        def forward(self, x):
            return self.a(x) + self.b(x)

    model, data = Sum(), torch.rand(20, 20)
    for loss in squared, lambda output, target: output.sum(1):
        chunks = list(gradext.iter_layer_grads(model, data.split(5), loss=loss))
        assert [chunk["b.bias"].shape for chunk in chunks] == [(5, 3)] * 4
        grads = gradext.batch_layer_grads(model, data, loss=loss)
        torch.testing.assert_close(grads["a.bias"], grads["b.bias"], rtol=0, atol=0)
        before = grads["b.bias"].clone()
        grads["a.bias"][0] += 1  # each result may be written to
        torch.testing.assert_close(grads["b.bias"], before, rtol=0, atol=0)
        torch.testing.assert_close(grads["a.bias"][1:], before[1:], rtol=0, atol=0)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="target: expected one for each batch; pass paired=True"):
        next(gradext.iter_layer_grads(network(), [torch.rand(4, 20)], target=torch.rand(4, 10)))
    model, data = network(), [torch.rand(4, 20, dtype=torch.float64)]
    with pytest.raises(ValueError, match=r"memory_budget: one sample needs about [\d,]+ bytes, more than.* 1,000;"):
        list(gradext.iter_layer_grads(model, data, loss=squared, memory_budget=1000))
    with pytest.raises(ValueError, match="out: iter_layer_grads keeps no graph"):
        list(gradext.iter_layer_grads(model, data, out={"a": torch.zeros(1)}))


@pytest.mark.parametrize("batch", [3, None, "text", torch.tensor(1.0), {"a": 1}])
def test_batches_without_a_tensor_are_refused(batch):
    with pytest.raises((TypeError, ValueError), match=r"expected (a tensor|names or positions of inputs)"):
        list(gradext.iter_layer_grads(network(), [batch], loss=squared))


def test_progress_is_shown_when_asked_for(capsys):
    model, data = network(), torch.rand(30, 20, dtype=torch.float64).split(10)
    list(gradext.iter_layer_grads(model, data, loss=squared))
    assert capsys.readouterr().err == ""
    list(gradext.iter_layer_grads(model, data, loss=squared, progress=True))
    assert "30 samples" in capsys.readouterr().err
