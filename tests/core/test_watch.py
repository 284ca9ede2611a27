"""`gradext.watch` around the user's own code: any forward, training steps, threads, exceptions, choices and errors."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import gradext

from .common import B, D, Net, Product, T, V, assert_right, in_threads, linear, own_gradients, squared, x_of

pytestmark = pytest.mark.usefixtures("double_precision")


def autoencoder() -> Net:
    layers = {
        "encoder": nn.Sequential(linear(D, 3), nn.Tanh()),
        "decoder": nn.Sequential(linear(3, D), nn.LayerNorm(D)),
    }
    return Net(lambda m, x: m.decoder(m.encoder(x)), **layers)


# --- any forward -----------------------------------------------------------------------------------------------------


def of_parts(m):
    h = m.encoder(x_of())
    return squared(m.decoder(h + 0.1)) + squared(h)


def sample_by_sample(m):
    return torch.stack([m(x)[0].square().sum() for x in x_of().split(1)])


def written_one_by_one(m):
    losses = torch.empty(B)
    for b in range(B):
        losses[b] = m(x_of(1, D)).square().sum()
    return losses


def of_two_batches(m):
    return torch.cat([squared(m(x_of(3, D))), squared(m(x_of(2, D)) - 1)])


def of_different_lengths(m):
    return torch.stack([m(x_of(n, D)).square().mean() for n in (1, 5, 2)])


def twice(m):
    x = x_of()
    return squared(m(x) - m(x.roll(1, 1)))


def temporal_difference(m):
    x, after, reward = x_of(), x_of(), x_of(B)
    with torch.no_grad():
        target = reward + 0.9 * m(after).amax(1)
    return (m(x)[:, 0] - target).square()


def of_a_teacher(m):
    x, teacher = x_of(), copy.deepcopy(m)
    return squared(m(x) - teacher(x).detach())


def autoregressive(m):
    x, losses = x_of(), 0
    for _ in range(3):
        x = m(x)
        losses = losses + squared(x)
        x = x.detach().round()
    return losses


def with_a_penalty(m):
    return squared(m(x_of())) + 0.1 * sum(p.square().sum() for p in m.parameters())


def by_its_weights(m):
    return squared(F.linear(x_of(), m.encoder[0].weight).tanh() @ m.decoder[0].weight.t())


def by_functional_call(m):
    changed = {name: 1.1 * p for name, p in m.named_parameters()}
    return squared(torch.func.functional_call(m, changed, (x_of(),)))


def of_groups(m):
    owners = torch.tensor([0, 2, 2, 1, 0, 3, 3])
    return torch.zeros(B).index_add(0, owners, squared(m(x_of(7, D))))


def of_the_last_dimension(m):
    return m(x_of(T, B, D)).square().sum((0, 2))


def with_dropout(m):
    return squared(F.dropout(m(x_of()), 0.5))


FORWARDS = [
    *(of_parts, sample_by_sample, written_one_by_one, of_two_batches, of_different_lengths, twice, autoregressive),
    *(temporal_difference, of_a_teacher, with_a_penalty, by_its_weights, by_functional_call, of_groups),
    *(of_the_last_dimension, with_dropout),
]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("run", FORWARDS, ids=lambda run: run.__name__)
def test_any_forward(run, frozen, right):
    torch.manual_seed(0)
    model = autoencoder()
    torch.manual_seed(1)
    expected = own_gradients(model, run(model))
    model.requires_grad_(not frozen)
    for what in ("grads", "factors", "grads"):
        torch.manual_seed(1)
        with gradext.watch(model) as watch:
            losses = run(model)
        found = getattr(watch, what)(losses)
        assert list(found) == list(expected) or set(found) == set(expected)
        right({name: g.materialize() if what == "factors" else g for name, g in found.items()}, expected)
    assert all(p.grad is None and p.requires_grad is not frozen for p in model.parameters())


def test_a_part_of_a_model_is_watched(right):
    torch.manual_seed(0)
    model, x = autoencoder(), x_of()
    expected = own_gradients(model.decoder, squared(model(x)))
    with gradext.watch(model.decoder) as watch:
        losses = squared(model(x))
    right(watch.grads(losses), expected)
    assert set(watch.grads(losses)) == set(expected)


def test_two_models_are_watched_at_once(right):
    torch.manual_seed(0)
    first, second, x = autoencoder(), autoencoder(), x_of()
    expected = [own_gradients(m, squared(second(first(x)))) for m in (first, second)]
    with gradext.watch(first) as one, gradext.watch(second) as other:
        losses = squared(second(first(x)))
    for watch, want in zip((one, other), expected, strict=True):
        right(watch.grads(losses), want)


def test_a_call_inside_the_block_is_a_constant_of_it(right):
    torch.manual_seed(0)
    model, x = autoencoder(), x_of()
    weights = gradext.batch_layer_factors(model, x, loss="mse").norm()
    expected = own_gradients(model, weights * squared(model(x)))
    with gradext.watch(model) as watch:
        losses = gradext.batch_layer_factors(model, x, loss="mse").norm() * squared(model(x))
    right(watch.grads(losses), expected)


def test_several_losses_of_one_forward(right):
    torch.manual_seed(0)
    model, x = autoencoder(), x_of()
    outputs = model(x)
    expected = [own_gradients(model, outputs[:, k]) for k in range(2)]
    with gradext.watch(model) as watch:
        outputs = model(x)
        losses = [outputs[:, k] for k in range(2)]
    for loss, want in zip(losses, expected, strict=True):
        right(watch.grads(loss), want)


def test_losses_that_depend_on_no_parameter_have_zeros():
    model, x = autoencoder(), x_of()
    with gradext.watch(model) as watch:
        losses = squared(x)
    assert all(g.shape[0] == B and not g.any() for g in watch.grads(losses).values())


@pytest.mark.parametrize("around", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_matter(around, right):
    torch.manual_seed(0)
    model, x = autoencoder(), x_of()
    expected = own_gradients(model, squared(model(x)))
    with around():
        with gradext.watch(model) as watch:
            losses = squared(model(x.clone()))
        found = watch.grads(losses)
    right(found, expected)
    assert not any(g.requires_grad for g in found.values())


def test_other_modes_still_see_the_model(right):
    class Count(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.calls += func is F.linear
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    model, x = autoencoder(), x_of()
    expected = own_gradients(model, squared(model(x)))
    with gradext.watch(model) as watch, Count() as inner:
        losses = squared(model(x))
    right(watch.grads(losses), expected)
    with Count() as outer, gradext.watch(model):
        model(x)
    assert inner.calls == outer.calls == 2


def test_second_derivatives(right):
    """create_graph: a penalty on the norms differentiates through to the parameters."""
    torch.manual_seed(0)
    model, x = autoencoder(), x_of()
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(loss, parameters, create_graph=True) for loss in squared(model(x))]
    expected = torch.autograd.grad(sum(g.square().sum() for row in rows for g in row), parameters)
    with gradext.watch(model, create_graph=True) as watch:
        losses = squared(model(x))
    for norms in (watch.factors(losses).sq_norm(), sum(g.square().sum() for g in watch.grads(losses).values())):
        found = torch.autograd.grad(norms.sum(), parameters, retain_graph=True)
        for (name, _), g, want in zip(model.named_parameters(), found, expected, strict=True):
            right({name: g}, {name: want})


# --- training --------------------------------------------------------------------------------------------------------


def transformer():
    layer = nn.TransformerEncoderLayer(D, 2, 8, 0.1, batch_first=True)
    return Net(
        lambda m, i: m.out(m.layer(m.e(i) + m.p)),
        e=nn.Embedding(V, D),
        p=nn.Parameter(x_of(T, D)),
        layer=layer,
        out=linear(),
    )


def tied():
    return Net(lambda m, i: F.linear(m.a(m.e(i)).tanh(), m.e.weight), e=nn.Embedding(V, D), a=linear())


def convolutional():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(3, 3), nn.ReLU(inplace=True), nn.Flatten(), linear(3 * 4, D))


def low_rank():
    members = {"a": linear(), "up": nn.Parameter(x_of(D, 2)), "down": nn.Parameter(x_of(2, D))}
    return Net(lambda m, x: F.linear(x, m.a.weight + m.up @ m.down, m.a.bias).sin(), **members)


def checkpointed():
    return Net(lambda m, x: m.b(checkpoint(lambda h: m.a(h).tanh(), x, use_reentrant=False)), a=linear(), b=linear())


def half_frozen():
    model = autoencoder()
    model.encoder.requires_grad_(False)
    return model


def index():
    return torch.randint(0, V, (B, T))


STEPS = {
    "layers": (autoencoder, x_of),
    "over positions": (autoencoder, lambda: x_of(B, T, D)),
    "a transformer with dropout": (transformer, index),
    "a tied embedding": (tied, index),
    "a convolution": (convolutional, lambda: x_of(B, 1, 4, 4)),
    "W + B @ A": (low_rank, x_of),
    "a checkpoint": (checkpointed, x_of),
    "a frozen part": (half_frozen, x_of),
    "weight norm": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(linear()), nn.Tanh(), linear()), x_of),
    "an LSTM": (lambda: Net(lambda m, x: m.rnn(x)[0], rnn=nn.LSTM(D, 3, batch_first=True)), lambda: x_of(B, T, D)),
    "a shared layer": (lambda: nn.Sequential(*[linear(), nn.Tanh()] * 2), x_of),
    "flattened rows": (lambda: Net(lambda m, x: m.a(x.view(-1, D)).view_as(x), a=linear()), lambda: x_of(B, T, D)),
}  # fmt: skip

# What needs a second backward to prove whose rows are whose, for which it is too late then: an error that names it.
REFUSED_AFTER_THE_STEP = {"an LSTM"}

REDUCTIONS = {
    "mean": lambda losses: losses.mean(),
    "sum": lambda losses: losses.sum(),
    "weighted": lambda losses: (losses * torch.linspace(0.5, 2.0, len(losses))).sum(),
    "squared": lambda losses: losses.square().mean(),
    "scaled": lambda losses: 1024 * losses.mean(),
    "softmax": lambda losses: losses.logsumexp(0),
}


def trained(name, watched: bool, reduction, steps=3, set_to_none=True):
    """Some steps of Adam; the gradients at each, the parameters at the end, and what the watch tells of the last."""
    make, sample = STEPS[name]
    torch.manual_seed(0)
    model, batches = make().train(), [sample() for _ in range(2 * steps)]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    seen, factors = [], None
    for k, x in enumerate(batches):
        torch.manual_seed(k)
        with gradext.watch(model, train=True) if watched else contextlib.nullcontext() as watch:
            losses = squared(model(x))
        reduction(losses).backward()
        if watched and name not in REFUSED_AFTER_THE_STEP:
            factors = watch.factors()
        seen += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        if k % 2:  # two batches a step
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    return seen, list(model.parameters()), factors


@pytest.mark.parametrize("name", STEPS)
def test_a_watched_training_is_the_same_training(name):
    """The gradients and the parameters, bit for bit."""
    for set_to_none in (True, False):
        plain = trained(name, False, REDUCTIONS["mean"], set_to_none=set_to_none)
        watched = trained(name, True, REDUCTIONS["mean"], set_to_none=set_to_none)
        for of_plain, of_watched in zip(plain[:2], watched[:2], strict=True):
            for a, b in zip(of_plain, of_watched, strict=True):
                assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", STEPS)
def test_factors_of_a_training_step_are_those_of_each_samples_own_loss(name, reduction, right):
    make, sample = STEPS[name]
    torch.manual_seed(0)
    model, x = make().train(), sample()
    torch.manual_seed(1)
    names = [key for key, p in model.named_parameters() if p.requires_grad]
    with torch.enable_grad():
        plain = copy.deepcopy(model).requires_grad_()
        expected = own_gradients(plain, squared(plain(x)))
    torch.manual_seed(1)
    with gradext.watch(model, train=True) as watch:
        losses = squared(model(x))
    REDUCTIONS[reduction](losses).backward()
    try:
        found = watch.factors()
    except gradext.CaptureError as error:
        refusal = str(error)
        assert name in REFUSED_AFTER_THE_STEP
        assert names[0] in refusal
        return
    assert set(found) == set(names)
    right({key: f.materialize() for key, f in found.items()}, expected)


@pytest.mark.parametrize("name", STEPS)
def test_factors_before_the_backward_leave_it_as_it_is(name, right):
    make, sample = STEPS[name]
    torch.manual_seed(0)
    model, x = make().train(), sample()
    torch.manual_seed(1)
    plain = copy.deepcopy(model)
    squared(plain(x)).mean().backward()
    torch.manual_seed(1)
    with gradext.watch(model, train=True) as watch:
        losses = squared(model(x))
    found = watch.factors(losses)
    losses.mean().backward()
    for (key, p), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if p.requires_grad:
            assert torch.equal(p.grad, other.grad), key
            right({key: found[key].materialize().sum(0) / B}, {key: other.grad})


def test_a_step_of_the_optimizer_before_the_factors_changes_nothing(right):
    """Or is refused: what the general rules need of the weights was theirs before the step."""
    members = {"a": linear(), "n": nn.LayerNorm(D), "s": nn.Parameter(x_of(D)), "w": nn.Parameter(x_of(2, 3, 3))}
    forward = lambda m, x: torch.einsum("bhi,hij->bhj", m.n(m.a(x) * m.s).tanh().unflatten(1, (2, 3)), m.w)  # noqa: E731
    torch.manual_seed(0)
    model, x = Net(forward, **members), x_of()
    expected = own_gradients(model, squared(model(x)))
    with gradext.watch(model, train=True) as watch:
        losses = squared(model(x))
    losses.mean().backward()
    torch.optim.SGD(model.parameters(), 10.0).step()
    try:
        found = watch.factors()
    except gradext.CaptureError:
        return
    right({key: f.materialize() for key, f in found.items()}, expected)


def test_samples_without_weight_in_the_step_are_told_apart(right):
    """Their gradients cannot be had from that backward: not a number, and no wrong one; the others' are right."""
    torch.manual_seed(0)
    model, x = autoencoder(), x_of()
    expected = own_gradients(model, squared(model(x)))
    with gradext.watch(model, train=True) as watch:
        losses = squared(model(x))
    (losses * torch.tensor([1.0, 0.0, 2.0, 0.5])).sum().backward()
    norms = watch.factors().norm()
    assert norms[1].isnan()
    total = sum(g.flatten(1).square().sum(1) for g in expected.values()).sqrt()
    right({"": norms[[0, 2, 3]]}, {"": total[[0, 2, 3]]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_under_autocast(dtype):
    torch.set_default_dtype(torch.float32)
    found = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, x = autoencoder(), x_of(B, T, D)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        with autocast, gradext.watch(model, train=True) if watched else contextlib.nullcontext() as watch:
            losses = squared(model(x).float())
        losses.mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    factors = watch.factors()
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name
        error = (factors[name].materialize().float().sum(0) / B - grad).abs().max()
        assert error <= (32 * 2**-8 if dtype == torch.bfloat16 else 1e-5) * grad.abs().max(), name


def test_mixing_in_a_training_step_is_refused_and_trains_as_ever():
    torch.manual_seed(0)
    model, x = nn.Sequential(linear(), nn.BatchNorm1d(D), nn.Tanh(), linear()), x_of()
    plain = copy.deepcopy(model)
    squared(plain(x)).mean().backward()
    with gradext.watch(model, train=True) as watch:
        losses = squared(model(x))
    losses.mean().backward()
    with pytest.raises(gradext.CaptureError):
        watch.factors()
    for (name, p), other in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(p.grad, other[1].grad), name
    for (name, b), other in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(b, other[1]), name  # a forward of the user's own moves the running statistics


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_unseen_code_in_a_training_step_is_right_or_refused(right):
    torch.manual_seed(0)
    model, x = Net(lambda m, x: m.b(Product.apply(x, m.a.weight)), a=linear(), b=linear()), x_of()
    plain = copy.deepcopy(model)
    expected = own_gradients(plain, squared(plain(x)))
    squared(plain(x)).mean().backward()
    for early in (True, False):
        with gradext.watch(model, train=True) as watch:
            losses = squared(model(x))
        if early:
            right(watch.grads(losses), expected)
        losses.mean().backward()
        if not early:
            with contextlib.suppress(gradext.CaptureError):
                right(watch.grads(), expected)
        for p, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (other.grad is None)
            assert p.grad is None or torch.equal(p.grad, other.grad)
        model.zero_grad()


def test_hooks_and_optimizers_in_the_backward_run_as_ever():
    torch.manual_seed(0)
    model, x, steps = autoencoder(), x_of(), []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: steps.append(p.grad.clone()))
    with gradext.watch(model, train=True) as watch:
        losses = squared(model(x))
    losses.mean().backward()
    watch.factors()
    assert len(steps) == len(list(model.parameters()))


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_threads_take_turns_on_one_model(frozen, right):
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(linear()), nn.Tanh(), nn.LSTM(D, D, batch_first=True))
    model = Net(lambda m, x: m.out(m.net(x)[0]), net=model, out=linear())
    inputs = [x_of(B, T, D) for _ in range(4)]
    expected = [own_gradients(model, squared(model(x))) for x in inputs]
    model.requires_grad_(not frozen)

    def work(k):
        for way in range(6):
            if way % 2:
                with gradext.watch(model) as watch:
                    losses = squared(model(inputs[k]))
                found = watch.grads(losses)
            else:
                found = gradext.batch_layer_grads(model, inputs[k], loss=lambda output, target: squared(output))
            right(found, expected[k])

    in_threads(*(lambda k=k: work(k) for k in range(4)))
    assert all(p.requires_grad is not frozen and p.grad is None for p in model.parameters())


def test_a_thread_that_fails_leaves_the_model_to_the_others(right):
    torch.manual_seed(0)
    model, x = autoencoder(), x_of()
    expected = own_gradients(model, squared(model(x)))

    def fails():
        with contextlib.suppress(ZeroDivisionError), gradext.watch(model):
            model(x)
            _ = 1 / 0

    def works():
        with gradext.watch(model) as watch:
            losses = squared(model(x))
        right(watch.grads(losses), expected)

    in_threads(*[fails, works] * 3)
    works()


# --- exceptions and interrupts ---------------------------------------------------------------------------------------


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.trouble = nn.Parameter(torch.ones(D)), None

    def forward(self, x):
        if self.trouble is not None:
            self.trouble()
        return x * self.scale


@pytest.fixture
def rule():
    gradext.register_layer(Scale)(lambda layer, input, delta: {"scale": input * delta})
    yield
    gradext.register_layer.__globals__["_registered"].pop(Scale)


def delicate() -> nn.Module:
    """With buffers that a forward moves, a parametrisation, and a layer that has a rule of its own."""
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(linear()), nn.Unflatten(1, (2, 3)),
        nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(), Scale(), linear(),
    )  # fmt: skip
    model[0].parametrizations.weight.original.requires_grad_(False)
    return model.train()


def surroundings() -> tuple:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.overrides._get_current_function_mode_stack() == [],
        torch.get_rng_state().tolist(),
    )


def buffers(model) -> dict[str, Tensor]:
    return {name: (b, b.clone()) for name, b in model.named_buffers()}


class Trouble(Exception):
    """From the model, the loss or a hook."""


PLACES = ["the forward", "the loss", "the backward", "a hook", "a layer with a rule of its own"]


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("way", ["watch", "grads", "train"])
def test_an_exception_leaves_the_model_as_it_was(way, where, error, rule, model_state):
    torch.manual_seed(0)
    model, x = delicate(), x_of()

    def fail(*args):
        raise error(where)

    def loss(output, target):
        if where == "the loss":
            fail()
        if where == "the backward" and output.requires_grad:
            output.register_hook(fail)
        return squared(output)

    if where == "the forward":
        model.append(Net(fail))
    elif where == "a hook":
        model[4].register_forward_hook(fail)
    elif where == "a layer with a rule of its own":
        model[4].trouble = fail
    model_before, around_before, buffers_before = model_state(model), surroundings(), buffers(model)
    try:
        if way == "grads":
            gradext.batch_layer_grads(model, x, loss=loss)
        else:
            with gradext.watch(model, train=way == "train") as watch:
                losses = loss(model(x), x)
            if way == "train":
                losses.mean().backward()
            watch.grads(losses)
    except error as raised:
        message = str(raised)
    assert message == where
    assert surroundings() == around_before
    if way == "grads":  # in a block the forward is the user's own, which moves them
        for name, (buffer, value) in buffers(model).items():
            assert buffer is buffers_before[name][0]
            assert torch.equal(value, buffers_before[name][1]), name
    for p in model.parameters():
        p.grad = None
    assert model_state(model) == model_before
    if where == "the forward":
        del model[-1]
    model[4]._forward_hooks.clear()
    model[4].trouble = None
    assert len(gradext.batch_layer_grads(model, x, loss=lambda output, target: squared(output))) == 4


@pytest.mark.parametrize("frozen", [False, True])
def test_a_call_leaves_the_model_and_torch_as_they_were(frozen, rule, model_state):
    torch.manual_seed(0)
    model, x = delicate().requires_grad_(not frozen), x_of()
    model_before, around_before, buffers_before = model_state(model), surroundings(), buffers(model)
    gradext.batch_layer_grads(model, x, loss="mse")
    gradext.batch_layer_factors(model, x, loss="mse", layers=["5"])
    assert model_state(model) == model_before
    assert surroundings() == around_before
    for name, (buffer, value) in buffers(model).items():
        assert buffer is buffers_before[name][0]
        assert torch.equal(value, buffers_before[name][1]), name


def test_a_watched_forward_moves_buffers_as_any_forward():
    torch.manual_seed(0)
    model = nn.Sequential(
        linear(), nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
    )
    other, x = copy.deepcopy(model), x_of()
    other(x)
    with gradext.watch(model) as watch:
        losses = squared(model(x))
    watch.factors(losses)
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


def test_a_block_that_is_left_early():
    model, x = autoencoder(), x_of()

    def early():
        with gradext.watch(model.requires_grad_(False)):
            return squared(model(x))

    early()
    assert not any(p.requires_grad for p in model.parameters())
    for _ in range(2):
        with gradext.watch(model) as watch:
            losses = squared(model(x))
            break
    assert watch.factors(losses).norm().shape == (B,)


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_models_are_copied_and_pickled_after_a_call(train, right):
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(linear()), nn.Tanh(), nn.LayerNorm(D), linear())
    del model[0]  # a parametrised layer's class is made at run time, and cannot be pickled
    x, keys = x_of(), list(model.state_dict())
    with gradext.watch(model, train=train) as watch:
        losses = squared(model(x))
    if train:
        losses.mean().backward()
    expected = watch.grads(losses)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(other.state_dict()) == keys
        right(gradext.batch_layer_grads(other, x, loss=lambda output, target: squared(output)), expected)
    assert vars(model).keys() == vars(nn.Sequential()).keys()


def test_results_are_pickled_and_copied():
    model, x = autoencoder(), x_of()
    factors = gradext.batch_layer_factors(model, x)
    for other in (copy.deepcopy(factors), pickle.loads(pickle.dumps(factors))):
        assert torch.equal(other.norm(), factors.norm())
        assert list(other) == list(factors)


# --- coverage --------------------------------------------------------------------------------------------------------


def test_coverage_names_what_is_in_and_what_is_not():
    torch.manual_seed(0)
    integers = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    members = {
        "e": nn.Embedding(V, D),
        "a": linear(),
        "n": nn.LayerNorm(D),
        "s": nn.Parameter(x_of(D)),
        "spare": linear(),
    }
    model = Net(lambda m, i: m.n(m.a(m.e(i)) * m.s), **members, q=integers, c=linear().requires_grad_(False))
    results = [
        gradext.batch_layer_grads(model, index(), loss=lambda output, target: squared(output), exclude="a.bias"),
        gradext.batch_layer_factors(model, index(), loss=lambda output, target: squared(output), exclude="a.bias"),
    ]
    tokens = index()
    with gradext.watch(model, exclude="a.bias") as watch:
        losses = squared(model(tokens))
    results.append(watch.factors(losses))
    for result in results:
        coverage = result.coverage
        assert set(coverage.rules) == set(result)
        assert set(coverage.left_out) == {"a.bias", "q", "c.weight", "c.bias"}
        assert set(coverage.rules) | set(coverage.left_out) == {name for name, _ in model.named_parameters()}
        assert "linear" in coverage.rules["a.weight"]
        assert "embedding" in coverage.rules["e.weight"]
        assert "unused" in coverage.rules["spare.weight"]
        assert not result["spare.bias"].norm().any()
        assert "frozen" in coverage.left_out["c.weight"]
        assert "int8" in coverage.left_out["q"]
        assert "exclude" in coverage.left_out["a.bias"]
        shown = repr(result)
        assert all(name in shown for name in coverage.left_out), shown
    assert str(watch.coverage) == str(results[2].coverage)


def test_coverage_of_what_takes_a_backward_a_sample():
    model = Net(lambda m, x: m.b(Product.apply(x, m.a.weight)), a=linear(), b=linear())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        grads = gradext.batch_layer_grads(model, x_of(), loss=lambda output, target: squared(output))
    assert "backward" in grads.coverage.rules["a.weight"]
    assert "backward" not in grads.coverage.rules["b.weight"]
    (warning,) = caught
    assert "a.weight" in str(warning.message)
    assert warning.filename == __file__


# --- which parameters ------------------------------------------------------------------------------------------------


def llm() -> Net:
    block = lambda: Net(lambda m, x: m.up(m.q_proj(x) + m.v_proj(x)), q_proj=linear(), v_proj=linear(), up=linear())  # noqa: E731
    members = {"e": nn.Embedding(V, D), "layers": nn.ModuleList([block(), block()]), "norm": nn.LayerNorm(D)}
    model = Net(
        lambda m, i: m.head(m.norm(m.layers[1](m.layers[0](m.e(i))))), **members, head=nn.Linear(D, V, bias=False)
    )
    model.head.weight = model.e.weight
    model.norm.requires_grad_(False)
    return model


MODEL = llm()
ALL = [name for name, _ in MODEL.named_parameters()]
TRAINABLE = [name for name in ALL if not name.startswith("norm")]


def of(*parts: str) -> list[str]:
    return [name for name in ALL if any(part in f".{name}" for part in parts)]


CHOICES = {
    "nothing": (None, TRAINABLE),
    "trainable": ("trainable", TRAINABLE),
    "a parameter's name": ("layers.0.up.bias", ["layers.0.up.bias"]),
    "a frozen one's": ("norm.weight", ["norm.weight"]),
    "parameters' names": (["layers.0.up.bias", "e.weight"], ["layers.0.up.bias", "e.weight"]),
    "a result's keys": (dict.fromkeys(["layers.0.up.bias"]).keys(), ["layers.0.up.bias"]),
    "a tied parameter's other name": ("head.weight", ["e.weight"]),
    "a module's name": ("layers.1", of("layers.1")),
    "a leaf's name": ("layers.1.up", of("layers.1.up")),
    "modules' names": (("layers.1", "norm"), of("layers.1", "norm")),
    "the model's own name": ("", ALL),
    "a pattern": ("*.q_proj", of("q_proj")),
    "a pattern of parameters": ("*.bias", of("bias")),
    "a pattern with a set": ("layers.[01].up.*", of("up")),
    "a pattern of one letter": ("layers.?.v_proj", of("v_proj")),
    "a module": (MODEL.layers[0], of("layers.0")),
    "a module list": (MODEL.layers, of("layers")),
    "the model": (MODEL, ALL),
    "modules": ([MODEL.norm, MODEL.e], of("norm", ".e.")),
    "a type": (nn.LayerNorm, of("norm")),
    "types": ({nn.LayerNorm, nn.Embedding}, of("norm", ".e.")),
    "a parameter": (MODEL.e.weight, ["e.weight"]),
    "parameters": (list(MODEL.layers[0].parameters()), of("layers.0")),
    "a generator of parameters": (lambda: MODEL.layers[0].parameters(), of("layers.0")),
    "a predicate": (lambda name, p: p.ndim == 1 and "up" in name, ["layers.0.up.bias", "layers.1.up.bias"]),
    "a mixture": (["*.q_proj", MODEL.norm, nn.Embedding, "layers.0.up"], of("q_proj", "norm", ".e.", "layers.0.up")),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_layers_and_exclude_in_every_spelling(name):
    choice, names = CHOICES[name]
    make = choice if name.startswith("a generator") else lambda: choice
    names = set(names)
    loss = lambda output, target: squared(output)  # noqa: E731
    found = gradext.batch_layer_factors(MODEL, index(), loss=loss, layers=make())
    assert set(found) == names

    with gradext.watch(MODEL, layers=make()) as watch:
        losses = squared(MODEL(index()))
    assert set(watch.grads(losses)) == names
    if choice is not None and names != set(ALL) and name != "trainable":
        rest = gradext.batch_layer_factors(MODEL, index(), loss=loss, layers="", exclude=make())
        assert set(rest) == set(ALL) - names
        default = gradext.batch_layer_factors(MODEL, index(), loss=loss, exclude=make())
        assert set(default) == set(TRAINABLE) - names


def test_all_parameters_of_a_frozen_model():
    model = copy.deepcopy(MODEL).requires_grad_(False)
    found = gradext.batch_layer_factors(model, index(), loss=lambda output, target: squared(output))
    assert set(found) == set(ALL)
    assert not any(p.requires_grad for p in model.parameters())


MISTAKES = {
    "a name": ("layers.0.upp", ValueError, r"'layers\.0\.upp'.*layers\.0\.up"),
    "a name without its path": ("q_proj", ValueError, r"'q_proj'.*\*\.q_proj"),
    "several names": (["layers.7", "e.weigth", "layers.0"], ValueError, r"(?s)'layers\.7'.*'e\.weigth'.*e\.weight"),
    "a pattern": ("*.k_proj", ValueError, r"\*\.k_proj"),
    "a module of another model": (linear(), ValueError, "Linear"),
    "a parameter of another model": (linear().weight, ValueError, r"\(6, 6\)"),
    "a type": (nn.Conv2d, ValueError, "Conv2d"),
    "a type of no module": (int, TypeError, "int"),
    "a number": (3, TypeError, "int"),
    "a number in a list": (["e.weight", 3], TypeError, "int"),
    "a predicate that matches nothing": (lambda name, p: False, ValueError, "predicate"),
    "nothing": ([], ValueError, "at least one"),
    "the former word for all": ("all", ValueError, r"'all'"),
    "the former word for the last": ("last", ValueError, r"'last'"),
}


@pytest.mark.parametrize("argument", ["layers", "exclude"])
@pytest.mark.parametrize("name", MISTAKES)
def test_choices_that_mean_nothing_are_refused(name, argument):
    if (argument, name) == ("exclude", "nothing"):
        pytest.skip("nothing is left out")
    choice, error, message = MISTAKES[name]
    for call in (
        lambda **keys: gradext.batch_layer_grads(MODEL, index(), **keys),
        lambda **keys: gradext.watch(MODEL, **keys),
    ):
        with pytest.raises(error, match=message) as raised:
            call(**{argument: choice})
        assert argument in str(raised.value)


def test_nothing_left_is_refused():
    with pytest.raises(ValueError, match="at least one parameter"):
        gradext.watch(MODEL, layers="norm", exclude="*norm*")


def test_all_that_cannot_be_done_is_told_at_once():
    """With fallback="error", every parameter that only a backward a sample gives, not one after the other."""
    members = {name: linear() for name in ("a", "b", "c")}
    model = Net(lambda m, x: Product.apply(Product.apply(m.c(x), m.a.weight), m.b.weight), **members)
    with pytest.raises(gradext.UnsupportedLayerError, match=r"(?s)a\.weight.*b\.weight") as raised:
        gradext.batch_layer_grads(model, x_of(), loss=lambda o, t: squared(o), fallback="error")
    assert "c.weight" not in str(raised.value)


def test_weights_without_a_gradient_are_refused_where_they_are_asked_for():
    model = Net(lambda m, x: m.a(x), a=linear(), q=nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
    with pytest.raises(gradext.UnsupportedLayerError, match=r"q.*int8"):
        gradext.batch_layer_grads(model, x_of(), layers="q")
    assert set(gradext.batch_layer_grads(model, x_of())) == {"a.weight", "a.bias"}


# --- ragged rows -----------------------------------------------------------------------------------------------------


def pooled(model, x, owners, count):
    return torch.zeros(count).index_add(0, owners, squared(model(x)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize(
    "owners", [[0, 0, 1, 2, 2, 2, 3], [2, 0, 1, 2, 3, 0, 2], [0, 0, 0, 0], [3, 3, 3, 3], [1, 0, 3, 2]]
)
def test_segments_tell_who_owns_a_row(owners, dtype, right):
    torch.manual_seed(0)
    model, owners = autoencoder(), torch.tensor(owners)
    x = x_of(len(owners), D)
    expected = own_gradients(model, pooled(model, x, owners, B))
    for segments in (owners.to(dtype), None):
        with gradext.watch(model, segments=segments) as watch:
            losses = pooled(model, x, owners, B)
        right(watch.grads(losses), expected)
        right({n: f.materialize() for n, f in watch.factors(losses).items()}, expected)


def test_wrong_segments_are_refused():
    model, x = autoencoder(), x_of(5, D)
    owners = torch.tensor([0, 0, 1, 2, 3])
    for wrong, error, message in (
        ([0, 0, 1, 2, 3], (TypeError, ValueError), "segments"),
        (owners.double(), (TypeError, ValueError), "segments.*integers"),
        (owners[None], ValueError, "segments.*one-dimensional"),
    ):
        with pytest.raises(error, match=message):
            gradext.watch(model, segments=wrong)
    for wrong, message in ((owners + 1, r"segments.*0\.\.3.*4"), (owners - 1, r"segments.*0\.\.3.*-1")):
        with gradext.watch(model, segments=wrong) as watch:
            losses = pooled(model, x, owners, B)
        with pytest.raises(ValueError, match=message):
            watch.factors(losses)


def test_segments_that_are_false_are_found_out():
    """Rows said to be another sample's than they are."""
    torch.manual_seed(0)
    model, x, owners = autoencoder(), x_of(7, D), torch.tensor([0, 0, 1, 2, 2, 2, 3])
    expected = own_gradients(model, pooled(model, x, owners, B))
    with gradext.watch(model, segments=owners.flip(0)) as watch:
        losses = pooled(model, x, owners, B)
    try:
        found = watch.grads(losses)
    except gradext.CaptureError:
        return
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


# --- mixing ----------------------------------------------------------------------------------------------------------


def test_mixing_is_exact_on_request_and_makes_no_noise(right):
    torch.manual_seed(0)
    model, x = nn.Sequential(linear(), nn.BatchNorm1d(D), nn.Tanh(), linear()), x_of()

    plain = copy.deepcopy(model)
    expected = own_gradients(plain, squared(plain(x)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with gradext.watch(model, mixing="allow") as watch:
            losses = squared(model(x))
        right(watch.grads(losses), expected)
        right(
            gradext.batch_layer_grads(copy.deepcopy(model), x, loss=lambda o, t: squared(o), mixing="allow"), expected
        )
    # Above the statistics nothing mixes: the rules are as fast as ever.
    assert "backward" not in watch.coverage.rules["3.weight"]


# --- bad arguments ---------------------------------------------------------------------------------------------------

BAD_ARGUMENTS = {
    "model": ({"model": print}, TypeError, "model: expected a torch.nn.Module"),
    "fallback": ({"fallback": "vmap"}, ValueError, "fallback: expected None or 'error', but got 'vmap'"),
    "mixing": ({"mixing": "yes"}, ValueError, "mixing: expected 'error' or 'allow', but got 'yes'"),
    "a model without parameters": ({"model": nn.Tanh()}, (ValueError, gradext.CaptureError), "parameters.*Tanh"),
    "what is gone": ({"include_bias": True}, TypeError, "include_bias"),
    "what is gone too": ({"check": "sample"}, TypeError, "check"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_of_watch(name):
    keys, error, message = BAD_ARGUMENTS[name]
    keys = dict(keys)
    model = keys.pop("model", MODEL)
    for call in (
        lambda: gradext.watch(model, **keys),
        lambda: gradext.batch_layer_grads(model, index(), **keys),
        lambda: gradext.batch_layer_factors(model, index(), **keys),
    ):
        with pytest.raises(error, match=message):
            call()


BAD_LOSSES = {
    "a mean": (lambda losses: losses.mean(), r"shape \(\)"),
    "a matrix": (lambda losses: losses[:, None], r"shape \(4, 1\)"),
    "integers": (lambda losses: losses.detach().round().long(), "int64"),
    "a list": (lambda losses: list(losses), "list"),
    "a number": (lambda losses: 3.0, "float"),
    "complex numbers": (lambda losses: losses * 1j, "complex"),
}


@pytest.mark.parametrize("name", BAD_LOSSES)
def test_bad_losses(name):
    change, message = BAD_LOSSES[name]
    model, x = autoencoder(), x_of()
    with gradext.watch(model) as watch:
        losses = change(squared(model(x)))
    for ask in (watch.factors, watch.grads):
        with pytest.raises((ValueError, TypeError), match=f"(?s)losses: expected.*{message}"):
            ask(losses)
    with pytest.raises((ValueError, TypeError), match=f"(?s)loss: expected.*{message}"):
        gradext.batch_layer_grads(model, x, loss=lambda output, target: change(squared(output)))


def test_questions_at_the_wrong_time():
    model, x = autoencoder(), x_of()
    watch = gradext.watch(model)
    with pytest.raises(RuntimeError, match="block"):
        watch.factors(squared(model(x)))
    with watch:
        losses = squared(model(x))
        with pytest.raises(RuntimeError, match="block"):
            watch.factors(losses)
        with pytest.raises(RuntimeError, match="once at a time"), watch:
            pass
    with pytest.raises(ValueError, match="losses"):
        watch.factors()
    assert watch.factors(losses).norm().shape == (B,)


@pytest.mark.parametrize("train", [False, True])
def test_losses_from_outside_of_the_block_are_refused(train):
    """Their graph knows nothing of the block: not zeros."""
    model, x = autoencoder(), x_of()
    outside = squared(model(x))
    with gradext.watch(model, train=train) as watch:
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = watch.grads(outside)
        except (gradext.CaptureError, ValueError):
            return
    expected = own_gradients(model, outside)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def test_a_backward_that_the_user_has_run_is_told():
    """Without train=True the losses have no graph to the parameters, and after a backward none at all."""
    model, x = autoencoder(), x_of().requires_grad_()
    with gradext.watch(model) as watch:
        losses = squared(model(x))
    losses.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    try:
        watch.grads(losses)
    except (gradext.CaptureError, RuntimeError) as error:
        message = str(error)
        assert "train=True" in message or "graph" in message


BAD_INPUTS = {
    "nothing": (3, TypeError, "x: expected a tensor"),
    "an empty tuple": ((), TypeError, "x: expected a tensor"),
    "an empty dict": ({}, TypeError, "x: expected a tensor"),
    "another device": (torch.empty(B, T, device="meta"), ValueError, "x: expected a tensor on the model's device"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs(name):
    x, error, message = BAD_INPUTS[name]
    with pytest.raises(error, match=message):
        gradext.batch_layer_grads(MODEL, x, loss="cross_entropy")


@pytest.mark.parametrize(
    ("loss", "target", "message"),
    [
        ("mse", torch.rand(B, 5), "target: expected the model output's shape"),
        ("mse", torch.zeros(B, D, dtype=torch.int64), "target: expected a floating-point tensor"),
        ("bce_logits", torch.full((B, D), 2.0), r"target: expected values in \[0, 1\]"),
        ("hinge", torch.rand(B, D), "loss: expected 'auto', one of"),
        ("mse", "text", "target: expected a tensor"),
    ],
)
def test_bad_losses_and_targets_by_name(loss, target, message):
    with pytest.raises((ValueError, TypeError), match=message):
        gradext.batch_layer_grads(autoencoder(), x_of(), loss=loss, target=target)


def test_an_input_that_the_model_overwrites():
    """It is the target too, by default; with a target of its own there is nothing wrong."""
    model, x = Net(lambda m, x: m.a(x.mul_(2)), a=linear()), x_of()
    with pytest.raises(gradext.CaptureError, match=r"x: the model overwrites its input.*target="):
        gradext.batch_layer_grads(model, x.clone(), loss="mse")
    assert set(gradext.batch_layer_grads(model, x.clone(), loss="mse", target=x)) == {"a.weight", "a.bias"}


def test_what_was_kept_of_a_training_steps_backward_is_taken_once():
    """The deltas of the weighted losses become those of each sample's own in place."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 3), torch.rand(5, 6), torch.tensor([0, 1, 2, 0, 1])
    with gradext.watch(model, train=True) as watch:
        losses = F.cross_entropy(model(x), y, reduction="none")
    before = watch.factors(losses).norm()
    losses.mean().backward()
    torch.testing.assert_close(watch.factors().norm(), before)
    for again in (watch.factors, watch.grads):
        with pytest.raises(RuntimeError, match="keep its result"):
            again()


def test_factors_after_a_training_step_take_no_memory_anew(monkeypatch):
    """What the backward has left is theirs; the input alone is the caller's, and copied."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    x = torch.rand(5, 4, 6)
    with gradext.watch(model, train=True) as watch:
        losses = model(x).square().sum((1, 2))
    losses.mean().backward()
    copied, clone = [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda t: copied.append(t) or clone(t))
    watch.factors()
    assert [t.data_ptr() for t in copied] == [x.data_ptr()]


# --- what others hold or change ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["entries", "a part"])
def test_factors_are_of_one_backward(kind, count, right):
    """Deltas of one backward and weights of another make nothing: the last through the losses counts, or none."""
    torch.manual_seed(0)
    model, x = nn.Sequential(linear(), nn.Tanh(), linear()), x_of(count, D)
    expected = own_gradients(model, squared(model(x)))
    with gradext.watch(model, train=True) as watch:
        h = model[0](x)
        output = model[2](model[1](h))
        losses = squared(output)
    output.sum().backward(retain_graph=True)
    losses.mean().backward(retain_graph=True)
    if kind == "entries":
        output.mean().backward(retain_graph=True)
        right(watch.factors(losses).materialize(), expected)
    else:
        torch.autograd.grad(losses.sum(), model[2].bias)
        with pytest.raises(gradext.CaptureError, match=r"0\.bias.*did not reach linear"):
            watch.factors(losses)


@pytest.mark.parametrize("change", ["an optimizer's step", "random numbers"])
def test_a_value_that_is_not_made_the_same_again_is_refused(change):
    """The training step frees the graph from a value to its parameters: what remains is to make it once more."""
    torch.manual_seed(0)
    make = F.dropout if change == "random numbers" else torch.tanh
    model = Net(lambda m, x: m.a(x @ make(m.w)), a=linear(), w=nn.Parameter(torch.randn(D, D)))
    x = x_of()
    with gradext.watch(model, train=True) as watch:
        losses = squared(model(x))
    losses.mean().backward()
    if change == "an optimizer's step":
        torch.optim.SGD(model.parameters(), 1e-6).step()
    with pytest.raises(gradext.CaptureError, match="w: changed since the forward"):
        watch.factors()


@pytest.mark.parametrize("train", [False, True])
def test_the_caller_may_overwrite_what_the_model_returned_beside_the_losses(train, right):
    torch.manual_seed(0)
    model, x = nn.Sequential(linear(), nn.GELU(), linear()), x_of()
    expected = own_gradients(model, squared(model(x)))
    with gradext.watch(model, train=train) as watch:
        features = model[1](model[0](x))
        losses = squared(model[2](features))
    if train:
        losses.mean().backward()
    factors = watch.factors(losses)
    with torch.no_grad():
        features.zero_()
    right(factors.materialize(), expected)


def halved(m, x):
    m.decay.mul_(0.5)
    return m.a(x) * m.other()


HOLDERS = {
    "an attribute": lambda m: setattr(m, "same", m.decay),
    "a view": lambda m: m.register_buffer("same", m.decay[:]),
    "a module in evaluation": lambda m: m.b.register_buffer("same", m.decay),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("holder", HOLDERS)
def test_buffers_that_are_held_twice(holder, mode, right):
    """A call works on copies of the buffers that training changes: so do all that hold one of them."""
    torch.manual_seed(0)
    model, x = Net(halved, a=linear(), decay=torch.ones(D), b=nn.Identity()), x_of()
    HOLDERS[holder](model)
    model.b.eval()
    model.other = lambda: model.b.same if holder == "a module in evaluation" else model.same
    with mode():
        found = gradext.batch_layer_grads(model, x, loss=squared)
    assert torch.equal(model.decay, torch.ones(D))
    assert torch.equal(model.other(), torch.ones(D))
    right(found, own_gradients(model, squared(model(x))))


def test_a_buffer_that_the_first_forward_makes_stays():
    def run(m, x):
        if not m.built:
            m.register_buffer("scale", torch.ones(D))
            m.built = True
        return m.a(x) * m.scale

    model = Net(run, a=linear(), first=torch.ones(D), built=False)
    gradext.batch_layer_grads(model, x_of(), loss=squared)
    assert model(x_of()).shape == (B, D)


@pytest.mark.parametrize("several", [False, True])
def test_one_row_of_input_and_several_samples(several, right):
    """A run of one sample needs no proof; what makes several samples of one row is no such run."""
    torch.manual_seed(0)
    x = (x_of(1, D), x_of()) if several else (x_of(1, B, D),)
    model = Net(lambda m, *x: m.norm(m.a(x[0] + x[-1]).reshape(B, D)), a=linear(), norm=nn.BatchNorm1d(D))
    with pytest.raises(gradext.CaptureError, match="samples mix"):
        gradext.batch_layer_grads(model, x, loss=squared)
    model.eval()
    found = gradext.batch_layer_grads(model, x, loss=squared, fallback="error")
    right(found, own_gradients(model, squared(model(*x))))


def test_rows_that_are_picked_in_a_training_step_are_refused_clearly():
    """Which ones the backward has freed."""
    model = Net(lambda m, x: m.b(m.a(x)[torch.arange(len(x)), x[:, :, 0].argmax(1)]), a=linear(), b=linear())
    x = x_of(B, T, D)
    with gradext.watch(model, train=True) as watch:
        losses = squared(model(x))
    losses.mean().backward()
    with pytest.raises(gradext.CaptureError, match="before the training step's"):
        watch.factors()


def test_outputs_of_layers_are_not_held():
    held = []

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.scale = nn.Linear(3, 4), nn.Parameter(torch.ones(4))

        def forward(self, x):
            before = self.linear(x)
            after = before * self.scale
            held.extend(map(weakref.ref, (before, after)))
            return after.sum(-1)

    model = Scaled()
    with gradext.watch(model) as watch:
        losses = model(torch.rand(5, 2, 3)).square().sum(1)
    before, after = (reference() for reference in held)
    assert before is not None  # the input of the product
    assert after is None
    assert watch.factors(losses).norm().shape == (5,)


@pytest.mark.parametrize("make", [lambda: torch.randn(B, D), lambda: torch.tensor([[0.1 * k] * D for k in range(B)])])
def test_data_made_in_the_block_are_samples(make):
    model = nn.Sequential(nn.Linear(D, 3), nn.Tanh())
    with gradext.watch(model) as watch:
        x = make()
        losses = model(x).square().sum(1)
    found = watch.grads(losses)
    assert found.coverage.rules == {"0.weight": "linear", "0.bias": "linear"}
    assert_right(found, own_gradients(model, model(x).square().sum(1)))


def test_random_numbers_made_in_a_module_are_constants():
    def forward(net, x):
        return net.layer(x + torch.rand(D)) * (net.layer.bias + torch.rand(3))

    model, x = Net(forward, layer=nn.Linear(D, 3)), torch.rand(B, D)
    torch.manual_seed(1)
    with gradext.watch(model) as watch:
        losses = model(x).square().sum(1)
    torch.manual_seed(1)
    assert_right(watch.grads(losses), own_gradients(model, model(x).square().sum(1)))
