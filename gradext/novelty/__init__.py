"""Gradient-based novelty detection with autoencoders, after Kwon, Prabhushankar, Temel and AlRegib, "Novelty Detection
Through Model-Based Characterization of Neural Networks", ICIP 2020.

model (`VAE`, `train`) -> `characterize` -> `SCORES` and `NoiseClassifier` -> `NoveltyDetector`.
"""

from .classifier import GradientFeatures, NoiseClassifier, features, train_classifier
from .detector import NoveltyDetector
from .models import VAE
from .representations import Characterization, characterize, distort
from .scores import SCORES, Statistics
from .training import GradientAlignment, History, train

__all__ = [
    "SCORES",
    "VAE",
    "Characterization",
    "GradientAlignment",
    "GradientFeatures",
    "History",
    "NoiseClassifier",
    "NoveltyDetector",
    "Statistics",
    "characterize",
    "distort",
    "features",
    "train",
    "train_classifier",
]
