"""`watch`: per-sample gradients of every parameter, from the user's own forward and one partial backward.

The public class: its arguments, what is changed for the time of its block, and the form of its results. `mode` sees the
run, `backward` makes gradients of what it saw. Nothing is ever run again with other inputs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from . import rules
from .backward import Backward
from .factors import Coverage, Gradient, LayerFactors, LayerGrads
from .losses import Root, checked_losses, root_of
from .mode import WatchMode
from .registered import whole_layers
from .selection import LayerChoice, select

_locks = WeakIdKeyDictionary()
_locks_guard = threading.Lock()


def _after_fork() -> None:
    """A child starts with no call under way, even if other threads of the parent were in one."""
    global _locks, _locks_guard
    _locks, _locks_guard = WeakIdKeyDictionary(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def lock_of(model: nn.Module) -> threading.RLock:
    """Calls on one model take turns: its parameters' flags and buffers are changed during a call."""
    with _locks_guard:
        return _locks.setdefault(model, threading.RLock())


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
            own loss, without a second forward or backward. Samples whose loss had weight 0 in it come out as NaN;
            penalties on the model's outputs in the same backward are part of them.
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
        self._lock, self._recorded = lock_of(model), False
        with self._lock:  # in another thread's call a layer may hold something else in a parameter's place
            self._selection = select(model, layers, exclude)
        self._mode: WatchMode | None = None
        self._context: contextlib.AbstractContextManager[None] | None = None
        self.coverage = Coverage(left_out=dict(self._selection.left_out))
        self.one_sample = False  # the run is one sample's, whose graph itself gives written gradients in one backward

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
    def recording(self) -> Iterator[None]:
        """Gradients are recorded, and of all parameters, so that a use that the mode misses leaves a trace.

        Calls on one model take turns, and compiled code runs as Python. Restores all on exit.
        """
        with self._lock, contextlib.ExitStack() as stack:
            if not self._recorded:
                self._recorded = True
                stack.callback(setattr, self, "_recorded", False)
                if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
                    stack.enter_context(torch.inference_mode(False))  # which ends `no_grad` too
                if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                if torch.is_autocast_cache_enabled():  # it would keep a cast of every stand-in until the context ends
                    stack.callback(torch.set_autocast_cache_enabled, True)
                    torch.set_autocast_cache_enabled(False)
                for parameter in self.parameters.values():
                    if not parameter.requires_grad:
                        stack.callback(parameter.requires_grad_, False)
                        parameter.requires_grad_(True)
            yield

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        with self.recording():
            attached = self._train or self._options["create_graph"]
            self._mode = mode = WatchMode(self._model, self._selection, attached=attached, train=self._train)
            if self._inputs is not None:
                mode.mark_inputs(rules.tensors_of(self._inputs))
            mode.opaque = self.one_sample
            before = RemovableHandle.next_id - WatchMode.handles
            with whole_layers(mode), mode:
                yield
            mode.hooked = RemovableHandle.next_id - WatchMode.handles != before

    def factors(self, losses: Tensor | None = None) -> LayerFactors:
        """The gradients of every chosen parameter in factored form, by the parameter's name.

        losses [B]: each sample's own loss, from inside the block. After a training step's backward they may be left
        out: the last one-dimensional result of the block is taken. Then one call takes what was kept of the backward.
        """
        return LayerFactors.of(self._gradients_of(losses), self.coverage).kept_apart()

    def grads(self, losses: Tensor | None = None) -> LayerGrads:
        """The gradients themselves, {parameter name: [B, *parameter.shape]}."""
        return LayerGrads.of(self._gradients_of(losses), self.parameters, self.coverage)

    def gradients(self, root: Root, weights: Tensor | None = None, *, keep_graph: bool = True) -> dict[str, Gradient]:
        """``root`` is where the backward begins; ``weights`` [B] are those of a backward that has run, by ``train``.

        keep_graph: the graph of the losses, for further calls.
        """
        with self.recording():
            return Backward(self._finished(), self.coverage, root, weights, keep_graph, **self._options).run()

    def _gradients_of(self, losses: Tensor | None) -> dict[str, Gradient]:
        mode = self._finished()
        losses = checked_losses(self._last_losses(mode) if losses is None else losses, "losses")
        edge, _ = root = root_of(losses)
        weights = None if edge is None else mode.captured.get((edge.node, edge.output_nr))
        found = self.gradients(root, weights)
        if weights is not None:  # the deltas were divided by them in place, and are the result's now
            for held in (mode.captured, mode.entries, mode.values):  # else only the user and the result hold them
                held.clear()
            self._mode = None
        return found

    def _finished(self) -> WatchMode:
        if self._mode is None or self._context is not None:
            raise RuntimeError(
                "watch: expected a block that has ended, and one call of factors or grads after a training step's "
                "backward, which takes what was kept of it; keep its result"
            )
        return self._mode

    def _last_losses(self, mode: WatchMode) -> Tensor:
        if not self._train or not mode.one_dimensional:
            raise ValueError(
                "losses: expected one loss for each sample, [B], left out at most with train=True, where the "
                "block gives a one-dimensional tensor; use reduction='none', and pass the losses to watch.factors"
            )
        return mode.one_dimensional[-1]


def _check_segments(segments: Any) -> None:
    if segments is None or (isinstance(segments, Tensor) and segments.ndim == 1 and not segments.is_floating_point()):
        return
    came = f"shape {tuple(segments.shape)}, {segments.dtype}" if isinstance(segments, Tensor) else repr(segments)
    raise ValueError(f"segments: expected the sample of each row, a one-dimensional tensor of integers, but got {came}")
