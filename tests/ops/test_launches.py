"""How many kernels a call launches on a GPU, counted on tensors without memory: torch runs there the same operators."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradext import GradFactors, LayerFactors
from gradext.backends import reference

VIEWS = {"view", "_unsafe_view", "expand", "unsqueeze", "squeeze", "transpose", "t", "permute", "slice", "split"}
VIEWS |= {"alias", "detach", "as_strided", "unfold", "select", "_reshape_alias", "new_empty", "empty", "empty_strided"}
VIEWS |= {"split_with_sizes", "promote_types"}


class Launches(TorchDispatchMode):
    """The names of all operators that run, but those that only look at memory otherwise or get some."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def made(*shapes, dtype):
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]


def call(name, T, dtype, B=256, O=784, I=400):
    shapes = [(B, O), (B, I)] if T is None else [(B, T, O), (B, T, I)]
    delta, activation, weight, diag, left, right = made(*shapes, (8, O, I), (O, I), (O, 16), (I, 16), dtype=dtype)
    out = torch.empty(B, O, I, dtype=dtype, device="meta")
    operands = {"outer": (out,), "linear": (weight,), "dot": (diag,), "quadratic": (diag,), "square_sum": ()}
    operands |= {"weighted_sum": (diag[0, :1].expand(B).float(),), "project": (left, right), "sq_norm": ()}
    operands["gram"] = (delta, activation)
    with Launches() as launches:
        getattr(reference, name)(delta, activation, *operands[name])
    return launches.names


NAMES = ("outer", "linear", "dot", "quadratic", "square_sum", "weighted_sum", "project", "sq_norm", "gram")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [None, 4, 64])
@pytest.mark.parametrize("name", NAMES)
def test_few_launches(name, T, dtype):
    """Of 256 gradients of 784 x 400 numbers, 320 MB in fp32, whatever else takes part."""
    assert len(call(name, T, dtype)) <= 8, call(name, T, dtype)


@pytest.mark.parametrize("name", ["quadratic", "square_sum", "weighted_sum", "project"])
def test_half_precision_is_not_widened(name):
    """Its products are of its own type and summed in fp32: no factor [B, T, ...] is converted before."""
    names = call(name, 64, torch.bfloat16)
    converted = names.count("_to_copy")
    assert converted <= (2 if name == "weighted_sum" else 1), names  # the delta that weights multiply; the diagonal


def test_the_counter_counts():
    """Views are none, all else is one each."""
    x = torch.empty(4, 3, device="meta")
    with Launches() as launches:
        (x.mT @ x).square_().sum(0)
    assert [name.replace("pow", "square") for name in launches.names] == ["mm", "square_", "sum"]


# --- factors of several layers ---------------------------------------------------------------------------------------


@pytest.fixture
def unnoticed(monkeypatch):
    """The counter looks on without being noticed: else differentiable forms would take the place of the fast ones."""
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def layers(dtype, B=64):
    """Weights and biases of six linear layers, two of them of 16 positions."""
    found = LayerFactors()
    for k, (T, O, I) in enumerate([(None, 784, 400), (None, 400, 20), (16, 512, 512)] * 2):
        leading = (B,) if T is None else (B, T)
        delta, activation, bias = made((*leading, O), (*leading, I), (B, O), dtype=dtype)
        found[f"{k}.weight"], found[f"{k}.bias"] = GradFactors(activation, delta), GradFactors.of(bias)
    return found


@pytest.mark.usefixtures("unnoticed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_of_all_layers(dtype, monkeypatch):
    """Norms are one call of the operator for all weights, and clipped sums one each; all biases go together."""
    calls = []

    def sq_norm_group(pairs):
        calls.append(len(pairs))
        return made((len(pairs), 64), dtype=torch.float32)[0]

    def weighted_sum(delta, activation, weights):
        calls.append("sum")
        return made((delta.shape[-1], activation.shape[-1]), dtype=torch.float32)[0]

    monkeypatch.setattr(reference, "sq_norm_group", sq_norm_group, raising=False)
    monkeypatch.setattr(reference, "weighted_sum", weighted_sum)
    factors = layers(dtype)
    with Launches() as launches:
        assert factors.norm().shape == (64,)
    assert calls == [6]
    assert len(launches.names) <= 8, launches.names
    with Launches() as launches:
        sums = factors.clipped_sum(1.0)
    assert calls == [6, 6, *["sum"] * 6]
    assert len(launches.names) <= 8 + 4 + 3, launches.names
    for name, each in factors.items():
        assert sums[name].shape == each.shape[1 : 3 if "weight" in name else 2]


@pytest.mark.usefixtures("unnoticed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sum", "project", "diag_fisher", "quadratic", "kron_fisher"])
def test_factors_of_a_layer(name, dtype):
    """In half precision no factor [B, T, ...] is converted, but a delta that weights multiply in plain torch."""
    factors = layers(dtype)["2.weight"]
    B, O, I = factors.shape
    diag, left, right, weights = made((O, I), (O, 16), (I, 16), (B,), dtype=torch.float32)
    arguments = {"sum": (weights,), "project": (left, right), "quadratic": (diag,)}
    with Launches() as launches:
        getattr(factors, name)(*arguments.get(name, ()))
    assert len(launches.names) <= 8, launches.names
    assert launches.names.count("_to_copy") <= {"sum": 2, "project": 2}.get(name, 0), launches.names
