"""Libraries for per-sample gradients in ordinary situations, against a backward of each sample alone.

gradext is tested by default; the peers where they are installed, by ``pytest -m peers tests/test_peers.py``, which
prints the table at the end and writes it with ``--peers-table FILE``.
"""

from __future__ import annotations

import contextlib
import importlib.metadata

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradext

B = 4


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output.flatten(1) + 0.1).square().sum(1)


# --- the situations --------------------------------------------------------------------------------------------------


class Lambda(nn.Module):
    """Layers by name, and a forward over them."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def shared_parameter() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model


def in_autocast(model: nn.Module) -> nn.Module:
    def forward(m, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.layers(x)

    return Lambda(forward, layers=model)


def perceptron(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), activation, nn.Linear(5, 4))


SITUATIONS = {
    "`model.eval()`": (lambda: perceptron(nn.ReLU()).eval(), (6,)),
    "`model.train()`": (lambda: perceptron(nn.ReLU()), (6,)),
    "in-place ReLU after a Linear": (lambda: perceptron(nn.ReLU(inplace=True)), (6,)),
    "input `(B, T, D)`": (lambda: perceptron(nn.Tanh()), (3, 6)),
    "input `(B, T1, T2, D)`": (lambda: perceptron(nn.Tanh()), (3, 2, 6)),
    "a layer called twice": (lambda: Lambda(lambda m, x: m.a(torch.tanh(m.a(x))), a=nn.Linear(6, 6)), (6,)),
    "two modules sharing one Parameter": (shared_parameter, (6,)),
    "weight used again through `F.linear`": (
        lambda: Lambda(lambda m, x: F.linear(torch.tanh(m.a(x)), m.a.weight), a=nn.Linear(6, 6)),
        (6,),
    ),
    "layer input passed by keyword": (lambda: Lambda(lambda m, x: m.a(input=x), a=nn.Linear(6, 5)), (6,)),
    "BatchNorm in eval mode": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).eval(),
        (6,),
    ),
    "bf16 autocast": (lambda: in_autocast(perceptron(nn.ReLU())), (6,)),
    "`MultiheadAttention`": (
        lambda: Lambda(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(6, 2, batch_first=True)),
        (5, 6),
    ),
    "`Conv2d` with groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
    "`Embedding`, tied to the output": (
        lambda: Lambda(lambda m, i: F.linear(m.a(i), m.a.weight), a=nn.Embedding(7, 5)),
        None,
    ),
}


def make(situation: str) -> tuple[nn.Module, Tensor, float]:
    """The model, its input, and how close a right result comes to the oracle."""
    torch.manual_seed(0)
    build, shape = SITUATIONS[situation]
    model = build()
    x = torch.randint(0, 7, (B, 3)) if shape is None else torch.randn(B, *shape)
    return model, x, 3e-2 if situation == "bf16 autocast" else 1e-4


# --- the libraries ---------------------------------------------------------------------------------------------------


def with_gradext(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return gradext.batch_layer_grads(model, x, loss=squared)


def with_torch_func(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def value(parameters, x):
        return squared(torch.func.functional_call(model, parameters, (x.unsqueeze(0),)), x).sum()

    return torch.func.vmap(torch.func.grad(value), (None, 0))(parameters, x)


def with_opacus(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    from opacus import GradSampleModule

    wrapped = GradSampleModule(model, loss_reduction="sum")
    squared(wrapped(x), x).sum().backward()
    return {name: parameter.grad_sample for name, parameter in model.named_parameters()}


def with_backpack(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model = extend(model)
    with backpack(BatchGrad()):
        squared(model(x), x).sum().backward()
    return {name: parameter.grad_batch for name, parameter in model.named_parameters()}


def with_asdl(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    from asdl.gradient import save_batch_gradient

    save_batch_gradient(model, lambda: squared(model(x), x).sum().backward())
    return {name: parameter.batch_grad for name, parameter in model.named_parameters()}


def with_nngeometry(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    from nngeometry import Jacobian
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object.vector import PVector

    layers = LayerCollection.from_model(model)
    jacobian = Jacobian(model, (x, x), lambda x, target: squared(model(x), x).unsqueeze(1), layer_collection=layers)
    samples = [PVector(layers, vector_repr=row).to_dict() for row in jacobian.to_torch()[0]]
    found = {}
    for layer in layers.layers:
        for k, name in enumerate(["weight", "bias"][: len(samples[0][layer])]):
            found[f"{layer}.{name}" if layer else name] = torch.stack([sample[layer][k] for sample in samples])
    return found


# Name in the table -> (its distribution, the function).
LIBRARIES = {
    "gradext": ("gradext", with_gradext),
    "torch.func": ("torch", with_torch_func),
    "Opacus": ("opacus", with_opacus),
    "BackPACK": ("backpack-for-pytorch", with_backpack),
    "ASDL": ("asdfghjkl", with_asdl),
    "nngeometry": ("nngeometry", with_nngeometry),
}


def outcome(library: str, situation: str, loop) -> str:
    """right; wrong (other numbers, or another shape, without a word); or error, where the library gives no result."""
    model, x, tolerance = make(situation)
    expected = loop(model, x, x, squared)
    try:
        found = LIBRARIES[library][1](model, x)
    except Exception:  # whatever a library raises
        return "error"
    if not set(expected) <= set(found) or any(found[name] is None for name in expected):
        return "error"
    if any(found[name].shape != value.shape for name, value in expected.items()):
        return "wrong shape"
    close = all((found[name] - value).abs().max() <= tolerance * value.abs().max() for name, value in expected.items())
    return "right" if close else "**wrong**"


@pytest.mark.parametrize("situation", SITUATIONS)
def test_gradext_is_right(situation, loop):
    assert outcome("gradext", situation, loop) == "right"


# --- the table -------------------------------------------------------------------------------------------------------

R, E, S, W = "right", "error", "wrong shape", "**wrong**"
# What benchmarks/results/peers.md says, in the order of LIBRARIES.
CLAIMED = {
    "`model.eval()`": (R, R, E, R, R, R),
    "`model.train()`": (R, R, R, R, R, R),
    "in-place ReLU after a Linear": (R, R, E, E, R, R),
    "input `(B, T, D)`": (R, R, R, R, S, E),
    "input `(B, T1, T2, D)`": (R, R, R, R, S, E),
    "a layer called twice": (R, R, R, E, W, W),
    "two modules sharing one Parameter": (R, R, R, W, R, W),
    "weight used again through `F.linear`": (R, R, W, W, W, W),
    "layer input passed by keyword": (R, R, E, E, E, E),
    "BatchNorm in eval mode": (R, R, E, R, R, R),
    "bf16 autocast": (R, R, R, R, E, E),
    "`MultiheadAttention`": (R, R, E, E, E, E),
    "`Conv2d` with groups": (R, R, R, R, S, S),
    "`Embedding`, tied to the output": (R, R, W, W, S, E),
}


@pytest.mark.peers
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.filterwarnings("ignore")
def test_the_table_says_what_libraries_do(library, loop, peers_table):
    distribution, _ = LIBRARIES[library]
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed")
    with contextlib.redirect_stdout(None):
        found = {situation: outcome(library, situation, loop) for situation in SITUATIONS}
    peers_table[f"{library} {version}"] = found
    place = list(LIBRARIES).index(library)
    assert found == {situation: claims[place] for situation, claims in CLAIMED.items()}
