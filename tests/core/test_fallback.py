"""Layers without a rule, uses that gradext cannot see, and layers with a user's rule."""

import copy

import pytest
import torch
from torch import Tensor, nn

import gradext
from gradext import CaptureError, GradFactors, UnsupportedLayerError, registered

from .common import LinearFunction

B = 4


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output.flatten(1) + 0.1).square().sum(1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(5, 6, num_layers=2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 4)
        self.b = nn.Bilinear(4, 4, 3)
        self.shift = nn.Parameter(torch.rand(3))
        self.a.weight.requires_grad_(False)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h, h) + self.shift


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: Recurrent(nn.LSTM), (7, 5)),
        (lambda: Recurrent(nn.GRU), (7, 5)),
        (Bilinear, (5,)),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)), (5,)),
    ],
    ids=["LSTM", "GRU", "bilinear", "weight norm"],
)
def test_what_has_no_rule_of_its_own_is_right_too(make, shape, loop):
    torch.manual_seed(0)
    model, x = make().double(), torch.rand(B, *shape).double()
    frozen = [p.requires_grad for p in model.parameters()]
    expected = loop(model, x, x, squared)
    expected = {name: value for name, value in expected.items() if model.get_parameter(name).requires_grad}
    grads = gradext.batch_layer_grads(model, x, loss=squared, fallback="error")
    assert set(grads) == set(expected)
    for name, value in grads.items():
        assert_close(value, expected[name])
    factors = gradext.batch_layer_factors(model, x, loss=squared)
    total = sum(value.flatten(1).square().sum(1) for value in expected.values())
    assert_close(factors.sq_norm(), total)
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("options", [{"layers": "1"}, {}], ids=str)
def test_cached_parametrisations_stay_the_callers(options, loop):
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)), nn.Linear(5, 5)).double()
    x = torch.rand(B, 5).double()
    expected = loop(model, x, x, gradext.losses.mse)
    for _ in range(2):
        with nn.utils.parametrize.cached():
            grads = gradext.batch_layer_grads(model, x, loss="mse", **options)
            again = gradext.batch_layer_grads(model, x, loss="mse", **options)  # with the weight in the cache
            gradext.losses.mse(model(x), x).sum().backward()
        assert set(grads) == set(again)
        for name, value in grads.items():
            assert_close(value, expected[name])
            assert_close(again[name], expected[name])
        for name, parameter in model.named_parameters():
            assert_close(parameter.grad, expected[name].sum(0))
            parameter.grad = None
    assert not nn.utils.parametrize._cache_enabled
    assert not nn.utils.parametrize._cache


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*used where gradext cannot see it:UserWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda part: torch.jit.trace(part, torch.rand(B, 5).double())])
def test_scripted_parts(make, loop):
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    model = nn.Sequential(nn.Linear(5, 5), part, nn.Linear(5, 5)).double()
    x = torch.rand(B, 5).double()
    expected = loop(model, x, x, gradext.losses.mse)
    model[1] = make(copy.deepcopy(part))
    grads = gradext.batch_layer_grads(model, x, loss="mse")
    assert set(grads) == set(expected)
    for name, value in grads.items():
        assert_close(value, expected[name])
    inside = {name: value for name, value in expected.items() if name.startswith("1.")}
    with pytest.raises(UnsupportedLayerError) as raised:
        gradext.batch_layer_grads(model, x, loss="mse", fallback="error")
    assert all(name in str(raised.value) for name in inside)  # all at once
    others = gradext.batch_layer_grads(model, x, loss="mse", exclude="1", fallback="error")
    assert set(others) == set(expected) - set(inside)


@pytest.mark.parametrize("loss", ["auto", "mse", "bce_logits"])
def test_named_losses_reach_what_has_no_rule(loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Bilinear(5, 5, 5))
    model.forward = lambda x: model[0](x, x)
    x = torch.rand(B, 5)
    grads = gradext.batch_layer_grads(model, x, loss=loss)
    one = [gradext.batch_layer_grads(model, x[b : b + 1], loss=loss) for b in range(B)]
    torch.testing.assert_close(grads["0.weight"], torch.cat([g["0.weight"] for g in one]))
    output = model(x)
    delta = 2 * (output - x) if loss != "bce_logits" else torch.sigmoid(output) - x
    torch.testing.assert_close(grads["0.bias"], delta.detach())


def test_a_loss_that_uses_parameters_itself():
    torch.manual_seed(0)
    model, x = Bilinear().double(), torch.rand(B, 5, dtype=torch.float64)
    held = model.shift

    def decayed(output, target):
        return squared(output, target) + model.b.weight.square().sum() + held.square().sum() + model.a.weight.norm()

    found = gradext.batch_layer_grads(model, x, loss=decayed, layers="")
    model.requires_grad_()
    for name, parameter in (("a.weight", model.a.weight), ("b.weight", model.b.weight), ("shift", held)):
        losses = [decayed(model(x[b : b + 1]), None).sum() for b in range(B)]
        assert_close(found[name], torch.stack([torch.autograd.grad(loss, parameter)[0] for loss in losses]))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_uses_inside_transforms_and_derivatives(loop):
    class Odd(nn.Module):
        def __init__(self, use):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
            self.use = use

        def forward(self, x):
            return self.b(self.a(x)) + self.use(self, x)

    def energy(m, x):
        with torch.enable_grad():
            v = x.detach().requires_grad_()
            return torch.autograd.grad(m.a(v).square().sum(), v, create_graph=True)[0]

    for use in energy, lambda m, x: torch.func.vmap(m.a)(x), lambda m, x: x * m.a.weight.sum():
        torch.manual_seed(0)
        model, x = Odd(use).double(), torch.rand(B, 5).double()
        expected = loop(model, x, x, squared)
        grads = gradext.batch_layer_grads(model, x, loss=squared)
        for name, value in expected.items():
            assert_close(grads[name], value)


def test_a_bias_that_is_shared_with_a_layer_without_samples(loop):
    class SharedBias(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
            self.b.bias = self.a.bias
            self.start = nn.Parameter(torch.rand(5))

        def forward(self, x):
            return self.b(torch.tanh(x + self.a(self.start)))

    torch.manual_seed(0)
    model, x = SharedBias().double(), torch.rand(B, 5).double()
    expected = loop(model, x, x, squared)
    grads = gradext.batch_layer_grads(model, x, loss=squared)
    assert set(grads) == set(expected)
    for name, value in grads.items():
        assert_close(value, expected[name])
    assert set(gradext.batch_layer_grads(model, x, loss=squared, layers="b")) == {"b.weight", "a.bias"}


def test_a_layer_that_branches_on_its_input(loop):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Bilinear(5, 5, 5)

        def forward(self, x):
            return self.a(x, x) if x.sum() > 0 else self.a(x, -x)

    model, x = Branching().double(), torch.rand(B, 5).double()
    expected = loop(model, x, x, squared)
    for name, value in gradext.batch_layer_grads(model, x, loss=squared).items():
        assert_close(value, expected[name])


# --- layers of the user's own ----------------------------------------------------------------------------------------


class Scale(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(features))
        self.inner = nn.Linear(features, features)

    def forward(self, x):
        return self.inner(x) * self.scale


@pytest.fixture
def rule():
    @gradext.register_layer(Scale)
    def gradients(layer, input, delta):
        back = delta * layer.scale
        found = {"scale": delta * torch.nn.functional.linear(input, layer.inner.weight, layer.inner.bias)}
        return found | {"inner.weight": GradFactors(input, back), "inner.bias": back}

    yield gradients
    forget(Scale)


def forget(kind):
    """Take a rule back."""
    registered._registered.pop(kind, None)


class Doubled(nn.Linear):
    pass


@pytest.mark.parametrize("kind", [nn.Linear, Doubled])
def test_a_rule_for_a_layer_that_has_one_holds_in_every_call(kind):
    model, x = nn.Sequential(kind(5, 5), nn.Tanh(), kind(5, 5)), torch.rand(B, 5)
    keys = {"loss": "mse", "layers": "*.weight"}
    plain = [gradext.batch_layer_factors(model, x, **keys) for _ in range(2)][-1]
    try:

        @gradext.register_layer(kind)
        def twice(layer, input, delta):
            return {"weight": GradFactors(input, 2 * delta), "bias": 2 * delta}

        for _ in range(3):
            found = gradext.batch_layer_factors(model, x, **keys)
            for name, factors in plain.items():
                torch.testing.assert_close(found[name].materialize(), 2 * factors.materialize())
    finally:
        forget(kind)


def test_a_rule_may_give_several_parameters_one_gradient():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.rand(5)), nn.Parameter(torch.rand(5))

        def forward(self, x):
            return x * (self.a + self.b)

    @gradext.register_layer(Shift)
    def gradients(layer, input, delta):
        return dict.fromkeys("ab", input * delta)

    try:
        grads = gradext.batch_layer_grads(nn.Sequential(Shift()), torch.rand(B, 5), loss=squared)
    finally:
        forget(Shift)
    assert torch.equal(grads["0.a"], grads["0.b"])
    grads["0.a"].zero_()
    assert (grads["0.b"] > 0).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_registered_layer_is_taken_as_a_whole(rule, frozen, loop):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), Scale(6), nn.Tanh(), Scale(6)).double().requires_grad_(not frozen)
    x = torch.rand(B, 5).double()
    expected = loop(model, x, x, squared)
    grads = gradext.batch_layer_grads(model, x, loss=squared)
    assert set(grads) == set(expected)
    for name, value in grads.items():
        assert_close(value, expected[name])
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_a_registered_layer_called_twice(rule, loop):
    torch.manual_seed(0)
    layer = Scale(6)
    model, x = nn.Sequential(layer, nn.Tanh(), layer).double(), torch.rand(B, 6).double()
    expected = loop(model, x, x, squared)
    for name, value in gradext.batch_layer_grads(model, x, loss=squared).items():
        assert_close(value, expected[name])


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))  # of no dimension

    def forward(self, x):
        return x * self.gain


@pytest.mark.parametrize("registered", [False, True])
def test_a_parameter_of_one_number(registered, loop):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 6), Gain()).double(), torch.rand(B, 5).double()
    expected = loop(model, x, x, squared)
    if registered:
        gradext.register_layer(Gain)(lambda layer, input, delta: {"gain": (input * delta).sum(1)})
    try:
        grads = gradext.batch_layer_grads(model, x, loss=squared)
        factors = gradext.batch_layer_factors(model, x, loss=squared)["1.gain"]
    finally:
        forget(Gain)
    for gradient in grads["1.gain"], factors.materialize():
        assert_close(gradient, expected["1.gain"])
    assert_close(factors.norm(), expected["1.gain"].abs())
    assert_close(factors.sum(), expected["1.gain"].sum())
    assert_close(factors.diag_fisher(), expected["1.gain"].square().mean())


def test_rules_that_give_something_else_are_refused(rule):
    model, x = Scale(6), torch.rand(B, 6)
    for wrong in {}, {"scale": torch.zeros(B, 5)}, None, {"scale": GradFactors(torch.zeros(B, 2), torch.zeros(B, 3))}:
        gradext.register_layer(Scale)(lambda layer, input, delta, wrong=wrong: wrong)
        with pytest.raises(ValueError, match=r"rule registered for Scale to give the gradient of 'scale'.*\(4, 6\)"):
            gradext.batch_layer_grads(model, x, loss=squared)
    with pytest.raises(TypeError, match=r"expected types derived from torch\.nn\.Module"):
        gradext.register_layer(int)


def test_a_registered_layer_that_overwrites_its_input_is_refused(rule):
    class Overwrites(Scale):
        def forward(self, x):
            return super().forward(x.relu_())

    gradext.register_layer(Overwrites)(rule)
    model, x = nn.Sequential(nn.Linear(5, 6), Overwrites(6)), torch.rand(B, 5)
    try:
        with pytest.raises(CaptureError, match=r"1\.scale.*modifies its input in place"):
            gradext.batch_layer_grads(model, x, loss=squared)
    finally:
        forget(Overwrites)


def test_a_registered_layer_may_fail_and_run_again(rule, loop):
    class Retries(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = Scale(6)

        def forward(self, x):
            try:
                return self.scale(x[:, :5])
            except RuntimeError:
                return self.scale(x)

    torch.manual_seed(0)
    model, x = Retries().double(), torch.rand(B, 6).double()
    expected = loop(model, x, x, squared)
    for name, value in gradext.batch_layer_grads(model, x, loss=squared).items():
        assert_close(value, expected[name])


def test_hooks_are_gone_after_an_exception(rule):
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    model = nn.Sequential(Scale(6), Fails())
    with pytest.raises(KeyboardInterrupt):
        gradext.batch_layer_grads(model, torch.rand(B, 6), loss=squared)
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


# --- what gradext cannot see ------------------------------------------------------------------------------------------


class HiddenUse(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 5)

    def forward(self, x):
        return self.a(x) + LinearFunction.apply(x, self.a.weight)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_use_that_cannot_be_seen_is_added_with_a_warning_or_refused(frozen, loop):
    torch.manual_seed(0)
    model, x = HiddenUse().double().requires_grad_(not frozen), torch.rand(B, 5).double()
    with pytest.raises(UnsupportedLayerError, match=r"a\.weight is used where gradext cannot see it"):
        gradext.batch_layer_grads(model, x, loss=squared, fallback="error")
    expected = loop(model, x, x, squared)
    with pytest.warns(UserWarning, match=r"a\.weight is used where gradext cannot see it"):
        grads = gradext.batch_layer_grads(model, x, loss=squared)
    for name, value in grads.items():
        assert_close(value, expected[name])
    assert model.a.weight.requires_grad is not frozen


class Views(nn.Module):
    """Holds a part of a weight that was cut out beforehand."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 5)
        self.parts = [self.a.weight[:3]]

    def forward(self, x):
        return self.a(x)[:, :3] + nn.functional.linear(x, self.parts[0])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore:.*used where gradext cannot see it:UserWarning")
def test_a_view_made_beforehand_counts(grad):
    torch.manual_seed(0)
    model, x = Views(), torch.rand(B, 5, requires_grad=True)
    expected = [torch.autograd.grad(squared(model(row), None).sum(), model.a.weight)[0] for row in x.split(1)]
    with torch.set_grad_enabled(grad):
        found = gradext.batch_layer_grads(model, x, loss=squared)
    assert_close(found["a.weight"], torch.stack(expected), 1e-5)
    assert not found["a.weight"].requires_grad


def test_a_loss_that_mixes_samples_is_found():
    model, x = nn.Linear(5, 5), torch.rand(B, 5)

    def centred(output, target):
        return (output - output.mean(0)).square().sum(1)

    with pytest.raises(CaptureError, match="samples mix"):
        gradext.batch_layer_grads(model, x, loss=centred)


def test_wrapped_for_several_processes(tmp_path, loop):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 5)).double(), torch.rand(B, 5).double()
    expected = loop(copy.deepcopy(model), x, x, squared)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            grads = gradext.batch_layer_grads(wrapped, x, loss=squared)
            for name, value in grads.items():
                assert_close(value, expected[name.removeprefix("module.")])
            wrapped(x).sum().backward()  # goes on as ever
        recurrent = Recurrent(nn.GRU).double()
        sequences = torch.rand(B, 7, 5).double()
        expected = loop(recurrent, sequences, sequences, squared)
        grads = gradext.batch_layer_grads(nn.parallel.DistributedDataParallel(recurrent), sequences, loss=squared)
        for name, value in grads.items():
            assert_close(value, expected[name.removeprefix("module.")])
    finally:
        torch.distributed.destroy_process_group()
