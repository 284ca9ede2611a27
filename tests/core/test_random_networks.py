"""Random networks from hypothesis, in double precision against autograd one sample at a time.

A network is a list of steps, each of which makes a value [B, T, D] (or [B, D]) of the ones before it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradext

from .common import Product

pytestmark = pytest.mark.medium

VOCABULARY = 5
ACTIVATIONS = {
    "relu": (F.relu, torch.relu_),
    "tanh": (torch.tanh, torch.tanh_),
    "sigmoid": (torch.sigmoid, torch.sigmoid_),
    "elu": (F.elu, F.elu_),
    "gelu": (F.gelu, None),
    "softplus": (F.softplus, None),
}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding: str | None = None  # the layer by which whole numbers become the first value
        self.steps: list[tuple[str, Callable]] = []  # (what it says, (network, values) -> the next value)

    def __repr__(self) -> str:
        return "Network(" + "; ".join([self.embedding or "input", *(text for text, _ in self.steps)]) + ")"

    def use(self, name: str) -> nn.Module:
        return self.get_submodule(name)

    def forward(self, x: Tensor) -> Tensor:
        values = [x if self.embedding is None else self.use(self.embedding)(x)]
        for _, step in self.steps:
            values.append(step(self, values))
        return values[-1]


# Ways to hand x [B, ..., D] to a layer that maps its last dimension.
ROUTES: dict[str, Callable[[Callable, Tensor], Tensor]] = {
    "plainly": lambda layer, x: layer(x),
    "rows flattened": lambda layer, x: layer(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1]),
    "time-major": lambda layer, x: layer(x.transpose(0, 1)).transpose(0, 1),
    "time-major, flattened": lambda layer, x: (
        layer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)
    ),
    "position by position": lambda layer, x: torch.stack([layer(x[:, t]) for t in range(x.shape[1])], dim=1),
    "twice": lambda layer, x: layer(x) + layer(x.flip(-1)),
}
# Ways to multiply by the weight of a linear layer, by its module or around it.
PRODUCTS: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "module": lambda layer, x: layer(x),
    "F.linear": lambda layer, x: F.linear(x, layer.weight, bias=layer.bias),
    "weight alone": lambda layer, x: F.linear(x, weight=layer.weight),
    "matmul": lambda layer, x: torch.matmul(x, layer.weight.T) + layer.weight.new_zeros(1),
    "addmm": lambda layer, x: torch.addmm(
        x.new_zeros(layer.out_features), x.reshape(-1, x.shape[-1]), layer.weight.t()
    ).unflatten(0, x.shape[:-1]),
    "in two parts": lambda layer, x: torch.cat(
        [F.linear(x, part) for part in layer.weight.split((layer.out_features + 1) // 2)], dim=-1
    ),
}


class Example(NamedTuple):
    network: Network
    x: Tensor
    target: Tensor
    loss: str | Callable
    oracle: Callable  # the same loss, written plainly
    layers: list[str] | None
    way: str
    grad_mode: Callable

    def __repr__(self) -> str:
        what = {name: value for name, value in self._asdict().items() if name not in ("x", "target", "oracle")}
        return f"x {tuple(self.x.shape)}, {what}"


class _Builder:
    """Draws a network step by step."""

    def __init__(self, draw, batch: int, positions: int | None) -> None:
        self.draw, self.batch, self.positions = draw, batch, positions
        self.network = Network()
        self.widths: list[int] = []  # of the values
        self.linear: dict[str, nn.Linear] = {}
        self.fresh = False  # whether the last value may be overwritten: no other step has seen it, nor autograd kept it

    def one_of(self, options):
        return self.draw(st.sampled_from(list(options)))

    def step(self, text: str, width: int, function: Callable, fresh: bool = False) -> None:
        self.network.steps.append((text, function))
        self.widths.append(width)
        self.fresh = fresh

    def layer(self, module: nn.Module) -> str:
        name = f"layer{len(self.network._modules)}"
        self.network.add_module(name, module)
        return name

    def route(self) -> str:
        return self.one_of(ROUTES) if self.positions else self.one_of(["plainly", "twice"])

    # --- the steps ---------------------------------------------------------------------------------------------------

    def new_linear(self) -> None:
        width = self.draw(st.integers(1, 6))
        name = self.layer(nn.Linear(self.widths[-1], width, bias=self.draw(st.booleans())))
        self.linear[name] = self.network.get_submodule(name)
        self._linear(name, "module", self.route())

    def old_linear(self) -> None:
        names = [name for name, layer in self.linear.items() if layer.in_features == self.widths[-1]]
        if names:
            self._linear(self.one_of(names), self.one_of(PRODUCTS), self.route())

    def _linear(self, name: str, product: str, route: str) -> None:
        def step(network, values):
            return ROUTES[route](lambda x: PRODUCTS[product](network.use(name), x), values[-1])

        fresh = route == "plainly" and product in ("module", "F.linear", "weight alone")
        self.step(f"{name} as {product}, {route}", self.linear[name].out_features, step, fresh)

    def transposed_linear(self) -> None:
        names = [name for name, layer in self.linear.items() if layer.out_features == self.widths[-1]]
        if names:
            name, route = self.one_of(names), self.route()

            def step(network, values):
                return ROUTES[route](lambda x: F.linear(x, network.use(name).weight.t()), values[-1])

            self.step(f"{name} transposed, {route}", self.linear[name].in_features, step)

    def without_gradients(self) -> None:
        names = [name for name, layer in self.linear.items() if layer.in_features == self.widths[-1]]
        if names:
            name = self.one_of(names)

            def step(network, values):
                with torch.no_grad():
                    gate = network.use(name)(values[-1]).mean(-1, keepdim=True)
                return values[-1] * gate

            self.step(f"gated by {name} without gradients", self.widths[-1], step)

    def ignored(self) -> None:
        name = self.layer(nn.Linear(self.widths[-1], 2))

        def step(network, values):
            network.use(name)(values[-1])
            return values[-1] * 1

        self.step(f"{name} ignored", self.widths[-1], step)

    def norm(self) -> None:
        if self.widths[-1] < 3:  # one number or two become the same whatever they are, with gradients of rounding noise
            return
        width, kind = self.widths[-1], self.one_of([nn.LayerNorm, nn.RMSNorm])
        name, route = self.layer(kind(width)), self.route()
        self.step(
            f"{kind.__name__} {name}, {route}",
            width,
            lambda network, values: ROUTES[route](lambda x: network.use(name)(x), values[-1]),
        )

    def channels(self) -> None:
        """Layers over [B, D, T]."""
        if not self.positions:
            return
        width, new = self.widths[-1], self.draw(st.integers(1, 3))
        groups = 2 if width % 2 == 0 and self.draw(st.booleans()) else 1
        kind, (out, make) = self.one_of(
            {
                "Conv1d": (groups * new, lambda: nn.Conv1d(width, groups * new, 3, padding=1, groups=groups)),
                "Conv1d dilated": (new, lambda: nn.Conv1d(width, new, 2, padding="same", dilation=2, bias=False)),
                "ConvTranspose1d": (
                    groups * new,
                    lambda: nn.ConvTranspose1d(width, groups * new, 3, padding=1, groups=groups),
                ),
                "GroupNorm": (width, lambda: nn.GroupNorm(groups, width)),
                "InstanceNorm1d": (width, lambda: nn.InstanceNorm1d(width, affine=True)),
                "BatchNorm1d": (width, lambda: nn.BatchNorm1d(width).eval()),
            }.items()
        )
        if {"GroupNorm": self.positions * width // groups, "InstanceNorm1d": self.positions}.get(kind, 3) < 3:
            return  # as in `norm`
        name = self.layer(make())
        self.step(
            f"{kind} {name}",
            out,
            lambda network, values: network.use(name)(values[-1].transpose(1, 2)).transpose(1, 2),
        )

    def image(self) -> None:
        """A convolution over [B, 1, T, D]."""
        if self.positions:
            name = self.layer(nn.Conv2d(1, 2, 3, padding=1))
            self.step(
                f"Conv2d {name}",
                self.widths[-1],
                lambda network, values: network.use(name)(values[-1].unsqueeze(1)).mean(1),
            )

    def attention(self) -> None:
        width = self.widths[-1]
        if self.positions and width % 2 == 0:
            batch_first = self.draw(st.booleans())
            name = self.layer(nn.MultiheadAttention(width, 2, batch_first=batch_first, bias=self.draw(st.booleans())))

            def step(network, values):
                layer, x = network.use(name), values[-1] if batch_first else values[-1].transpose(0, 1)
                y = layer(x, x, x.tanh())[0]
                return y if batch_first else y.transpose(0, 1)

            self.step(f"MultiheadAttention {name}, {batch_first=}", width, step)

    def bare(self) -> None:
        """A parameter of the network's own, for all samples."""
        width, same = self.widths[-1], ("shift", "scale", "gain", "offset of one number")
        kinds = [*same, *(["positions", "token", "prompt"] if self.positions else [])]
        kind = self.one_of(kinds)
        name = f"bare{len(self.network._parameters)}"
        shape = {"gain": (), "offset of one number": (1,), "positions": (self.positions or 1, width)}.get(
            kind, (width,)
        )
        self.network.register_parameter(name, nn.Parameter(torch.randn(shape).double()))

        def step(network, values):
            p, x = getattr(network, name), values[-1]
            if kind in ("scale", "gain"):
                return x * (1 + p)
            if kind == "token":  # in front of the others, and mixed with them
                x = torch.cat([p.expand(len(x), 1, -1), x], dim=1)
                return x.cumsum(1)[:, 1:]
            if kind == "prompt":
                return x + (x @ p)[..., None] * p
            return x + p

        self.step(f"bare {kind}", width, step)

    def product(self) -> None:
        """A weight of the network's own, by einsum, from the left, or low in rank."""
        width = self.widths[-1]
        new = self.draw(st.integers(1, 4))
        kinds = ["einsum", "low rank", *(["between positions", "for each position"] if self.positions else ["left"])]
        kind = self.one_of(kinds)
        name, positions = f"own{len(self.network._parameters)}", self.positions or 1
        shapes = {"between positions": (positions, positions), "for each position": (positions, width, new)}
        out = width if kind == "between positions" else new
        shape = shapes.get(kind, (new, width))
        self.network.register_parameter(name, nn.Parameter(torch.randn(shape).double()))
        if kind == "low rank":
            down = nn.Parameter(torch.randn(new, 2).double())
            self.network.register_parameter(f"{name}_down", down)

        def step(network, values):
            p, x = getattr(network, name), values[-1]
            if kind == "einsum":
                return torch.einsum("...i,oi->...o", x, p)
            if kind == "low rank":
                down = getattr(network, f"{name}_down")
                return F.linear(x, p + down @ (down.t() @ p))
            if kind == "between positions":
                return p @ x
            if kind == "for each position":
                return torch.einsum("bti,tio->bto", x, p)
            return (p @ x.t()).t()

        self.step(f"own weight, {kind}", out, step)

    def exchanged(self) -> None:
        """Samples, or positions of all samples, in another order and back."""
        kind = self.one_of(["reversed", "sorted", "rows"] if self.positions else ["reversed", "sorted"])
        name = self.layer(nn.Linear(self.widths[-1], self.widths[-1]))

        def step(network, values):
            layer, x = network.use(name), values[-1]
            if kind == "reversed":
                return layer(x.flip(0)).tanh().flip(0)
            rows = x.flatten(0, 1) if kind == "rows" else x
            order = rows.detach().flatten(1).sum(1).argsort()
            return layer(rows[order]).tanh()[order.argsort()].view_as(x)

        self.step(f"{name}, {kind}", self.widths[-1], step)

    def unseen(self) -> None:
        names = [name for name, layer in self.linear.items() if layer.in_features == self.widths[-1]]
        if names:
            name = self.one_of(names)

            def step(network, values):
                return Product.apply(values[-1], network.use(name).weight.t())

            self.step(f"{name} in a function of its own", self.linear[name].out_features, step)

    def recurrent(self) -> None:
        if self.positions:
            kind, width = self.one_of([nn.LSTM, nn.GRU, nn.RNN]), self.draw(st.integers(1, 3))
            batch_first = self.draw(st.booleans())
            name = self.layer(kind(self.widths[-1], width, batch_first=batch_first))

            def step(network, values):
                x = values[-1] if batch_first else values[-1].transpose(0, 1)
                y = network.use(name)(x)[0]
                return y if batch_first else y.transpose(0, 1)

            self.step(f"{kind.__name__} {name}, {batch_first=}", width, step)

    def activation(self) -> None:
        name = self.one_of(ACTIVATIONS)
        new, in_place = ACTIVATIONS[name]
        overwrite = in_place is not None and self.fresh and self.draw(st.booleans())
        function = in_place if overwrite else new
        text = name + (" in place" if overwrite else "")
        self.step(text, self.widths[-1], lambda network, values: function(values[-1]))

    def residual(self) -> None:
        same = [k for k, width in enumerate(self.widths) if width == self.widths[-1]]
        k = self.one_of(same)
        self.step(f"sum with value {k}", self.widths[-1], lambda network, values: values[-1] + values[k])

    def concatenation(self) -> None:
        k = self.draw(st.integers(0, len(self.widths) - 1))
        if self.widths[k] + self.widths[-1] <= 8:
            self.step(
                f"beside value {k}",
                self.widths[k] + self.widths[-1],
                lambda network, values: torch.cat([values[k], values[-1]], dim=-1),
            )


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output.flatten(1) + 0.1).pow(3).sum(1)


ORACLES = {
    "mse": lambda output, target: (output - target).square().flatten(1).sum(1),
    "bce": lambda output, target: F.binary_cross_entropy(output, target, reduction="none").flatten(1).sum(1),
    "bce_logits": lambda output, target: (
        (torch.logaddexp(output, torch.zeros_like(output)) - target * output).flatten(1).sum(1)
    ),
    "cross_entropy": lambda output, target: -output.log_softmax(1)[torch.arange(len(output)), target],
}


@st.composite
def examples(draw) -> Example:
    torch.manual_seed(draw(st.integers(0, 1 << 16)))
    batch = draw(st.integers(1, 5))
    positions = draw(st.none() | st.integers(1, 5) | st.just(batch))
    inner = () if positions is None else (positions,)
    builder = _Builder(draw, batch, positions)
    width = draw(st.integers(1, 4))
    builder.widths.append(width)
    if draw(st.booleans()):
        x = torch.randint(0, VOCABULARY, (batch, *inner))
        padding = draw(st.none() | st.integers(0, VOCABULARY - 1))
        builder.network.embedding = builder.layer(nn.Embedding(VOCABULARY, width, padding_idx=padding))
    else:
        x = torch.randn(batch, *inner, width).double()
    builder.new_linear()
    steps = [
        *(builder.new_linear, builder.old_linear, builder.transposed_linear, builder.without_gradients),
        *(builder.ignored, builder.norm, builder.channels, builder.image, builder.attention, builder.activation),
        *(builder.residual, builder.concatenation, builder.bare, builder.product, builder.exchanged, builder.unseen),
        builder.recurrent,
    ]
    for step in draw(st.lists(st.sampled_from(steps), max_size=8)):
        step()
    loss = draw(st.sampled_from(["callable", *ORACLES, "auto"]))
    if loss in ("bce", "auto"):
        # Bounded, as the oracle's logarithms lose digits where a sigmoid saturates.
        builder.step("sigmoid of tanh", builder.widths[-1], lambda network, values: values[-1].tanh().sigmoid())
    if loss == "cross_entropy" and positions:
        builder.step("mean", builder.widths[-1], lambda network, values: values[-1].mean(1))

    network = builder.network.double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # affine parameters begin as ones and zeros
    network.train(draw(st.booleans()))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    output = network(x)
    names = [name for name, module in network.named_modules() if name and list(module.parameters())]
    names += [name for name, _ in network.named_parameters()]
    layers = draw(st.none() | st.lists(st.sampled_from(names), min_size=1, max_size=4))
    for parameter in network.parameters():
        parameter.requires_grad_(draw(st.booleans()))
    target = torch.randint(output.shape[1], (batch,)) if loss == "cross_entropy" else torch.rand_like(output.detach())
    return Example(
        network=network,
        x=x,
        target=target,
        loss=squared if loss == "callable" else loss,
        oracle=squared if loss == "callable" else ORACLES["bce" if loss == "auto" else loss],
        layers=layers,
        way=draw(st.sampled_from(["grads", "factors", "watch"])),
        grad_mode=draw(st.sampled_from([contextlib.nullcontext, torch.no_grad, torch.inference_mode])),
    )


def gradients(example: Example) -> dict[str, Tensor]:
    network, keys = example.network, {"layers": example.layers}
    if example.way == "watch" and callable(example.loss):
        with gradext.watch(network, **keys) as watch:
            losses = example.loss(network(example.x), example.target)
        return watch.grads(losses)
    keys |= {"loss": example.loss, "target": example.target}
    if example.way == "factors":
        factors = gradext.batch_layer_factors(network, example.x, **keys)
        return {name: f.materialize() for name, f in factors.items()}
    return gradext.batch_layer_grads(network, example.x, **keys)


def check(example: Example, loop) -> None:
    network = example.network
    named = dict(network.named_parameters())
    names = {name for name, p in named.items() if p.requires_grad} or set(named)
    if example.layers is not None:
        names = {n for n in named for item in example.layers if n == item or n.startswith(f"{item}.")}
    flags = {name: p.requires_grad for name, p in named.items()}
    expected = loop(network, example.x, example.target, example.oracle)
    largest = max(value.abs().max() for value in expected.values())
    for _ in range(2):
        with example.grad_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what takes one backward a sample
            grads = gradients(example)
        assert set(grads) == names
        for name, value in grads.items():
            assert value.shape == expected[name].shape
            # A gradient that cancels to nothing is rounding noise, which is relative to what cancelled.
            bound = 1e-9 * expected[name].abs().max() + 1e-12 * largest
            assert (value - expected[name]).abs().max() <= bound, name
        assert {name: p.requires_grad for name, p in named.items()} == flags


COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
}


@settings(max_examples=150, derandomize=True, **COMMON)
@given(example=examples())
def test_random_networks(example, loop):
    check(example, loop)


@pytest.mark.slow
@settings(max_examples=4000, **COMMON)
@given(example=examples())
def test_many_random_networks(example, loop):
    check(example, loop)
