"""Models, losses and hooks that once gave wrong numbers, several variants of each: right, or refused by name."""

from __future__ import annotations

import contextlib
import copy
import gc
import re
import types
import warnings
import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import gradext

from .common import B, D, Net, Product, linear, x_of

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
    pytest.mark.filterwarnings("ignore:Full backward hook"),
]


def two_layers(middle=torch.tanh) -> Net:
    return Net(lambda m, x: m.b(middle(m.a(x))), a=linear(), b=linear())


def mse(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).sum(1)


# --- weights, and forms of weights, in code that no function mode sees -----------------------------------------------


class NewProduct(torch.autograd.Function):
    """With its context set up apart, and differentiable once."""

    @staticmethod
    def forward(x, weight):
        return x @ weight, x.sum()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.flatten(0, -2).t() @ grad.flatten(0, -2)


@torch.library.custom_op("gradext_tests::product", mutates_args=())
def product_operator(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


def _product_backward(ctx, grad):
    x, weight = ctx.saved
    return grad @ weight.t(), x.flatten(0, -2).t() @ grad.flatten(0, -2)


product_operator.register_autograd(
    _product_backward, setup_context=lambda ctx, inputs, output: setattr(ctx, "saved", inputs)
)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(x @ weight)


def scripted(x: Tensor, weight: Tensor) -> Tensor:
    return torch.jit.script(_product)(x, weight)


FORMS = {
    "the weight": lambda w: w,
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "swapaxes": lambda w: w.swapaxes(0, 1),
    "permute": lambda w: torch.permute(w, (1, 0)),
    "adjoint": lambda w: w.adjoint(),
    "to": lambda w: w.to(w.dtype),
    "two casts": lambda w: w.float().double(),
    "type_as": lambda w: w.type_as(w),
    "contiguous": lambda w: w.t().contiguous(),
    "clone": lambda w: w.clone(),
    "all rows": lambda w: w[:],
    "ellipsis": lambda w: w[...],
    "narrow": lambda w: w.narrow(0, 0, D),
    "one chunk": lambda w: w.chunk(1)[0],
    "split and cat": lambda w: torch.cat(w.split((2, 4))),
    "unbind and stack": lambda w: torch.stack(w.unbind(1)),
    "view": lambda w: w.view(-1).view(D, D),
    "view_as": lambda w: w.view_as(w),
    "reshape": lambda w: w.reshape(2, 3, D).reshape(D, D),
    "flatten": lambda w: w.flatten().unflatten(0, (D, D)),
    "squeeze": lambda w: w[None].squeeze(),
    "squeeze of a dimension": lambda w: w.unsqueeze(1).squeeze(1),
    "expand": lambda w: w.expand(2, D, D)[1],
    "repeat": lambda w: w.repeat(1, 2)[:, 3:9],
    "movedim": lambda w: w.movedim(0, 1),
    "einsum": lambda w: torch.einsum("ij->ji", w),
    "index_select": lambda w: w.index_select(1, torch.tensor([5, 0, 1, 1, 2, 3])),
    "index": lambda w: w[torch.tensor([1, 0, 2, 2, 5, 4])],
    "gather": lambda w: w.gather(0, torch.arange(D * D).view(D, D) % D),
    "every other twice": lambda w: torch.cat([w[::2], w[1::2]]),
    "flip and roll": lambda w: w.flip(0).roll(2, 1),
    "diagonal": lambda w: torch.diag_embed(w.diagonal()),
    "triangles": lambda w: w.tril() - w.triu(1),
    "masked": lambda w: w.masked_fill(torch.eye(D) > 0, 0.5),
    "where": lambda w: torch.where(w > 0, w, 0.1 * w),
    "plus one": lambda w: 1 + w,
    "doubled": lambda w: 2 * w,
    "its square root": lambda w: w.abs().sqrt(),
    "normalised": lambda w: F.normalize(w, dim=1),
    "standardised": lambda w: (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True),
    "its own product": lambda w: w @ w,
    "inverted": lambda w: torch.linalg.inv(w + 3 * torch.eye(D)),
    "padded": lambda w: F.pad(w[:4], (0, 0, 2, 0)),
    "changed in place": lambda w: w.clone().mul_(2).t_(),
    "set in place": lambda w: w.new_zeros(D, D).copy_(w),
    "rounded straight through": lambda w: w + (w.sign() - w).detach(),
    "in a list": lambda w: torch.block_diag(*[w[:2, :2], w[2:4, 2:4], w[4:, 4:]]),
    "vmapped": lambda w: torch.func.vmap(lambda row: row * 2)(w),
}
UNSEEN = {
    "autograd.Function": Product.apply,
    "a new autograd.Function": lambda x, w: NewProduct.apply(x, w)[0],
    "jit.script": scripted,
    "custom_op": product_operator,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("unseen", ["autograd.Function", "jit.script"])
def test_forms_of_a_weight_in_unseen_code(unseen, form, judge):
    f, u = FORMS[form], UNSEEN[unseen]
    tolerance = 1e-6 if form == "two casts" else 1e-9  # by way of single precision
    judge(
        lambda: {
            "model": Net(lambda m, x: u(torch.tanh(m.a(x)), f(m.a.weight)), a=linear()),
            "x": x_of(),
            "tolerance": tolerance,
        }
    )


class FusedCrossEntropy(torch.autograd.Function):
    """Makes its gradients in the forward, and weighs them by the losses' in the backward."""

    @staticmethod
    def forward(ctx, h, weight, target):
        with torch.enable_grad():
            h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_()
            losses = F.cross_entropy(h @ weight.t(), target, reduction="none")
        ctx.saved = h, weight, losses
        return losses.detach()

    @staticmethod
    def backward(ctx, grad):
        h, weight, losses = ctx.saved
        return *torch.autograd.grad(losses, (h, weight), grad, retain_graph=True), None


class ReversiblePart(torch.autograd.Function):
    """Keeps no graph: its backward runs the part again, and accumulates into the parameters itself."""

    @staticmethod
    def forward(ctx, x, part):
        ctx.part = part
        ctx.save_for_backward(x)
        with torch.no_grad():
            return part(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            ctx.part(x).backward(grad)
        return x.grad, None


def tied(fused: bool) -> Net:
    def forward(m, index, target):
        h = torch.tanh(m.a(m.e(index).mean(1)))
        weight = m.e.weight.to(h.dtype)
        if fused:
            return FusedCrossEntropy.apply(h, weight, target)
        return F.cross_entropy(torch.jit.script(_product)(h, weight.t()), target, reduction="none")

    return Net(forward, a=linear(), e=nn.Embedding(7, D))


UNSEEN_CODE = {
    **{
        f"beside a plain use, {name}": lambda u=u: {
            "model": Net(lambda m, x: m.b(m.a(x)) + u(torch.tanh(m.a(x)), m.a.weight), a=linear(), b=linear()),
            "x": x_of(),
        }
        for name, u in UNSEEN.items()
    },
    **{
        f"over positions, {name}": lambda u=u: {
            "model": Net(lambda m, x: u(m.a(x).tanh(), m.a.weight.t()), a=linear()),
            "x": x_of(B, 3, D),
        }
        for name, u in UNSEEN.items()
    },
    "two weights in one function": lambda: {
        "model": Net(lambda m, x: Product.apply(x, m.a.weight @ m.b.weight.t()), a=linear(), b=linear()),
        "x": x_of(),
    },
    "a bias and a scale": lambda: {
        "model": Net(
            lambda m, x: Product.apply(x * m.scale + m.a.bias, m.a.weight), a=linear(), scale=nn.Parameter(x_of(D))
        ),
        "x": x_of(),
    },
    "only a part of the samples goes through": lambda: {
        "model": Net(
            lambda m, x: torch.cat([m.a(x[:1]), Product.apply(x[1:], m.a.weight)]) if len(x) > 1 else m.pick(x),
            a=linear(),
            pick=nn.Identity(),
        ),
        "x": x_of(),
        "oracle": "batch",
    },
    "fused cross entropy of a tied embedding": lambda: {
        "model": tied(True),
        "x": (torch.randint(0, 7, (B, 3)), torch.randint(0, 7, (B,))),
        "loss": lambda output, target: output,
    },
    "scripted logits of a tied embedding": lambda: {
        "model": tied(False),
        "x": (torch.randint(0, 7, (B, 3)), torch.randint(0, 7, (B,))),
        "loss": lambda output, target: output,
    },
    "a scripted part": lambda: {
        "model": nn.Sequential(linear(), torch.jit.script(nn.Sequential(linear(), nn.Tanh(), linear()))),
        "x": x_of(),
    },
    "a traced part": lambda: {
        "model": nn.Sequential(linear(), torch.jit.trace(nn.Sequential(linear(), nn.Tanh(), linear()), x_of(2, D))),
        "x": x_of(),
    },
    "a part that is compiled": lambda: {
        "model": nn.Sequential(linear(), torch.compile(nn.Sequential(linear(), nn.Tanh()), backend="eager"), linear()),
        "x": x_of(),
    },
    "a weight that only the backward of a function uses": lambda: {
        "model": Net(lambda m, x: m.b(StraightThrough.apply(m.a(x), m.b.weight)), a=linear(), b=linear()),
        "x": x_of(),
    },
    "a view made before the call": lambda: {
        "model": with_view(Net(lambda m, x: m.a(x)[:, :3] + F.linear(x, m.kept[0]), a=linear())),
        "x": x_of(),
        "outcome": "right or refused",
        "frozen": False,
    },
    "a part that its function runs again": lambda: {
        "model": Net(lambda m, x: m.b(ReversiblePart.apply(m.a(x), m.part)), a=linear(), part=linear(), b=linear()),
        "x": x_of(),
        "outcome": "right or refused",
    },
}


class StraightThrough(torch.autograd.Function):
    """sign(x), with the gradient of x @ weight."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad @ weight, None


def with_view(model: Net) -> Net:
    model.kept = [model.a.weight[:3]]
    return model


@pytest.mark.parametrize("name", UNSEEN_CODE)
def test_unseen_code(name, judge):
    judge(UNSEEN_CODE[name])


def test_unseen_code_is_told_once_and_can_be_refused():
    model, x = Net(lambda m, x: m.b(Product.apply(x, m.a.weight)), a=linear(), b=linear()), x_of()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gradext.batch_layer_grads(model, x, loss=mse)
    (warning,) = (str(w.message) for w in caught if "a.weight" in str(w.message))
    assert "b.weight" not in warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(gradext.UnsupportedLayerError, match=r"a\.weight"):
            gradext.batch_layer_grads(model, x, loss=mse, fallback="error")
        found = gradext.batch_layer_grads(model, x, loss=mse, fallback="error", layers=["b"])
    assert set(found) == {"b.weight", "b.bias"}


# --- checkpoints -----------------------------------------------------------------------------------------------------


def checkpointed(reentrant: bool, where: str) -> Net:
    def forward(m, x):
        def again(f, *args):
            return checkpoint(f, *args, use_reentrant=reentrant)

        h = m.a(x)
        if where == "inside and outside":
            return m.b(again(lambda h: torch.tanh(m.b(h)), h))
        if where == "inside only":
            return again(lambda h: m.b(torch.tanh(h)), h)
        if where == "two at once":
            return again(m.b, again(lambda h: m.b(h).sin(), h))
        if where == "nested":
            return m.b(again(lambda h: torch.tanh(again(m.b, h)), h))
        if where == "of the input":
            return m.b(again(lambda x: torch.tanh(m.a(x)), x) + h)
        if where == "a form of the weight goes in":
            return again(lambda h, w: torch.tanh(h @ w), h, m.b.weight.t())
        return checkpoint_sequential(nn.Sequential(m.b, nn.Tanh(), m.b), 2, h, use_reentrant=reentrant)

    return Net(forward, a=linear(), b=linear())


PLACES = [
    *("inside and outside", "inside only", "two at once", "nested", "of the input", "a form of the weight goes in"),
    "sequential",
]


@pytest.mark.parametrize("where", PLACES)
def test_checkpoints(where, judge):
    judge(lambda: {"model": checkpointed(False, where), "x": x_of()})


@pytest.mark.parametrize("where", PLACES)
def test_reentrant_checkpoints_are_refused_or_right(where, judge):
    # The input requires grad, or a reentrant checkpoint of it alone is constant in plain torch too.
    judge(lambda: {"model": checkpointed(True, where), "x": x_of(), "outcome": "right or refused"})
    for layers in (["b"], ["a"]):
        names = {f"{layers[0]}.weight", f"{layers[0]}.bias"}
        judge(
            lambda layers=layers, names=names: {
                "model": checkpointed(True, where),
                "x": x_of(),
                "outcome": "right or refused",
                "options": {"layers": layers},
                "names": names,
            }
        )


def test_a_reentrant_checkpoint_is_refused_with_what_to_do():
    with pytest.raises(gradext.CaptureError, match="use_reentrant=False"):
        gradext.batch_layer_grads(checkpointed(True, "inside and outside"), x_of(), loss=mse)


def test_dropout_in_a_checkpoint(judge):
    model = lambda: Net(  # noqa: E731
        lambda m, x: m.b(checkpoint(lambda x: F.dropout(m.a(x)), x, use_reentrant=False)), a=linear(), b=linear()
    )
    judge(lambda: {"model": model(), "x": x_of(), "oracle": "batch", "seed": 3})


# --- what was proved once, and holds no longer -----------------------------------------------------------------------


class Weighted(nn.Module):
    """A loss with a contrastive term, by a weight that is a parameter, a buffer or an attribute."""

    def __init__(self, kind: str):
        super().__init__()
        zero = torch.zeros(())
        if kind == "buffer":
            self.register_buffer("weight", zero)
        else:
            self.weight = nn.Parameter(zero, requires_grad=False) if kind == "parameter" else 0.0

    def forward(self, output, target):
        return mse(output, target) + self.weight * (output @ output.mT).sum(1)


def set_weight(case):
    weight = case["loss"].weight
    if isinstance(weight, Tensor):
        weight.data.fill_(1.0)
    else:
        case["loss"].weight = 1.0


SETTINGS = {"contrast": 0.0}


def by_global(output, target):
    return mse(output, target) + SETTINGS["contrast"] * output.sum(0).sum() * output.sum(1)


def by_default(output, target, options={"weight": 0.0}):  # noqa: B006
    return mse(output, target) + options["weight"] * (output - output.mean(0)).square().sum(1)


def of_closure():
    weight = 0.0

    def loss(output, target):
        return mse(output, target) + weight * (output @ output.mT).sum(1)

    def turn_on(case):
        nonlocal weight
        weight = 1.0

    return {"model": two_layers(), "x": x_of(), "loss": loss, "change": turn_on}


def hard_negatives(output, target):
    """The hinge of the most similar other sample: nothing, until some are too similar."""
    others = output @ output.mT - 1e9 * torch.eye(len(output))
    return mse(output, target) + torch.relu(others.amax(1) - 50 if len(output) > 1 else 0 * output.sum(1))


def in_order(order_of):
    """A layer that gets its rows in another order, which is undone behind it."""

    def forward(m, x, *more):
        order = order_of(m, x, *more)
        return m.b(torch.tanh(m.a(x[order])))[torch.argsort(order)]

    return forward


def switched(on, off=lambda h: h):
    """Two layers with ``on`` between them once model.on says so."""
    model = Net(lambda m, x: m.b((on if m.on else off)(torch.tanh(m.a(x)))), a=linear(), b=linear())
    model.on = False
    return model


def turn_on(case):
    case["model"].on = True


def centred(h):
    return h - h.mean(0)


def reverses(module, args):
    return (args[0].flip(0),)


STALE = {
    # of the loss
    "a closure's variable": of_closure,
    "a loss made anew by the same line": lambda: {
        "model": two_layers(),
        "x": x_of(),
        "loss": weighted_loss(0.0),
        "change": lambda case: case.update(loss=weighted_loss(1.0)),
    },
    **{
        f"a loss's {kind}": lambda kind=kind: {
            "model": two_layers(),
            "x": x_of(),
            "loss": Weighted(kind),
            "change": set_weight,
        }
        for kind in ("buffer", "parameter", "attribute")
    },
    "a global": lambda: {
        "model": two_layers(),
        "x": x_of(),
        "loss": by_global,
        "change": lambda case: case["stack"].enter_context(mock.patch.dict(SETTINGS, contrast=1.0)),
    },
    "a default argument": lambda: {
        "model": two_layers(),
        "x": x_of(),
        "loss": by_default,
        "change": lambda case: case["stack"].enter_context(mock.patch.dict(by_default.__defaults__[0], weight=1.0)),
    },
    "a function of torch": lambda: {
        "model": two_layers(),
        "x": x_of(),
        "loss": lambda output, target: F.mse_loss(output, target, reduction="none").sum(1),
        "change": lambda case: case["stack"].enter_context(
            mock.patch.object(F, "mse_loss", lambda o, t, reduction: (o - t.flip(0) * o.roll(1, 0)).square())
        ),
    },
    "weights that bring negatives near": lambda: {
        "model": two_layers(),
        "x": x_of(),
        "loss": hard_negatives,
        "change": lambda case: case["model"].b.weight.data.mul_(60),
    },
    "targets that choose other samples": lambda: {
        "model": two_layers(),
        "x": x_of(),
        "target": torch.arange(B),
        "loss": lambda output, target: (output * output[target if len(output) > 1 else 0]).sum(1),
        "change": lambda case: case.update(target=torch.tensor([1, 0, 2, 3])),
    },
    # of the model
    "an attribute": lambda: {"model": switched(centred), "x": x_of(), "change": turn_on},
    "an attribute, to a softmax": lambda: {"model": switched(lambda h: h.softmax(0)), "x": x_of(), "change": turn_on},
    "an attribute, to a sum so far": lambda: {
        "model": switched(lambda h: h.cumsum(0)),
        "x": x_of(),
        "change": turn_on,
    },
    "a gate that is a weight": lambda: {
        "model": Net(
            lambda m, x: m.b(m.a(x).sin() + m.gate * m.a(x).mean(0)),
            a=linear(),
            b=linear(),
            gate=nn.Parameter(torch.zeros(D)),
        ),
        "x": x_of(),
        "options": {"layers": ["a", "b"]},
        "names": {"a.weight", "a.bias", "b.weight", "b.bias"},
        "change": lambda case: case["model"].gate.data.fill_(1.0),
    },
    "a buffer": lambda: {
        "model": with_buffer(Net(lambda m, x: m.b(m.mixing @ torch.tanh(m.a(x))), a=linear(), b=linear())),
        "x": x_of(),
        "change": lambda case: case["model"].mixing.add_(0.1),
    },
    "a mode": lambda: {
        "model": nn.Sequential(linear(), nn.BatchNorm1d(D), linear()).eval(),
        "x": x_of(),
        "change": lambda case: case["model"].train(),
        "trains": False,
    },
    "another layer": lambda: {
        "model": two_layers(nn.Identity()),
        "x": x_of(),
        "change": lambda case: setattr(case["model"], "b", nn.Sequential(Net(lambda m, h: h @ h.mT @ h), linear())),
    },
    "a hook": lambda: {
        "model": two_layers(),
        "x": x_of(),
        "change": lambda case: case["model"].a.register_forward_hook(lambda m, args, output: centred(output)),
    },
    "a hook before": lambda: {
        "model": two_layers(),
        "x": x_of(),
        "change": lambda case: case["model"].b.register_forward_pre_hook(lambda m, args: (centred(args[0]),)),
    },
    "a hook on all modules": lambda: {
        "model": two_layers(),
        "x": x_of(),
        "change": lambda case: case["stack"].callback(
            torch.nn.modules.module.register_module_forward_hook(lambda m, args, output: centred(output)).remove
        ),
    },
    "a method of the object": lambda: {
        "model": two_layers(),
        "x": x_of(),
        "change": lambda case: setattr(
            case["model"].a, "forward", types.MethodType(lambda m, x: centred(F.linear(x, m.weight)), case["model"].a)
        ),
    },
    "a method of the class": lambda: {
        "model": two_layers(),
        "x": x_of(),
        "change": lambda case: case["stack"].enter_context(
            mock.patch.object(nn.Linear, "forward", lambda m, x: F.linear(centred(x), m.weight, m.bias))
        ),
    },
    "a count of calls": lambda: {"model": Counting(), "x": x_of(), "change": lambda case: None, "trains": False},
    "the input's own statistics": lambda: {
        "model": Net(lambda m, x: m.b(centred(m.a(x)) if x.max() > 10 else m.a(x)), a=linear(), b=linear()),
        "x": x_of().clamp(-3, 3),
        "change": lambda case: case["x"].select(0, 1).fill_(11.0),
    },
    "other rows that are asked for": lambda: {
        "model": Net(lambda m, x, other: m.b(reads(m.a(x).tanh(), other)), a=linear(), b=linear()),
        "x": (x_of(), torch.arange(B)),
        "change": lambda case: case["x"][1].copy_(torch.tensor([2, 1, 0, 3])),
    },
}  # fmt: skip


def reads(h, other):
    return h + h[other]


class Counting(nn.Module):
    """Mixes from the second forward on."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls = linear(), linear(), 0

    def forward(self, x):
        self.calls += 1
        return self.b(torch.tanh(self.a(x)) if self.calls == 1 else centred(self.a(x)))


def weighted_loss(weight):
    return lambda output, target: mse(output, target) + weight * (output @ output.mT).sum(1)


def with_buffer(model):
    model.register_buffer("mixing", torch.eye(B))
    return model


@pytest.mark.parametrize("name", STALE)
def test_samples_that_come_to_mix_are_refused(name, judge):
    judge(lambda: {"outcome": "refused", "oracle": "batch", "frozen": False, **STALE[name]()})


@pytest.mark.parametrize("name", [name for name in STALE if name not in ("a mode", "a count of calls")])
def test_samples_that_come_to_mix_have_exact_gradients_on_request(name, judge):
    def case():
        case = STALE[name]()
        return {"oracle": "batch", "frozen": False, **case, "options": {**case.get("options", {}), "mixing": "allow"}}

    judge(case)


class Experts(nn.Module):
    """Every position goes to the expert that ``route`` or the gate names."""

    def __init__(self, count=2):
        super().__init__()
        self.gate, self.experts, self.head = linear(), nn.ModuleList(linear() for _ in range(count)), linear()

    def forward(self, x, route=None):
        h = x.reshape(-1, D)
        route = self.gate(h)[:, : len(self.experts)].argmax(1) if route is None else route.reshape(-1)
        out = torch.zeros_like(h)
        for k, expert in enumerate(self.experts):
            mine = torch.where(route == k)[0]
            out = out.index_add(0, mine, expert(h[mine]).tanh())
        return self.head(out.view_as(x))


# A change after which the rows of a layer are other samples': right, whoever they belong to. Where each row still
# counts in one loss alone, nothing mixes.
REROUTED = {
    "rolled by one": lambda: {
        "model": switched(lambda h: h.roll(1, 0)),
        "x": x_of(),
        "change": turn_on,
        "oracle": "batch",
    },
    "every feature sorted over the batch": lambda: {
        "model": switched(lambda h: h.sort(0).values),
        "x": x_of(),
        "change": turn_on,
        "oracle": "batch",
    },
    "sorted by length": lambda: {
        "model": Net(in_order(lambda m, x, length: length.argsort(descending=True)), a=linear(), b=linear()),
        "x": (x_of(), torch.tensor([9, 8, 7, 6])),
        "change": lambda case: case["x"][1].copy_(torch.tensor([4, 9, 5, 7])),
    },
    "sorted by value": lambda: {
        "model": Net(in_order(lambda m, x: x[:, 0].argsort()), a=linear(), b=linear()),
        "x": x_of().sort(0).values,
        "change": lambda case: case["x"].copy_(case["x"].flip(0).roll(1, 0)),
    },
    "an order that is an attribute": lambda: {
        "model": ordered(Net(in_order(lambda m, x: m.order[m.order < len(x)]), a=linear(), b=linear())),
        "x": x_of(),
        "change": lambda case: setattr(case["model"], "order", torch.tensor([1, 3, 0, 2])),
    },
    "experts, one token of each sample": lambda: {
        "model": Experts(),
        "x": (x_of(B, 2, D), torch.tensor([[0, 1]] * B)),
        "change": lambda case: case["x"][1].copy_(torch.tensor([[0, 0], [0, 0], [1, 1], [1, 1]])),
    },
    "experts, by the gate's weights": lambda: {
        "model": Experts(3),
        "x": x_of(B, 2, D),
        "change": lambda case: case["model"].gate.weight.data.neg_(),
    },
    "a hook that reverses, before and after": lambda: {
        "model": two_layers(),
        "x": x_of(),
        "change": lambda case: (
            case["model"].b.register_forward_pre_hook(reverses),
            case["model"].b.register_forward_hook(lambda m, args, output: output.flip(0)),
        ),
    },
    "halves that are exchanged": lambda: {
        "model": switched(lambda h: h, off=lambda h: h),
        "x": x_of(),
        "change": lambda case: setattr(case["model"], "_run", halves),
    },
}


def halves(m, x):
    first, second = x.tensor_split(2)
    a, b = m.a(torch.cat([second, first])).tanh().tensor_split([len(second)])
    return m.b(torch.cat([b, a]))


def ordered(model):
    model.order = torch.arange(B)
    return model


@pytest.mark.parametrize("name", REROUTED)
def test_rows_that_change_their_order_are_right_or_refused(name, judge):
    judge(lambda: {"outcome": "right or refused", **REROUTED[name]()})


# --- one sample that outweighs the others ----------------------------------------------------------------------------

PAIRS = torch.tensor([3, 1, 2, 0, 4, 5])
MIXING = {
    "two read each other": lambda h: h + h[PAIRS],
    "one reads another": lambda h: torch.cat([h[:1] + h[3:4], h[1:]]),
    "all read the mean": lambda h: h - h.mean(0),
    "each reads the one before": lambda h: h + 1e-3 * h.roll(1, 0),
    "attention": lambda h: (h @ h.mT / 6).softmax(1) @ h,
}


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mixing", MIXING)
def test_a_large_sample_does_not_hide_that_others_mix(mixing, dtype, scale):
    torch.manual_seed(0)
    model, x, target = two_layers(MIXING[mixing]).to(dtype), x_of(6, D).to(dtype), x_of(6, D).to(dtype)
    target[4] *= scale
    for layers in (None, ["a"]):
        with pytest.raises(gradext.CaptureError):
            gradext.batch_layer_grads(model, x, loss=mse, target=target, layers=layers)


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e5, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_of_very_different_sizes_are_no_mixing(dtype, scale):
    torch.manual_seed(0)
    net = two_layers().to(dtype)  # its rows are those of all samples, position by position
    model = Net(lambda m, x: m.net(x.transpose(0, 1).reshape(-1, D)).view(3, B, D).transpose(0, 1), net=net)
    x, target = x_of(B, 3, D).to(dtype), x_of(B, 3, D).to(dtype)
    target[1] *= scale
    found = gradext.batch_layer_grads(model, x, loss=mse, target=target)
    exact = copy.deepcopy(net).double()
    for b in range(B):
        loss = mse(exact(x[b : b + 1].double()), target[b : b + 1].double()).sum()
        for name, want in zip(found, torch.autograd.grad(loss, list(exact.parameters())), strict=True):
            error = (found[name][b].double() - want).abs().max()
            assert error <= (1e-5 if dtype == torch.float32 else 1e-12) * want.abs().max(), name


# --- hooks that change gradients -------------------------------------------------------------------------------------


def node_prehook(change):
    def hook(m, h):
        if h.grad_fn is not None:
            h.grad_fn.register_prehook(lambda grads: (change(grads[0]),))
        return h

    return hook


def node_hook(change):
    def hook(m, h):
        if h.grad_fn is not None:
            h.grad_fn.register_hook(lambda inputs, outputs: tuple(None if g is None else change(g) for g in inputs))
        return h

    return hook


def tensor_hook(change):
    def hook(m, h):
        if h.requires_grad:
            h.register_hook(change)
        return h

    return hook


def looked_at(m, h):
    """Hooks that change nothing."""
    if h.requires_grad:
        h.register_hook(lambda g: m.seen.append(g.norm()))
        h.grad_fn.register_hook(lambda inputs, outputs: None)
        h.retain_grad()
    return h


CHANGES = {
    "scaled": lambda g: 2 * g,
    "negated": torch.neg,
    "clipped": lambda g: g.clamp(-0.1, 0.1),
    "zero": torch.zeros_like,
    "rescaled by sample": lambda g: g / (1e-3 + g.flatten(1).norm(dim=1).view(-1, *[1] * (g.ndim - 1))),
    "some features only": lambda g: g * torch.tensor([1.0, 0, 1, 0, 1, 1]),
}


def with_hook(hook, at: str, in_place=False) -> Net:
    def forward(m, x):
        h = m.a(x)
        h = hook(m, h) if at == "an activation" else h
        h = torch.tanh_(h) if in_place else torch.tanh(h)
        h = hook(m, h.view(len(x), -1, D)).view_as(x) if at == "a view" else h
        y = m.b(h)
        return hook(m, y) if at == "the output" else y

    model = Net(forward, a=linear(), b=linear())
    model.seen = []
    return model


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("at", ["an activation", "a view", "the output"])
@pytest.mark.parametrize("kind", [tensor_hook, node_prehook, node_hook])
def test_hooks_on_tensors_and_nodes(kind, at, change, judge):
    judge(lambda: {"model": with_hook(kind(CHANGES[change]), at), "x": x_of(B, 3, D)})


def backward_hooked(kind: str, change, layer: nn.Module) -> nn.Module:
    if kind == "full":
        layer.register_full_backward_hook(lambda m, inputs, _: tuple(None if g is None else change(g) for g in inputs))
    else:
        layer.register_full_backward_pre_hook(lambda m, outputs: tuple(change(g) for g in outputs))
    return layer


HOOKED = {
    **{
        f"{kind} backward hook, {where}, {change}": lambda kind=kind, layer=layer, f=f: {
            "model": nn.Sequential(linear(), backward_hooked(kind, f, layer()), nn.Tanh(), linear()),
            "x": x_of(),
        }
        for kind in ("full", "full pre")
        for where, layer in (
            ("activation", nn.Sigmoid),
            ("layer", linear),
            ("norm", lambda: nn.LayerNorm(D)),
            ("block", lambda: nn.Sequential(linear(), nn.Tanh())),
        )
        for change, f in CHANGES.items()
        if change in ("scaled", "clipped", "zero")
    },
    "hooks that look": lambda: {"model": with_hook(looked_at, "an activation"), "x": x_of(B, 3, D)},
    "a hook before an operation in place": lambda: {
        "model": with_hook(tensor_hook(torch.neg), "an activation", in_place=True),
        "x": x_of(B, 3, D),
    },
    "a hook after an operation in place": lambda: {
        "model": with_hook(tensor_hook(torch.neg), "a view", in_place=True),
        "x": x_of(B, 3, D),
    },
    "a hook of an embedding": lambda: {
        "model": Net(lambda m, i: m.a(tensor_hook(lambda g: 3 * g)(m, m.e(i))), e=nn.Embedding(7, D), a=linear()),
        "x": torch.randint(0, 7, (B, 3)),
    },
    "a hook on all modules": lambda: {
        "model": GlobalHook(),
        "x": x_of(),
    },
    "two hooks": lambda: {
        "model": Net(
            lambda m, x: m.b(tensor_hook(torch.tanh)(m, tensor_hook(torch.neg)(m, m.a(x)))), a=linear(), b=linear()
        ),
        "x": x_of(),
    },
    "saved tensors that are packed": lambda: {"model": packed(torch.autograd.graph.saved_tensors_hooks), "x": x_of()},
    "saved tensors on the CPU": lambda: {
        "model": packed(lambda *_: torch.autograd.graph.save_on_cpu()),
        "x": x_of(),
    },
    "a parameter's hook that scales": lambda: {
        "model": parameter_hooked(lambda g: 2 * g),
        "x": x_of(),
        "frozen": False,
        "outcome": "right or refused",
    },
    "a parameter's hook that clips": lambda: {
        "model": parameter_hooked(lambda g: g.clamp(-0.05, 0.05)),
        "x": x_of(),
        "frozen": False,
        "outcome": "right or refused",
        "trains": False,
    },
    "a parameter's hook that is masked": lambda: {
        "model": parameter_hooked(lambda g: g.tril()),
        "x": x_of(),
        "frozen": False,
        "outcome": "right or refused",
    },
    "a hook on the node of a layer itself": lambda: {
        "model": with_hook(node_hook(lambda g: 2 * g), "the output"),
        "x": x_of(),
        "outcome": "right or refused",
    },
    "a hook that scales by the batch": lambda: {
        "model": with_hook(tensor_hook(lambda g: g / g.norm()), "an activation"),
        "x": x_of(B, 3, D),
        "outcome": "right or refused",
        "trains": False,
    },
    "a hook that exchanges samples' gradients": lambda: {
        "model": with_hook(tensor_hook(lambda g: g.flip(0)), "the output"),
        "x": x_of(B, 3, D),
        "oracle": "batch",
        "outcome": "right or refused",
    },
}  # fmt: skip


class GlobalHook(nn.Module):
    """Its forward runs below a hook that is registered for all modules of the process."""

    def __init__(self):
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x):
        handle = torch.nn.modules.module.register_module_forward_hook(lambda m, args, output: 2 * output)
        try:
            return self.b(torch.tanh(self.a(x)))
        finally:
            handle.remove()


def packed(hooks):
    def forward(m, x):
        with hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy):
            return m.b(torch.tanh(m.a(x)))

    return Net(forward, a=linear(), b=linear())


def parameter_hooked(change):
    model = two_layers()
    model.a.weight.register_hook(change)
    return model


@pytest.mark.parametrize("name", HOOKED)
def test_hooks(name, judge):
    judge(HOOKED[name])


def test_what_happens_after_a_gradient_is_accumulated_happens_in_training_alone():
    """An optimizer in a hook takes no step in a call."""
    model, x, steps = two_layers(), x_of(), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: steps.append(p))
    gradext.batch_layer_grads(model, x, loss=mse)
    with gradext.watch(model) as watch:
        losses = mse(model(x), x)
    watch.factors(losses)
    assert not steps
    mse(model(x), x).sum().backward()
    assert len(steps) == 4


# --- weights that are another's for a while --------------------------------------------------------------------------


def exchanged_data(m, x):
    y = m.b(torch.tanh(m.a(x)))
    weight, kept = m.a.weight, m.a.weight.data
    weight.data = 1.5 * kept
    y = y + m.b(torch.tanh(m.a(x)))
    weight.data = kept
    return y


def scaled_data(m, x):
    """In place, through .data, which autograd does not notice: the first use's backward has the later values."""
    y = m.a(x)
    m.b.weight.data.mul_(1.5)
    y = m.b(torch.tanh(y))
    m.b.weight.data.div_(1.5)
    return y


def swapped(m, x):
    y = m.b(torch.tanh(m.a(x)))
    own = m.a.weight
    m.a.weight = nn.Parameter(own.detach() * 1.5)
    y = y + m.b(torch.tanh(m.a(x)))
    m.a.weight = own
    return y


def in_place(m, x):
    with torch.no_grad():
        m.a.weight.mul_(1.5)
    y = m.b(torch.tanh(m.a(x)))
    with torch.no_grad():
        m.a.weight.div_(1.5)
    return y


def functional(m, x):
    weights = {name: p * 1.5 for name, p in m.a.named_parameters()}
    return m.b(torch.tanh(m.a(x) + torch.func.functional_call(m.a, weights, (x,))))


def restored_later(m, x):
    """A power iteration, as legacy spectral norms have it."""
    with torch.no_grad():
        u = F.normalize(m.a.weight @ torch.ones(D), dim=0)
    return m.b(torch.tanh(F.linear(x, m.a.weight / (u @ m.a.weight).norm())))


EXCHANGED = {
    "weight.data, between two uses": (exchanged_data, "right or refused"),
    "weight.data in place": (scaled_data, "right or refused"),
    "another parameter for a while": (swapped, "right or refused"),
    "in place around its use": (in_place, "right or refused"),
    "weights of weights in functional_call": (functional, "right"),
    "a power iteration": (restored_later, "right"),
}


@pytest.mark.parametrize("layers", [None, ["a"], ["b"]], ids=str)
@pytest.mark.parametrize("name", EXCHANGED)
def test_weights_that_change_in_the_forward(name, layers, judge):
    forward, outcome = EXCHANGED[name]

    def case():
        case = {"model": Net(forward, a=linear(), b=linear()), "x": x_of(), "outcome": outcome, "frozen": False}
        if layers:
            case |= {"options": {"layers": layers}, "names": {f"{layers[0]}.weight", f"{layers[0]}.bias"}}
        return case

    judge(case)


def test_an_embedding_that_renormalises_its_rows_is_left_as_its_forward_leaves_it(judge):
    case = lambda: {  # noqa: E731
        "model": Net(lambda m, i: m.a(m.e(i)), e=nn.Embedding(7, D, max_norm=1.0), a=linear()),
        "x": torch.randint(0, 7, (B, 3)),
        "outcome": "right or refused",
    }
    judge(case)
    torch.manual_seed(0)
    model, x = case()["model"], torch.randint(0, 7, (B, 3))
    with contextlib.suppress(gradext.CaptureError):
        gradext.batch_layer_grads(model, x, loss=lambda output, target: output.square().sum((1, 2)))
    other = copy.deepcopy(model)
    torch.testing.assert_close(model(x), other(x))
    assert model.e.weight[x.unique()].norm(dim=1).max() <= 1 + 1e-9


# --- patched classes and methods -------------------------------------------------------------------------------------

relu, sequential, norm, embed = nn.ReLU.forward, nn.Sequential.forward, nn.LayerNorm.forward, nn.Embedding.forward


def chain():
    return nn.Sequential(linear(), nn.LayerNorm(D), nn.ReLU(), linear())


def convolutions():
    return nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv1d(3, 2, 3, padding=1))


PATCHED = {
    "nn.Linear.forward": (chain, nn.Linear, "forward", lambda m, x: F.linear(0.5 * x, m.weight, m.bias)),
    "nn.Linear.forward, without its bias": (chain, nn.Linear, "forward", lambda m, x: x @ m.weight.t()),
    "nn.ReLU.forward": (chain, nn.ReLU, "forward", lambda m, x: F.leaky_relu(x, 0.1)),
    "nn.Sequential.forward": (chain, nn.Sequential, "forward", lambda m, x: 2 * sequential(m, x)),
    "nn.LayerNorm.forward": (chain, nn.LayerNorm, "forward", lambda m, x: norm(m, x) + m.weight),
    "nn.Module.__call__": (chain, nn.Module, "__call__", lambda m, *args: 1.5 * m.forward(*args)),
    "F.linear": (chain, F, "linear", lambda x, weight, bias=None: (x @ weight.t() + bias).sin()),
    "F.layer_norm": (chain, F, "layer_norm", lambda x, shape, weight, bias, eps: x * weight + bias),
    "torch.relu": (chain, torch, "relu", torch.tanh),
    "nn.Conv1d.forward": (convolutions, nn.Conv1d, "forward", lambda m, x: F.conv1d(x, 2 * m.weight, padding=1)),
    "nn.Conv1d._conv_forward": (
        convolutions, nn.Conv1d, "_conv_forward", lambda m, x, w, b: F.conv1d(x, w.flip(2), b, m.stride, m.padding),
    ),
    "F.conv1d": (convolutions, F, "conv1d", lambda x, w, b, *_: torch.conv1d(x, w * 2, b, padding=1)),
}  # fmt: skip


@pytest.mark.parametrize("loss", ["mse", mse], ids=["named", "own"])
@pytest.mark.parametrize("name", PATCHED)
def test_patched_classes_and_functions(name, loss, right):
    """Patched before the first call, and after it."""
    torch.manual_seed(0)
    build, owner, attribute, patch = PATCHED[name]
    model = build()
    x = x_of(B, 2, D) if build is convolutions else x_of()
    target = torch.randn_like(x)
    if loss == "mse":
        gradext.batch_layer_grads(model, x, loss=loss, target=target)
    with mock.patch.object(owner, attribute, patch):
        model(x)
        expected = {name: [] for name, _ in model.named_parameters()}
        for b in range(B):
            value = mse(model(x[b : b + 1]), target[b : b + 1]).sum()
            grads = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)
            for key, g in zip(expected, grads, strict=True):
                expected[key].append(g)
        expected = {key: torch.stack(value) for key, value in expected.items()}
        for _ in range(2):
            right(gradext.batch_layer_grads(model, x, loss=loss, target=target), expected)


METHODS = {
    "a layer's forward": lambda m: setattr(m[0], "forward", lambda x: F.linear(x, 2 * m[0].weight, m[0].bias)),
    "an activation's forward": lambda m: setattr(m[2], "forward", torch.sin),
    "the model's forward": lambda m: setattr(m, "forward", lambda x: m[3](m[0](x))),
    "a norm's forward": lambda m: setattr(m[1], "forward", lambda x: x * m[1].weight),
    "a layer's class": lambda m: setattr(m[0], "__class__", type("Twice", (nn.Linear,), {"forward": twice})),
}


def twice(m, x):
    return F.linear(F.linear(x, m.weight, m.bias), m.weight)


@pytest.mark.parametrize("name", METHODS)
def test_patched_objects(name, judge):
    def patched():
        model = chain()
        METHODS[name](model)
        return {"model": model, "x": x_of()}

    judge(patched)
    judge(lambda: {"model": chain(), "x": x_of(), "change": lambda case: METHODS[name](case["model"])})


# --- derivatives in the forward and in the loss ----------------------------------------------------------------------


def inner_step(create_graph: bool):
    """Test-time training: one step of the layer's weight on a constant problem."""

    def forward(m, x):
        with torch.enable_grad():
            g = torch.autograd.grad(m.a(torch.ones(1, D)).square().sum(), m.a.weight, create_graph=create_graph)[0]
        return m.b(torch.tanh(F.linear(x, m.a.weight - 0.1 * g, m.a.bias)))

    return forward


def inner_step_unused(m, x):
    with torch.enable_grad():
        (g,) = torch.autograd.grad(m.a(torch.ones(1, D)).square().sum(), [m.a.weight], allow_unused=True)
    return m.b(torch.tanh(m.a(x if g is None else x @ (torch.eye(D) - 0.1 * g))))


def inner_step_on_samples(m, x):
    """Each sample's own step, by vmap: nothing mixes."""
    grad = torch.func.grad(lambda w, v: F.linear(v, w).square().sum())
    g = torch.func.vmap(grad, (None, 0))(m.a.weight, x)
    return m.b(torch.einsum("boi,bi->bo", m.a.weight - 0.1 * g, x).tanh())


def energy(m, x):
    with torch.enable_grad():
        v = x.detach().requires_grad_()
        return torch.autograd.grad(m.b(m.a(v).tanh()).square().sum(), v, create_graph=True)[0]


def constant_energy(m, x):
    with torch.enable_grad():
        v = x.detach().requires_grad_()
        return m.b(x + torch.autograd.grad(m.a(v).sin().sum(), v)[0])


INNER = {
    "a step without its graph": (inner_step(False), "right or refused"),
    "a step with its graph": (inner_step(True), "right or refused"),
    "a step that may be left out": (inner_step_unused, "right or refused"),
    "a step for each sample": (inner_step_on_samples, "right or refused"),
    "an energy's gradient": (energy, "right or refused"),
    "an energy's gradient as a constant": (constant_energy, "right"),
}


@pytest.mark.parametrize("name", INNER)
def test_derivatives_in_the_forward(name, judge):
    forward, outcome = INNER[name]
    frozen = "step" not in name  # for a frozen weight plain torch has no gradient either
    judge(lambda: {"model": Net(forward, a=linear(), b=linear()), "x": x_of(), "outcome": outcome, "frozen": frozen})


def test_a_gradient_penalty_in_the_loss(judge):
    """Of the critic of a WGAN: the loss differentiates with respect to the input."""

    def forward(m, x):
        with torch.enable_grad():
            v = x.detach().requires_grad_()
            y = m.b(m.a(v).tanh())
            (g,) = torch.autograd.grad(y.sum(), v, create_graph=True)
        return y, g

    judge(
        lambda: {
            "model": Net(forward, a=linear(), b=linear()),
            "x": x_of(),
            "loss": lambda output, target: output[0].sum(1) + (output[1].norm(dim=1) - 1).square(),
            "outcome": "right or refused",
        }
    )


# --- results that stay what they are ---------------------------------------------------------------------------------


class Memory(nn.Module):
    """Remembers in plain attributes, and overwrites them in the next forward."""

    def __init__(self, kind: str):
        super().__init__()
        self.a, self.b, self.kind, self.memory = linear(), linear(), kind, torch.randn(B, D)
        self.kept = []
        self.register_buffer("table", torch.zeros(2, B, D))

    def forward(self, x):
        if self.kind == "a running mean":
            self.memory.mul_(0.5).add_(x.detach())
            return self.b(torch.tanh(x)) + self.a(self.memory)
        if self.kind == "a buffer":
            with torch.no_grad():
                self.table[1].copy_(x)
            return self.a(self.table[1]) + self.b(x)
        if self.kind == "a workspace":
            self.memory.copy_(x.detach())
            return self.b(self.a(self.memory.view(B, D)))
        for kept in self.kept:
            with torch.no_grad():
                kept.zero_()
        h = self.a(x)
        self.kept = [h.detach()]
        return self.b(h)


@pytest.mark.parametrize("kind", ["a running mean", "a buffer", "a workspace", "an activation"])
def test_factors_keep_their_values(kind):
    torch.manual_seed(0)
    model, x = Memory(kind), x_of()
    factors = gradext.batch_layer_factors(model, x, loss=mse)
    with gradext.watch(model) as watch:
        losses = mse(model(x), x)
    watched = watch.factors(losses)
    before = [{name: f.materialize().clone() for name, f in found.items()} for found in (factors, watched)]
    gradext.batch_layer_grads(model, 3 * x, loss=mse)
    model(5 * x)
    with torch.no_grad():
        x.zero_()
        for tensor in (*model.parameters(), *model.buffers(), model.memory):
            tensor.zero_()
    for found, values in zip((factors, watched), before, strict=True):
        for name, value in values.items():
            assert torch.equal(found[name].materialize(), value), name


def test_what_a_hook_keeps_may_be_overwritten():
    torch.manual_seed(0)
    model, x, kept = nn.Sequential(linear(), nn.Tanh(), linear()), x_of(), []
    model[1].register_forward_hook(lambda m, args, output: kept.extend([args[0].detach(), output.detach()]))
    model[1].register_full_backward_hook(lambda m, inputs, outputs: kept.extend([*inputs, *outputs]))
    factors = gradext.batch_layer_factors(model, x, loss=mse)
    before = {name: f.materialize().clone() for name, f in factors.items()}
    with torch.no_grad():
        for tensor in kept:
            tensor.zero_()
    for name, value in before.items():
        assert torch.equal(factors[name].materialize(), value), name


# --- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "of_delta"), [(1e20, 1e-20), (1e25, 1e-25), (1e-25, 1e22), (1e15, 1e-25)])
def test_norms_of_factors_of_very_different_sizes(scale, of_delta):
    torch.manual_seed(0)
    factors = gradext.GradFactors((torch.randn(4, 5) * scale).float(), (torch.randn(4, 3) * of_delta).float())
    flat = factors.materialize().double().flatten(1)
    torch.testing.assert_close(factors.norm().double(), flat.norm(dim=1), rtol=1e-5, atol=0)
    clipped = ((1 / flat.norm(dim=1)).clamp_max(1)[:, None] * flat).sum(0)
    torch.testing.assert_close(factors.clipped_sum(1.0).double().flatten(), clipped, rtol=1e-4, atol=0)


def test_the_cosine_of_a_tiny_gradient_with_itself():
    for dtype, size in ((torch.float64, 1e-4), (torch.float64, 1e-40), (torch.float32, 1e-12)):
        factors = gradext.GradFactors(torch.full((2, 5), size, dtype=dtype), torch.full((2, 3), size, dtype=dtype))
        torch.testing.assert_close(factors.cosine(factors.materialize()[0]), torch.ones(2, dtype=dtype))


# --- nothing is held -------------------------------------------------------------------------------------------------


def test_nothing_is_held_when_a_call_is_over():
    torch.manual_seed(0)
    model = nn.Sequential(linear(), nn.ReLU(), linear())
    x, loss = x_of(), Weighted("buffer")
    for layers in (None, ["0"], "2", "*.weight"):
        gradext.batch_layer_factors(model, x, loss=loss, layers=layers)
    with gradext.watch(model) as watch:
        losses = loss(model(x), x)
    factors = watch.factors(losses)
    old = {"x": x, "loss": loss, "losses": losses, "layer": model[2], "weight": model[2].weight}
    old = {name: weakref.ref(value) for name, value in old.items()}
    model[2] = linear()
    del x, loss, losses, watch, factors
    gradext.batch_layer_grads(model, x_of(), loss=mse, layers=["0"])
    gc.collect()
    assert {name: value() for name, value in old.items() if value() is not None} == {}
    gone = weakref.ref(model)
    gradext.batch_layer_grads(model, x_of(), loss=mse)
    del model
    gc.collect()
    assert gone() is None


# --- the other samples of a batch ------------------------------------------------------------------------------------


def reconstruction():
    torch.manual_seed(0)
    return nn.Sequential(linear(), nn.Tanh(), linear(), nn.Sigmoid()), torch.rand(8, D)


@pytest.mark.parametrize("value", [1.0000001, -1e-9, 7.0, float("nan")])
@pytest.mark.parametrize("place", [0, 5])
def test_auto_does_not_depend_on_other_samples(place, value):
    """One pixel outside of [0, 1] changes no other sample's gradient; that it is refused is right too."""
    model, x = reconstruction()
    others = [k for k in range(8) if k != place]
    expected = gradext.batch_layer_grads(model, x)
    x[place, 0] = value
    try:
        found = gradext.batch_layer_grads(model, x)
    except ValueError as error:
        refusal, found = str(error), {}
    for name, gradients in found.items():
        torch.testing.assert_close(gradients[others], expected[name][others], rtol=1e-12, atol=1e-15)
    assert found or re.search(rf"samples?\b\D*{place}\b", refusal), refusal


@pytest.mark.parametrize("value", [0.5, 1.0000001, 7.0])
def test_auto_does_not_depend_on_where_batches_are_cut(value):
    model, x = reconstruction()
    x[5, 0] = value
    keys = {"reduce": lambda factors: factors.norm()}
    cuts = [gradext.iter_layer_grads(model, x.split(size), **keys) for size in (1, 2, 3, 8)]
    cuts += [gradext.iter_layer_grads(model, [x], **keys, memory_budget=budget) for budget in (1 << 13, 1 << 15)]
    cuts += [(gradext.batch_layer_factors(model, part).norm() for part in x.split(size)) for size in (3, 8)]
    found, refused = [], []
    for cut in cuts:
        try:
            found.append(torch.cat(list(cut)))
        except ValueError as error:
            refused.append(str(error))
    assert not found or not refused
    assert all("target" in refusal for refusal in refused)
    for norms in found:
        torch.testing.assert_close(norms, found[0], rtol=1e-10, atol=0)


# --- targets in another order of dimensions --------------------------------------------------------------------------

TARGETS = {
    "[B, L, C] and [B, C, L]": ((4, 5, 3), (4, 3, 5)),
    "[B, C, H, W] and [B, H, W, C]": ((4, 3, 5, 2), (4, 5, 2, 3)),
    "[B, C, H, W] and [B, C, W, H]": ((4, 3, 5, 2), (4, 3, 2, 5)),
    "[B, T, D] and [T, B, D]": ((4, 5, 3), (5, 4, 3)),
}


@pytest.mark.parametrize("loss", ["mse", "bce_logits", "auto"])
@pytest.mark.parametrize("name", TARGETS)
def test_targets_in_another_order_are_refused(name, loss):
    """Never read in the order of the output, which is another sample's or another position's number."""
    output, target = TARGETS[name]
    model = nn.Linear(output[-1], output[-1])
    with pytest.raises(ValueError, match="target"):
        gradext.batch_layer_grads(model, torch.rand(output), loss=loss, target=torch.rand(target))


@pytest.mark.parametrize("shape", [(B, 15), (B, 3, 5)])
def test_flat_models_take_targets_in_the_shape_of_images(shape, right):
    """And the reverse: the same numbers in the same order."""
    torch.manual_seed(0)
    flat, x, target = nn.Linear(15, 15), torch.rand(B, 15), torch.rand(B, 3, 5)
    model = flat if shape == (B, 15) else nn.Sequential(flat, nn.Unflatten(1, (3, 5)))
    given = target if shape == (B, 15) else target.flatten(1)
    expected = gradext.batch_layer_grads(flat, x, loss="mse", target=target.flatten(1))
    found = gradext.batch_layer_grads(model, x, loss="mse", target=given)
    for value, other in zip(found.values(), expected.values(), strict=True):
        right({"": value}, {"": other})


# --- how many forwards and backwards ---------------------------------------------------------------------------------

ONE_BACKWARD = {
    "a chain": lambda: (nn.Sequential(linear(), nn.Tanh(), linear(), nn.Tanh(), linear()), x_of()),
    "over positions": lambda: (nn.Sequential(linear(), nn.Tanh(), nn.LayerNorm(D), linear()), x_of(B, 3, D)),
    "convolutions": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.BatchNorm2d(3).eval(), nn.Flatten(), nn.Linear(12, 5)),
        x_of(B, 2, 4, 4),
    ),
    "flattened rows": lambda: (
        Net(lambda m, x: m.b(torch.tanh(m.a(x.view(-1, D)))).view(len(x), -1), a=linear(), b=linear()),
        x_of(B, 3, D),
    ),
    "as many positions as samples": lambda: (nn.Sequential(linear(), nn.Tanh(), linear()), x_of(B, B, D)),
    "an embedding": lambda: (
        nn.Sequential(nn.Embedding(7, D), linear(), nn.Tanh(), linear()),
        torch.randint(0, 7, (B, 3)),
    ),
    "attention": lambda: (
        nn.Sequential(nn.TransformerEncoderLayer(D, 2, 8, 0.0, torch.tanh, batch_first=True), nn.Tanh()),
        x_of(B, 3, D),
    ),
}


@pytest.mark.parametrize("name", ONE_BACKWARD)
def test_what_is_sample_by_sample_by_structure_takes_one_backward(name):
    torch.manual_seed(0)
    model, x = ONE_BACKWARD[name]()

    def loss(output, target):
        return output.square().flatten(1).sum(1)

    def backwards() -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            gradext.batch_layer_factors(model, x, loss=loss)
        return sum(event.count for event in profile.key_averages() if event.key == "aten::tanh_backward")

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss(model(x), x).sum().backward()
    plain = sum(event.count for event in profile.key_averages() if event.key == "aten::tanh_backward")
    assert plain
    backwards()
    assert backwards() == plain


@pytest.mark.parametrize(
    ("forward", "options"),
    [
        (lambda m, x: m.b(torch.tanh(m.a(x))), {}),
        (lambda m, x: m.b(torch.tanh(m.a(x.flip(0)))).flip(0), {"mixing": "allow"}),
        (lambda m, x: m.b(centred(m.a(x))), {"mixing": "allow"}),
        (lambda m, x: m.b(Product.apply(x, m.a.weight)), {}),
        (lambda m, x: m.b(m.a(x.transpose(0, 1))).transpose(0, 1), {}),
    ],
    ids=["plain", "reversed", "mixed", "unseen", "time-major"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_model_runs_once(forward, options):
    calls = []
    model, x = Net(lambda m, x: calls.append(x.shape) or forward(m, x), a=linear(), b=linear()), x_of(B, B, D)
    for k in range(1, 4):
        gradext.batch_layer_grads(model, x, loss=mse, **options)
        assert calls == [x.shape] * k
