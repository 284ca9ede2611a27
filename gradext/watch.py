"""`watch`: per-sample gradients of every parameter, from the user's own forward and one partial backward.

The public class: its arguments, what is changed for the time of its block, and the form of its results. `mode` sees the
run, `backward` makes gradients of what it saw. Nothing is ever run again with other inputs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from . import ops, rules
from .backward import Backward, Gradient, held_elsewhere, memory
from .errors import CaptureError, UnsupportedLayerError
from .factors import GradFactors, LayerFactors, LayerGrads
from .losses import Root, root_of
from .mode import WatchMode
from .selection import Coverage, LayerChoice, select

_locks = WeakIdKeyDictionary()
_locks_guard = threading.Lock()


def _after_fork() -> None:
    """A child starts with no call under way, whatever other threads of its parent were doing."""
    global _locks, _locks_guard
    _locks, _locks_guard = WeakIdKeyDictionary(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def lock_of(model: nn.Module) -> threading.RLock:
    """Calls on one model take turns: its parameters' flags and buffers are changed for their time."""
    with _locks_guard:
        return _locks.setdefault(model, threading.RLock())


@contextlib.contextmanager
def _recording(model: nn.Module, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Gradients are recorded, and of all parameters, so that a use that the mode misses leaves a trace.

    Calls on one model take turns, and compiled code runs as Python. Restores all on exit.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_of(model))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if torch.is_autocast_cache_enabled():  # it would keep a cast of every stand-in until the caller's context ends
            stack.callback(torch.set_autocast_cache_enabled, True)
            torch.set_autocast_cache_enabled(False)
        for parameter in parameters:
            if not parameter.requires_grad:
                stack.callback(parameter.requires_grad_, False)
                parameter.requires_grad_(True)
        yield


class watch:
    """Per-sample gradients of whatever runs inside: ``with gradext.watch(model) as watch: losses = ...``.

    Any forward, any loss, any inputs: the user's own code. Then `factors` and `grads` give, for each parameter, row b
    as ∂ losses[b] / ∂ parameter of this very run, with its dropout, its routing and its constants. B is the length of
    the losses, in whatever dimension the model has its samples.

    Args:
        model: the module whose parameters are meant; it may be called, or parts of it, any number of times.
        layers, exclude: which parameters, see `gradext.batch_layer_grads`.
        train: watch a training step: the losses keep their graph to the parameters, and after the user's own
            ``losses.mean().backward()`` ``watch.factors()`` gives the factors of that very backward, for each sample's
            own loss, without a second forward or backward. Samples whose loss had weight 0 in it come out as NaN.
        fallback: None: uses of parameters that cannot be seen are added by one backward a sample, with one warning;
            ``"error"`` raises instead.
        mixing: ``"error"`` refuses samples whose losses depend on other samples' rows beyond constants; ``"allow"``
            gives their exact gradients, by one backward a sample.
        segments: for ragged rows, the sample of each row: integers [N] in 0..B-1.
        inputs: the tensors that hold samples (nested); by default all that come from outside of the model.
        create_graph: results can be differentiated with respect to the parameters.

    Raises:
        CaptureError: samples that mix, an input overwritten in place, a reentrant checkpoint.
        UnsupportedLayerError: with ``fallback="error"``, a use of a parameter that cannot be seen.

    >>> import torch, gradext
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    >>> x, y = torch.rand(5, 6), torch.tensor([0, 1, 2, 0, 1])
    >>> with gradext.watch(model, train=True) as watch:
    ...     losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
    >>> losses.mean().backward()
    >>> watch.factors().norm().shape
    torch.Size([5])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerChoice = None,
        exclude: LayerChoice = None,
        train: bool = False,
        fallback: str | None = None,
        mixing: str = "error",
        segments: Tensor | None = None,
        inputs: Any = None,
        create_graph: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, but got {type(model).__name__}")
        if fallback not in (None, "error"):
            raise ValueError(f"fallback: expected None or 'error', but got {fallback!r}")
        if mixing not in ("error", "allow"):
            raise ValueError(f"mixing: expected 'error' or 'allow', but got {mixing!r}")
        _check_segments(segments)
        if train and create_graph:
            raise ValueError("create_graph: expected False with train=True; use watch(model, create_graph=True)")
        self._model, self._train, self._inputs = model, train, inputs
        self._options: dict[str, Any] = {"fallback": fallback, "mixing": mixing, "segments": segments}
        self._options["create_graph"] = create_graph
        self._selection = select(model, layers, exclude)
        self._mode: WatchMode | None = None
        self._context: contextlib.AbstractContextManager[None] | None = None
        self.coverage = Coverage(left_out=dict(self._selection.left_out))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The chosen parameters, by name."""
        return self._selection.chosen

    def __enter__(self) -> watch:
        if self._context is not None:
            raise RuntimeError("watch: expected to be entered once at a time; make another one for another block")
        context = self._watching()
        context.__enter__()
        self._context = context
        return self

    def __exit__(self, *error) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(*error)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        with _recording(self._model, self.parameters.values()):
            attached = self._train or self._options["create_graph"]
            self._mode = mode = WatchMode(self._model, self._selection, attached=attached, train=self._train)
            if self._inputs is not None:
                mode.mark_inputs(rules.tensors_of(self._inputs))
            handles = RemovableHandle.next_id
            with _registered_layers(mode), mode:
                yield
            mode.hooked = RemovableHandle.next_id - mode.handles != handles

    def factors(self, losses: Tensor | None = None) -> LayerFactors:
        """The gradients of every chosen parameter in factored form, by the parameter's name.

        losses [B]: each sample's own loss, from inside the block. After a training step's backward they may be left
        out: the last one-dimensional result of the block is taken.
        """
        mode = self._finished()
        return kept_apart(layer_factors(self._gradients_of(losses), self.coverage), mode.held())

    def grads(self, losses: Tensor | None = None) -> LayerGrads:
        """The gradients themselves, {parameter name: [B, *parameter.shape]}."""
        return layer_grads(self._gradients_of(losses), self.parameters, self.coverage)

    def gradients(self, root: Root, weights: Tensor | None = None, *, keep_graph: bool = True) -> dict[str, Gradient]:
        """From where the backward begins; ``weights`` [B] are those of a backward that has run, by ``train``.

        keep_graph: the graph of the losses, for further calls.
        """
        with _recording(self._model, self.parameters.values()):
            return Backward(self._finished(), self.coverage, root, weights, keep_graph, **self._options).run()

    def _gradients_of(self, losses: Tensor | None) -> dict[str, Gradient]:
        mode = self._finished()
        losses = _checked_losses(self._last_losses(mode) if losses is None else losses)
        edge, _ = root = root_of(losses)
        return self.gradients(root, None if edge is None else mode.captured.get((edge.node, edge.output_nr)))

    def _finished(self) -> WatchMode:
        if self._mode is None or self._context is not None:
            raise RuntimeError("watch: expected the block to have ended; ask for gradients after it")
        return self._mode

    def _last_losses(self, mode: WatchMode) -> Tensor:
        if not self._train:
            raise ValueError("losses: expected the losses [B]; only with train=True they may be left out")
        if not mode.one_dimensional:
            raise ValueError(
                "losses: expected one loss for each sample, [B], from inside the block, but nothing there gave a "
                "one-dimensional tensor; use reduction='none', and pass the losses to watch.factors"
            )
        return mode.one_dimensional[-1]


def _check_segments(segments: Any) -> None:
    if segments is None or (isinstance(segments, Tensor) and segments.ndim == 1 and not segments.is_floating_point()):
        return
    came = f"shape {tuple(segments.shape)}, {segments.dtype}" if isinstance(segments, Tensor) else repr(segments)
    raise ValueError(f"segments: expected the sample of each row, a one-dimensional tensor of integers, but got {came}")


def _checked_losses(losses: Any) -> Tensor:
    if isinstance(losses, Tensor) and losses.ndim == 1 and losses.is_floating_point():
        return losses
    came = f"shape {tuple(losses.shape)}, {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
    raise ValueError(
        f"losses: expected a floating-point tensor of shape (B,), one value for each sample, but got {came}; use "
        "reduction='none' and sum over each sample's own elements: .flatten(1).sum(1)"
    )


# --- layers with a rule of their user's own ---------------------------------------------------------------------------


@contextlib.contextmanager
def _registered_layers(mode: WatchMode) -> Iterator[None]:
    """Record layers that have a rule of their user's own as wholes."""
    former: list[tuple[nn.Module, Callable | None]] = []
    try:
        for name, module in rules.registered_modules(mode.model):
            own = {role: p for role, p in module.named_parameters() if any(p is q for q in mode.chosen.values())}
            if own:
                former.append((module, module.__dict__.get("forward")))
                module.forward = _as_whole(mode, name, module, own)
        yield
    finally:
        for module, forward in former:
            del module.forward
            if forward is not None:
                module.forward = forward


def _as_whole(mode: WatchMode, name: str, module: nn.Module, own: dict[str, nn.Parameter]) -> Callable:
    """A forward that is one function of its arguments and of the parameters ``own``, by their names in the module."""
    forward, thread = module.forward, threading.get_ident()

    def run(given: dict[str, Tensor], args: tuple, kwargs: dict):
        parameters, versions = _exchange(module, given), [(t, t._version) for t in rules.tensors_of([args, kwargs])]
        mode.opaque = True
        try:
            output = forward(*args, **kwargs)
        finally:
            mode.opaque = False
            _exchange(module, parameters)
        if any(t._version != version for t, version in versions):
            raise CaptureError(
                f"{', '.join(f'{name}.{role}' for role in own)}: the layer modifies its input in place, so that "
                "its rule cannot be applied; make that operation out of place"
            )
        return output

    @functools.wraps(forward)
    def whole(*args, **kwargs):
        if mode.opaque or threading.get_ident() != thread or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return mode.__torch_function__(run, (), (own, args, kwargs))

    run.rule = functools.partial(rules.registered_call, name, module)  # type: ignore[attr-defined]
    return whole


def _exchange(module: nn.Module, tensors: dict[str, Any]) -> dict[str, Any]:
    """Put tensors in place of parameters, by their names in the module; returns what was there."""
    former = {}
    for role, tensor in tensors.items():
        owner, _, name = role.rpartition(".")
        parameters = module.get_submodule(owner)._parameters
        former[role] = parameters[name]
        parameters[name] = tensor
    return former


# --- results ----------------------------------------------------------------------------------------------------------


def layer_factors(found: dict[str, Gradient], coverage: Coverage) -> LayerFactors:
    """The gradients of a run in factored form."""
    result = LayerFactors(coverage=coverage)
    for name, gradient in found.items():
        if isinstance(gradient, GradFactors):
            result[name] = gradient.compact()
            continue
        if gradient.is_complex():
            raise UnsupportedLayerError(
                f"{name}: expected a real parameter, as factors hold real numbers, but it is {gradient.dtype}; leave "
                "it out with exclude=, or take the gradients themselves (batch_layer_grads, watch.grads)"
            )
        result[name] = GradFactors.of(gradient)
    return result


def kept_apart(factors: LayerFactors, held: Iterable[Tensor] = ()) -> LayerFactors:
    """Factors outlive the call: what somebody else holds too (an input, a buffer, a model's memory) is copied.

    ``held``: other tensors that are known to share memory with them, and stay as they are.
    """
    shared = held_elsewhere([*(t for f in factors.values() for t in f._tensors()), *held])
    copies: dict[int, Tensor] = {}

    def own(t: Tensor) -> Tensor:
        if id(t) not in copies:
            copies[id(t)] = t.clone() if shared(t) else t
        return copies[id(t)]

    return factors._map(lambda f: f._map(own))


def layer_grads(
    found: dict[str, Gradient],
    parameters: Mapping[str, Tensor],
    coverage: Coverage,
    *,
    out: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> LayerGrads:
    """The gradients of a run themselves, written into ``out`` where it has a tensor for them."""
    out = out or {}
    kinds = {name: None if name in out else dtype or parameters[name].dtype for name in found}
    products = {
        name: ops.Product(gradient.delta, gradient.activation, out.get(name), kinds[name])
        for name, gradient in found.items()
        if type(gradient) is GradFactors and gradient.weight_shape is None
    }
    grads = LayerGrads(zip(products, ops.outer_group(list(products.values()), backend=backend), strict=True))
    # A bias's gradient is a delta, which autograd may have given others too: each result has memory of its own.
    taken = {memory(t) for f in found.values() if isinstance(f, GradFactors) for t in f._tensors()}
    for name, gradient in found.items():
        if name in grads:
            continue
        if isinstance(gradient, GradFactors):
            grads[name] = gradient.materialize(out=out.get(name), dtype=kinds[name], backend=backend)
        elif name in out:
            grads[name] = out[name].copy_(gradient)
        else:
            gradient = gradient.to(kinds[name])
            if memory(gradient) in taken or 0 in gradient.stride():
                gradient = gradient.clone(memory_format=torch.contiguous_format)
            taken.add(memory(gradient))
            grads[name] = gradient
    return LayerGrads({name: grads[name] for name in found}, coverage=coverage)
