"""gradext: per-sample gradients of linear layers from one forward and a partial backward, and what people do next
with them (norms, cosines, classifiers, projections, Fisher scores) without writing them at all."""

from ._version import __version__
from .errors import BackendError, CaptureError, NonFiniteError, UnsupportedLayerError
from .factors import GradFactors, LayerFactors
from .graphs import make_graphed_layer_grads
from .layer_grads import batch_layer_factors, batch_layer_grads

__all__ = [
    "BackendError",
    "CaptureError",
    "GradFactors",
    "LayerFactors",
    "NonFiniteError",
    "UnsupportedLayerError",
    "__version__",
    "batch_layer_factors",
    "batch_layer_grads",
    "make_graphed_layer_grads",
]
