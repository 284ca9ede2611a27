"""Gradient-based novelty detection with autoencoders, after Kwon, Prabhushankar, Temel and AlRegib, "Novelty Detection
Through Model-Based Characterization of Neural Networks", ICIP 2020.

model (`VAE`, `train`) -> `characterize` -> `SCORES` and `NoiseClassifier`: a `FittedScore` -> `NoveltyDetector`, with a
`Calibration` -> `save`, `load`.
"""

from .calibration import Calibration, benjamini_hochberg
from .classifier import GradientFeatures, NoiseClassifier, features, train_classifier
from .detector import NoveltyDetector
from .fitted import FittedScore, fit_score
from .guards import DetectorWarning
from .models import VAE, Autoencoder, ConvVAE, RotationNet
from .persistence import ModelFileError, load, save
from .representations import Characterization, characterize, distort
from .scores import SCORES, Statistics
from .training import Checkpoint, GradientAlignment, History, train

__all__ = [
    "SCORES",
    "VAE",
    "Autoencoder",
    "Calibration",
    "Characterization",
    "Checkpoint",
    "ConvVAE",
    "DetectorWarning",
    "FittedScore",
    "GradientAlignment",
    "GradientFeatures",
    "History",
    "ModelFileError",
    "NoiseClassifier",
    "NoveltyDetector",
    "RotationNet",
    "Statistics",
    "benjamini_hochberg",
    "characterize",
    "distort",
    "features",
    "fit_score",
    "load",
    "save",
    "train",
    "train_classifier",
]
