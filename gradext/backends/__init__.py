"""One file for each implementation of the operators in `gradext.ops`; `choose` picks one by device or by name.

A backend is a module with ``available() -> str | None`` (None: it works here; else the reason why not) and the
operators that it does better than `reference`, from which every other operator comes.
"""

from __future__ import annotations

import os
from types import ModuleType

from ..errors import BackendError
from . import cpu, cuda, reference

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "reference": reference}
# For each device type, which to try, best first.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "reference")}
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
    if name not in ("reference", device_type):
        raise BackendError(f"backend={name!r} does not take tensors on {device_type}; move them or leave backend=None")
    reason = BACKENDS[name].available()
    if reason is not None:
        raise BackendError(f"backend={name!r} does not work here: {reason}")
    return BACKENDS[name]


def implementation(operator: str, name: str | None, device_type: str):
    """The function that computes ``operator`` on the backend that `choose` gives."""
    backend = choose(name, device_type)
    return getattr(backend, operator, None) or getattr(reference, operator)
