"""The factored algebra: per-sample gradients as ``Σ_t delta_t activation_tᵀ``, used without being written.

B samples, T positions (a sequence, or several uses of the weight), O output and I input features; ``G[b]`` is the
gradient of sample b. Costs are counted in multiply-adds. Nothing here knows about modules.

| file | its one job |
| --- | --- |
| `products.py` | `GradFactors`: factors of one weight, and the methods of every kind of factors |
| `written.py` | `WrittenFactors`: gradients stored as tensors, of biases and the like |
| `convolutions.py` | `ConvFactors`: unfolded only while they are used |
| `embeddings.py` | `EmbeddingFactors`: gradients of positions, with the indices that were looked up |
| `sums.py` | `SumFactors`: one weight used in several ways; joining of uses and of batches |
| `inner.py` | inner products between factors of different kinds |
| `layers.py` | `LayerFactors`, `LayerGrads`: all parameters by name |
| `projections.py` | hashes, count sketches and random signs, the same on every device |
| `numerics.py` | blocks, and norms whose squares would leave the range of the type |
"""

from .convolutions import ConvFactors, Windows
from .embeddings import EmbeddingFactors
from .layers import Coverage, LayerFactors, LayerGrads
from .products import GradFactors, Gradient
from .sums import SumFactors
from .written import WrittenFactors

__all__ = [
    "ConvFactors",
    "Coverage",
    "EmbeddingFactors",
    "GradFactors",
    "Gradient",
    "LayerFactors",
    "LayerGrads",
    "SumFactors",
    "Windows",
    "WrittenFactors",
]
