"""A use of chosen parameters by a model's forward, and what follows from it, however `capture` has found it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .factors import GradFactors


class Form(NamedTuple):
    """How a tensor that a call used lies in a parameter: some of its rows, or all, as they are or transposed."""

    name: str  # the parameter's
    shape: torch.Size  # the parameter's
    start: int = 0  # the first row
    rows: int | None = None  # how many, None for all
    turned: bool = False

    def place(self, gradient: GradFactors | Tensor) -> GradFactors | Tensor:
        """The gradient for the parameter, from that for the form."""
        if self.turned:
            gradient = gradient.mT if isinstance(gradient, Tensor) else gradient.transposed()
        if self.rows is None:
            return gradient
        if isinstance(gradient, GradFactors):
            if gradient.weight_shape is None:
                return gradient.in_rows(self.start, self.shape[0])
            gradient = gradient.materialize()
        padded = gradient.new_zeros(gradient.shape[0], *self.shape)
        padded[:, self.start : self.start + self.rows] = gradient
        return padded


def memory(tensor: Tensor) -> int | None:
    """The address of the tensor's storage, by which it is found out who shares it."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # sparse tensors, and classes that wrap others, have none
        return None


class Use(NamedTuple):
    """One call with chosen parameters. ``delta`` is the gradient of Σ_b loss_b with respect to the call's output."""

    forms: dict[str, Form]  # of the chosen parameters, by the role that the call's rule gives them
    gradient: Callable[[str, Tensor, Tensor], GradFactors | Tensor]  # (role, input, delta), one row or more a sample
    input: Tensor
    delta: Tensor

    def gradients(self, batch: int) -> Iterable[tuple[str, GradFactors | Tensor]]:
        """(parameter name, the gradient of every sample for it)."""
        taken: set[int | None] = set()
        for role, form in self.forms.items():
            gradient = self.gradient(role, self.input, self.delta)
            if self.delta.shape[0] != batch:
                if isinstance(gradient, Tensor):
                    gradient = gradient.unflatten(0, (batch, -1)).sum(1)
                else:
                    gradient = gradient.regrouped(batch)
            elif isinstance(gradient, Tensor):
                # A bias's is the delta itself, which autograd may have given other layers too, and may be expanded; a
                # rule of the user's own may give several parameters the same one.
                taken = taken or {memory(self.delta)}
                gradient = gradient.clone() if memory(gradient) in taken else gradient
                taken.add(memory(gradient))
            yield form.name, form.place(gradient)


class _Record(Protocol):
    """A NamedTuple that tells, among other things, which parameters one call used."""

    @property
    def forms(self) -> dict[str, Form]: ...  # by role

    def _replace(self: Found, *, forms: dict[str, Form]) -> Found: ...


Found = TypeVar("Found", bound=_Record)


def names_of(record: _Record) -> set[str]:
    """The parameters that a call used."""
    return {form.name for form in record.forms.values()}


def without(records: list[Found], missing: Iterable[str]) -> list[Found]:
    """The records whose parameters are all there: one use that is missing makes the others worthless."""
    missing = set(missing)
    kept = []
    for record in records:
        forms = {role: form for role, form in record.forms.items() if form.name not in missing}
        if forms:
            kept.append(record._replace(forms=forms))
    return kept


def is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[2]


def select(records: list[Found], pick: str | None, owners: dict[str, str]) -> list[Found]:
    """All records, or those of the layer whose weight ran first or last."""
    if pick is None:
        return records
    weights = [form.name for record in records for form in record.forms.values() if not is_bias(form.name)]
    if not weights:
        return []
    layer = owners[weights[0] if pick == "first" else weights[-1]]
    names = {name for name, owner in owners.items() if owner == layer and not is_bias(name)}
    # Its bias may be owned by another layer that shares it, and be used there too.
    names |= {name for record in records if names_of(record) & names for name in names_of(record) if is_bias(name)}
    return without(records, {name for record in records for name in names_of(record)} - names)
