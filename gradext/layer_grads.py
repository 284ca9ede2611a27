"""`batch_layer_grads` and `batch_layer_factors`: arguments, ``out=`` and errors; `watch` does the work.

Nothing here knows how a gradient is found.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .errors import CaptureError, NonFiniteError
from .factors import Gradient, LayerFactors, LayerGrads
from .losses import PerSampleLoss, backward_root, checked_losses, root_of
from .rules import tensors_of
from .selection import LayerChoice
from .watch import watch


def batch_layer_grads(
    model: nn.Module,
    x: Any,
    *,
    loss: str | PerSampleLoss = "auto",
    target: Any = None,
    layers: LayerChoice = None,
    exclude: LayerChoice = None,
    out: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    fallback: str | None = None,
    mixing: str = "error",
    segments: Tensor | None = None,
    check_finite: bool = False,
    create_graph: bool = False,
) -> LayerGrads:
    """The gradient of every sample's own loss with respect to every parameter of the model.

    ``grads[name][b] = ∂ loss_b / ∂ parameter`` for every parameter that requires grad (for all, where none does), in
    the form of ``torch.func.vmap(torch.func.grad(...))``: ``{"decoder.0.weight": [B, O, I], ...}``. One forward and one
    partial backward, in which no gradient of a weight is computed; the model is left as it was, but for what its own
    forward writes. A parameter that the losses do not depend on has gradient zero. ``result.coverage`` tells by which
    rule each was found, and what was left out and why.

    Args:
        model: any module; in `eval()` or `train()`, frozen or not.
        x: the model's input [B, ...]; a tuple or list for several positional inputs, a dict for keyword inputs (or for
            one positional input, where forward takes no such keywords). Inputs may be nested.
        loss: ``"bce"``, ``"bce_logits"``, ``"mse"``, ``"cross_entropy"``, or ``(output, target) -> Tensor[B]``. Losses
            are summed over a sample's elements and never divided by B. ``"auto"`` is reconstruction: BCE where the
            output ends in a sigmoid, else squared error. A named loss takes the output tensor, ``.logits`` of an output
            object, or a tuple's first element; a callable gets the output as it is.
        target: default: ``x`` (its first tensor).
        layers: which parameters: their names (the result's keys), names of modules, patterns (``"*.q_proj"``), modules,
            parameters, types of modules, ``"trainable"``, predicates ``(name, parameter)``, or a list of these.
        exclude: the same, for what is left out.
        out: tensors to write into, one for every result, by name.
        dtype: type of the results; default: the parameters' (or that of ``out``).
        backend: None (the best for the device), ``"cpu"``, ``"cuda"``, ``"triton"``, ``"reference"``.
        fallback, mixing, segments: as for `gradext.watch`.
        check_finite: raise NonFiniteError where a gradient holds NaN or infinity (on a GPU this waits for the stream).
        create_graph: keep the graph, so that the results can be differentiated with respect to the parameters.

    Raises:
        ValueError, TypeError: an argument of a wrong shape, type or value; the message says what was expected.
        CaptureError: samples that mix (BatchNorm in training mode), an input overwritten in place, and the like.
        UnsupportedLayerError: with ``fallback="error"``, a use of a parameter that cannot be seen.

    >>> import torch, gradext
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.ReLU(), torch.nn.Linear(3, 6), torch.nn.Sigmoid())
    >>> {name: tuple(g.shape) for name, g in gradext.batch_layer_grads(model, torch.rand(5, 6)).items()}
    {'0.weight': (5, 3, 6), '0.bias': (5, 3), '2.weight': (5, 6, 3), '2.bias': (5, 6)}
    """
    if dtype is not None and dtype not in ops.DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, ops.DTYPES))}, but got {dtype}")
    if out is not None and create_graph:
        raise ValueError("out: results that keep their graph cannot be written into given tensors; pass out=None")
    choice = {"layers": layers, "exclude": exclude, "fallback": fallback, "mixing": mixing, "segments": segments}
    found, watched = _gradients(model, x, loss, target, check_finite, create_graph, True, **choice)
    return LayerGrads.of(found, watched.parameters, watched.coverage, out=out, dtype=dtype, backend=backend)


def batch_layer_factors(
    model: nn.Module,
    x: Any,
    *,
    loss: str | PerSampleLoss = "auto",
    target: Any = None,
    layers: LayerChoice = None,
    exclude: LayerChoice = None,
    fallback: str | None = None,
    mixing: str = "error",
    segments: Tensor | None = None,
    check_finite: bool = False,
    create_graph: bool = False,
) -> LayerFactors:
    """The same gradients in factored form, ``{"decoder.0.weight": GradFactors, ...}``: nothing of size B·O·I exists.

    Arguments and errors as for `batch_layer_grads`. Where a gradient is no larger than its factors (biases,
    normalisations, most convolutions) it is there itself, as `GradFactors.of` holds it.

    >>> import torch, gradext
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.ReLU(), torch.nn.Linear(3, 6), torch.nn.Sigmoid())
    >>> factors = gradext.batch_layer_factors(model, torch.rand(5, 6), layers="2.weight")
    >>> factors["2.weight"]
    GradFactors(B=5, O=6, I=3, T=1, dtype=torch.float32, device=cpu)
    >>> factors.norm().shape
    torch.Size([5])
    """
    choice = {"layers": layers, "exclude": exclude, "fallback": fallback, "mixing": mixing, "segments": segments}
    found, watched = _gradients(model, x, loss, target, check_finite, create_graph, False, **choice)
    result = LayerFactors.of(found, watched.coverage)
    del found, watched  # frees the graph
    return result.kept_apart()


def _gradients(
    model: nn.Module, x: Any, loss: Any, target: Any, finite: bool, create_graph: bool, written: bool, **choice: Any
) -> tuple[dict[str, Gradient], watch]:
    """The per-sample gradient of every chosen parameter, in the form that its rule gives; ``choice`` as for `watch`.

    finite: raise where they are not; written: no factors are needed.
    """
    if create_graph and torch.is_inference_mode_enabled():
        raise RuntimeError(
            "create_graph: expected False under torch.inference_mode(), which keeps no graph; leave inference mode"
        )
    x, target = as_constant(x), as_constant(target)
    args, kwargs = as_call(x, model)
    tensors = tensors_of([args, kwargs])
    if not tensors:
        raise TypeError(f"x: expected a tensor [B, ...], or a tuple or dict that holds one, but got {type(x).__name__}")
    watched = watch(model, inputs=[args, kwargs, target], create_graph=create_graph, **choice)
    watched.one_sample = written and all(t.shape[:1] == (1,) for t in tensors_of([args, kwargs, target]) if t.ndim)
    devices = {parameter.device for parameter in watched.parameters.values()}
    if len(devices) == 1 and tensors[0].device not in devices:
        raise ValueError(
            f"x: expected a tensor on the model's device {devices.pop()}, but got one on {tensors[0].device}; use "
            "x.to(...)"
        )
    target = tensors[0] if target is None else target
    versions = [(t, t._version) for t in tensors if not t.is_inference()]
    # In the backward of a wrapped model replicas would exchange gradients, and wait for each other.
    runs = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    with watched.recording(), buffers_kept(model):  # which the backward may need as the forward has left them
        with watched:
            output = output_of(runs(*args, **kwargs), loss)
            if any(target is t and t._version != version for t, version in versions):
                raise CaptureError(
                    "x: the model overwrites its input in place, which is the target too; pass a target= of its own, "
                    "or make that operation out of place"
                )
            losses = loss(output, target) if callable(loss) else None
        if losses is None:
            root = backward_root(loss, output, target, create_graph=create_graph)
        else:
            root = root_of(checked_losses(losses, "loss"))
        wrong = watched.one_sample and len(root.gradient) != 1  # it makes several samples of one row: run anew
        found = {} if wrong else watched.gradients(root, keep_graph=False)
    if wrong:
        return _gradients(model, x, loss, target, finite, create_graph, False, **choice)
    if finite:
        for name, gradient in found.items():
            for tensor in [gradient] if isinstance(gradient, Tensor) else gradient._tensors():
                _refuse_non_finite(name, tensor, root.gradient.shape[0])
    return found, watched


def as_call(x: Any, model: nn.Module | None = None) -> tuple[tuple, dict]:
    """A model's input as positional and keyword arguments."""
    if isinstance(x, Mapping):
        forward = getattr(model, "forward", None)
        function = getattr(forward, "__func__", forward)
        if function is not None and not _takes(function, function is not forward, tuple(x)):
            return (x,), {}
        return (), dict(x)
    return (tuple(x), {}) if isinstance(x, (tuple, list)) else ((x,), {})


@functools.lru_cache(256)
def _takes(forward: Callable, is_method: bool, keywords: tuple[str, ...]) -> bool:
    """Whether a model's forward takes these keywords; where it cannot be told, it does."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())[is_method:]
    except (ValueError, TypeError):
        return True
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if named.issuperset(keywords) or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return True
    required = [p.name for p in parameters if p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD]
    return len(required) != 1 or required[0] in keywords


def as_constant(value: Any) -> Any:
    """Inputs that need no gradient and may be used in a graph, in nested structures too."""
    if isinstance(value, Tensor):
        if value.is_inference():
            with torch.inference_mode(False):  # within it the copy would be one of its tensors too
                return value.clone()
        return value.detach() if value.requires_grad else value
    if type(value) in (tuple, list):
        return type(value)(as_constant(v) for v in value)
    return {key: as_constant(v) for key, v in value.items()} if type(value) is dict else value


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """During a forward in training mode copies stand for the buffers (running statistics, power iterations).

    Other modules and plain attributes that hold one of these buffers, or a view of it, hold the copy meanwhile.
    """
    modules = list(model.modules())
    modules = modules if any(m.training and m._buffers for m in modules) else []
    buffers = {id(b): b for m in modules if m.training for b in m._buffers.values() if b is not None}
    with torch.inference_mode(False):  # else nothing could be written into the copies
        copies = {i: b.clone() for i, b in buffers.items() if id(b._base) not in buffers}

    def copy_of(t: Any) -> Tensor | None:
        if not isinstance(t, Tensor) or id(t) in copies or t._base is None or id(t._base) not in copies:
            return copies.get(id(t))
        return copies[id(t._base)].as_strided(t.shape, t.stride(), t.storage_offset() - t._base.storage_offset())

    places = [(own, name, t) for m in modules for own in (m._buffers, vars(m)) for name, t in own.items()]
    held: list[tuple] = [(*place, copy) for place in places if (copy := copy_of(place[2])) is not None]
    held += [(m._buffers, name, b, b) for m in modules if m.training for name, b in m._buffers.items() if b is None]
    try:
        for own, name, _, copy in held:
            own[name] = copy
        yield
    finally:
        for own, name, former, _ in held:
            own[name] = former


def output_of(output: Any, loss: str | PerSampleLoss) -> Any:
    """What the loss takes of the model's output."""
    if callable(loss):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        output = logits
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim == 0:
        raise TypeError(
            "model: expected an output tensor [B, ...], an object with .logits, or a tuple that begins with a tensor, "
            f"but got {type(output).__name__}; pass a loss that takes the output as it is"
        )
    return output


def _refuse_non_finite(name: str, tensor: Tensor, batch: int) -> None:
    if not tensor.is_floating_point() or tensor.shape[0] != batch:
        return
    finite = tensor.isfinite().reshape(batch, -1 if tensor.numel() else 0).all(1)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise NonFiniteError(
            f"{name}: the gradient of {len(bad)} of {batch} samples holds NaN or infinity (samples {shown}); check the "
            "input's range and the model's weights"
        )
