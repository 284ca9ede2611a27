"""The two quick routes, closed form and reading, against the watched forward and a loop over the samples."""

import gc
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradext
from gradext import capture, closed_form
from gradext.novelty import VAE

B = 5


@pytest.fixture
def routes(monkeypatch):
    """The route that gave the result of each call, in order."""
    taken = []

    def noted(module, name, route):
        function = getattr(module, name)

        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            if result is not None:
                taken.append(route)
            return result

        monkeypatch.setattr(module, name, call)

    noted(closed_form, "uses", "closed form")
    noted(capture, "_read", "read")
    noted(capture, "_captured", "watched")
    return taken


class Plain(nn.Module):
    """A model of the same layers that is no Sequential."""

    def __init__(self, *layers, forward=None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.change = forward or (lambda h: h)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.change(x)


def squared(output, target):
    return output.square().flatten(1).sum(1)


def assert_same(actual, expected, tolerance=1e-10):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance)


# --- closed form -----------------------------------------------------------------------------------------------------

ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"),
    nn.LeakyReLU(0.2), nn.ELU(0.7), nn.Softplus(2.0, 5.0), nn.Identity(), nn.Dropout(0.5),
]  # fmt: skip
CHAINS = {
    **{f"{layer}": lambda layer=layer: [nn.Linear(6, 7), layer, nn.Linear(7, 6)] for layer in ACTIVATIONS},
    "no bias": lambda: [nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 6)],
    "ends in a sigmoid": lambda: [nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6), nn.Sigmoid()],
    "nested": lambda: [nn.Sequential(nn.Linear(6, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 6))],
    "conv": lambda: [
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3, stride=2, padding=1), nn.ELU(), nn.Conv1d(4, 6, 2, groups=2),
        nn.Flatten(), nn.Linear(12, 6),
    ],
    "dilated conv": lambda: [nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 6, 2, dilation=2, padding=(1,)), nn.Flatten(),
                             nn.Linear(18, 6)],
}  # fmt: skip


@pytest.mark.parametrize("loss", ["auto", "mse", "bce_logits", "cross_entropy"])
@pytest.mark.parametrize("name", CHAINS)
def test_closed_form(name, loss, loop, routes):
    torch.manual_seed(0)
    model = nn.Sequential(*CHAINS[name]()).double().eval()
    x = torch.rand(B, 6, dtype=torch.float64)
    target = torch.tensor([0, 5, -100, 2, 2]) if loss == "cross_entropy" else torch.rand_like(x)
    if loss == "auto":
        oracle = gradext.losses.bce if isinstance(model[-1], nn.Sigmoid) else gradext.losses.mse
    else:
        oracle = gradext.losses.LOSSES[loss]
    expected = loop(model, x, target, oracle)
    grads = gradext.batch_layer_grads(model, x, loss=loss, target=target, include_bias=True)
    assert_same(grads, expected)
    for pick in "first", "last":
        part = gradext.batch_layer_grads(model, x, loss=loss, target=target, layers=pick)
        assert_same(part, {key: expected[key] for key in part})
    assert routes == ["closed form"] * 3
    model.requires_grad_(False)  # frozen or not
    assert_same(gradext.batch_layer_grads(model, x, loss=loss, target=target, include_bias=True), expected)


def test_a_layer_used_twice_in_a_chain(loop, routes):
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    model, x = nn.Sequential(layer, nn.Tanh(), layer).double(), torch.rand(B, 6, dtype=torch.float64)
    expected = loop(model, x, x, gradext.losses.mse)
    assert_same(gradext.batch_layer_grads(model, x, loss="mse", include_bias=True), expected)
    assert routes == ["closed form"]


@pytest.mark.parametrize("shape", [(B, 3, 6), (B, 2, 3, 6)])
def test_closed_form_over_positions(shape, loop, routes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6)).double()
    x = torch.rand(*shape, dtype=torch.float64)
    assert_same(
        gradext.batch_layer_grads(model, x, loss="mse", include_bias=True), loop(model, x, x, gradext.losses.mse)
    )
    assert routes == ["closed form"]


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def instance_forward():
    layer = nn.Linear(6, 6)
    layer.forward = types.MethodType(lambda self, x: 2 * F.linear(x, self.weight, self.bias), layer)
    return layer


def hooked():
    layer = nn.Linear(6, 6)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


def backward_hooked():
    layer = nn.ReLU()
    layer.register_full_backward_hook(lambda module, grads_in, grads_out: (2 * grads_in[0],))
    return layer


@pytest.mark.parametrize("build", [lambda: Doubled(6, 6), instance_forward, hooked])
def test_what_is_not_as_torch_made_it_is_watched(build, loop, routes):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), build()).double(), torch.rand(B, 6, dtype=torch.float64)
    expected = loop(model, x, x, gradext.losses.mse)
    for _ in range(2):
        assert_same(gradext.batch_layer_grads(model, x, loss="mse", include_bias=True), expected)
    assert routes == ["watched", "read"]


def test_backward_hooks_count(loop, routes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), backward_hooked(), nn.Linear(6, 6)).double()
    x = torch.rand(B, 6, dtype=torch.float64)
    expected = loop(model, x, x, gradext.losses.mse)
    for _ in range(3):
        assert_same(gradext.batch_layer_grads(model, x, loss="mse", include_bias=True), expected)
    assert routes == ["watched"] * 3


@pytest.mark.parametrize("last", [nn.Identity(), nn.Dropout(), nn.Unflatten(1, (2, 3)), nn.Flatten()])
def test_auto_looks_through_what_follows_a_sigmoid(last, loop):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6), nn.Sigmoid(), last).double().eval()
    x = torch.rand(B, 6, dtype=torch.float64)
    expected = loop(model, x, x, lambda output, target: gradext.losses.bce(output.flatten(1), target))
    for check in None, "sample":
        assert_same(gradext.batch_layer_grads(model, x, check=check, include_bias=True), expected)
    named = gradext.batch_layer_grads(model, x, loss="bce", include_bias=True)
    assert_same(named, expected)


def test_a_view_of_another_weight_in_a_chain_is_refused():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6, bias=False))
    del model[2].weight
    model[2].weight = model[0].weight.t()
    with pytest.raises(gradext.UnsupportedLayerError, match="a view made before the call"):
        gradext.batch_layer_grads(model, torch.rand(B, 6), loss="mse")


@pytest.mark.parametrize("layers", ["0", "2", None])
def test_a_chain_that_mixes_samples_is_refused(layers):
    model = nn.Sequential(nn.Linear(1, 1), nn.Flatten(0), nn.Linear(B, B))
    with pytest.raises(gradext.CaptureError, match=r"samples mix|expected an input of shape"):
        gradext.batch_layer_grads(model, torch.rand(B, 1), loss="mse", target=torch.rand(B), layers=layers)


def test_dropout_in_training_is_watched(routes):
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.Linear(6, 6))
    gradext.batch_layer_grads(model, torch.rand(B, 6), loss="mse")
    assert routes == ["watched"]


@pytest.mark.parametrize(
    ("loss", "target", "message"),
    [
        ("mse", torch.rand(B, 5), "as many elements a sample"),
        ("bce_logits", torch.full((B, 6), 2.0), r"values in \[0, 1\]"),
        ("cross_entropy", torch.full((B,), 6), "out of bounds"),
        ("mse", torch.zeros(B, 6, dtype=torch.int64), "floating-point"),
    ],
)
def test_wrong_targets(loss, target, message):
    model = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        gradext.batch_layer_grads(model, torch.rand(B, 6), loss=loss, target=target)


def test_the_caller_s_input_is_left_alone(routes):
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6)), torch.randn(B, 6)
    before = x.clone()
    factors = gradext.batch_layer_factors(model, x, loss="mse")
    assert routes == ["closed form"]
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    x.zero_()
    torch.testing.assert_close(factors["1"].activation, before.relu(), rtol=0, atol=0)


def test_sparse_inputs_are_refused_or_fall_back(loop):
    model, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).double(), torch.eye(B, 6).double()
    expected = loop(model, x, x, gradext.losses.mse)
    with pytest.raises(gradext.UnsupportedLayerError, match=r"0\.weight is used by linear"):
        gradext.batch_layer_grads(model, x.to_sparse(), target=x, loss="mse")
    later = gradext.batch_layer_grads(model, x.to_sparse(), target=x, loss="mse", layers="2")
    assert_same(later, {"2.weight": expected["2.weight"]})


# --- reading ---------------------------------------------------------------------------------------------------------


def test_reading_a_vae(loop, routes):
    torch.manual_seed(0)
    model = VAE(12, 7, 3).double().eval()
    x = torch.rand(B, 12, dtype=torch.float64)
    expected = loop(model, x, x, gradext.losses.bce)
    for layers in None, "first", "last", "decoder.0", ["encoder", "decoder"]:
        for frozen in False, True:
            model.requires_grad_(not frozen)
            grads = gradext.batch_layer_grads(model, x, layers=layers, include_bias=True)
            assert_same(grads, {key: expected[key] for key in grads})
    assert routes == ["watched", "read"] * 5
    model.requires_grad_(True)
    for _ in range(2):  # on the variance no loss depends: its zeros are not in the graph
        assert_same(gradext.batch_layer_grads(model, x, layers="all", include_bias=True), expected)
    assert routes[10:] == ["watched"] * 2
    model.requires_grad_(False)
    gradext.batch_layer_grads(model, x)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


READABLE = {
    "positions": (lambda: [nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6)], (B, 3, 6)),
    "convolutions": (
        lambda: [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)],
        (B, 2, 4, 4),
    ),
    "transposed": (lambda: [nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1)], (B, 2, 4)),
    "batch normalisation": (lambda: [nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)], (B, 6)),
}


@pytest.mark.parametrize("name", READABLE)
def test_readable(name, loop, routes):
    torch.manual_seed(0)
    build, shape = READABLE[name]
    model, x = Plain(*build()).double().eval(), torch.rand(*shape, dtype=torch.float64)
    expected = loop(model, x, x, squared)
    for _ in range(2):
        assert_same(gradext.batch_layer_grads(model, x, loss=squared, include_bias=True, layers="all"), expected)
    assert routes == ["watched", "read"]


@pytest.mark.parametrize("padding", ["valid", "same", 1, (0, 1)])
def test_one_image_is_read(padding, loop, routes):
    torch.manual_seed(0)
    model, x = Plain(nn.Conv2d(2, 3, (3, 3), padding=padding)).double(), torch.rand(1, 2, 5, 6, dtype=torch.float64)
    expected = loop(model, x, x, squared)
    for _ in range(2):
        assert_same(gradext.batch_layer_grads(model, x, loss=squared, include_bias=True), expected)
    assert routes == ["watched", "read"]


def test_residual_connections(loop, routes):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            h = self.a(x)
            return h + self.b(torch.relu(h)) * torch.sigmoid(h)

    torch.manual_seed(0)
    model, x = Residual().double(), torch.rand(B, 6, dtype=torch.float64)
    expected = loop(model, x, x, squared)
    for _ in range(2):
        assert_same(gradext.batch_layer_grads(model, x, loss=squared, include_bias=True), expected)
    assert routes == ["watched", "read"]


def test_an_empty_batch_says_nothing_of_others(routes):
    model, x = Plain(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 6)), torch.rand(B, 6)
    for rows in B, B, 0, B:
        gradext.batch_layer_grads(model, x[:rows], loss=squared)
    assert routes == ["watched", "read", "watched", "read"]


CHANGES = {
    "swap of samples": lambda h: h.flip(0),
    "normalisation over the batch": lambda h: h - h.mean(0),
    "product of samples": lambda h: h * h[:1],
    "transposition": lambda h: (h @ h.T)[:, :1],
    "powers in front": lambda h: h.abs().pow(torch.ones(B, 1, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_comes_to_mix_samples_is_not_read(change, routes):
    """What was read before holds for no other graph."""
    torch.manual_seed(0)
    model, x = Plain(nn.Linear(6, B)).double(), torch.rand(B, 6, dtype=torch.float64)
    for _ in range(2):
        gradext.batch_layer_grads(model, x, loss=squared)
    assert routes == ["watched", "read"]
    model.change = CHANGES[change]
    for options in {}, {"check": "sample"}:
        with pytest.raises(gradext.CaptureError, match="samples mix"):
            gradext.batch_layer_grads(model, x, loss=squared, **options)


@pytest.mark.parametrize("last", [False, True])
def test_hooks_on_outputs_count_when_read(last, loop, routes):
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.factor = 1.0

        def forward(self, x):
            h = self.a(x)
            y = self.b(torch.tanh(h))
            if self.factor != 1:
                (y if last else h).register_hook(lambda gradient: self.factor * gradient)
            return y

    torch.manual_seed(0)
    model, x = Hooked().double(), torch.rand(B, 6, dtype=torch.float64)
    for model.factor in 1.0, 1.0, 3.0:
        expected = loop(model, x, x, gradext.losses.mse)
        assert_same(gradext.batch_layer_grads(model, x, loss="mse", include_bias=True), expected)
    assert routes == ["watched", "read", "read"]


def test_inputs_modified_in_place_are_not_read():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.overwrite = False

        def forward(self, x):
            h = x + 0
            y = self.a(h)
            if self.overwrite:
                h.zero_()
            return y

    model, x = Overwriting(), torch.rand(B, 6)
    for _ in range(2):
        gradext.batch_layer_grads(model, x, loss="mse")
    model.overwrite = True
    for _ in range(2):
        with pytest.raises(gradext.CaptureError, match="modified in place"):
            gradext.batch_layer_grads(model, x, loss="mse")


def test_large_inputs_leave_the_encoder_out_of_the_graph(routes, monkeypatch):
    monkeypatch.setattr(capture, "READ_ELEMENTS", B * 12)
    model, x = VAE(12, 7, 3).eval(), torch.rand(B, 12)
    for batch in x, x, torch.cat([x, x]):
        gradext.batch_layer_grads(model, batch)
    model.encoder.requires_grad_(False), model.mu.requires_grad_(False), model.logvar.requires_grad_(False)
    gradext.batch_layer_grads(model, torch.cat([x, x]), include_bias=True)
    gradext.batch_layer_grads(model, torch.cat([x, x]), include_bias=True)
    assert routes == ["watched", "read", "watched", "watched", "read"]


def test_a_changed_model_is_chosen_from_anew():
    """What a model consists of is looked at in every call."""
    model, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), torch.rand(B, 6)
    assert set(gradext.batch_layer_grads(model, x)) == {"0.weight", "2.weight"}
    model[2] = nn.Tanh()
    assert set(gradext.batch_layer_grads(model, x)) == {"0.weight"}
    model.append(nn.Linear(6, 6))
    assert set(gradext.batch_layer_grads(model, x)) == {"0.weight", "3.weight"}
    model[3].weight = model[0].weight
    assert set(gradext.batch_layer_grads(model, x)) == {"0.weight"}
    model[3].weight = nn.Parameter(torch.ones(6, 6))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    assert set(gradext.batch_layer_grads(model, x)) == {"3.weight"}


def test_a_decoder_that_is_a_property_is_asked_for_anew():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoders, self.current = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]), 0

        @property
        def decoder(self):
            return self.decoders[self.current]

        def forward(self, x):
            return self.decoders[1](self.decoders[0](x))

    model, x = Several(), torch.rand(B, 6)
    for model.current in 0, 1, 0:
        assert set(gradext.batch_layer_grads(model, x)) == {f"decoders.{model.current}.weight"}


def test_models_can_go():
    model = nn.Sequential(nn.Linear(6, 6))
    outer = Plain(model)
    for _ in range(2):
        gradext.batch_layer_grads(outer, torch.rand(B, 6), loss="mse", layers="all")
        gradext.batch_layer_grads(model, torch.rand(B, 6), loss="mse")
    gone = weakref.ref(model), weakref.ref(outer)
    del model, outer
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


class Unused(nn.Module):
    """Beside what the losses depend on runs ``dead``, of which they do not, before it or after."""

    def __init__(self, dead, where):
        super().__init__()
        self.dead, self.where = dead, where
        for name in {dead, "b", "c"}:
            self.add_module(name, nn.Linear(6, 6))

    def forward(self, x):
        if self.where == "before":
            getattr(self, self.dead)(x)
        y = self.c(torch.tanh(self.b(x)))
        if self.where == "after":
            getattr(self, self.dead)(x)
        return y


@pytest.mark.parametrize("dead", ["a", "b", "c"])
@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize(("layers", "names"), [("first", "b"), ("last", "c"), (None, "abc"), ("b", "b"), (["c"], "c")])
def test_what_the_losses_do_not_depend_on_is_neither_picked_nor_a_position(dead, where, layers, names, loop, routes):
    torch.manual_seed(0)
    model, x = Unused(dead, where).double(), torch.rand(B, 6, dtype=torch.float64)
    names = [name for name in names if name == dead or name != "a"]
    expected = loop(model, x, x, gradext.losses.mse)
    for _ in range(3):
        factors = gradext.batch_layer_factors(model, x, loss="mse", layers=layers)
        assert sorted(factors) == names
        assert {f.positions for f in factors.values()} == {1}
        for name, f in factors.items():
            torch.testing.assert_close(f.materialize(), expected[f"{name}.weight"])
    assert routes == (["watched"] * 3 if "a" in names else ["watched", "read", "read"])


@pytest.mark.parametrize("closed", [True, False])
def test_results_come_in_one_order_by_every_route(closed, routes):
    layers = [nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Conv1d(2, 2, 2), nn.Flatten(), nn.Linear(6, 3)]
    model, x = nn.Sequential(*layers) if closed else Plain(*layers), torch.rand(B, 1, 6)
    keys = {"target": torch.rand(B, 3), "loss": "mse", "include_bias": True}
    orders = [list(gradext.batch_layer_factors(model, x, **keys)) for _ in range(2)]
    orders += [list(gradext.batch_layer_factors(model, x, **keys, check="sample"))]
    assert orders == [orders[0]] * 3
    assert routes == (["closed form"] * 2 if closed else ["watched", "read"]) + ["watched"]


class Noisy(Unused):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


@pytest.mark.parametrize("layers", [None, "first", ["a", "b"], ["b"]])
def test_every_call_draws_the_same_random_numbers(layers):
    model, x, found = Noisy("a", "before"), torch.rand(B, 6), []
    for _ in range(3):
        torch.manual_seed(0)
        found.append(gradext.batch_layer_grads(model, x, loss="mse", layers=layers))
    for grads in found:
        assert_same(grads, found[0])
