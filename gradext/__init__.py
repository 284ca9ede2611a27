"""Per-sample gradients of every parameter of a PyTorch model, from one forward and a partial backward.

Start with `batch_layer_grads` (the gradients as tensors) or `batch_layer_factors` (in factored form, for norms, clipped
sums, inner products, projections and Fisher scores without writing a gradient). `watch` does the same for a forward and
a loss of your own, and in a training loop. `iter_layer_grads` and `GradStatistics` work through data sets,
`register_layer` adds a faster rule for a layer, `make_graphed_layer_grads` makes a CUDA graph of a call.

Other pages: `gradext.novelty` (the detector), `gradext.novelty.scores`, `gradext.novelty.explain`,
`gradext.novelty.onnx`, `gradext.ops` (the operators), `gradext.datasets`.
"""

from ._version import __version__
from .errors import BackendError, CaptureError, NonFiniteError, UnsupportedLayerError
from .factors import ConvFactors, EmbeddingFactors, GradFactors, LayerFactors, LayerGrads
from .graphs import make_graphed_layer_grads
from .layer_grads import batch_layer_factors, batch_layer_grads
from .registered import register_layer
from .statistics import GradStatistics
from .streaming import iter_layer_grads
from .watch import watch

__all__ = [  # noqa: RUF022 (in the order of the API reference: what is used first comes first)
    "batch_layer_grads",
    "batch_layer_factors",
    "watch",
    "iter_layer_grads",
    "register_layer",
    "make_graphed_layer_grads",
    "GradStatistics",
    "LayerGrads",
    "LayerFactors",
    "GradFactors",
    "ConvFactors",
    "EmbeddingFactors",
    "CaptureError",
    "UnsupportedLayerError",
    "NonFiniteError",
    "BackendError",
    "__version__",
]
