"""Gradients through torch's own machinery: slower and exact, for what gradext has no rule for, and to check by.

`vmap` hands parameters to the model by `torch.func.functional_call`, so that its own are never written to.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree  # what torch.func itself takes nested inputs apart with
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .borrowing import Afterwards, Loans, exchange
from .errors import CaptureError

# Of gradients at a time. vmap holds about twice as much besides.
CHUNK_BYTES = 1 << 28


@dataclass(frozen=True)
class Problem:
    """A model with its input, and the sum of its samples' losses as a function of (model output, target)."""

    model: nn.Module
    args: tuple
    kwargs: Mapping
    target: object
    loss: Callable[[object, object], Tensor]
    parameters: Mapping[str, nn.Parameter]  # all of the model's, by name

    def vmap_grads(self, chosen: Iterable[str], batch: int) -> dict[str, Tensor]:
        """``vmap(grad)`` over the chosen parameters, in chunks of samples -> {name: [B, *parameter.shape]}.

        A sample is a row of every input and target tensor that has ``batch`` of them; all else is the same for every
        sample. Randomness is each sample's own. Where torch cannot vectorise it warns, and loops.
        """
        constant, varied = self._parted(chosen)
        samples = self._samples(batch)

        def sample_loss(varied, rows):
            loss = self._loss({**constant, **varied}, samples.with_rows([row.unsqueeze(0) for row in rows]))
            return loss, loss

        size = sum(value.numel() * value.element_size() for value in varied.values())
        gradients = torch.func.vmap(
            torch.func.grad(sample_loss, has_aux=True),
            (None, 0),
            randomness="different",
            chunk_size=max(1, CHUNK_BYTES // max(1, size)),
        )
        if batch == 0:
            return {name: value.new_zeros(0, *value.shape) for name, value in varied.items()}
        reason: object = "it holds a view of a parameter, which nothing can be put in place of"
        try:
            with torch.enable_grad():
                found, losses = gradients(varied, samples.rows)
            if not losses.requires_grad:  # else they depend on the model's own parameters too
                return found
        except (RuntimeError, NotImplementedError, ValueError) as error:
            reason = error
        warnings.warn(
            f"torch.func cannot vectorise this model ({reason}), so that the gradients of {', '.join(varied)} are "
            'computed sample by sample; fallback="loop" does so without trying',
            stacklevel=7,
        )
        return self.loop_grads(varied, batch)

    def loop_grads(self, chosen: Iterable[str], batch: int) -> dict[str, Tensor]:
        """As `vmap_grads`, one sample after the other: the slowest way, which works for every model."""
        chosen, samples = list(chosen), self._samples(batch)
        grads = {name: (p := self.parameters[name]).new_zeros(batch, *p.shape) for name in chosen}
        for b in range(batch):
            one = samples.with_rows([rows[b : b + 1] for rows in samples.rows])
            for name, gradient in self._own_grads(chosen, *one).items():
                if gradient is not None:
                    grads[name][b] = gradient.to_dense() if gradient.is_sparse else gradient
        return grads

    def batch_grads(self, chosen: Iterable[str]) -> dict[str, Tensor | None]:
        """Autograd's gradient of Σ_b loss_b by the chosen parameters; None where nothing depends on one."""
        return self._own_grads(chosen, self.args, self.kwargs, self.target)

    def _own_grads(
        self, chosen: Iterable[str], args: tuple, kwargs: Mapping, target: object
    ) -> dict[str, Tensor | None]:
        """The parameters themselves require grad meanwhile, so that no use of them is missed."""
        leaves = {name: self.parameters[name] for name in chosen}
        loans = Loans()
        end = Afterwards(loans.put_back)
        with end, end, torch.inference_mode(False), torch.enable_grad():
            loans.thaw(leaves.values())
            loans.keep(self._changing().values())
            total = self.loss(self.model(*args, **kwargs), target)
            if not total.requires_grad:
                return dict.fromkeys(leaves)
            found = torch.autograd.grad(total, tuple(leaves.values()), allow_unused=True)
        return dict(zip(leaves, found, strict=True))

    def _loss(self, parameters: dict[str, Tensor], sample: tuple) -> Tensor:
        args, kwargs, target = sample
        owned: list[tuple[dict, str, Tensor | None]] = []
        former: list[int | None] = []

        def put_back() -> None:
            for owner, name, tensor in owned:
                owner[name] = tensor
            if former:
                exchange.thread = former[0]

        def run() -> Tensor:
            former.append(exchange.thread)
            exchange.begin()
            owned.extend((m._parameters, name, p) for m in self.model.modules() for name, p in m._parameters.items())
            updated: dict[str, Tensor] = {}  # copies of buffers for the model to write into, of each sample
            for prefix, module in self._changing().items():
                owned.extend((module._buffers, name, b) for name, b in module._buffers.items())
                updated |= {f"{prefix}{name}": b.clone() for name, b in module._buffers.items() if b is not None}
            with _InPlaceOf({id(self.parameters[name]): tensor for name, tensor in parameters.items()}):
                return self.loss(torch.func.functional_call(self.model, updated | parameters, args, kwargs), target)

        # functional_call exchanges the model's own parameters for a while: one thread at a time, and back in any case.
        end = Afterwards(put_back)
        with exchange.lock, end, end:
            return run()

    def _changing(self) -> dict[str, nn.Module]:
        """The modules that may update buffers of theirs in a forward, by the beginning of the buffers' names."""
        modules = self.model.named_modules()
        return {f"{name}." if name else "": m for name, m in modules if m.training and m._buffers}

    def _samples(self, batch: int) -> Samples:
        return Samples((self.args, dict(self.kwargs), self.target), batch)

    def _parted(self, chosen: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        constant = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return constant, {name: constant.pop(name).clone() for name in chosen}


class _InPlaceOf(TorchFunctionMode):
    """Torch's functions get these tensors in place of the model's parameters, by id, wherever they are taken from.

    `functional_call` exchanges what the modules hold, and for the forward alone: a loss that decays weights would be
    handed the parameters themselves, and its share of their gradients would be lost.
    """

    def __init__(self, tensors: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: self.tensors.get(id(t), t), (args, kwargs or {}))
        return func(*args, **kwargs)


@contextlib.contextmanager
def same_randomness(state: list[tuple[torch.device | None, Tensor]]):
    """Draw again what was drawn after `random_state` gave ``state``, and leave the generators as they were."""
    now = random_state([device for device, _ in state if device is not None])
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(now)


def random_state(devices: Iterable[torch.device]) -> list[tuple[torch.device | None, Tensor]]:
    cuda = sorted({device for device in devices if device.type == "cuda"}, key=str)
    return [(None, torch.get_rng_state()), *((device, torch.cuda.get_rng_state(device)) for device in cuda)]


def _set_random_state(state: list[tuple[torch.device | None, Tensor]]) -> None:
    for device, value in state:
        if device is None:
            torch.set_rng_state(value)
        else:
            torch.cuda.set_rng_state(value, device)


class Samples:
    """Nested inputs of a model, the tensors in them that have a row for each sample, and the same for other rows."""

    def __init__(self, values, batch: int) -> None:
        self.leaves, self.structure = pytree.tree_flatten(values)
        self.places = [
            k
            for k, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
        ]
        if not self.places:
            raise CaptureError(
                f"fallback: expected an input with B = {batch} rows, one for each sample, but found none"
            )
        self.rows = [self.leaves[k] for k in self.places]

    def with_rows(self, rows: list[Tensor]):
        leaves = list(self.leaves)
        for k, row in zip(self.places, rows, strict=True):
            leaves[k] = row
        return pytree.tree_unflatten(leaves, self.structure)
