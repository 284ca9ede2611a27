"""The routes to per-sample gradients that are compared: gradext's, torch's own, by hand, and the libraries that do it.

A `Case` is a model with a loss and chosen weights, a `Problem` the same with a batch, and a `Route` is set up once for
a problem and then called. `benchmarks.models` has the cases of real models. Every route gets what suits it best: a copy
of the model in which the chosen weights alone require a gradient, in the state and mode that it asks for, and the loss
summed over the batch.

    python -m benchmarks.peers CASE B ROUTE      (the bytes by which resident memory rises in one call of a route)
"""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import gradext
from gradext.novelty import VAE

from . import measure

TOLERANCE = 1e-4  # relative, of fp32 results against fp64 ones
SUMMED = 1e-3  # of one fp32 sum over all entries of a gradient, millions: what the routes that form it round to
FUNCTIONALS = 10  # of the gradient: the classes of a small classifier on it
CHECKED = 3  # samples of a batch that are compared with the oracle

# Per-sample losses [B], and their gradients with respect to the output (for bce: to the sigmoid's input).
LOSSES: dict[str, tuple[Callable, Callable]] = {
    "bce": (
        lambda output, target: F.binary_cross_entropy(output, target, reduction="none").flatten(1).sum(1),
        lambda output, target: output - target,
    ),
    "mse": (
        lambda output, target: (output - target).square().flatten(1).sum(1),
        lambda output, target: 2 * (output - target),
    ),
    "cross_entropy": (
        lambda output, target: F.cross_entropy(output, target, reduction="none"),
        lambda output, target: output.softmax(1).scatter_add_(
            1, target[:, None], torch.full_like(target[:, None], -1, dtype=output.dtype)
        ),
    ),
}


@dataclass(frozen=True)
class Case:
    """A model, how its loss is taken, and the weights whose per-sample gradients are wanted."""

    name: str
    build: Callable[[], nn.Module]
    sample: tuple[int, ...]  # shape of one input
    loss: str | Callable  # a name of `LOSSES`, or (output, target) -> [B]
    weights: tuple[str, ...] | None  # None: all that require grad
    classes: int | None = None  # None: reconstruction, the target is the input
    batch: Callable[[int], tuple[dict[str, Tensor], Tensor]] | None = None  # B -> keywords and target, in place of x
    for_opacus: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None  # the inputs as its hooks need them


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


CASES = {
    case.name: case
    for case in (
        Case(
            "small",
            lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)),
            (64,),
            "cross_entropy",
            ("0.weight", "2.weight"),
            classes=16,
        ),
        Case("MNIST VAE, last layer", lambda: VAE(784, 400, 20), (784,), "bce", ("decoder.2.weight",)),
        Case("MNIST VAE, decoder", lambda: VAE(784, 400, 20), (784,), "bce", ("decoder.0.weight", "decoder.2.weight")),
        Case("wide", lambda: VAE(3072, 1024, 128), (3072,), "bce", ("decoder.0.weight", "decoder.2.weight")),
        Case(
            "sequence",
            lambda: nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)),
            (16, 128),
            "mse",
            ("0.weight", "2.weight"),
        ),
        Case("conv", _conv, (1, 28, 28), "cross_entropy", ("0.weight", "2.weight", "5.weight"), classes=10),
    )
}


class Problem:
    """A case with a batch of B samples: the same numbers at every call, the first ones the same for every B."""

    def __init__(self, case: Case, B: int) -> None:
        self.case, self.B = case, B
        torch.manual_seed(0)
        self.model = case.build().eval()
        parameters = dict(self.model.named_parameters())
        self.weights = case.weights or tuple(name for name, p in parameters.items() if p.requires_grad)
        self.model.requires_grad_(False)
        self.shapes = {name: tuple(parameters[name].shape) for name in self.weights}
        if case.batch is not None:
            self.x, self.target = case.batch(B)
            return
        self.x = torch.rand(B, *case.sample, generator=torch.Generator().manual_seed(1))
        if case.classes is None:
            self.target = self.x
        else:
            self.target = torch.randint(case.classes, (B,), generator=torch.Generator().manual_seed(2))

    def __len__(self) -> int:
        return self.B

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all chosen per-sample gradients in fp32, the B·O·I that the factors avoid."""
        return 4 * self.B * sum(math.prod(shape) for shape in self.shapes.values())

    def trainable(self) -> nn.Module:
        """A copy of the model in which the chosen weights alone require a gradient."""
        model = copy.deepcopy(self.model)
        for name in self.weights:
            model.get_parameter(name).requires_grad_()
        return model

    def losses(self, model: nn.Module, x=None, target: Tensor | None = None) -> Tensor:
        """The losses [B] of the batch, or of other samples."""
        x, target = (self.x, self.target) if target is None else (x, target)
        return self.loss(self.output(model, x), target)

    def output(self, model: nn.Module, x=None):
        x = self.x if x is None else x
        return model(**x) if isinstance(x, dict) else model(x)

    def loss(self, output, target: Tensor) -> Tensor:
        if callable(self.case.loss):
            return self.case.loss(output, target)
        return LOSSES[self.case.loss][0](_first(output), target)

    def samples(self, index: Sequence[int] | Tensor) -> tuple:
        """The inputs and targets of some samples."""
        return tree_map(lambda t: t[index], (self.x, self.target))

    @cached_property
    def max_norm(self) -> float:
        """The norm to clip to: that of the first sample's gradient."""
        model = self.trainable()
        grads = torch.autograd.grad(self.losses(model, *self.samples([0])).sum(), _chosen(self, model))
        return _flat(grads, 0).norm().item()

    @cached_property
    def out(self) -> dict[str, Tensor]:
        return {name: torch.empty(self.B, *shape) for name, shape in self.shapes.items()}

    @cached_property
    def functionals(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(3)
        return {name: torch.randn(FUNCTIONALS, *shape, generator=generator) for name, shape in self.shapes.items()}

    @cached_property
    def expected(self) -> Expected:
        return Expected(self)


def _chosen(problem: Problem, model: nn.Module) -> list[nn.Parameter]:
    return [model.get_parameter(name) for name in problem.weights]


def _first(output):
    return output[0] if isinstance(output, (tuple, list)) else output


# --- the oracle ------------------------------------------------------------------------------------------------------


class Expected:
    """What the routes must give, from one backward in fp64 for each of a few samples alone."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.index = sorted({round(k * (len(problem) - 1) / max(1, CHECKED - 1)) for k in range(CHECKED)})
        self.model = problem.trainable().double()
        self.weights = _chosen(problem, self.model)
        self.flat = torch.stack([self._gradient([b]) for b in self.index])

    def _gradient(self, index: Sequence[int]) -> Tensor:
        """Of the summed losses of these samples."""
        x, target = tree_map(_double, self.problem.samples(index))
        return _flat(torch.autograd.grad(self.problem.losses(self.model, x, target).sum(), self.weights), 0)

    @cached_property
    def clipped(self) -> Tensor:
        samples = (self._gradient([b]) for b in range(len(self.problem)))
        return sum(g * min(1.0, self.problem.max_norm / g.norm().item()) for g in samples)

    def error(self, computes: str, result) -> float:
        """The largest relative error; infinite for a result of another shape, or that is not finite."""
        lengths = self.flat.norm(dim=1)
        if computes == "output":
            wanted = _first(self.problem.output(self.model, tree_map(_double, self.problem.x))).detach()
            got, scale = _first(result), wanted.norm()
        elif computes in ("sum", "step"):
            wanted, got = self._gradient(range(len(self.problem))), _flat(result, 0)
            scale = wanted.norm()
        elif computes == "clipped":
            wanted, got = self.clipped, _flat(result, 0)
            scale = wanted.norm()
        elif any(len(part) != len(self.problem) for part in (result if computes == "gradients" else [result])):
            return math.inf
        elif computes == "gradients":
            wanted, got, scale = self.flat, _flat([g[self.index] for g in result], 1), lengths[:, None]
        elif computes in ("norms", "step norms"):
            wanted, got, scale = lengths, result[self.index], lengths
        elif computes == "gram":
            wanted, got = self.flat @ self.flat.mT, result[self.index][:, self.index]
            scale = lengths[:, None] * lengths
        else:
            functionals = _flat(list(self.problem.functionals.values()), 1).double()
            wanted, got = self.flat @ functionals.mT, result[self.index]
            scale = lengths[:, None]  # the size of a product with standard normal numbers
        if got.shape != wanted.shape or not got.isfinite().all():
            return math.inf
        difference = (got.double() - wanted) / scale
        whole = computes in ("gradients", "clipped")
        return float(difference.norm(dim=-1).max() if whole else difference.abs().max())


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _flat(tensors: Sequence[Tensor], start: int) -> Tensor:
    """One vector, or one row for each of the first dimension where ``start`` is 1, of all tensors."""
    return torch.cat([t.flatten(start) for t in tensors], dim=-1)


# --- the routes ------------------------------------------------------------------------------------------------------

Call = Callable[[], object]


@dataclass(frozen=True)
class Route:
    """One way to one result; ``setup(problem)`` gives the call that is measured.

    ``computes`` is "gradients" (a list of [B, *weight]), "norms" [B], "gram" [B, B] or "scores" [B, H] of all chosen
    weights together, "clipped" (the sum of gradients clipped to a norm), "sum" (the batch gradient, not per sample) or
    "output" (the forward pass); the last two are floors. "step" and "step norms" are a training step, and one that
    gives the norms. ``copies`` counts how many times the gradients' bytes a call takes at its peak.
    """

    name: str
    computes: str
    setup: Callable[[Problem], Call]
    copies: int = 0
    package: str | None = None

    @property
    def key(self) -> str:
        return f"{self.name}: {self.computes}"

    @property
    def ours(self) -> bool:
        return self.name.startswith("gradext")

    @property
    def tolerance(self) -> float:
        return SUMMED if self.computes in ("norms", "gram", "scores") and not self.ours else TOLERANCE

    def unavailable(self) -> str | None:
        """None where the route can be taken, else why not."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed (pip install '.[peers]')"
        return None


def forward(problem: Problem) -> Call:
    return torch.no_grad()(lambda: problem.output(problem.model))


def batched_backward(problem: Problem) -> Call:
    model = problem.trainable()
    weights = _chosen(problem, model)
    return lambda: torch.autograd.grad(problem.losses(model).sum(), weights)


def loop(problem: Problem) -> Call:
    """The literature's way: a forward and a backward pass at batch size one."""
    model = problem.trainable()
    weights = _chosen(problem, model)

    def call() -> list[Tensor]:
        samples = (problem.samples(slice(b, b + 1)) for b in range(len(problem)))
        grads = [torch.autograd.grad(problem.losses(model, *sample).sum(), weights) for sample in samples]
        return [torch.stack(parts) for parts in zip(*grads, strict=True)]

    return call


def vmap_grad(problem: Problem) -> Call:
    """The best that torch itself offers, over the chosen weights alone."""
    parameters = dict(problem.model.named_parameters())
    chosen = {name: parameters.pop(name) for name in problem.weights}

    def sample_loss(chosen, x, target):
        x, target = tree_map(lambda t: t[None], (x, target))
        arguments = ((), x) if isinstance(x, dict) else ((x,), {})
        output = torch.func.functional_call(problem.model, {**parameters, **chosen}, *arguments)
        return problem.loss(output, target).sum()

    per_sample = torch.func.vmap(torch.func.grad(sample_loss), (None, 0, 0))
    return lambda: list(per_sample(chosen, problem.x, problem.target).values())


# By hand: what one writes in torch for just this model, with the closed form of the loss's gradient.


def _hand_factors(problem: Problem) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    """(delta [B, (T,) O], activation [B, (T,) I]) of every chosen weight, the backward stopping at the first."""
    model, residual = problem.model, LOSSES[problem.case.loss][1]
    layers = list(model.decoder if isinstance(model, VAE) else model)
    chosen = [model.get_submodule(name.removesuffix(".weight")) for name in problem.weights]

    @torch.no_grad()
    def call():
        h = model._encode(problem.x)[0] if isinstance(model, VAE) else problem.x
        inputs = []
        for layer in layers:
            inputs.append(h)
            h = layer(h)
        delta, found = residual(h, problem.target), {}
        for layer, h in zip(reversed(layers), reversed(inputs), strict=True):
            if layer in chosen:
                found[layer] = _unfolded(layer, delta, h)
            if len(found) == len(chosen):
                return [found[layer] for layer in chosen]
            delta = _backward(layer, delta, h)

    return call


def _unfolded(layer: nn.Module, delta: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(layer, nn.Linear):
        return delta, h
    windows = F.unfold(h, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return delta.flatten(2).mT, windows.mT


def _backward(layer: nn.Module, delta: Tensor, h: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return delta @ layer.weight
    if isinstance(layer, nn.ReLU):
        return delta * (h > 0)
    if isinstance(layer, nn.Flatten):
        return delta.reshape(h.shape)
    if isinstance(layer, nn.Conv2d):
        return torch.nn.grad.conv2d_input(h.shape, layer.weight, delta, layer.stride, layer.padding)
    return delta  # the sigmoid, which the residual of bce has passed already


def _product(delta: Tensor, activation: Tensor, out: Tensor | None = None) -> Tensor:
    if delta.ndim == 2:
        return torch.mul(delta[:, :, None], activation[:, None, :], out=out)
    return torch.bmm(delta.mT, activation, out=out)


def by_hand(problem: Problem) -> Call:
    factors, shapes = _hand_factors(problem), list(problem.shapes.values())
    return lambda: [_product(d, a).view(-1, *shape) for (d, a), shape in zip(factors(), shapes, strict=True)]


def by_hand_out(problem: Problem) -> Call:
    factors, outs = _hand_factors(problem), list(problem.out.values())
    matrices = [out.flatten(2) for out in outs]

    def call() -> list[Tensor]:
        for (delta, activation), matrix in zip(factors(), matrices, strict=True):
            _product(delta, activation, matrix)
        return outs

    return call


def by_hand_norms(problem: Problem) -> Call:
    factors = _hand_factors(problem)

    def sq_norm(d: Tensor, a: Tensor) -> Tensor:
        if d.ndim == 2:
            return d.square().sum(1) * a.square().sum(1)
        T, O, I = *d.shape[1:], a.shape[2]
        if T * (O + I) <= O * I:
            return ((d @ d.mT) * (a @ a.mT)).sum((1, 2))
        return _product(d, a).square().sum((1, 2))

    return lambda: sum(sq_norm(d, a) for d, a in factors()).sqrt()


def by_hand_gram(problem: Problem) -> Call:
    factors = _hand_factors(problem)

    def gram(d: Tensor, a: Tensor) -> Tensor:
        if d.ndim == 2:
            return (d @ d.mT) * (a @ a.mT)
        gradient = _product(d, a).flatten(1)
        return gradient @ gradient.mT

    return lambda: sum(gram(d, a) for d, a in factors())


def by_hand_scores(problem: Problem) -> Call:
    factors = _hand_factors(problem)
    weights = [W.flatten(2) for W in problem.functionals.values()]

    def scores(d: Tensor, a: Tensor, W: Tensor) -> Tensor:
        if d.ndim == 2:  # the longer factor first
            return ((d @ W) * a).sum(2).mT if d.shape[1] >= a.shape[1] else ((a @ W.mT) * d).sum(2).mT
        return _product(d, a).flatten(1) @ W.flatten(1).mT

    return lambda: sum(scores(d, a, W) for (d, a), W in zip(factors(), weights, strict=True))


# What one does with the gradients themselves, for the routes that give nothing else.


def _then(route: Callable[[Problem], Call], operation: Callable[[Problem, list[Tensor]], Tensor]):
    def setup(problem: Problem) -> Call:
        call = route(problem)
        return lambda: operation(problem, call())

    return setup


def _norms(problem: Problem, grads: list[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in grads]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)


def _clipped(problem: Problem, grads: list[Tensor]) -> list[Tensor]:
    factors = (problem.max_norm / _norms(problem, grads)).clamp(max=1)
    return [torch.einsum("b,b...->...", factors, g) for g in grads]


def _gram(problem: Problem, grads: list[Tensor]) -> Tensor:
    return sum(g.flatten(1) @ g.flatten(1).mT for g in grads)


def _scores(problem: Problem, grads: list[Tensor]) -> Tensor:
    pairs = zip(grads, problem.functionals.values(), strict=True)
    return sum(g.flatten(1) @ W.flatten(1).mT for g, W in pairs)


def _for_opacus(problem: Problem) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """The model and its losses as Opacus needs them: its hooks watch a layer in training mode alone.

    That changes nothing in these models.
    """
    model, x = problem.trainable(), problem.x
    for module in model.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            module.training = True
    if problem.case.for_opacus:
        x = problem.case.for_opacus(x)
    return model, lambda model: problem.losses(model, x, problem.target)


def opacus_full(problem: Problem) -> Call:
    from opacus.grad_sample import GradSampleModule

    model, losses = _for_opacus(problem)
    model = GradSampleModule(model, loss_reduction="sum")
    weights = _chosen(problem, model._module)

    def call() -> list[Tensor]:
        for weight in weights:
            weight.grad = weight.grad_sample = None
        losses(model).sum().backward()
        return [weight.grad_sample for weight in weights]

    return call


def _opacus_ghost(problem: Problem) -> tuple[nn.Module, Callable[[nn.Module], Tensor], list[nn.Parameter]]:
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    model, losses = _for_opacus(problem)
    model = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", use_ghost_clipping=True)
    return model, losses, _chosen(problem, model._module)


def opacus_ghost(problem: Problem) -> Call:
    model, losses, weights = _opacus_ghost(problem)

    def call() -> Tensor:
        for weight in weights:
            weight.grad = None
        losses(model).sum().backward()
        return model.get_norm_sample()

    return call


def opacus_ghost_clipped(problem: Problem) -> Call:
    """What its `DPLossFastGradientClipping` does: a backward for the norms, a second one of the weighted losses."""
    model, losses, weights = _opacus_ghost(problem)

    def call() -> list[Tensor]:
        found = losses(model)
        found.sum().backward(retain_graph=True)
        factors = (problem.max_norm / model.get_norm_sample()).clamp(max=1)
        for weight in weights:
            weight.grad = None
        model.disable_hooks()
        (factors * found).sum().backward()
        model.enable_hooks()
        return [weight.grad for weight in weights]

    return call


def _backpack(problem: Problem, extension: str, attribute: str) -> Callable[[], list[Tensor]]:
    import backpack.extensions

    model = backpack.extend(problem.trainable())
    weights = _chosen(problem, model)

    def call() -> list[Tensor]:
        for weight in weights:
            weight.grad = None
        with backpack.backpack(getattr(backpack.extensions, extension)()):
            problem.losses(model).sum().backward()
        found = [getattr(weight, attribute) for weight in weights]
        for weight in weights:
            delattr(weight, attribute)
        return found

    return call


def backpack_grad(problem: Problem) -> Call:
    return _backpack(problem, "BatchGrad", "grad_batch")


def backpack_norm(problem: Problem) -> Call:
    squares = _backpack(problem, "BatchL2Grad", "batch_l2")
    return lambda: sum(squares()).sqrt()


def nngeometry_gram(problem: Problem) -> Call:
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import FMatDense

    model = problem.trainable()
    layers = LayerCollection()
    for name in problem.weights:
        layer = LayerCollection._module_to_layer(model.get_submodule(name.removesuffix(".weight")))
        layer.bias = None  # the weights alone, as everywhere here
        layers.add_layer(name.removesuffix(".weight"), layer)
    backend = TorchHooksJacobianBackend(
        model, lambda x, target: problem.loss(model(x), target)[:, None], layer_collection=layers
    )

    def call() -> Tensor:
        return FMatDense(backend, examples=(problem.x, problem.target)).data[0, :, 0]

    return call


def _ours(problem: Problem) -> tuple[nn.Module, dict]:
    arguments = {"loss": problem.case.loss, "target": problem.target}
    if problem.case.weights is None:
        return problem.trainable(), arguments
    return problem.model, arguments | {"layers": list(problem.weights)}


def gradext_grads(problem: Problem) -> Call:
    return _gradext_grads(problem)


def gradext_grads_out(problem: Problem) -> Call:
    return _gradext_grads(problem, out=problem.out)


def _gradext_grads(problem: Problem, **options) -> Call:
    model, arguments = _ours(problem)

    def call() -> list[Tensor]:
        grads = gradext.batch_layer_grads(model, problem.x, **arguments, **options)
        return [grads[name] for name in problem.weights]

    return call


def _gradext_factors(operation: Callable[[Problem, gradext.LayerFactors], Tensor | list[Tensor]]):
    def setup(problem: Problem) -> Call:
        model, arguments = _ours(problem)
        return lambda: operation(problem, gradext.batch_layer_factors(model, problem.x, **arguments))

    return setup


def training_step(problem: Problem) -> Call:
    """A backward into the parameters' .grad, without an optimizer."""
    model = problem.trainable()

    def call() -> list[Tensor]:
        problem.losses(model).sum().backward()
        return _taken(problem, model)

    return call


def gradext_training_step(problem: Problem) -> Call:
    model = problem.trainable()

    def call() -> Tensor:
        with gradext.watch(model, train=True) as watch:
            losses = problem.losses(model)
        losses.sum().backward()
        norms = watch.factors(losses).norm()
        _taken(problem, model)
        return norms

    return call


def _taken(problem: Problem, model: nn.Module) -> list[Tensor]:
    grads = [weight.grad for weight in _chosen(problem, model)]
    model.zero_grad()
    return grads


def _clipped_sum(problem: Problem, factors: gradext.LayerFactors) -> list[Tensor]:
    sums = factors.clipped_sum(problem.max_norm)
    return [sums[name] for name in problem.weights]


def _linear(problem: Problem, factors: gradext.LayerFactors) -> Tensor:
    return sum(factors[name].linear(W) for name, W in problem.functionals.items())


ROUTES = {
    route.key: route
    for route in (
        Route("forward pass alone", "output", forward),
        Route("batched backward", "sum", batched_backward),
        Route("single-sample loop", "gradients", loop, copies=2),
        Route("vmap(grad)", "gradients", vmap_grad, copies=1),
        Route("by hand", "gradients", by_hand, copies=1),
        Route("by hand, out=", "gradients", by_hand_out),
        Route("Opacus", "gradients", opacus_full, copies=2, package="opacus"),
        Route("BackPACK BatchGrad", "gradients", backpack_grad, copies=1, package="backpack"),
        Route("gradext", "gradients", gradext_grads, copies=1),
        Route("gradext, out=", "gradients", gradext_grads_out),
        Route("vmap(grad)", "norms", _then(vmap_grad, _norms), copies=1),
        Route("by hand", "norms", by_hand_norms),
        Route("Opacus ghost", "norms", opacus_ghost, package="opacus"),
        Route("BackPACK BatchL2Grad", "norms", backpack_norm, package="backpack"),
        Route("gradext", "norms", _gradext_factors(lambda problem, factors: factors.norm())),
        Route("vmap(grad)", "clipped", _then(vmap_grad, _clipped), copies=1),
        Route("Opacus", "clipped", _then(opacus_full, _clipped), copies=2, package="opacus"),
        Route("Opacus ghost", "clipped", opacus_ghost_clipped, package="opacus"),
        Route("gradext", "clipped", _gradext_factors(_clipped_sum)),
        Route("vmap(grad)", "gram", _then(vmap_grad, _gram), copies=1),
        Route("by hand", "gram", by_hand_gram),
        Route("nngeometry", "gram", nngeometry_gram, package="nngeometry"),
        Route("gradext", "gram", _gradext_factors(lambda problem, factors: factors.gram())),
        Route("training step", "step", training_step),
        Route("gradext", "step norms", gradext_training_step),
        Route("vmap(grad)", "scores", _then(vmap_grad, _scores), copies=1),
        Route("by hand", "scores", by_hand_scores),
        Route("gradext", "scores", _gradext_factors(_linear)),
    )
}


def main() -> None:
    from . import models

    name, B, key = sys.argv[1:]
    case, route = (CASES | models.CASES)[name], ROUTES[key]
    route.setup(Problem(case, 2))()  # lazy imports and the like are not the route's memory
    print(measure.resident_rise(route.setup(Problem(case, int(B)))))


if __name__ == "__main__":
    main()
