"""One file for each implementation of the operators in `gradext.ops`, and the `TABLE` that chooses among them.

A backend is a module with ``available() -> str | None`` (None: it works here; else the reason why not) and the
operators that it computes better than `reference`, which computes all others. It takes tensors of the device type that
it is named after, or of those in its ``device_types()``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import BackendError
from . import cpu, cuda, reference, triton

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton, "reference": reference}

# The backend of calls without backend=. Read once: reading the environment takes as long as the rest of a choice.
DEFAULT = os.environ.get("GRADEXT_BACKEND") or None


class Call(NamedTuple):
    """The properties of a call that rows of the table use, computed when used: a choice takes about 1 µs."""

    delta: Tensor  # [B, (T,) O]
    out: Any = None  # the result [B, O, I] of `outer`, a tensor; rows for other operators do not ask for it

    @property
    def positions(self) -> int:
        return 1 if self.delta.ndim == 2 else self.delta.shape[1]

    @property
    def by_columns(self) -> bool:
        """Neighbours in a row of the result are not adjacent in memory."""
        return self.out.stride(2) != 1 and self.out.shape[2] > 1

    @property
    def converts(self) -> bool:
        """The result is rounded to another type than that of the sums."""
        return self.out.dtype != self.delta.dtype or self.delta.dtype.itemsize == 2

    @property
    def on_tensor_cores(self) -> bool:
        return triton._on_tensor_cores(self.delta.dtype)

    @property
    def in_tf32(self) -> bool:
        return triton._precision(self.delta.dtype) == "tf32"


class Row(NamedTuple):
    operators: tuple[str, ...]
    device: str
    when: str
    fits: Callable[[Call], bool]
    backends: tuple[str, ...]  # best first; the first one that works on this machine is used
    why: str


_FUNCTIONALS = ("dot", "linear", "gram", "weighted_sum", "project")
# The first row that fits an operator and a device is used; `reference` if none does.
TABLE = (
    Row(
        ("outer",), "cuda", "T > 8, one type, fp32 or fp64", lambda c: c.positions > 8 and not c.converts,
        ("reference",), "bound by arithmetic that cuBLAS does best (torch.bmm)",
    ),
    Row(
        ("outer",), "cuda", "T > 8", lambda c: c.positions > 8,
        ("triton", "reference"), "tensor cores, and the conversion fused: torch.bmm would write the result twice",
    ),
    Row(
        ("outer",), "cuda", "out stored by columns", lambda c: c.by_columns,
        ("triton", "reference"), "the compiled kernel writes along rows; Triton's exchanges the factors",
    ),
    Row(
        ("outer",), "cuda", "else", lambda c: True,
        ("cuda", "triton", "reference"), "bound by writing BOI numbers, in 16-byte streaming stores",
    ),
    Row(
        ("sq_norm",), "cuda", "T > 1, TF32", lambda c: c.positions > 1 and c.in_tf32,
        ("triton", "cuda", "reference"), "both Gram matrices or gradients on tensor cores, never written",
    ),
    Row(
        ("sq_norm",), "cuda", "else", lambda c: True,
        ("cuda", "triton", "reference"), "all layers in one launch, half precision on tensor cores; else Triton",
    ),
    Row(
        _FUNCTIONALS, "cuda", "half precision or TF32", lambda c: c.on_tensor_cores,
        ("triton", "reference"), "tensor cores outrun the memory that an intermediate would pass through: fused",
    ),
    Row(
        _FUNCTIONALS, "cuda", "else", lambda c: True,
        ("reference",), "bound by arithmetic that cuBLAS does best",
    ),
    Row(
        ("outer",), "cpu", "T = 1, stored by rows", lambda c: c.delta.ndim == 2 and c.out.stride(2) == 1,
        ("cpu", "reference"), "bound by writing BOI numbers, in streaming stores",
    ),
    Row(
        ("outer",), "cpu", "T >= 12", lambda c: c.positions >= 12,
        ("reference",), "bound by arithmetic that torch.bmm blocks better (measured: they meet between T = 8 and 20)",
    ),
    Row(
        ("outer",), "cpu", "out stored by columns", lambda c: c.by_columns,
        ("reference",), "the compiled kernel writes along rows",
    ),
    Row(
        ("outer",), "cpu", "else", lambda c: True,
        ("cpu", "reference"), "a few positions cost less than the writing, which streams past the cache",
    ),
)  # fmt: skip

_rows: dict[tuple[str, str], list[Row]] = {}
for _row in TABLE:
    for _operator in _row.operators:
        _rows.setdefault((_operator, _row.device), []).append(_row)
_working: dict[tuple[str, ...], ModuleType] = {}


def choose(operator: str, name: str | None, device_type: str, call: Call) -> ModuleType:
    """The backend ``name`` (or `DEFAULT`), or the choice of the table if both are None.

    Raises BackendError if the named backend is unknown, does not work here, or is for another device.
    """
    name = name or DEFAULT
    if name is None:
        for row in _rows.get((operator, device_type), ()):
            if row.fits(call):
                return _working.get(row.backends) or first_working(row.backends)
        return reference
    if name not in BACKENDS:
        raise BackendError(f"backend: expected one of {sorted(BACKENDS)} or None, but got {name!r}")
    reason = BACKENDS[name].available()
    if reason is not None:
        raise BackendError(f"backend={name!r} does not work here: {reason}")
    if name != "reference" and device_type not in _device_types(name):
        raise BackendError(f"backend={name!r} does not take tensors on {device_type}; move them or leave backend=None")
    return BACKENDS[name]


def first_working(names: tuple[str, ...]) -> ModuleType:
    found = _working.get(names)
    if found is None:
        found = _working[names] = next(BACKENDS[name] for name in names if BACKENDS[name].available() is None)
    return found


def _device_types(name: str) -> tuple[str, ...]:
    device_types = getattr(BACKENDS[name], "device_types", None)
    return (name,) if device_types is None else device_types()


def implementation(operator: str, name: str | None, call: Call) -> Callable:
    """The function that computes ``operator`` on the backend that `choose` gives."""
    backend = choose(operator, name, call.delta.device.type, call)
    return getattr(backend, operator, None) or getattr(reference, operator)
