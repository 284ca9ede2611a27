"""`batch_layer_grads` and `batch_layer_factors`: capture -> factors -> operators."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from . import functional, ops
from .borrowing import left_as_found
from .capture import Untouched, as_constant, capture
from .errors import CaptureError, NonFiniteError
from .factors import GradFactors, LayerFactors
from .layers import Chosen, LayerChoice, choose
from .losses import PerSampleLoss, Root, backward_root, loss_values, resolve
from .uses import memory


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
    fallback: str | None = None,
    check_finite: bool = False,
    check: str | None = None,
    create_graph: bool = False,
) -> dict[str, Tensor]:
    """The gradient of every sample's own loss with respect to the weights of the chosen layers.

    For a linear layer ``grads[name][b] = ∂ loss_b / ∂ weight = Σ_t δ_bt a_btᵀ``, with the keys, shapes and values of
    ``torch.func.vmap(torch.func.grad(...))`` over the parameters: ``{"decoder.0.weight": Tensor[B, O, I], ...}``, and
    ``[B, O]`` for biases. One forward, one backward that stops at the earliest chosen layer, one product a layer; the
    model is left as it was, but for parameters and attributes that its own forward writes.

    Args:
        model: any module; in `eval()` or `train()`, frozen or not.
        x: the model's input [B, ...]; a tuple for several positional inputs, a dict for keyword inputs.
        loss: ``"bce"``, ``"bce_logits"``, ``"mse"``, ``"cross_entropy"``, or ``(output, target) -> Tensor[B]``. Losses
            are summed over a sample's elements and never divided by B. ``"auto"`` is reconstruction: BCE where the
            output ends in a sigmoid and the target lies in [0, 1], else squared error.
        target: default: ``x`` (its first tensor).
        layers: None: the supported layers of ``model.decoder`` where the model has one, else all; ``"all"``;
            ``"first"`` or ``"last"`` of the default ones, that the losses depend on, in order of execution; a module's
            name (a container stands for the layers in it), a module, or a list of these.
        include_bias: also the gradients of the layers' biases.
        out: tensors to write into, one for every result, by name.
        dtype: type of the results; default: the parameters' (or that of ``out``).
        backend: None (the best for the device), ``"cpu"``, ``"cuda"``, ``"triton"``, ``"reference"``.
        fallback: ``"vmap"`` computes the parameters for which there is no rule through ``torch.func``, in chunks (where
            torch can vectorise the model), and ``"loop"`` sample by sample; then every parameter can be chosen. There
            a sample is a row of every input that has B of them, and random models draw anew.
        check_finite: raise NonFiniteError where a delta, an input, or a gradient by a fallback, holds NaN or infinity
            (on a GPU this waits for the stream).
        check: ``"sample"`` raises CaptureError where a sample's loss depends on another sample's row of a layer's
            input, at the price of a second backward. That is always done where the shapes cannot tell samples from
            positions, and in the first call of a model with each loss and arrangement of shapes; ask for it where the
            data decide what a model does with its rows. ``"sum"`` raises it where Σ_b of a parameter's gradients is not
            what autograd gives for the summed losses, at the price of a whole forward and backward.
        create_graph: keep the graph, so that the results can be differentiated with respect to the parameters.

    A tuple output means its first element. A loss of your own gets any other output as it is.

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
    asked = (loss, target, layers, include_bias, fallback, check, check_finite, create_graph)
    found, chosen = _gradients(model, x, *asked)
    parameters = chosen.parameters
    given = _check_outs(out, found, parameters, dtype)
    kinds = {name: None if name in given else dtype or parameters[name].dtype for name in found}
    products = {
        name: ops.Product(gradient.delta, gradient.activation, given.get(name), kinds[name])
        for name, gradient in found.items()
        if type(gradient) is GradFactors and gradient.weight_shape is None
    }
    written = dict(zip(products, ops.outer_group(list(products.values()), backend=backend), strict=True))
    grads: dict[str, Tensor] = {}
    for name, gradient in found.items():
        if name in written:
            grads[name] = written[name]
        elif isinstance(gradient, Tensor):
            grads[name] = given[name].copy_(gradient) if name in given else gradient.to(kinds[name])
        else:
            grads[name] = gradient.materialize(out=given.get(name), dtype=kinds[name], backend=backend)
    return grads


def batch_layer_factors(
    model: nn.Module,
    x: Tensor | tuple | Mapping,
    *,
    loss: str | PerSampleLoss = "auto",
    target: Tensor | None = None,
    layers: LayerChoice = None,
    include_bias: bool = False,
    fallback: str | None = None,
    check_finite: bool = False,
    check: str | None = None,
    create_graph: bool = False,
) -> LayerFactors:
    """The factors of the same gradients: ``{"decoder.0": GradFactors, ...}``; nothing of size B·O·I exists.

    Arguments and errors as for `batch_layer_grads`. With ``include_bias`` a layer's bias is there under its own name,
    ``"decoder.0.bias"``. Where a gradient is no larger than its factors (biases, normalisations, most convolutions) it
    is there itself, as `GradFactors.of` holds it.

    >>> import torch, gradext
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.ReLU(), torch.nn.Linear(3, 6), torch.nn.Sigmoid())
    >>> factors = gradext.batch_layer_factors(model, torch.rand(5, 6), layers="last")
    >>> factors
    {'2': GradFactors(B=5, O=6, I=3, T=1, dtype=torch.float32, device=cpu)}
    >>> factors["2"].norm().shape
    torch.Size([5])
    """
    asked = (loss, target, layers, include_bias, fallback, check, check_finite, create_graph)
    found, chosen = _gradients(model, x, *asked)
    # Factors outlive the call, and a layer's input can be the caller's tensor, or a view of what the model learns or
    # remembers: all of these may be overwritten.
    inputs = [x] if isinstance(x, Tensor) else pytree.tree_leaves(as_call(x))
    buffers = [b for m in (model, *chosen.modules.values()) if m._buffers for b in m._buffers.values() if b is not None]
    lasting = {memory(t) for t in (*inputs, *chosen.parameters.values(), *buffers) if isinstance(t, Tensor)}

    def own(factor: Tensor) -> Tensor:
        return factor.clone() if memory(factor) in lasting else factor

    result = LayerFactors()
    for name, gradient in found.items():
        factors = GradFactors.of(gradient) if isinstance(gradient, Tensor) else gradient.compact()
        result[name.removesuffix(".weight")] = factors._map(own)
    return result


@left_as_found
def _gradients(
    model: nn.Module,
    x: Tensor | tuple | Mapping,
    loss: str | PerSampleLoss,
    target: Tensor | None,
    layers: LayerChoice,
    include_bias: bool,
    fallback: str | None,
    check: str | None,
    check_finite: bool,
    create_graph: bool,
) -> tuple[dict[str, GradFactors | Tensor], Chosen]:
    """The per-sample gradient of every chosen parameter, in the form that its rule gives, and what was chosen."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, but got {type(model).__name__}")
    for name, value, allowed in (("check", check, ("sample", "sum")), ("fallback", fallback, ("vmap", "loop"))):
        if value is not None and value not in allowed:
            raise ValueError(f"{name}: expected None, {' or '.join(map(repr, allowed))}, but got {value!r}")
    chosen = choose(model, layers, include_bias, any_type=fallback is not None)
    parameters = chosen.parameters
    _check_inference(chosen.layers, create_graph)
    args, kwargs = as_call(x)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not tensors or tensors[0].ndim == 0:
        raise TypeError(f"x: expected a tensor [B, ...], or a tuple or dict that holds one, but got {type(x).__name__}")
    _check_device(parameters, tensors[0])
    if target is None:
        target = tensors[0]
    untouched = Untouched(tensors)

    resolved: dict[str, str] = {}

    def objective(output: Any) -> Root:
        if any(target is tensor for tensor in tensors):
            untouched.check("pass a target= of its own")
        output = _first(output, loss)
        if not callable(loss) and (fallback or check == "sum"):
            resolved["loss"] = resolve(loss, output, target)
        return backward_root(resolved.get("loss", loss), output, as_constant(target), create_graph=create_graph)

    # Replicas exchange gradients in the backward of a wrapped model, and wait for each other: there is nothing to wait
    # for here.
    runs = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    randomness = functional.random_state(p.device for p in parameters.values()) if check == "sum" else []
    captured = capture(
        runs,
        args,
        kwargs,
        objective,
        chosen,
        loss=_code(loss),
        named_loss=None if callable(loss) or fallback or check else (loss, target),
        check_samples=check == "sample",
        create_graph=create_graph,
    )
    if captured.missing and fallback is None:
        raise next(iter(captured.missing.values()))
    for use in captured.uses if check_finite else ():
        names = " and ".join(form.name for form in use.forms.values())
        for what, tensor in (("delta", use.delta), ("input", use.input)):
            _refuse_non_finite(f"{names}: the {what}", tensor, captured.batch)
    gathered: dict[str, list[GradFactors | Tensor]] = {}
    for use in captured.uses:
        for name, gradient in use.gradients(captured.batch):
            gathered.setdefault(name, []).append(gradient)
    found = {name: _joined(uses) for name, uses in gathered.items()}

    if not captured.missing and check != "sum":
        return found, chosen

    def total(output: Any, target: Any) -> Tensor:
        return loss_values(resolved.get("loss", loss), _first(output, loss), target).sum()

    untouched.check('leave out fallback= and check="sum", which run it again')
    wrapped = "" if runs is model else "module."
    inner = {name.removeprefix(wrapped): parameter for name, parameter in parameters.items()}
    problem = functional.Problem(runs, as_constant(args), as_constant(kwargs), as_constant(target), total, inner)
    if captured.missing:
        plain = problem.vmap_grads if fallback == "vmap" else problem.loop_grads
        missing = plain([name.removeprefix(wrapped) for name in captured.missing], captured.batch)
        for name, gradient in missing.items() if check_finite else ():
            _refuse_non_finite(f"{wrapped}{name}: the gradient", gradient, captured.batch)
        found |= {wrapped + name: gradient for name, gradient in missing.items()}
    if check == "sum":
        with functional.same_randomness(randomness):
            expected = problem.batch_grads([name.removeprefix(wrapped) for name in found])
        _check_sums(found, {wrapped + name: gradient for name, gradient in expected.items()})
    return found, chosen


def as_call(x: Any) -> tuple[tuple, dict]:
    """A model's input as positional and keyword arguments."""
    if isinstance(x, Mapping):
        return (), dict(x)
    return (tuple(x), {}) if isinstance(x, (tuple, list)) else ((x,), {})


def _code(loss: str | PerSampleLoss) -> object:
    """What tells a loss from others, but not from itself with other constants, or made again by the same line."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    return loss if isinstance(loss, str) else getattr(loss, "__code__", type(loss))


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


def _joined(uses: list[GradFactors | Tensor]) -> GradFactors | Tensor:
    """The gradient of a parameter that was used several times."""
    if len(uses) == 1:
        return uses[0]
    factored = [use for use in uses if isinstance(use, GradFactors) and use.weight_shape is None]
    if len(factored) == len(uses):
        return GradFactors.stack_positions(factored)
    return functools.reduce(torch.add, (use if isinstance(use, Tensor) else use.materialize() for use in uses))


def _first(output: Any, loss: str | PerSampleLoss) -> Any:
    """What the loss takes of the model's output: its first element if it is a tuple."""
    output = output[0] if isinstance(output, (tuple, list)) else output
    if not callable(loss) and (not isinstance(output, Tensor) or output.ndim == 0):
        raise TypeError(
            f"model: expected an output tensor [B, ...] or a tuple that begins with one, but got "
            f"{type(output).__name__}; wrap the model so that it returns the tensor that the loss takes, or pass a "
            "loss that takes it as it is"
        )
    return output


def _check_sums(found: dict[str, GradFactors | Tensor], expected: dict[str, Tensor | None]) -> None:
    """Refuse gradients whose sum over the samples is not the gradient of the sum."""
    sums: dict[str, tuple[Tensor, Tensor, float]] = {}  # the sum, autograd's, and what both are measured by
    for name, gradient in found.items():
        factors = GradFactors.of(gradient) if isinstance(gradient, Tensor) else gradient.compact()
        total, norms = factors.sum(), factors.norm()
        batch = torch.zeros_like(total) if (given := expected[name]) is None else given.to_dense()
        batch = batch.reshape(total.shape).to(total.dtype)
        sums[name] = total, batch, torch.maximum(norms.sum(), batch.norm()).item()
    largest = max(scale for _, _, scale in sums.values())
    for name, (total, batch, scale) in sums.items():
        eps, difference = torch.finfo(found[name].dtype).eps, (total - batch).norm().item()
        # Rounding stays far below the root of the type's precision; a use that was missed is of the order of one. What
        # vanishes (a bias that is normalised away) is rounding alone, of what cancelled.
        if not difference <= eps**0.5 * scale + 1000 * eps * largest:
            raise CaptureError(
                f"{name}: the sum of its per-sample gradients differs from autograd's gradient of the summed losses by "
                f"{difference:.3g}, with a norm of {batch.norm().item():.3g}; it may be used where gradext "
                "cannot see it (a custom autograd function, scripted code), or the model may draw other random numbers "
                'at each call than its generators\' state tells; leave the layer out, or pass fallback="vmap"'
            )


def _check_outs(
    out: Mapping[str, Tensor] | None,
    found: dict[str, GradFactors | Tensor],
    parameters: dict[str, nn.Parameter],
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    if out is None:
        return {}
    if not isinstance(out, Mapping):
        raise TypeError(f"out: expected a mapping from names to tensors, but got {type(out).__name__}")
    if set(out) != set(found):
        raise ValueError(f"out: expected one tensor for each of {sorted(found)}, but got {sorted(out)}")
    for name, tensor in out.items():
        shape = (found[name].shape[0], *parameters[name].shape)
        ops.check_out(tensor, shape, found[name].device, f"out[{name!r}]")
        if dtype is not None and tensor.dtype != dtype:
            raise TypeError(f"out[{name!r}]: expected type {dtype} (the dtype argument), but got {tensor.dtype}")
    ops.check_apart(out.values(), [tensor for gradient in found.values() for tensor in _tensors(gradient)])
    return dict(out)


def _tensors(gradient: GradFactors | Tensor) -> list[Tensor]:
    """What a gradient is made of."""
    if isinstance(gradient, Tensor):
        return [gradient]
    return [value for value in vars(gradient).values() if isinstance(value, Tensor)]


def _refuse_non_finite(what: str, tensor: Tensor, batch: int) -> None:
    finite = tensor.isfinite().reshape(batch, tensor.numel() // max(1, batch)).all(1)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise NonFiniteError(
            f"{what} of {len(bad)} of {batch} samples holds NaN or infinity (samples {shown}); check the input's range "
            "and the model's weights"
        )
