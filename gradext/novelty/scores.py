"""Label-free scores: one function each, from a `Characterization` to a novelty [N]; higher is more novel.

Scores of one layer use the layer that was chosen first, combinations all that were chosen. What they compare a sample
with is taken from inliers, best from held-out ones: a model explains the samples it was trained on too well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .representations import Characterization

RIDGE = 0.1  # added to every second moment, times their mean: a few thousand samples leave most directions unknown


@dataclass(frozen=True, eq=False)
class Statistics:
    """What scores keep of the inliers, all of it tensors; None where no score that was asked for needs it.

    Of the layer that was chosen first: mean_gradient [O, I]; inverse_fisher [O, I], one over the diagonal of the
    empirical Fisher matrix; activation_inverse [I, I] and delta_inverse [O, O], the inverses of its Kronecker factors
    ``Σ a aᵀ / N`` and ``Σ δ δᵀ / N``, `RIDGE` times their mean (diagonal) being added before all inversions.

    Mean and standard deviation of logarithms: gradient_moments [layers, 2] and delta_moments [layers, 2] of every
    chosen layer's gradient norm and delta norm, whitened_moments [2] of the first one's whitened delta norm.
    """

    mean_gradient: Tensor | None = None
    inverse_fisher: Tensor | None = None
    activation_inverse: Tensor | None = None
    delta_inverse: Tensor | None = None
    gradient_moments: Tensor | None = None
    delta_moments: Tensor | None = None
    whitened_moments: Tensor | None = None

    @staticmethod
    def of(inliers: Characterization, scores: Iterable[str] | None = None) -> Statistics:
        """What the named scores need of the inliers; None: what any of them needs."""
        needed = {field for name in (NEEDS if scores is None else scores) for field in NEEDS[name]}
        gradient, kept = inliers.gradient, {}
        if "mean_gradient" in needed:
            kept["mean_gradient"] = gradient.mean()
        if "inverse_fisher" in needed:
            fisher = gradient.diag_fisher()
            kept["inverse_fisher"] = 1 / (fisher + _ridge(fisher))
        if "delta_inverse" in needed:
            inverses = map(_ridge_inverse, gradient.kron_fisher())
            kept["activation_inverse"], kept["delta_inverse"] = inverses
        if "gradient_moments" in needed:
            kept["gradient_moments"] = _moments(_log_gradient_norms(inliers))
        if "delta_moments" in needed:
            kept["delta_moments"] = _moments(_log_delta_norms(inliers))
        if "whitened_moments" in needed:
            whitened = whitened_delta_norm(inliers, Statistics(**kept))
            kept["whitened_moments"] = _moments(_log(whitened)[:, None])[0]
        return Statistics(**kept)


def gradient_norm(sample: Characterization, statistics: Statistics) -> Tensor:
    """``‖∇_W L‖``, how far the sample would move the weights (the paper's Fig. 2c)."""
    return sample.gradient.norm()


def delta_norm(sample: Characterization, statistics: Statistics) -> Tensor:
    """``(Σ_t ‖δ_t‖²)^½``: the gradient's norm without the activation's."""
    return torch.linalg.vector_norm(sample.gradient.delta.flatten(1), dim=1)


def gradient_cosine(sample: Characterization, statistics: Statistics) -> Tensor:
    """``1 - cos(∇_W L, mean inlier gradient)``, after GradCon (Kwon et al., ECCV 2020); in [0, 2]."""
    return 1 - sample.gradient.cosine(_kept(statistics.mean_gradient))


def diagonal_fisher(sample: Characterization, statistics: Statistics) -> Tensor:
    """``(Σ_oi g_oi² / F_oi)^½``: every weight's change in units of what inliers ask of it.

    F is the diagonal of the empirical Fisher matrix, as in Kirkpatrick et al., PNAS 2017.
    """
    return sample.gradient.quadratic(_kept(statistics.inverse_fisher)).clamp_min(0).sqrt()


def kronecker_fisher(sample: Characterization, statistics: Statistics) -> Tensor:
    """``(gᵀ F⁻¹ g)^½`` with ``F ≈ D ⊗ A``: for one position ``((aᵀ A⁻¹ a)(δᵀ D⁻¹ δ))^½``.

    The factored Fisher matrix of Martens and Grosse, ICML 2015.
    """
    inverses = _kept(statistics.activation_inverse), _kept(statistics.delta_inverse)
    square = sample.gradient.quadratic_kron(*inverses)
    return square.clamp_min(0).sqrt()


def whitened_delta_norm(sample: Characterization, statistics: Statistics) -> Tensor:
    """``(Σ_t δ_tᵀ D⁻¹ δ_t)^½``, the delta's part of the Kronecker Fisher norm: a Mahalanobis distance from zero."""
    delta = sample.gradient.delta
    return ((delta @ _kept(statistics.delta_inverse)) * delta).flatten(1).sum(1).clamp_min(0).sqrt()


def log_norm_density(sample: Characterization, statistics: Statistics) -> Tensor:
    """``Σ_l z_l² / 2``: minus the log density, constants aside, of normals fitted to every layer's log gradient norm.

    z standardises with the inliers' mean and standard deviation. Source: Dauncey et al., "Approximations to the Fisher
    information metric of deep generative models for out-of-distribution detection", 2024. Gradients that are too small
    count as novel too.
    """
    return _standardise(_log_gradient_norms(sample), _kept(statistics.gradient_moments)).square().sum(1) / 2


def combined_delta_norm(sample: Characterization, statistics: Statistics) -> Tensor:
    """``Σ_l z(log ‖δ_l‖)``: the evidence of all chosen layers, each on the scale of the inliers."""
    return _standardise(_log_delta_norms(sample), _kept(statistics.delta_moments)).sum(1)


def combined_whitened_norm(sample: Characterization, statistics: Statistics) -> Tensor:
    """``z(log whitened ‖δ_1‖) + Σ_(l>1) z(log ‖δ_l‖)``: as `combined_delta_norm`, the first layer's delta whitened.

    Whitening a hidden layer's delta weighs up directions that inliers leave alone. The output's delta is the residual
    of every pixel, of which it would weigh up those that are always blank.
    """
    whitened = _standardise(_log(whitened_delta_norm(sample, statistics)), _kept(statistics.whitened_moments))
    return whitened + _standardise(_log_delta_norms(sample), _kept(statistics.delta_moments))[:, 1:].sum(1)


def reconstruction_error(sample: Characterization, statistics: Statistics) -> Tensor:
    """The summed binary cross entropy (Fig. 2a); nats."""
    return sample.reconstruction.sum(1)


def latent_loss(sample: Characterization, statistics: Statistics) -> Tensor:
    """The summed Kullback-Leibler divergence (Fig. 2b); nats."""
    return sample.latent.sum(1)


SCORES: dict[str, Callable[[Characterization, Statistics], Tensor]] = {
    score.__name__: score
    for score in (
        *(gradient_norm, delta_norm, gradient_cosine, diagonal_fisher, kronecker_fisher, whitened_delta_norm),
        *(log_norm_density, combined_delta_norm, combined_whitened_norm),
        *(reconstruction_error, latent_loss),
    )
}
# The fields of `Statistics` that each score reads.
NEEDS: dict[str, tuple[str, ...]] = dict.fromkeys(SCORES, ()) | {
    "gradient_cosine": ("mean_gradient",),
    "diagonal_fisher": ("inverse_fisher",),
    "kronecker_fisher": ("activation_inverse", "delta_inverse"),
    "whitened_delta_norm": ("delta_inverse",),
    "log_norm_density": ("gradient_moments",),
    "combined_delta_norm": ("delta_moments",),
    "combined_whitened_norm": ("delta_inverse", "delta_moments", "whitened_moments"),
}


def _kept(statistic: Tensor | None) -> Tensor:
    if statistic is None:
        raise ValueError(
            "statistics: expected those that the score needs, but one is None; make them by Statistics.of(inliers, "
            "[name of the score])"
        )
    return statistic


def _log_gradient_norms(sample: Characterization) -> Tensor:
    return _log(torch.stack([gradient.norm() for gradient in sample.gradients.values()], dim=1))


def _log_delta_norms(sample: Characterization) -> Tensor:
    deltas = (gradient.delta.flatten(1) for gradient in sample.gradients.values())
    return _log(torch.stack([torch.linalg.vector_norm(delta, dim=1) for delta in deltas], dim=1))


def _log(norms: Tensor) -> Tensor:
    """Logarithms, with the smallest normal number in place of zero."""
    return norms.clamp_min(torch.finfo(norms.dtype).tiny).log()


def _moments(values: Tensor) -> Tensor:
    """Mean and standard deviation over the samples, [N, K] -> [K, 2]; the deviation at least the type's epsilon."""
    spread = values.std(0, correction=0).clamp_min(torch.finfo(values.dtype).eps)
    return torch.stack([values.mean(0), spread], dim=1)


def _standardise(values: Tensor, moments: Tensor) -> Tensor:
    return (values - moments[..., 0]) / moments[..., 1]


def _ridge(moments: Tensor) -> Tensor:
    """`RIDGE` times the mean; positive for gradients that are all zero, which have no scale of their own."""
    return (RIDGE * moments.mean()).clamp_min(torch.finfo(torch.float32).tiny)


def _ridge_inverse(matrix: Tensor) -> Tensor:
    wide = matrix.double()
    wide = wide + torch.diag(_ridge(wide.diagonal()).expand(len(wide)))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    return inverse.to(matrix.dtype).contiguous()  # the order in memory decides how products round, and is not saved
