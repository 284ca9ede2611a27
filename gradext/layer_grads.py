"""`batch_layer_grads` and `batch_layer_factors`: capture -> factors -> operators."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from . import ops
from .capture import Use, as_constant, capture
from .errors import NonFiniteError
from .factors import GradFactors, LayerFactors
from .layers import LayerChoice, choose_layers
from .losses import PerSampleLoss, Root, backward_root


def batch_layer_grads(
    model: nn.Module,
    x: Tensor | tuple | Mapping,
    *,
    loss: str | PerSampleLoss = "auto",
    target: Tensor | None = None,
    layers: LayerChoice = None,
    include_bias: bool = False,
    out: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    check_finite: bool = False,
    check: str | None = None,
    create_graph: bool = False,
) -> dict[str, Tensor]:
    """The gradient of every sample's own loss with respect to the weights of the chosen layers.

    ``grads[name][b] = ∂ loss_b / ∂ weight = Σ_t δ_bt a_btᵀ``, with the keys, shapes and values of
    ``torch.func.vmap(torch.func.grad(...))`` over the parameters: ``{"decoder.0.weight": Tensor[B, O, I], ...}``, and
    ``[B, O]`` for biases. One forward, one backward that stops at the earliest chosen layer, one product a layer; the
    model is left as it was.

    Args:
        model: any module made of `nn.Linear` and whatever else; in `eval()` or `train()`, frozen or not.
        x: the model's input [B, ...]; a tuple for several positional inputs, a dict for keyword inputs.
        loss: ``"bce"``, ``"bce_logits"``, ``"mse"``, ``"cross_entropy"``, or ``(output, target) -> Tensor[B]``. Losses
            are summed over a sample's elements and never divided by B. ``"auto"`` is reconstruction: BCE where the
            output ends in a sigmoid and the target lies in [0, 1], else squared error.
        target: default: ``x`` (its first tensor).
        layers: None: the supported layers of ``model.decoder`` where the model has one, else all; ``"all"``;
            ``"first"`` or ``"last"`` of the default ones in order of execution; a module's name (a container stands
            for the layers in it), a module, or a list of these.
        include_bias: also the gradients of the layers' biases.
        out: tensors to write into, one for every result, by name.
        dtype: type of the results; default: the parameters' (or that of ``out``).
        backend: None (the best for the device), ``"cpu"``, ``"cuda"``, ``"reference"``.
        check_finite: raise NonFiniteError where a delta holds NaN or infinity (on a GPU this waits for the stream).
        check: ``"sample"`` raises CaptureError where a sample's loss depends on another sample's row of a layer's
            input, at the price of a second backward. Worth one call for a model that is new; it is always done where
            there are as many positions as samples, since then shapes cannot tell them apart.
        create_graph: keep the graph, so that the results can be differentiated with respect to the parameters.

    A tuple output means its first element.

    Raises:
        ValueError, TypeError: an argument of a wrong shape, type or value; the message says what was expected.
        CaptureError: samples that mix (BatchNorm in training mode), a chosen layer that never ran, and the like.
        UnsupportedLayerError: a chosen layer, or a use of its weight, without an exact rule.

    >>> import torch, gradext
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.ReLU(), torch.nn.Linear(3, 6), torch.nn.Sigmoid())
    >>> {name: tuple(g.shape) for name, g in gradext.batch_layer_grads(model, torch.rand(5, 6)).items()}
    {'0.weight': (5, 3, 6), '2.weight': (5, 6, 3)}
    """
    if dtype is not None and dtype not in ops.DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, ops.DTYPES))}, but got {dtype}")
    if out is not None and create_graph:
        raise ValueError("out: results that keep their graph cannot be written into given tensors; pass out=None")
    uses, parameters = _uses(model, x, loss, target, layers, include_bias, check_finite, check, create_graph)
    weights, biases = _by_parameter(uses)
    shapes = {name: tuple(factors.shape) for name, factors in weights.items()}
    shapes |= {name: tuple(value.shape) for name, value in biases.items()}
    given = _check_outs(out, shapes, uses, dtype)
    products = [
        ops.Product(factors.delta, factors.activation, given.get(name), dtype or parameters[name].dtype)
        for name, factors in weights.items()
    ]
    grads = dict(zip(weights, ops.outer_group(products, backend=backend), strict=True))
    for name, value in biases.items():
        kind = dtype or parameters[name].dtype
        grads[name] = given[name].copy_(value) if name in given else value.to(kind)
    return grads


def batch_layer_factors(
    model: nn.Module,
    x: Tensor | tuple | Mapping,
    *,
    loss: str | PerSampleLoss = "auto",
    target: Tensor | None = None,
    layers: LayerChoice = None,
    include_bias: bool = False,
    check_finite: bool = False,
    check: str | None = None,
    create_graph: bool = False,
) -> LayerFactors:
    """The factors of the same gradients: ``{"decoder.0": GradFactors, ...}``; nothing of size B·O·I exists.

    Arguments and errors as for `batch_layer_grads`. With ``include_bias`` a layer's bias is there under its own name,
    ``"decoder.0.bias"``, as the factors of a weight [O, 1] whose input is one.

    >>> import torch, gradext
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.ReLU(), torch.nn.Linear(3, 6), torch.nn.Sigmoid())
    >>> factors = gradext.batch_layer_factors(model, torch.rand(5, 6), layers="last")
    >>> factors
    {'2': GradFactors(B=5, O=6, I=3, T=1, dtype=torch.float32, device=cpu)}
    >>> factors["2"].norm().shape
    torch.Size([5])
    """
    uses, _ = _uses(model, x, loss, target, layers, include_bias, check_finite, check, create_graph)
    # Factors outlive the call, and the first layer's input can be the caller's tensor, which may be overwritten.
    args, kwargs = as_call(x)
    given = {t.untyped_storage().data_ptr() for t in (*args, *kwargs.values()) if isinstance(t, Tensor)}
    uses = [
        use._replace(input=use.input.clone()) if use.input.untyped_storage().data_ptr() in given else use
        for use in uses
    ]
    weights, biases = _by_parameter(uses)
    result = LayerFactors((name.removesuffix(".weight"), factors) for name, factors in weights.items())
    for name, value in biases.items():
        result[name] = GradFactors(value.new_ones(value.shape[0], 1), value)
    return result


def _uses(
    model, x, loss, target, layers, include_bias, check_finite, check, create_graph
) -> tuple[list[Use], dict[str, nn.Parameter]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, but got {type(model).__name__}")
    if check not in (None, "sample"):
        raise ValueError(f"check: expected None or 'sample', but got {check!r}")
    candidates, pick = choose_layers(model, layers)
    _check_inference(candidates, create_graph)
    # Walking a model takes as long as a small layer's product: once for all that follows.
    modules = dict(model.named_modules())
    parameters = _named_parameters(modules)
    args, kwargs = as_call(x)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not tensors or tensors[0].ndim == 0:
        raise TypeError(f"x: expected a tensor [B, ...], or a tuple or dict that holds one, but got {type(x).__name__}")
    _check_device(parameters, tensors[0])
    if target is None:
        target = tensors[0]

    def objective(output) -> Root:
        output = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(output, Tensor) or output.ndim == 0:
            raise TypeError(
                f"model: expected an output tensor [B, ...] or a tuple that begins with one, but got "
                f"{type(output).__name__}; wrap the model so that it returns the tensor that the loss takes"
            )
        return backward_root(loss, output, as_constant(target), create_graph=create_graph)

    uses = capture(
        model,
        args,
        kwargs,
        objective,
        candidates,
        modules,
        parameters,
        pick=pick,
        include_bias=include_bias,
        watch_objective=callable(loss),
        check_samples=check is not None,
        create_graph=create_graph,
    )
    if check_finite:
        _refuse_non_finite(uses)
    return uses, parameters


def _named_parameters(modules: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """As `nn.Module.named_parameters`, a shared parameter under its first name only."""
    names: dict[nn.Parameter, str] = {}
    for prefix, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(parameter, f"{prefix}.{name}" if prefix else name)
    return {name: parameter for parameter, name in names.items()}


def as_call(x) -> tuple[tuple, dict]:
    """The positional and keyword arguments that ``x`` stands for."""
    if isinstance(x, Mapping):
        return (), dict(x)
    return (tuple(x), {}) if isinstance(x, (tuple, list)) else ((x,), {})


def _check_device(parameters: dict[str, nn.Parameter], x: Tensor) -> None:
    devices = {parameter.device for parameter in parameters.values()}
    if len(devices) == 1 and x.device not in devices:
        (device,) = devices
        raise ValueError(
            f"x: expected a tensor on the model's device {device}, but got one on {x.device}; use x.to(...)"
        )


def _check_inference(candidates: dict[str, nn.Module], create_graph: bool) -> None:
    if create_graph and torch.is_inference_mode_enabled():
        raise RuntimeError(
            "create_graph: expected False under torch.inference_mode(), which keeps no graph; leave inference mode"
        )
    for name, module in candidates.items():
        if any(parameter is not None and parameter.is_inference() for parameter in module._parameters.values()):
            raise RuntimeError(
                f"layer {name!r}: expected parameters that autograd can use, but they were made under "
                "torch.inference_mode(); make the model outside of it, or replace them by their .clone()"
            )


def _by_parameter(uses: list[Use]) -> tuple[dict[str, GradFactors], dict[str, Tensor]]:
    """The factors of each weight, every use a further position, and the gradient [B, O] of each bias."""
    weights: dict[str, list[tuple[Tensor, Tensor]]] = {}
    biases: dict[str, list[Tensor]] = {}
    for use in uses:
        activation, delta = use.rule.factors(use.input, use.delta)
        if use.bias is not None:
            biases.setdefault(use.bias, []).append(delta if delta.ndim == 2 else delta.sum(1))
        if use.weight is not None:
            weights.setdefault(use.weight, []).append((delta, activation) if use.swapped else (activation, delta))
    joined = {}
    for name, parts in weights.items():
        if len(parts) == 1:
            joined[name] = GradFactors(*parts[0])
        else:
            stacked = [[f.unsqueeze(1) if f.ndim == 2 else f for f in part] for part in parts]
            kind = functools.reduce(torch.promote_types, (activation.dtype for activation, _ in parts))
            activations, deltas = zip(*stacked, strict=True)
            joined[name] = GradFactors(
                torch.cat([a.to(kind) for a in activations], dim=1), torch.cat([d.to(kind) for d in deltas], dim=1)
            )
    return joined, {name: parts[0] if len(parts) == 1 else sum(parts) for name, parts in biases.items()}


def _check_outs(out, shapes: dict[str, tuple[int, ...]], uses: list[Use], dtype) -> dict[str, Tensor]:
    if out is None:
        return {}
    if not isinstance(out, Mapping):
        raise TypeError(f"out: expected a mapping from names to tensors, but got {type(out).__name__}")
    if set(out) != set(shapes):
        raise ValueError(f"out: expected one tensor for each of {sorted(shapes)}, but got {sorted(out)}")
    for name, tensor in out.items():
        ops.check_out(tensor, shapes[name], uses[0].delta.device, f"out[{name!r}]")
        if dtype is not None and tensor.dtype != dtype:
            raise TypeError(f"out[{name!r}]: expected type {dtype} (the dtype argument), but got {tensor.dtype}")
    return dict(out)


def _refuse_non_finite(uses: list[Use]) -> None:
    for use in uses:
        for what, tensor in (("delta", use.delta), ("input", use.input)):
            finite = tensor.isfinite().flatten(1).all(1)
            if not finite.all():
                bad = (~finite).nonzero().flatten().tolist()
                shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
                raise NonFiniteError(
                    f"{use.weight or use.bias}: the {what} of {len(bad)} of {math.prod(finite.shape)} samples holds "
                    f"NaN or infinity (samples {shown}); check the input's range and the model's weights"
                )
