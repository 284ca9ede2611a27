"""One file for each implementation of the operators in `gradext.ops`; `choose` picks one by device or by name.

A backend is a module with ``available() -> str | None`` (None: it works here; else the reason why not) and the
operators that it does better than `reference`, from which every other operator comes. It takes tensors of the device
type of its own name, or of those that its ``device_types()`` names.
"""

from __future__ import annotations

import os
from types import ModuleType

from ..errors import BackendError
from . import cpu, cuda, reference, triton

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton, "reference": reference}
# For each device type, which to try, best first.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_working: dict[str, ModuleType] = {}


def choose(name: str | None, device_type: str) -> ModuleType:
    """The backend called ``name``, or the best one that works for the device (or ``GRADEXT_BACKEND``) if None.

    Raises BackendError if the one asked for is unknown, does not work here, or is for another device.
    """
    name = name or os.environ.get("GRADEXT_BACKEND") or None
    if name is None:
        found = _working.get(device_type)
        if found is None:
            names = PREFERENCE.get(device_type, ("reference",))
            found = _working[device_type] = next(BACKENDS[n] for n in names if BACKENDS[n].available() is None)
        return found
    if name not in BACKENDS:
        raise BackendError(f"backend: expected one of {sorted(BACKENDS)} or None, but got {name!r}")
    reason = BACKENDS[name].available()
    if reason is not None:
        raise BackendError(f"backend={name!r} does not work here: {reason}")
    if name != "reference" and device_type not in _device_types(name):
        raise BackendError(f"backend={name!r} does not take tensors on {device_type}; move them or leave backend=None")
    return BACKENDS[name]


def _device_types(name: str) -> tuple[str, ...]:
    device_types = getattr(BACKENDS[name], "device_types", None)
    return (name,) if device_types is None else device_types()


def implementation(operator: str, name: str | None, device_type: str):
    """The function that computes ``operator`` on the backend that `choose` gives."""
    backend = choose(name, device_type)
    return getattr(backend, operator, None) or getattr(reference, operator)
