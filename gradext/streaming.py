"""Gradients over a whole data set, batch by batch, or in chunks of samples that fit into a given memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from .factors import LayerFactors, LayerGrads
from .layer_grads import as_call, batch_layer_factors, batch_layer_grads
from .rules import tensors_of

Reduced = TypeVar("Reduced")


@overload
def iter_layer_grads(
    model: nn.Module,
    batches: Iterable,
    *,
    memory_budget: int = ...,
    cut: Sequence[int | str] | None = ...,
    reduce: None = None,
    paired: bool = ...,
    progress: bool = ...,
    **options: Any,
) -> Iterator[LayerGrads]: ...
@overload
def iter_layer_grads(
    model: nn.Module,
    batches: Iterable,
    *,
    memory_budget: int = ...,
    cut: Sequence[int | str] | None = ...,
    reduce: Callable[[LayerFactors], Reduced],
    paired: bool = ...,
    progress: bool = ...,
    **options: Any,
) -> Iterator[Reduced]: ...
def iter_layer_grads(
    model: nn.Module,
    batches: Iterable,
    *,
    memory_budget: int = 1 << 30,
    cut: Sequence[int | str] | None = None,
    reduce: Callable[[LayerFactors], Any] | None = None,
    paired: bool = False,
    progress: bool = False,
    **options: Any,
) -> Iterator[Any]:
    """`batch_layer_grads` over ``batches``, cut into chunks that need at most ``memory_budget`` bytes.

    Yields for each chunk, in order, the gradients {name: [b, *parameter.shape]}; or, with ``reduce``, what it returns
    for the chunk's `LayerFactors` (norms, scores, a running sum; ``lambda factors: factors`` for the factors). The
    memory of one sample (its part of the graph, the factors and the results) is measured on the first sample, so that
    the peak does not depend on the size of the batches. Convolutions unfold another 4 MB at a time, 64 MB on a GPU.

    Args:
        batches: of model inputs, each as ``x`` of `batch_layer_grads`; with ``paired``, pairs (x, target).
        memory_budget: bytes beyond the model and the batch itself.
        cut: which inputs have their samples in the first dimension and are cut there: positions of positional inputs,
            names of keyword inputs, and ``"target"``. Default: a batch that is one tensor, and a target that is one,
            are cut; batches of several inputs are not cut.
        reduce: see above. Without it the memory of the gradients is reused, and each chunk overwrites the previous one:
            clone what you keep.
        progress: show a progress bar on standard error.
        options: ``loss``, ``layers`` and the like, as for `batch_layer_grads`.

    Raises ValueError if one sample needs more than the budget, and everything that `batch_layer_grads` raises.

    >>> import torch, gradext
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.ReLU(), torch.nn.Linear(3, 6), torch.nn.Sigmoid())
    >>> data = torch.rand(1000, 6).split(300)
    >>> norms = torch.cat(list(gradext.iter_layer_grads(model, data, reduce=lambda factors: factors.norm())))
    >>> norms.shape
    torch.Size([1000])
    """
    for name in ("out", "create_graph"):
        if options.pop(name, None):
            raise ValueError(f"{name}: iter_layer_grads keeps no graph and reuses memory of its own; leave {name} out")
    if options.pop("target", None) is not None:
        raise ValueError("target: expected one for each batch; pass paired=True and pairs (x, target) as batches")
    size: int | None = None
    buffers: dict[str, Tensor] = {}
    with _shown(progress) as done:
        for batch in batches:
            x, target = batch if paired else (batch, None)
            parts = _Parts(x, target, cut)
            if parts.count == 0:
                continue
            if parts.count is None:
                chunks: Iterable[tuple[Any, Any]] = [(x, target)]
            else:
                if size is None:
                    size = max(1, memory_budget // _bytes_per_sample(model, parts, memory_budget, reduce, options))
                chunks = (parts.of(slice(start, start + size)) for start in range(0, parts.count, size))
            for chunk, of_chunk in chunks:
                if reduce is not None:
                    factors = batch_layer_factors(model, chunk, target=of_chunk, **options)
                    done(len(next(iter(factors.values()))))
                    yield reduce(factors)
                    continue
                rows = parts.rows_of(chunk)
                out = {name: buffer[:rows] for name, buffer in buffers.items()} if rows is not None else {}
                fits = out and all(len(value) == rows for value in out.values())
                grads = batch_layer_grads(model, chunk, target=of_chunk, out=out if fits else None, **options)
                if not fits:
                    buffers = dict(grads)
                done(len(next(iter(grads.values()))))
                yield grads


@contextlib.contextmanager
def _shown(progress: bool) -> Iterator[Callable[[int], object]]:
    """A function to call with the number of samples that have been done."""
    if not progress:
        yield lambda samples: None
        return
    from tqdm import tqdm  # not needed by the rest of the package

    with tqdm(unit=" samples", desc="gradients") as bar:
        yield bar.update


class _Parts:
    """A batch's inputs and target, and which of them are cut."""

    def __init__(self, x: Any, target: Any, cut: Sequence[int | str] | None) -> None:
        self.x, self.target = x, target
        self.named = isinstance(x, Mapping)
        args, kwargs = as_call(x)
        self.inputs: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
        if not any(t.ndim for t in tensors_of(list(self.inputs.values()))):
            raise TypeError(
                "batches: expected a tensor [B, ...], or a tuple or dict that holds one, in each batch, but got "
                f"{type(x).__name__}"
            )
        if cut is None:
            places: list[int | str] = [0] if isinstance(x, Tensor) else []
            if places and isinstance(target, Tensor):
                places.append("target")
        else:
            places = list(cut)
        self.cut: dict[int | str, Tensor] = {}
        for place in places:
            value = target if place == "target" else self.inputs.get(place)
            if not isinstance(value, Tensor) or value.ndim == 0:
                raise ValueError(
                    f"cut: expected names or positions of inputs that are tensors [B, ...], but {place!r} is "
                    f"{type(value).__name__}; there are {', '.join(map(repr, [*self.inputs, 'target']))}"
                )
            self.cut[place] = value
        counts = {len(value) for value in self.cut.values()}
        if len(counts) > 1:
            sizes = ", ".join(f"{place!r}: {len(value)}" for place, value in self.cut.items())
            raise ValueError(f"cut: expected as many samples in every input that is cut, but got {sizes}")
        self.count = counts.pop() if counts else None

    def of(self, rows: slice, made: Callable[[Tensor], Tensor] = lambda part: part) -> tuple[Any, Any]:
        inputs = {place: made(self.cut[place][rows]) if place in self.cut else v for place, v in self.inputs.items()}
        target = made(self.cut["target"][rows]) if "target" in self.cut else self.target
        if isinstance(self.x, Tensor):
            return inputs[0], target
        return (inputs if self.named else tuple(inputs.values())), target

    def rows_of(self, chunk: Any) -> int | None:
        if self.count is None:
            return None
        place = next(iter(self.cut))
        if place == "target":
            return None
        return len(chunk if isinstance(chunk, Tensor) else chunk[place])


def _bytes_per_sample(
    model: nn.Module, parts: _Parts, memory_budget: int, reduce: Callable | None, options: Mapping[str, Any]
) -> int:
    """The bytes that one more sample needs: tensors saved by the graph, its factors, and its gradients if formed."""
    x, target = parts.of(slice(0, 1), torch.clone)  # a view would count the memory of the whole batch
    model_memory = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in model_memory:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    options = {key: value for key, value in options.items() if key not in ("dtype", "backend")} | {"target": target}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        factors = batch_layer_factors(model, x, **options)
    # The deltas between the layers take about as much memory as the tensors that the graph saves.
    size = 2 * sum(saved.values()) + sum(f.nbytes for f in factors.values())
    if reduce is None:
        kind = options.get("dtype")
        size += sum(f.shape[1] * f.shape[2] * (kind or f.dtype).itemsize for f in factors.values())
    if size > memory_budget:
        raise ValueError(
            f"memory_budget: one sample needs about {size:,} bytes, more than the budget of {memory_budget:,}; allow "
            "more, choose fewer layers, or pass reduce= to work on the factors alone"
        )
    return max(1, size)
