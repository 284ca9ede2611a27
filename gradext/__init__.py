"""gradext: per-sample gradients of neural networks from one forward and a partial backward, and what people do next
with them (norms, cosines, classifiers, projections, Fisher scores) without writing them at all."""

from ._version import __version__
from .errors import BackendError, CaptureError, NonFiniteError, UnsupportedLayerError
from .factors import ConvFactors, EmbeddingFactors, GradFactors, LayerFactors, LayerGrads
from .graphs import make_graphed_layer_grads
from .layer_grads import batch_layer_factors, batch_layer_grads
from .registered import register_layer
from .statistics import GradStatistics
from .streaming import iter_layer_grads
from .watch import watch

__all__ = [
    "BackendError",
    "CaptureError",
    "ConvFactors",
    "EmbeddingFactors",
    "GradFactors",
    "GradStatistics",
    "LayerFactors",
    "LayerGrads",
    "NonFiniteError",
    "UnsupportedLayerError",
    "__version__",
    "batch_layer_factors",
    "batch_layer_grads",
    "iter_layer_grads",
    "make_graphed_layer_grads",
    "register_layer",
    "watch",
]
