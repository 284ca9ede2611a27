"""The errors that gradext raises. Each message says what was expected, what came, and what to do."""

from collections.abc import Iterable


class CaptureError(RuntimeError):
    """Per-sample gradients of this model, on this input, cannot be computed exactly."""


class UnsupportedLayerError(CaptureError):
    """A chosen layer is of a type, or is used in a way, for which gradext has no exact rule."""


class NonFiniteError(CaptureError):
    """A delta holds NaN or infinity (raised with ``check_finite=True``)."""


class BackendError(RuntimeError):
    """The requested backend does not work here; the message says why."""


# What to do where a training step's backward has freed or changed what the gradients need.
BEFORE = "call watch.factors(losses) before the training step's backward"


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
