"""A whole call as one CUDA graph. For small batches, where launching the kernels takes longer than running them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .factors import LayerFactors
from .layer_grads import as_call, batch_layer_factors, batch_layer_grads
from .losses import PerSampleLoss


def make_graphed_layer_grads(
    model: nn.Module,
    sample_x: Tensor | tuple | Mapping,
    *,
    target: Tensor | None = None,
    num_warmup_iters: int = 3,
    pool: Any = None,
    reduce: Callable[[LayerFactors], object] | None = None,
    **options: Any,
) -> GraphedLayerGrads:
    """`gradext.batch_layer_grads` of one model and one shape of input, recorded as a CUDA graph and replayed.

    ``graphed = make_graphed_layer_grads(model, sample_x, loss="bce")`` and then ``graphed(x)`` give the result of
    ``batch_layer_grads(model, x, loss="bce")``, with forward, backward and products in a single launch. As with
    `torch.cuda.make_graphed_callables`, the results are tensors of the graph, **which the next call overwrites**: clone
    what you keep. Weights and buffers may change in place (a step of an optimizer, `load_state_dict`).

    Everything that Python decides is fixed at the recording: hooks, a callable ``loss``, ``reduce``, branches on
    values, autocast, the training mode. Dropout draws new numbers at each replay, from the GPU's default generator. A
    check that waits for the GPU (``check_finite``) is made once, on the sample. A model whose rows need a proof in
    every call cannot be recorded, and raises CaptureError.

    Args:
        model: on a GPU, in the mode that it is to run in.
        sample_x: an input of the types and shapes of all that will follow: tensor, tuple or dict.
        target: as for `batch_layer_grads`; if given, every call takes one.
        num_warmup_iters: calls on a side stream before the recording, in which libraries set themselves up.
        pool: the memory pool to share with other graphs that never run at the same time (`torch.cuda.graph`).
        reduce: a function of the `LayerFactors`, recorded in place of the products, such as ``lambda f: f.norm()``:
            no gradient is written.
        options: of `batch_layer_grads`, or with ``reduce`` of `batch_layer_factors`, except ``create_graph``.

    Raises:
        ValueError, TypeError: a model that is not on one GPU; in a call, an input of another structure, shape, type
            or device than the sample's. Otherwise as `batch_layer_grads`, on the sample.
        RuntimeError: in a call, after a weight moved to other memory or the model changed its mode or its modules.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, but got {type(model).__name__}")
    if num_warmup_iters < 1:
        raise ValueError(f"num_warmup_iters: expected at least 1, but got {num_warmup_iters!r}")
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        found = ", ".join(sorted(map(str, devices))) or "no device: it holds no tensors"
        raise ValueError(
            f"model: expected all parameters and buffers on one GPU, whose work a CUDA graph records, but they are on "
            f"{found}; use model.to('cuda'), or batch_layer_grads itself"
        )
    recorder = CudaGraphRecorder(devices.pop(), num_warmup_iters, pool)
    return GraphedLayerGrads(model, sample_x, recorder, target=target, reduce=reduce, **options)


class Recorder(Protocol):
    def capture(self, function: Callable[[], object]) -> object:
        """Call ``function`` and return its result; each `replay` writes new values into its tensors."""

    def replay(self) -> None: ...


class CudaGraphRecorder:
    def __init__(self, device: torch.device, num_warmup_iters: int, pool: Any) -> None:
        self._device, self._num_warmup_iters, self._pool = device, num_warmup_iters, pool
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], object]) -> object:
        with torch.cuda.device(self._device):
            # The first use makes handles, workspaces and compiled kernels, and must not be recorded.
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(self._num_warmup_iters):
                    function()
            torch.cuda.synchronize()
            # This registers the default random number generator with the graph.
            with torch.cuda.graph(self._graph, pool=self._pool, stream=_recording_stream(self._device)):
                return function()

    def replay(self) -> None:
        self._graph.replay()


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all graphs of a GPU, which may share a pool. Torch's belongs to the GPU of the first recording."""
    return torch.cuda.Stream(device)


class GraphedLayerGrads:
    """A recorded call of a model, ``graphed(x, target=None)``; made by `make_graphed_layer_grads`."""

    def __init__(
        self,
        model: nn.Module,
        sample_x: Tensor | tuple | Mapping,
        recorder: Recorder,
        *,
        target: Tensor | None = None,
        reduce: Callable[[LayerFactors], object] | None = None,
        loss: str | PerSampleLoss = "auto",
        check_finite: bool = False,
        **options: Any,
    ) -> None:
        if options.get("create_graph"):
            raise ValueError("create_graph: expected False, since a replay builds no graph; use batch_layer_grads")
        self._x, self._target = _StaticInput("x", as_call(sample_x)), _StaticInput("target", target)
        args, kwargs = self._x.value
        x, target = kwargs or args, self._target.value

        def call() -> object:
            if reduce is None:
                return batch_layer_grads(model, x, target=target, loss=loss, **options)
            return reduce(batch_layer_factors(model, x, target=target, loss=loss, **options))

        # Checks of values wait for the GPU and cannot be recorded: they are made once, on the sample.
        batch_layer_factors(model, x, target=target, loss=loss, check_finite=check_finite, **_choices(options))
        self._recorder = recorder
        self._results = recorder.capture(call)
        self._assumptions = _Assumptions(model)

    def __call__(self, x: Tensor | tuple | Mapping, target: Tensor | None = None) -> Any:
        self._assumptions.check()
        self._x.copy_from(as_call(x))
        self._target.copy_from(target)
        self._recorder.replay()
        return self._results


def _choices(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that `batch_layer_factors` takes too."""
    return {name: value for name, value in options.items() if name not in ("out", "dtype", "backend")}


class _StaticInput:
    """Copies of the sample's tensors, whose memory stays, in the input's structure; other values are constants."""

    def __init__(self, name: str, sample: Any) -> None:
        self._name = name
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.value = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, sample)
        self._leaves, self._structure = pytree.tree_flatten(self.value)

    def copy_from(self, value: Any) -> None:
        leaves, structure = pytree.tree_flatten(value)
        if structure != self._structure:
            raise ValueError(f"{self._name}: expected the structure of the sample that was recorded, but got another")
        for leaf, new in zip(self._leaves, leaves, strict=True):
            if _kind(leaf) != _kind(new):
                raise ValueError(
                    f"{self._name}: expected {_describe(leaf)} as in the sample that was recorded, but got "
                    f"{_describe(new)}; record another graph for it, or call batch_layer_grads"
                )
        with torch.no_grad():
            for leaf, new in zip(self._leaves, leaves, strict=True):
                if isinstance(leaf, Tensor):
                    leaf.copy_(new)


def _kind(value: Any) -> object:
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype} on {value.device}"
    return repr(value)


class _Assumptions:
    """What must not change after the recording: the modules, their modes, and the addresses of their tensors."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.named_modules(prefix="model"))
        self._modules = [(name, module, module.training, dict(module._modules)) for name, module in modules]
        self._tensors = [
            (f"{name}.{key}", tensors, key, tensor.data_ptr())
            for name, module in modules
            for tensors in (module._parameters, module._buffers)
            for key, tensor in tensors.items()
            if tensor is not None
        ]

    def check(self) -> None:
        for name, module, training, children in self._modules:
            if module.training is not training:
                modes = ("train()", "eval()") if training else ("eval()", "train()")
                raise RuntimeError(
                    f"{name}: expected {modes[0]} as at the recording, but the module is in {modes[1]}; "
                    "set the mode again, or record another graph"
                )
            if module._modules != children:
                raise RuntimeError(f"{name}: expected the modules of the recording, but they changed; {_AGAIN}")
        for name, tensors, key, address in self._tensors:
            tensor = tensors.get(key)
            if tensor is None or tensor.data_ptr() != address:
                raise RuntimeError(
                    f"{name}: expected the memory that was recorded, but the tensor was replaced; {_AGAIN}, or change "
                    "it in place (copy_, load_state_dict)"
                )


_AGAIN = "record the graph again by make_graphed_layer_grads"
