"""Gradients over a whole data set in chunks of samples that fit into a given memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .factors import LayerFactors
from .functional import Samples
from .layer_grads import as_call, batch_layer_factors, batch_layer_grads

Reduced = TypeVar("Reduced")


@overload
def iter_layer_grads(
    model: nn.Module,
    batches: Iterable,
    *,
    memory_budget: int = ...,
    reduce: None = None,
    paired: bool = ...,
    progress: bool = ...,
    **options: Any,
) -> Iterator[dict[str, Tensor]]: ...
@overload
def iter_layer_grads(
    model: nn.Module,
    batches: Iterable,
    *,
    memory_budget: int = ...,
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
    reduce: Callable[[LayerFactors], Any] | None = None,
    paired: bool = False,
    progress: bool = False,
    **options: Any,
) -> Iterator[Any]:
    """`batch_layer_grads` over ``batches`` of any size, cut into chunks that need at most ``memory_budget`` bytes.

    Yields for each chunk, in order, the gradients {name: [b, *parameter.shape]}; or, with ``reduce``, what it returns
    for the chunk's `LayerFactors` (norms, scores, a running sum; ``lambda factors: factors`` for the factors). The peak
    does not depend on the size of the caller's batches: what a sample needs (its share of the graph, of the factors and
    of the results) is measured once, on the first one. Convolutions unfold 4 MB at a time besides, 64 on a GPU.

    Args:
        batches: of model inputs, each as ``x`` of `batch_layer_grads`; with ``paired``, pairs (x, target). A sample is
            a row of every tensor that has as many rows as the first.
        memory_budget: bytes beyond the model and the batch itself.
        reduce: see above; without it the gradients' memory is reused, so that each chunk overwrites the one before:
            clone what must stay.
        progress: show a progress bar on standard error.
        options: ``loss``, ``layers`` and the like, as for `batch_layer_grads`.

    Raises ValueError where one sample needs more than the budget, and whatever `batch_layer_grads` raises.

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
    with tqdm(disable=not progress, unit=" samples", desc="gradients") as bar:
        for batch in batches:
            x, target = batch if paired else (batch, None)
            args, kwargs = as_call(x)
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim > 0]
            if not tensors:
                raise TypeError(
                    f"batches: expected a tensor [B, ...], or a tuple or dict that holds one, in each batch, but got "
                    f"{type(x).__name__}"
                )
            count = tensors[0].shape[0]
            if count == 0:
                continue
            samples = Samples((kwargs or args, target), count)  # of mappings of every type
            if size is None:
                size = max(1, memory_budget // _bytes_per_sample(model, samples, memory_budget, reduce, options))
            for start in range(0, count, size):
                chunk, of_chunk = samples.with_rows([rows[start : start + size] for rows in samples.rows])
                if reduce is not None:
                    yield reduce(batch_layer_factors(model, chunk, target=of_chunk, **options))
                else:
                    rows = min(size, count - start)
                    out = {name: buffer[:rows] for name, buffer in buffers.items()}
                    fits = out and all(len(value) == rows for value in out.values())
                    grads = batch_layer_grads(model, chunk, target=of_chunk, out=out if fits else None, **options)
                    if not fits:
                        buffers = grads
                    yield grads
                bar.update(min(size, count - start))


def _bytes_per_sample(
    model: nn.Module, samples: Samples, memory_budget: int, reduce: Callable | None, options: Mapping[str, Any]
) -> int:
    """What one more sample needs: what its graph saves, its factors, and its gradients if they are formed."""
    x, target = samples.with_rows([rows[:1].clone() for rows in samples.rows])
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
    # The deltas between the layers take about what the graph saves.
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
