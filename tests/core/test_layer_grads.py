"""batch_layer_grads and batch_layer_factors: exact on every accepted model, an error on every other."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradext
from gradext import BackendError, CaptureError, NonFiniteError, backends
from gradext.backends import reference

from .common import LinearFunction, assert_right, own_gradients

B = 4


def squared(output: Tensor | tuple, target: Tensor) -> Tensor:
    output = output[0] if isinstance(output, tuple) else output
    return (output - target).square().flatten(1).sum(1)


def assert_close(actual: Tensor, expected: Tensor, relative: float, scale: float | None = None) -> None:
    """Largest error, relative to the largest entry expected (or to ``scale``, where that should be zero)."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().amax().item()
    scale = scale or expected.abs().amax().item()
    assert error <= relative * scale, f"error {error:.2e} at a scale of {scale:.2e}"


# --- models ----------------------------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 6), nn.Sigmoid())

    def forward(self, x):
        return self.decoder(self.encoder(x))


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5))
        self.mu, self.logvar = nn.Linear(5, 3), nn.Linear(5, 3)
        self.decoder = nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 6), nn.Sigmoid())

    def forward(self, x, noise=None):
        hidden = self.encoder(x)
        mu, logvar = self.mu(hidden), self.logvar(hidden)
        z = mu if noise is None else mu + noise * (logvar / 2).exp()
        return self.decoder(z), mu, logvar


class ResidualDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.decoder = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 6)])

    def forward(self, x):
        h = self.encoder(x)
        for layer in self.decoder[:-1]:
            h = h + F.gelu(layer(h))
        return self.decoder[-1](h)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 5), nn.LeakyReLU(0.1, inplace=True), nn.Linear(5, 6)
        )

    def forward(self, x):
        y = self.net(x)
        y[..., :2].mul_(2)  # in place on a view of a layer's output
        y.sigmoid_()
        return y


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.last(torch.tanh(self.first(torch.tanh(self.first(x)))))


class SharedWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class SharedBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.bias = self.first.bias

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class TransposedInDecoder(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.form = form

    def forward(self, x):
        return self.form(torch.tanh(self.encoder(x)), self.encoder.weight)


FORMS = {
    "F.linear(h, W.t())": lambda h, W: F.linear(h, W.t()),
    "h @ W": lambda h, W: h @ W,
    "torch.matmul(h, W)": torch.matmul,
    "h.matmul(W.T.mT)": lambda h, W: h.matmul(W.T.mT),
    "F.linear(h, W.transpose(0, 1))": lambda h, W: F.linear(h, W.transpose(0, 1)),
    "F.linear(h, torch.transpose(W, -1, -2))": lambda h, W: F.linear(input=h, weight=torch.transpose(W, -1, -2)),
    "F.linear(h, W.to(double).t())": lambda h, W: F.linear(h.double(), W.to(torch.float64).t()).to(h.dtype),
    "F.linear(h, W.t().contiguous())": lambda h, W: F.linear(h, W.t().contiguous()),
    "twice": lambda h, W: F.linear(torch.sin(F.linear(h, W.t()) @ W.t()), W.t()),
}


class WeightUsedAgain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x):
        return self.b(torch.relu(self.a(x))) + F.linear(torch.sin(self.a(input=x)), self.b.weight, bias=self.b.bias)


class KeywordInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, *, context):
        return self.b(torch.tanh(self.a(input=x)) * context)


class Branches(nn.Module):
    """The loss does not depend on one of the layers, and on the other only through a detach."""

    def __init__(self):
        super().__init__()
        self.kept, self.dropped, self.detached = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        self.dropped(x)
        return self.kept(x) + self.detached(x).detach()


class Chunked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(4, 6)

    def forward(self, x):
        gate, value = self.a(x).chunk(2, dim=-1)
        return self.b(torch.sigmoid(gate) * value)


class Hooked(nn.Module):
    """Hooks that change inputs and outputs are part of the function."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.a.register_forward_hook(lambda module, args, output: output * 2)
        self.b.register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.use_checkpoint = True
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = checkpoint(self.inner, x, use_reentrant=False) if self.use_checkpoint else self.inner(x)
        return self.c(h)

    def inner(self, x):
        return torch.tanh(self.b(torch.tanh(self.a(x))))


class FunctionalCall(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x):
        return torch.func.functional_call(self.net, dict(self.net.named_parameters()), (x,)) + self.net(x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.mT, dim=-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


MODELS = {
    "autoencoder": (Autoencoder, (6,)),
    "vae": (VAE, (6,)),
    "residual": (ResidualDecoder, (6,)),
    "in place 2-D": (InPlace, (6,)),
    "in place 3-D": (InPlace, (3, 6)),
    "in place 4-D": (InPlace, (2, 3, 6)),
    "called twice": (CalledTwice, (6,)),
    "called twice, 3-D": (CalledTwice, (3, 6)),
    "shared weight": (SharedWeight, (6,)),
    "shared weight, 3-D": (SharedWeight, (5, 6)),
    "shared bias": (SharedBias, (6,)),
    "weight used again": (WeightUsedAgain, (6,)),
    "weight used again, 4-D": (WeightUsedAgain, (2, 3, 6)),
    "branches": (Branches, (6,)),
    "chunked": (Chunked, (2, 6)),
    "hooked": (Hooked, (6,)),
    "functional call": (FunctionalCall, (6,)),
    "attention": (Attention, (5, 6)),
    "a layer alone": (lambda: nn.Linear(6, 6), (6,)),
    "positions as many as samples": (InPlace, (B, 6)),
    **{f"tied: {form}": (lambda form=form: TransposedInDecoder(FORMS[form]), (6,)) for form in FORMS},
    "tied, 3-D": (lambda: TransposedInDecoder(FORMS["twice"]), (3, 6)),
}


def build(name: str, dtype=torch.float64, batch: int = B) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    return make().to(dtype).eval(), torch.rand(batch, *shape, dtype=dtype)


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_equals_both_oracles_in_double_precision(name, oracle):
    model, x = build(name)
    expected = oracle(model, x, x, squared)
    grads = gradext.batch_layer_grads(model, x, loss=squared)
    assert set(grads) == set(expected)
    scale = max(value.abs().amax().item() for value in expected.values())
    for key in expected:
        assert_close(grads[key], expected[key], 1e-12, scale)


@pytest.mark.parametrize("name", MODELS)
def test_factors_stand_for_the_same_gradients_in_single_precision(name, loop, backend):
    model, x = build(name)
    expected = loop(model, x, x, squared)
    model, x = model.float(), x.float()
    grads = gradext.batch_layer_grads(model, x, loss=squared, backend=backend)
    factors = gradext.batch_layer_factors(model, x, loss=squared)
    assert set(grads) == set(expected)
    scale = max(value.abs().amax().item() for value in expected.values())
    for key, value in expected.items():
        assert_close(grads[key], value, 1e-6, scale)
        assert_close(factors[key].materialize(), value, 1e-6, scale)


@pytest.mark.parametrize("loss", ["mse", "bce", "bce_logits", "cross_entropy", "auto", "callable"])
def test_named_losses_are_sums_over_the_sample(loss, oracle):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)).double()
    x = torch.rand(B, 6, dtype=torch.float64)
    target = torch.randint(6, (B,)) if loss == "cross_entropy" else torch.rand(B, 6, dtype=torch.float64)
    if loss in ("bce", "auto"):
        model.append(nn.Sigmoid())
    sum_of = {
        "mse": lambda o, t: F.mse_loss(o, t, reduction="sum"),
        "bce": lambda o, t: F.binary_cross_entropy(o, t, reduction="sum"),
        "auto": lambda o, t: F.binary_cross_entropy(o, t, reduction="sum"),
        "bce_logits": lambda o, t: F.binary_cross_entropy_with_logits(o, t, reduction="sum"),
        "cross_entropy": lambda o, t: F.cross_entropy(o, t, reduction="sum"),
        "callable": lambda o, t: (o - t).abs().pow(3).sum(),
    }[loss]
    expected = oracle(model, x, target, sum_of)
    given = (lambda o, t: (o - t).abs().pow(3).sum(1)) if loss == "callable" else loss
    for key, value in gradext.batch_layer_grads(model, x, loss=given, target=target).items():
        assert_close(value, expected[key], 1e-12)


def test_target_is_the_input_by_default_and_takes_the_outputs_shape():
    model, x = build("autoencoder")
    images = x.reshape(B, 2, 3)
    by_default = gradext.batch_layer_grads(nn.Sequential(nn.Flatten(), model), images, loss="bce")
    given = gradext.batch_layer_grads(model, x, loss="bce", target=images)
    for key, value in by_default.items():
        assert torch.equal(value, given[key.removeprefix("1.")])


def test_reparametrisation_noise_follows_the_seed(loop):
    model, x = build("vae")
    noise = torch.randn(B, 3, dtype=torch.float64)

    class Sampling(VAE):
        def forward(self, x):
            return super().forward(x, torch.randn(len(x), 3, dtype=x.dtype))

    sampling = Sampling().double().eval()
    sampling.load_state_dict(model.state_dict())
    torch.manual_seed(7)
    noise = torch.randn(B, 3, dtype=torch.float64)
    expected = loop(model, (x, noise), x, squared)
    torch.manual_seed(7)
    grads = gradext.batch_layer_grads(sampling, x, loss=squared)
    assert "mu.weight" in grads
    assert "logvar.weight" in grads
    for key, value in grads.items():
        assert_close(value, expected[key], 1e-12)


def test_tuple_dict_and_keyword_inputs(loop):
    torch.manual_seed(0)
    model, x, context = KeywordInputs().double(), torch.randn(B, 6).double(), torch.randn(B, 6).double()
    inputs = {"x": x, "context": context}
    expected = loop(model, inputs, x, squared)
    for key, value in gradext.batch_layer_grads(model, inputs, loss=squared).items():
        assert_close(value, expected[key], 1e-12)
    model, x = build("vae")
    noise = torch.randn(B, 3).double()
    expected = loop(model, (x, noise), x, squared)
    for value in (x, noise), [x, noise], {"x": x, "noise": noise}:
        grads = gradext.batch_layer_grads(model, value, loss=squared)
        for key, gradient in grads.items():
            assert_close(gradient, expected[key], 1e-12)


@pytest.mark.parametrize("frozen", ["none", "some", "all"])
@pytest.mark.parametrize("training", [True, False])
def test_frozen_parameters_and_training_mode_change_nothing(frozen, training):
    model, x = build("residual")
    expected = gradext.batch_layer_grads(model, x, loss=squared)
    for k, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(frozen == "none" or (frozen == "some" and k % 2 == 1))
    grads = gradext.batch_layer_grads(model.train(training), x, loss=squared, layers="")
    for key, value in expected.items():
        assert torch.equal(grads[key], value)


def test_the_callers_gradient_mode_does_not_matter():
    model, x = build("residual")
    expected = gradext.batch_layer_grads(model, x, loss="mse")
    with torch.no_grad():
        without = gradext.batch_layer_grads(model, x, loss="mse")
    with torch.inference_mode():
        made_inside = x + 0
        inference = gradext.batch_layer_grads(model, made_inside, loss="mse", target=x + 0)
        nested = gradext.batch_layer_grads(model, (made_inside,), loss=squared)
    for key, value in expected.items():
        for other in without, inference, nested:
            assert torch.equal(other[key], value)
            assert not other[key].requires_grad


def test_an_input_that_requires_grad_stays_out_of_the_graph():
    model, x = build("residual")
    expected = gradext.batch_layer_grads(model, x, loss="mse")
    leaf = x.clone().requires_grad_()
    grads = gradext.batch_layer_grads(model, leaf, loss="mse")
    assert leaf.grad is None
    for key, value in expected.items():
        assert torch.equal(grads[key], value)
        assert not grads[key].requires_grad


def test_checkpointed_modules(oracle):
    torch.manual_seed(0)
    # Square in every way, so that a tensor saved for another purpose would pass for the right one.
    model, x = Checkpointed().double(), torch.randn(6, 6).double()
    reference = copy.deepcopy(model)
    reference.use_checkpoint = False
    expected = oracle(reference, x, x, squared)
    for requires_grad in True, False:
        model.requires_grad_(requires_grad)
        for layers in None, ["b"], ["b", "c"], "a.weight":
            grads = gradext.batch_layer_grads(model, x, loss=squared, layers=layers)
            for key, value in grads.items():
                assert_close(value, expected[key], 1e-12)


def test_reentrant_checkpoints_are_refused():
    model, x = build("residual")
    layer = model.decoder[0]
    layer.forward = lambda h, plain=layer.forward: checkpoint(plain, h, use_reentrant=True)
    with pytest.raises(CaptureError, match="use_reentrant=False"):
        gradext.batch_layer_grads(model, x, loss=squared)


def test_autocast_keeps_no_copy_of_a_weight():
    class Casts(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.kept = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default:
                self.kept.append(weakref.ref(result))
            return result

    model, x = build("autoencoder", torch.float32)
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        grads = gradext.batch_layer_grads(model, x, loss="mse")
        assert len(grads) == 8
        assert len(casts.kept) >= 4
        results = set(map(id, grads.values()))  # a bias's gradient is itself one, of a delta
        assert [cast() for cast in casts.kept if cast() is not None and id(cast()) not in results] == []


@pytest.mark.parametrize("shape", [(6,), (3, 6)])
def test_bfloat16_autocast(shape, loop):
    torch.manual_seed(0)
    model = InPlace()
    x = torch.rand(B, *shape)
    expected = loop(copy.deepcopy(model).double(), x.double(), x.double(), squared)
    with torch.autocast("cpu", torch.bfloat16):
        grads = gradext.batch_layer_grads(model, x, loss="mse")
        factors = gradext.batch_layer_factors(model, x, loss="mse")
        after = model(x)
    for key, value in grads.items():
        assert value.dtype == torch.float32
        assert_close(value, expected[key], 8 * 2**-8)
        assert not key.endswith("weight") or factors[key].dtype == torch.bfloat16
    # The cast of an alias must not stay in autocast's cache: training in the same context still reaches the weights.
    after.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_half_precision_models_lose_no_more_than_their_type():
    model, x = build("autoencoder", torch.float32)
    expected = gradext.batch_layer_grads(model, x, loss="bce")
    grads = gradext.batch_layer_grads(model.to(torch.bfloat16), x.to(torch.bfloat16), loss="bce")
    for key, value in grads.items():
        assert value.dtype == torch.bfloat16
        assert_close(value, expected[key], 8 * 2**-8)


def test_a_shared_bias_keeps_all_its_uses_when_one_layer_is_picked(loop):
    model, x = build("shared bias")
    expected = loop(model, x, x, squared)
    for pick, weight in (("first", "first.weight"), ("second", "second.weight")):
        grads = gradext.batch_layer_grads(model, x, loss=squared, layers=pick)
        assert set(grads) == {weight, "first.bias"}
        for key, value in grads.items():
            assert_close(value, expected[key], 1e-12)


def test_three_uses_of_one_layer_in_three_types(loop):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6, bias=False)

        def forward(self, x):
            y = self.a(x)
            y = y + F.linear(x.double(), self.a.weight.double()).to(x.dtype)
            return y + F.linear(x.bfloat16(), self.a.weight.to(torch.bfloat16)).to(x.dtype)

    torch.manual_seed(0)
    model, x = Mixed(), torch.rand(B, 6)
    expected = loop(model, x, x, squared)
    grads = gradext.batch_layer_grads(model, x, loss=squared)
    assert_close(grads["a.weight"], expected["a.weight"], 1e-2)


# --- the results -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_out(dtype, backend):
    for name in "residual", "in place 3-D":
        model, x = build(name, torch.float32)
        exact = gradext.batch_layer_grads(model.double(), x.double(), loss="mse")
        model.float()
        options = {"loss": "mse", "backend": backend}
        grads = gradext.batch_layer_grads(model, x, dtype=dtype, **options)
        contiguous = {key: torch.empty_like(value, dtype=dtype) for key, value in exact.items()}
        strided = {key: torch.full((2, *value.shape[::-1]), 7.0, dtype=dtype) for key, value in exact.items()}
        views = {key: value[1].permute(*range(value.ndim - 2, -1, -1)) for key, value in strided.items()}
        for out in contiguous, views:
            returned = gradext.batch_layer_grads(model, x, out=out, **options)
            for key, value in exact.items():
                assert returned[key] is out[key]
                assert_close(out[key], value, max(2 * torch.finfo(dtype).eps, 2e-6))
                assert_close(grads[key], value, max(2 * torch.finfo(dtype).eps, 2e-6))
        assert all((value[0] == 7).all() for value in strided.values())  # nothing outside the view is written


def test_wrong_out_is_refused_by_name():
    model, x = build("autoencoder")
    shape = (B, 6, 5)

    def call(out, **options):
        gradext.batch_layer_grads(model, x, layers="decoder.2.weight", out=out, **options)

    def empty(*size, **options):
        return {"decoder.2.weight": torch.empty(*(size or shape), **{"dtype": torch.float64, **options})}

    with pytest.raises(ValueError, match=r"out\['decoder.2.weight'\]: expected shape \[4, 6, 5\], but got \[4, 5, 6\]"):
        call(empty(B, 5, 6))
    with pytest.raises(TypeError, match=r"out\['decoder.2.weight'\].*int64"):
        call(empty(dtype=torch.int64))
    with pytest.raises(ValueError, match=r"out\['decoder.2.weight'\].*meta"):
        call(empty(device="meta"))
    with pytest.raises(ValueError, match="require grad"):
        call(empty(requires_grad=True))
    with pytest.raises(ValueError, match="expanded"):
        call({"decoder.2.weight": torch.empty(1, dtype=torch.float64).expand(shape)})
    with pytest.raises(
        ValueError, match=r"expected one tensor for each of \['decoder.2.weight'\], but got \['other'\]"
    ):
        call({"other": torch.empty(shape)})
    with pytest.raises(TypeError, match="mapping"):
        call(torch.empty(shape))
    with pytest.raises(TypeError, match="float32"):
        call(empty(), dtype=torch.float32)
    with pytest.raises(ValueError, match="keep their graph"):
        call(empty(), create_graph=True)
    with pytest.raises(TypeError, match="dtype"):
        gradext.batch_layer_grads(model, x, dtype=torch.int32)


def test_factors_do_not_change_with_the_callers_buffers():
    model, x = build("residual")
    expected = gradext.batch_layer_grads(model, x, loss="mse")
    factors = gradext.batch_layer_factors(model, x, loss="mse")
    x.zero_()
    assert torch.equal(factors["encoder.weight"].materialize(), expected["encoder.weight"])


class Queries(nn.Module):
    """Learned vectors, a constant one and an input inside a dict, each as a layer's input."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 6))
        self.register_buffer("constant", torch.randn(6))
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, others):
        return self.a(self.query.expand(len(x), -1)) + self.b(self.constant.expand(len(x), -1)) * self.c(others["y"])


def test_factors_do_not_change_with_the_model_nor_with_nested_inputs():
    torch.manual_seed(0)
    model, x = Queries().double(), (torch.rand(B, 6).double(), {"y": torch.rand(B, 6).double()})
    expected = gradext.batch_layer_grads(model, x, loss="mse")
    factors = gradext.batch_layer_factors(model, x, loss="mse")
    with torch.no_grad():
        for tensor in (model.query, model.constant, x[1]["y"]):
            tensor.zero_()
    for name in "abc":
        assert_close(factors[f"{name}.weight"].materialize(), expected[f"{name}.weight"], 1e-12)


def test_every_result_has_memory_of_its_own():
    class Sum(nn.Module):  # whose layers get one delta, of one number
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return self.a(x) + self.b(x)

    model, x = Sum(), torch.rand(B, 6)
    for loss in (lambda output, target: output.sum(1)), (lambda output, target: output.square().sum(1)):
        grads = gradext.batch_layer_grads(model, x, loss=loss)
        expected = {name: value.clone() for name, value in grads.items()}
        for name, value in grads.items():
            value.mul_(2)
            assert torch.equal(value, 2 * expected[name])


@pytest.mark.parametrize("name", ["autoencoder", "in place 3-D", "in place 4-D", "tied: twice", "attention"])
def test_an_empty_batch_gives_empty_gradients(name):
    model, x = build(name, batch=0)
    full = gradext.batch_layer_grads(*build(name), loss="mse")
    grads = gradext.batch_layer_grads(model, x, loss="mse")
    assert {key: tuple(g.shape) for key, g in grads.items()} == {key: (0, *g.shape[1:]) for key, g in full.items()}
    factors = gradext.batch_layer_factors(model, x, loss="mse")
    assert factors.norm().shape == (0,)


def test_one_sample_and_any_cut_into_batches_give_the_same():
    model, x = build("attention")
    whole = gradext.batch_layer_grads(model, x, loss="mse")
    parts = [gradext.batch_layer_grads(model, part, loss="mse") for part in x.split([1, 3])]
    scale = max(value.abs().amax().item() for value in whole.values())  # the keys' bias has gradient zero
    for key, value in whole.items():
        assert_close(torch.cat([part[key] for part in parts]), value, 1e-12, scale)


def test_second_derivatives_reach_the_parameters(oracle):
    """The gradient of a penalty on per-sample norms is that of differentiating twice."""
    for name in "residual", "in place 3-D", "tied: twice", "shared weight", "weight used again":
        model, x = build(name)
        model.requires_grad_()
        grads = gradext.batch_layer_grads(model, x, loss=squared, create_graph=True)
        factors = gradext.batch_layer_factors(model, x, loss=squared, create_graph=True)
        parameters = dict(model.named_parameters())

        def penalty(parameters, model=model, x=x):
            def loss(parameters, x):
                output = torch.func.functional_call(model, parameters, (x[None],))
                return squared(output, x[None]).sum()

            grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
            return sum(g.square().sum() for g in grads.values())

        expected = torch.func.grad(penalty)({key: p.detach() for key, p in parameters.items()})
        for value in sum(g.square().sum() for g in grads.values()), factors.sq_norm().sum():
            found = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, materialize_grads=True)
            for key, gradient in zip(parameters, found, strict=True):
                assert_close(gradient, expected[key], 1e-11)


# --- cost ------------------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, list[int]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else [result]
        self.calls.append((str(func), [v.numel() for v in outputs if isinstance(v, Tensor)]))
        return result

    def products(self) -> int:
        return sum(name.startswith(("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")) for name, _ in self.calls)


@pytest.mark.parametrize("frozen", [False, True])
def test_no_weight_gradient_and_no_encoder_is_differentiated(frozen):
    model, x = build("autoencoder")
    model.requires_grad_(not frozen)
    # Four layers forward; then one product from the last layer to the one before it, and the outer products are not
    # matrix products. Neither the encoder nor the first decoder layer's input is reached.
    for layers, products in ((None, 7), ("decoder.2", 4), ("decoder", 5), ("decoder.0.bias", 5), ("encoder.2", 6)):
        with Operations() as operations:
            gradext.batch_layer_factors(model, x, layers=layers)
        assert operations.products() == products, layers


def test_the_graph_begins_at_the_first_chosen_layer():
    model, x = build("autoencoder")
    seen = {}
    model.encoder.register_forward_hook(lambda module, args, output: seen.update(encoder=output.requires_grad))
    model.decoder.register_forward_hook(lambda module, args, output: seen.update(decoder=output.requires_grad))
    gradext.batch_layer_factors(model, x, layers="decoder")
    assert seen == {"encoder": False, "decoder": True}


@pytest.mark.parametrize("operation", [torch.mul, torch.add, torch.sub])
def test_the_backward_frees_the_graph_as_it_goes(operation):
    """Also below parameters that are added and multiplied: their rule needs no graph."""
    saved, alive = [], []

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            saved.append(weakref.ref(self))

    def unpack(kept):
        alive.append(sum(ref() is not None for ref in saved))
        return kept.tensor

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.p = nn.Linear(6, 5).double(), nn.Parameter(torch.rand(5).double())

        def forward(self, x):
            h = self.first(x)
            with torch.autograd.graph.saved_tensors_hooks(Saved, unpack):
                h = h.sin().exp()
            return operation(h, self.p)

    model, x = Model(), torch.rand(4, 6).double()
    factors = gradext.batch_layer_factors(model, x, loss=lambda output, target: output.square().sum(1))
    assert alive == [2, 1]  # in the backward of exp, and of sin
    assert_right(factors.materialize(), own_gradients(model, model(x).square().sum(1)))


def test_the_factor_route_never_holds_anything_of_gradient_size():
    samples, width = 16, 64
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    x = torch.rand(samples, 3, width)
    with Operations() as operations:
        factors = gradext.batch_layer_factors(model, x, loss="mse")
        for entry in factors.values():
            entry.sq_norm()
            entry.dot(torch.ones(width, width))
            entry.gram()
            entry.sum()
            entry.sketch(8)
    assert max(max(sizes, default=0) for _, sizes in operations.calls) < samples * width * width


# --- the model is left as it was -------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> list:
    state = [(id(p), p._version, p.requires_grad, id(p.grad), p.data_ptr(), p.clone()) for p in model.parameters()]
    state += [(id(b), b.clone()) for b in model.buffers()]
    for module in model.modules():
        hooks = [getattr(module, name) for name in vars(module) if name.endswith("_hooks")]
        state.append((module.training, [dict(h) for h in hooks], set(vars(module))))
    state += [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_cache_enabled()]
    state += [torch.overrides._get_current_function_mode_stack() == []]
    return state


def assert_unchanged(before: list, after: list) -> None:
    for old, new in zip(before, after, strict=True):
        if isinstance(old, tuple):
            for a, b in zip(old, new, strict=True):
                assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        else:
            assert old == new


class SpectralNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.norm = nn.InstanceNorm1d(1, track_running_stats=True)
        self.decoder = nn.Linear(6, 6)

    def forward(self, x):
        return self.decoder(self.norm(self.encoder(x).unsqueeze(1)).squeeze(1))


@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt, "loss"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_it_was(failure, frozen):
    torch.manual_seed(0)
    model, x = SpectralNorm().train(), torch.randn(B, 6)
    model(x).sum().backward()  # gradients are there, and the power iteration has begun
    model.requires_grad_(not frozen)
    loss = squared
    if failure == "loss":
        loss = lambda output, target: output.undefined  # noqa: E731
    elif failure is not None:

        def fail(module, args, output):
            raise failure("from the forward")

        model.decoder.register_forward_hook(fail)
    before = snapshot(model)
    if failure is None:
        gradext.batch_layer_grads(model, x, loss=loss, layers="decoder")
    else:
        with pytest.raises(AttributeError if failure == "loss" else failure):
            gradext.batch_layer_grads(model, x, loss=loss, layers="decoder")
    assert_unchanged(before, snapshot(model))


class Remembering(nn.Module):
    """A layer that sees what the model remembers of earlier calls, and a count of them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("memory", torch.ones(B, 6))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.count = self.count + 1  # in its place
            self.memory[: len(x)].lerp_(x, 0.5)
        return self.layer(self.memory[: len(x)])


@pytest.mark.parametrize("options", [{}, {"mixing": "allow"}], ids=str)
@pytest.mark.parametrize("make", [SpectralNorm, Remembering])
def test_buffers_are_left_as_they_were(make, options):
    torch.manual_seed(0)
    model, x = make().train(), torch.randn(B, 6)
    before = snapshot(model)
    gradext.batch_layer_grads(model, x, loss="mse", **options)
    assert_unchanged(before, snapshot(model))


def test_what_is_put_back_was_a_layer_s_input():
    torch.manual_seed(0)
    model, x = Remembering().train(), torch.randn(B, 6)
    grads = gradext.batch_layer_grads(model, x, loss="mse")
    factors = gradext.batch_layer_factors(model, x, loss="mse")
    delta = 2 * (model(x) - x)
    expected = delta.unsqueeze(2) * model.memory.unsqueeze(1)
    assert_close(grads["layer.weight"], expected, 1e-6)
    assert_close(factors["layer.weight"].materialize(), expected, 1e-6)


class Averaging(nn.Module):
    """A layer whose input is a buffer that the forward writes samples into, whole or by a view."""

    def __init__(self, view: bool):
        super().__init__()
        self.layer, self.view = nn.Linear(6, 6), view
        self.register_buffer("memory", torch.ones(B, 6))

    def forward(self, x):
        (self.memory[:] if self.view else self.memory).lerp_(x, 0.5)
        return self.layer(self.memory[:] if self.view else self.memory)


@pytest.mark.parametrize("view", [False, True])
def test_a_layers_input_is_a_buffer_that_is_put_back(view):
    torch.manual_seed(0)
    model, x = Averaging(view), torch.randn(B, 6)
    memory = torch.ones(B, 6).lerp(x, 0.5)
    expected = 2 * (model.layer(memory) - x).unsqueeze(2) * memory.unsqueeze(1)
    assert_close(gradext.batch_layer_grads(model, x, loss="mse")["layer.weight"], expected, 1e-6)
    assert_close(gradext.batch_layer_factors(model, x, loss="mse")["layer.weight"].materialize(), expected, 1e-6)
    assert torch.equal(model.memory, torch.ones(B, 6))


def test_threads_do_not_disturb_each_other():
    model, x = build("attention")
    expected = gradext.batch_layer_grads(model, x, loss="mse")
    problems = []

    def work(part):
        for _ in range(10):
            grads = gradext.batch_layer_grads(model, x[part], loss="mse")
            problems.extend(k for k, g in grads.items() if not torch.allclose(g, expected[k][part], rtol=1e-10))

    threads = [threading.Thread(target=work, args=(slice(k, k + 2),)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_out_may_not_share_memory():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)), torch.rand(2, 4)
    expected = gradext.batch_layer_grads(model, x, loss="mse")
    sizes = {name: g[0].numel() for name, g in expected.items()}
    flat, start, out = torch.zeros(2, sum(sizes.values())), 0, {}  # the gradients of a sample as one vector
    for name, size in sizes.items():
        out[name] = flat[:, start : start + size].view_as(expected[name])
        start += size
    gradext.batch_layer_grads(model, x, loss="mse", out=out)
    assert torch.equal(flat, torch.cat([g.flatten(1) for g in expected.values()], dim=1))
    with pytest.raises(ValueError, match="out: expected memory of its own"):
        gradext.batch_layer_grads(model, x, loss="mse", out=out | {"0.bias": flat[:, :3]})
    x = torch.rand(28)
    with pytest.raises(ValueError, match="out: expected memory of its own"):
        gradext.batch_layer_grads(model, x[:8].view(2, 4), layers="0.weight", out={"0.weight": x[4:].view(2, 3, 4)})


# --- wrong use -------------------------------------------------------------------------------------------------------


def test_batch_normalisation_in_training_mode_is_refused(loop):
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)).double().train()
    x = torch.rand(B, 6).double()
    before = model[1].running_mean.clone()
    with pytest.raises(CaptureError, match=r"samples mix.*model.eval\(\)"):
        gradext.batch_layer_grads(model, x)
    assert torch.equal(model[1].running_mean, before)
    expected = loop(model.eval(), x, x, squared)
    for key, value in gradext.batch_layer_grads(model, x, loss=squared).items():
        assert_close(value, expected[key], 1e-12)

    class Functional(nn.Linear):
        def forward(self, x):
            return F.batch_norm(super().forward(x), None, None, training=True)

    with pytest.raises(CaptureError, match="samples mix"):
        gradext.batch_layer_grads(Functional(6, 6).eval().double(), x)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda o, t: F.mse_loss(o, t), r"expected a floating-point tensor of shape \(B,\).*shape \(\)"),
        (lambda o, t: F.mse_loss(o, t, reduction="none"), r"shape \(4, 6\)"),
        (lambda o, t: 3.0, "but got float"),
        ("hinge", "expected 'auto', one of.*'hinge'"),
    ],
)
def test_losses_of_the_wrong_shape_are_refused(loss, message):
    model, x = build("autoencoder")
    with pytest.raises(ValueError, match=message):
        gradext.batch_layer_grads(model, x, loss=loss)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex128])
def test_losses_without_a_gradient_are_refused(dtype):
    model, x = build("autoencoder")
    with pytest.raises(TypeError, match=r"loss: expected a floating-point tensor.*torch"):
        gradext.batch_layer_grads(model, x, loss=lambda output, target: output.sum(1).to(dtype))


class Doubling(nn.Module):
    """Overwrites its input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Bilinear(6, 6, 6)

    def forward(self, x):
        return self.b(self.a(x.mul_(2)), x)


def test_an_input_that_the_model_overwrites_is_used_once(loop):
    torch.manual_seed(0)
    model, x = Doubling().double(), torch.rand(B, 6).double()
    expected = loop(model, x, x, squared)
    for _ in range(2):
        grads = gradext.batch_layer_grads(model, x.clone(), loss=squared, target=x, layers="a")
        assert_close(grads["a.weight"], expected["a.weight"], 1e-12)
        with pytest.raises(CaptureError, match="x: the model overwrites its input in place"):
            gradext.batch_layer_grads(model, x.clone(), loss=squared)


def test_a_layer_that_never_ran_has_gradient_zero():
    model, x = build("residual")
    expected = gradext.batch_layer_grads(model, x, loss="mse")
    model.spare = nn.Linear(6, 6).double()
    grads = gradext.batch_layer_grads(model, x, loss="mse")
    assert not grads["spare.weight"].any()
    assert grads.coverage.rules["spare.weight"] == "unused"
    for key, value in expected.items():
        assert torch.equal(grads[key], value)
    model.forward = torch.no_grad()(model.forward)
    assert not any(g.any() for g in gradext.batch_layer_grads(model, x, loss="mse").values())


def test_non_finite_values_are_reported_by_sample():
    model, x = build("residual")
    x[2, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"1 of 4 samples.*samples 2\)"):
        gradext.batch_layer_grads(model, x, loss="mse", check_finite=True)
    grads = gradext.batch_layer_grads(model, x, loss="mse")
    assert [bool(g.isfinite().all()) for g in grads["decoder.2.weight"]] == [True, True, False, True]


def test_non_finite_values_are_those_of_a_sample_whatever_its_positions():
    model, x = nn.Sequential(nn.Linear(5, 3), nn.PReLU(), nn.Linear(3, 5)), torch.rand(4, 3, 5)
    x[2, 1, 0] = float("nan")
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"1 of 4 samples.*samples 2\)"):
            gradext.batch_layer_grads(model, x, loss="mse", check_finite=True)
        gradext.batch_layer_grads(model, x.nan_to_num(), loss="mse", check_finite=True)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (0,), (0, 3)])
def test_finite_gradients_of_an_embedding(shape):
    model, x = nn.Embedding(5, 3), torch.zeros(shape, dtype=torch.int64)
    grads = gradext.batch_layer_grads(
        nn.Sequential(model), x, loss=lambda output, _: output.flatten(1).sum(1), check_finite=True
    )
    assert grads["0.weight"].shape == (shape[0], 5, 3)


def test_wrong_models_inputs_and_targets_are_refused():
    model, x = build("autoencoder")
    for bad, message in ((print, "torch.nn.Module"),):
        with pytest.raises(TypeError, match=message):
            gradext.batch_layer_grads(bad, x)
    for bad in 3, (), {}:
        with pytest.raises(TypeError, match="x: expected a tensor"):
            gradext.batch_layer_grads(model, bad)
    with pytest.raises(ValueError, match=r"x: expected a tensor on the model's device cpu"):
        gradext.batch_layer_grads(model, x.to("meta"))
    with pytest.raises(ValueError, match=r"target: expected the model output's shape \(4, 6\)"):
        gradext.batch_layer_grads(model, x, target=x[:, :5])
    with pytest.raises(TypeError, match=r"target: expected a floating-point tensor.*cross_entropy"):
        gradext.batch_layer_grads(model, x, target=torch.zeros(B, 6, dtype=torch.int64), loss="mse")
    with pytest.raises(ValueError, match=r"target: expected values in \[0, 1\].*samples 1, 2, 3"):
        gradext.batch_layer_grads(model, x, target=torch.linspace(0, 3, B * 6).reshape(B, 6), loss="bce")
    with pytest.raises(TypeError, match="model: expected an output tensor"):
        gradext.batch_layer_grads(Returns(lambda y: {"y": y}), x, loss="mse")


class Returns(nn.Linear):
    def __init__(self, change):
        super().__init__(6, 6)
        self.double()
        self.change = change

    def forward(self, x):
        return self.change(super().forward(x))


def test_wrong_backends(monkeypatch):
    model, x = build("autoencoder")
    with pytest.raises(BackendError, match=r"expected one of.*'reference'.*'quantum'"):
        gradext.batch_layer_grads(model, x, backend="quantum")
    with pytest.raises(BackendError, match=r"'cuda' does not (take tensors on cpu|work here)"):
        gradext.batch_layer_grads(model, x, backend="cuda")
    monkeypatch.setattr(backends, "DEFAULT", "quantum")
    with pytest.raises(BackendError, match="quantum"):
        gradext.batch_layer_grads(model, x)
    monkeypatch.setattr(backends, "DEFAULT", "reference")
    gradext.batch_layer_grads(model, x)


@pytest.mark.medium
def test_default_backend_comes_from_the_environment():
    code = "import gradext.backends as b; print(b.DEFAULT)"
    for value, expected in (("reference", "reference"), ("", "None")):
        environment = {**os.environ, "GRADEXT_BACKEND": value}
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert run.stdout.strip() == expected


def test_inference_mode_is_told_where_a_graph_is_wanted():
    model, x = build("autoencoder")
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match=r"create_graph: expected False under torch.inference_mode\(\)"):
            gradext.batch_layer_grads(model, x, create_graph=True)
        made = copy.deepcopy(model)
    for options in {}, {"create_graph": True}:
        with pytest.raises(RuntimeError, match=r"decoder\.0\.weight.*expected parameters.*make the model outside"):
            gradext.batch_layer_factors(made, x, **options)
    made.decoder = copy.deepcopy(model.decoder)
    grads = gradext.batch_layer_grads(made, x, layers="decoder")
    assert_close(grads["decoder.0.weight"], gradext.batch_layer_grads(model, x)["decoder.0.weight"], 1e-12)


def test_all_layers_are_one_call_of_a_backend_that_takes_groups(monkeypatch):
    calls = []

    def outer_group(problems):
        calls.append(problems)
        for delta, activation, out in problems:
            reference.outer(delta, activation, out)

    model, x = build("autoencoder")
    expected = gradext.batch_layer_grads(model, x)
    monkeypatch.setattr(reference, "outer_group", outer_group, raising=False)
    found = gradext.batch_layer_grads(model, x, backend="reference")
    assert [len(problems) for problems in calls] == [4]
    for name, value in found.items():
        assert_close(value, expected[name], 1e-12)


# --- never a wrong number --------------------------------------------------------------------------------------------


def scripted(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(x, weight.t())


class Odd(nn.Module):
    """A model with one plain use of its weight, and one that has no exact rule."""

    def __init__(self, use):
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.use = use
        self.hidden = [[self.a.weight]]
        self.made_before = self.a.weight.t()
        self.double()

    def forward(self, x):
        return self.a(x) + self.use(self, x)


def energy(model, x):
    with torch.enable_grad():
        v = x.detach().requires_grad_()
        return torch.autograd.grad(model.a(v).square().sum(), v, create_graph=True)[0]


# What is right, by whatever rule; the last ones may be refused.
ODD_USES = {
    "reduced": lambda m, x: m.a.weight.sum(),
    "elementwise": lambda m, x: x @ (2 * m.a.weight),
    "sliced by columns": lambda m, x: F.linear(x[:, :3], m.a.weight[:, :3]),
    "every other row": lambda m, x: x + F.pad(F.linear(x, m.a.weight[::2]), (0, 3)),
    "stacked": lambda m, x: x @ torch.stack([m.a.weight, m.a.weight])[0],
    "einsum": lambda m, x: torch.einsum("bi,oi->bo", x, m.a.weight),
    "weight first": lambda m, x: (m.a.weight @ x.t()).t(),
    "bilinear": lambda m, x: F.bilinear(x, x, m.a.weight.expand(6, 6, 6)),
    "addmm": lambda m, x: torch.addmm(x, x, m.a.weight),
    "in place": lambda m, x: F.linear(x.float(), m.a.weight.float().mul_(2)).double(),
    "weight of weight": lambda m, x: x @ (m.a.weight @ m.a.weight),
    "in containers": lambda m, x: x @ torch.block_diag(*m.hidden[0]),
    "custom function": lambda m, x: LinearFunction.apply(x, m.a.weight),
    "scripted": lambda m, x: torch.jit.script(scripted)(x, m.a.weight),
    "made before": lambda m, x: x @ m.made_before,
    "energy": energy,
    "vmap": lambda m, x: torch.func.vmap(m.a)(x),
    "jvp": lambda m, x: torch.func.jvp(m.a, (x,), (x,))[1],
    "functional": lambda m, x: torch.func.functional_call(m.a, {"weight": m.a.weight * 2}, (x,)),
    "rescaling embedding": lambda m, x: F.embedding(torch.zeros(len(x), dtype=torch.int64), m.a.weight, None, 1e9),
    "out=": lambda m, x: torch.mm(x, m.a.weight, out=torch.empty(0, dtype=x.dtype)),
}


MAY_BE_REFUSED = ("in place", "made before", "energy", "jvp", "rescaling embedding", "out=")


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("use", ODD_USES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of what takes one backward a sample
def test_unusual_uses_of_a_weight(use, create_graph, loop):
    torch.manual_seed(0)
    model, x = Odd(ODD_USES[use]), torch.rand(B, 6).double()
    if use == "made before":
        model.made_before = model.a.weight.t()
        expected = [torch.autograd.grad(squared(model(row), row).sum(), [model.a.weight])[0] for row in x.split(1)]
        expected = {"a.weight": torch.stack(expected)}
    elif use == "out=":
        expected = {}
    else:
        del model.hidden, model.made_before
        model.hidden = [[model.a.weight]]
        expected = loop_by_hand(model, x)
    error = RuntimeError if use == "out=" else gradext.CaptureError  # torch itself has no derivative of it
    try:
        grads = gradext.batch_layer_grads(model, x, loss=squared, create_graph=create_graph)
    except error:
        assert use in MAY_BE_REFUSED
        return
    for key, value in expected.items():
        assert_close(grads[key], value, 1e-6 if use == "in place" else 1e-12)  # by way of single precision


def loop_by_hand(model, x):
    """One backward for each sample alone, of the model itself: it holds its weight in other places too."""
    rows = [torch.autograd.grad(squared(model(row), row).sum(), list(model.parameters())) for row in x.split(1)]
    return {name: torch.stack([row[k] for row in rows]) for k, (name, _) in enumerate(model.named_parameters())}


CONSTANT_USES = {
    "detached": lambda m, x: x * m.a.weight.detach().sum(),
    "data": lambda m, x: F.linear(x, m.a.weight.data),
    "rounded": lambda m, x: F.linear(x, m.a.weight.to(torch.int32).to(x.dtype)),
    "copied": lambda m, x: copy.deepcopy(m.a)(x),
    "shape": lambda m, x: x * m.a.weight.shape[0] / m.a.weight.size(1),
    "zeros_like": lambda m, x: x + torch.zeros_like(m.a.weight).sum(),
    "under no_grad": lambda m, x: x * torch.no_grad()(lambda: m.a.weight.sum())(),
    "linear under no_grad": lambda m, x: torch.no_grad()(m.a)(x),
    "inner derivative": lambda m, x: torch.autograd.grad(m.a(v := x.clone().requires_grad_()).sin().sum(), v)[0],
    "nested": lambda m, x: x * gradext.batch_layer_factors(m.a, x.detach(), loss=squared).norm()[:, None],
}


@pytest.mark.parametrize("use", CONSTANT_USES)
def test_uses_that_autograd_does_not_follow_count_for_nothing(use, loop):
    torch.manual_seed(0)
    model, x = Odd(CONSTANT_USES[use]), torch.rand(B, 6).double()
    del model.hidden, model.made_before
    expected = loop(model, x, x, squared)
    for key, value in gradext.batch_layer_grads(model, x, loss=squared).items():
        assert_close(value, expected[key], 1e-12)


def test_a_regulariser_in_the_loss_counts():
    model, x = build("residual")
    weight = model.decoder[0].weight
    plain = gradext.batch_layer_grads(model, x, loss=squared)
    grads = gradext.batch_layer_grads(model, x, loss=lambda o, t: squared(o, t) + weight.square().sum())
    for key, value in plain.items():
        shift = 2 * weight.detach() if key == "decoder.0.weight" else 0
        assert_close(grads[key], value + shift, 1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nested_second_derivatives_are_right_or_refused():
    def inner(model, x):
        return x * gradext.batch_layer_factors(model.a, x.detach(), loss=squared, create_graph=True).norm()[:, None]

    model, x = Odd(inner), torch.rand(B, 6).double()
    del model.hidden, model.made_before
    expected = loop_by_hand(model, x)
    try:
        grads = gradext.batch_layer_grads(model, x, loss=squared)
    except gradext.CaptureError:
        return
    for key, value in grads.items():
        assert_close(value, expected[key], 1e-12)


@pytest.mark.parametrize("shape", [(6,), (3, 6)])
def test_an_input_overwritten_after_its_use_is_refused(shape):
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            h = x + 1
            y = self.a(h)
            h.mul_(2)
            return self.b(y + h)

    with pytest.raises(CaptureError, match=r"a\.weight.*modified in place"):
        gradext.batch_layer_grads(Overwrites(), torch.rand(B, *shape), loss=squared, layers=["a"])


def test_wrappers_keep_their_names(loop):
    model, x = build("residual")
    expected = loop(model, x, x, squared)
    wrapped = nn.DataParallel(model)
    for key, value in gradext.batch_layer_grads(wrapped, x, loss=squared).items():
        assert_close(value, expected[key.removeprefix("module.")], 1e-12)


class PartlyCompiled(nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.part = torch.compile(self.plain, backend=backend) if backend else self.plain

    def plain(self, x):
        return torch.tanh(self.a(x))

    def forward(self, x):
        return self.b(self.part(x)) + self.a(x)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_parts_are_seen_through(backend, warm, loop):
    torch.manual_seed(0)
    model, x = PartlyCompiled(backend).double(), torch.rand(B, 6).double()
    plain = PartlyCompiled(None).double()
    plain.load_state_dict(model.state_dict())
    expected = loop(plain, x, x, squared)
    for requires_grad in True, False:
        model.requires_grad_(requires_grad)
        if warm:
            model(x)
        for create_graph in False, True:
            grads = gradext.batch_layer_grads(model, x, loss=squared, create_graph=create_graph)
            for key, value in expected.items():
                assert_close(grads[key], value, 1e-12)


def test_other_function_modes_still_see_the_model():
    class Count(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.calls += func is F.linear
            return func(*args, **(kwargs or {}))

    model, x = build("residual")
    with Count() as count:
        gradext.batch_layer_grads(model, x)
    assert count.calls == 4


def test_another_default_device_changes_nothing():
    model, x = build("autoencoder")
    for options in {}, {"mixing": "allow"}:
        expected = gradext.batch_layer_grads(model, x, **options)
        with torch.device("meta"):
            grads = gradext.batch_layer_grads(model, x, **options)
            state = gradext.GradStatistics().partial_fit(gradext.batch_layer_factors(model, x)).state_dict()
        for name, value in expected.items():
            assert_close(grads[name], value, 1e-12)
        assert state["count"].item() == B
