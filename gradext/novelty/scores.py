"""Label-free scores: one function each, from a `Characterization` to a novelty [N]; higher is more novel.

Scores of one layer use the layer that was chosen first, combinations use all chosen layers. Statistics come from
inliers, best from held-out ones: the errors of training samples are too small.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..factors import GradFactors
from ..statistics import GradStatistics
from .passes import Blocks
from .representations import Characterization, product, with_constant

RIDGE = 0.1  # times the mean, added to every second moment: a few thousand samples leave most directions unknown
BASIS = 256  # directions of a delta that are whitened one by one; all others are scaled by one number
WRITTEN = 1024  # second moments of deltas up to this length are computed; of longer ones, some rows are kept
KEPT_NUMBERS, KEPT_ROWS = 1 << 23, 2048  # of them at most, over all inliers
NEIGHBOURS = 2048  # inliers that `local_gradient` compares with, at most
WHOLE = 4096  # numbers of a gradient up to which `gradient_mahalanobis` takes all their correlations
NEAREST, LOCAL = 5, 20  # which neighbour's distance counts of gradients; of how many the activations' density is


@dataclass(frozen=True, eq=False)
class Statistics:
    """The statistics of inliers that scores use, all tensors; None if no requested score needs it.

    Of the layer that was chosen first: mean_gradient [O, I]; inverse_fisher [O, I], one over the diagonal of the
    empirical Fisher matrix; activation_inverse [I, I], the inverse of its Kronecker factor ``Σ a aᵀ / (N T)``. Of that
    layer, and for `combined_whitened_norm` of all further ones but the last: delta_inverses [O, O], those of
    ``Σ δ δᵀ / N``. `RIDGE` times their mean (diagonal) is added before all inversions.
    activation_whitener [I + 1, I + 1], the transposed inverse Cholesky factor of the activations with a constant 1, the
    input of a bias; delta_basis [O, K], the K leading eigenvectors of ``Σ δ δᵀ / N``, and delta_gains [K + 1], one over
    the roots of their eigenvalues and of the mean of all others.
    gradient_whitener [O I, O I], the transposed inverse Cholesky factor of the gradients' covariance.
    neighbour_activation [M, (T,) I] and neighbour_delta [M, (T,) O], in single precision, of up to `NEIGHBOURS`
    inliers; neighbour_reach [M] and neighbour_density [M], the distance of each one's activation to its 20th neighbour
    and its local density; local_moments [2, 2] of the two logarithms that `local_gradient` adds up.

    Mean and standard deviation of logarithms: gradient_moments [layers, 2] and delta_moments [layers, 2] of every
    chosen layer's gradient norm and delta norm, whitened_moments [len(delta_inverses), 2] of whitened delta norms;
    joint_moments [layers + 2, 2] of gradient norms, reconstruction error and latent loss, joint_inverse the inverse of
    their correlation matrix. evidence_moments [3, 2]: mean and standard deviation of `joint_density` and both losses.
    """

    mean_gradient: Tensor | None = None
    inverse_fisher: Tensor | None = None
    activation_inverse: Tensor | None = None
    delta_inverses: tuple[Tensor, ...] = ()
    gradient_moments: Tensor | None = None
    delta_moments: Tensor | None = None
    whitened_moments: Tensor | None = None
    joint_moments: Tensor | None = None
    joint_inverse: Tensor | None = None
    evidence_moments: Tensor | None = None
    activation_whitener: Tensor | None = None
    delta_basis: Tensor | None = None
    delta_gains: Tensor | None = None
    gradient_whitener: Tensor | None = None
    neighbour_activation: Tensor | None = None
    neighbour_delta: Tensor | None = None
    neighbour_reach: Tensor | None = None
    neighbour_density: Tensor | None = None
    local_moments: Tensor | None = None

    @staticmethod
    def of(inliers: Characterization | Blocks[Characterization], scores: Iterable[str] | None = None) -> Statistics:
        """The statistics that the named scores need; None: those that any score needs.

        At most two passes over blocks; memory O(I² + O² + OI), with O the length of what stands for the delta (see
        `delta_norm`), and a number for every inlier and layer.
        """
        needed = {field for name in (NEEDS if scores is None else scores) for field in NEEDS[name]}
        if isinstance(inliers, Blocks):
            blocks = inliers
        else:
            blocks = Blocks(lambda _: inliers, 1, like=inliers.reconstruction[:0])
        kept = _second_moments(blocks, needed)
        if "delta_basis" in needed:
            kept |= _whiteners(blocks)
        if "neighbour_delta" in needed:
            kept |= _neighbours(blocks)
        if "gradient_whitener" in needed and (scores is not None or kept["mean_gradient"].numel() <= WHOLE):
            kept["gradient_whitener"] = _whole_whitener(blocks, kept["mean_gradient"])
        return Statistics(**kept).with_moments_of_numbers(blocks, needed)

    def with_moments_of_numbers(self, blocks: Blocks[Characterization], needed: Container[str]) -> Statistics:
        """The fields that are computed from a few numbers of each inlier."""
        joint = "joint_moments" in needed
        numbers: dict[str, Callable[[Characterization], Tensor]] = {}
        if joint or "gradient_moments" in needed:
            numbers["gradient"] = _log_gradient_norms
        if "delta_moments" in needed:
            numbers["delta"] = _log_delta_norms
        if "whitened_moments" in needed:
            numbers["whitened"] = lambda seen: _log_whitened_norms(seen, self)
        if joint:
            numbers["losses"] = _losses
        if not numbers:
            return self
        table = blocks.concatenate(lambda seen: torch.cat([function(seen) for function in numbers.values()], dim=1))
        # The table is that of all processes: one without a block of its own learns the number of layers from it.
        known = {"whitened": len(self.delta_inverses), "losses": 2}
        layers = table.shape[1] - sum(known[name] for name in numbers if name in known)
        layers //= max(1, sum(name not in known for name in numbers))
        columns = dict(zip(numbers, table.split([known.get(name, layers) for name in numbers], dim=1), strict=True))
        kept: dict[str, Any] = {}
        for name in ("gradient", "delta", "whitened"):
            if f"{name}_moments" in needed:
                kept[f"{name}_moments"] = _moments(columns[name].contiguous())
        if joint:
            logs = torch.cat([columns["gradient"], _log(columns["losses"])], dim=1)
            kept["joint_moments"] = _moments(logs)
            z = _standardise(logs, kept["joint_moments"])
            kept["joint_inverse"] = _ridge_inverse(z.mT @ z / len(z)).to(z.dtype)
            if "evidence_moments" in needed:
                density = _half_square(z, kept["joint_inverse"])
                kept["evidence_moments"] = _moments(torch.cat([density[:, None], columns["losses"]], dim=1))
        return replace(self, **{name: value.to(blocks.like).contiguous() for name, value in kept.items()})

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are not None, by name; ``delta_inverses`` by name and place."""
        kept = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "delta_inverses"}
        kept |= {f"delta_inverses.{k}": inverse for k, inverse in enumerate(self.delta_inverses)}
        return {name: value for name, value in kept.items() if value is not None}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> Statistics:
        """The inverse of `tensors`."""
        places = sorted((name for name in tensors if "." in name), key=lambda name: int(name.split(".")[1]))
        rest = {name: value for name, value in tensors.items() if name not in places}
        return Statistics(**rest, delta_inverses=tuple(tensors[name] for name in places))


def _second_moments(blocks: Blocks[Characterization], needed: Container[str]) -> dict[str, Any]:
    """The fields that are sums over inliers of their gradients, or of products of them."""
    kinds = {
        "mean": "mean_gradient" in needed,
        "diag_fisher": "inverse_fisher" in needed,
        "kron_fisher": "delta_inverses" in needed,
    }
    if not any(kinds.values()):
        return {}

    def sums_of(seen: Characterization) -> tuple[GradStatistics, GradStatistics]:
        others = list(seen.gradients.items())[1:-1] if "whitened_moments" in needed else []
        found = GradStatistics(mean=False, diag_fisher=False, kron_fisher=True)
        if others:  # of their deltas alone
            found.partial_fit({name: GradFactors(torch.ones_like(g.delta[..., :1]), g.delta) for name, g in others})
        return GradStatistics(**kinds).partial_fit({"": seen.gradient}), found

    def merged(left: tuple, right: tuple) -> tuple[GradStatistics, GradStatistics]:
        return left[0].merge(right[0]), left[1].merge(right[1])

    sums, others = blocks.total(sums_of, merged)

    def plain(value: Tensor) -> Tensor:
        # Rounding of products depends on the order in memory, which is not saved.
        return value.to(blocks.like).contiguous()

    kept: dict[str, Any] = {}
    if kinds["mean"]:
        kept["mean_gradient"] = plain(sums.mean[""])
    if kinds["diag_fisher"]:
        fisher = sums.diag_fisher[""]
        kept["inverse_fisher"] = plain(1 / (fisher + _ridge(fisher)))
    if kinds["kron_fisher"]:
        of_activation, of_delta = sums.kron_fisher[""]
        kept["activation_inverse"] = plain(_ridge_inverse(of_activation))
        deltas = [of_delta, *(D for _, D in others.kron_fisher.values())] if others.count else [of_delta]
        kept["delta_inverses"] = tuple(plain(_ridge_inverse(D)) for D in deltas)
    return kept


def _whiteners(blocks: Blocks[Characterization]) -> dict[str, Tensor]:
    """The fields of `whitened_gradient`."""
    rows_a_block = max(1, -(-KEPT_ROWS // blocks.count))

    def sums_of(seen: Characterization) -> GradStatistics:
        factors = with_constant(seen.gradient)
        factors = factors[_is_finite(factors.delta) & _is_finite(factors.activation)]
        if factors.delta.shape[-1] > WRITTEN:  # of the activations alone
            factors = GradFactors(factors.activation, torch.ones_like(factors.delta[..., :1]))
        return GradStatistics(mean=False, diag_fisher=False, kron_fisher=True).partial_fit({"": factors})

    of_activation, of_delta = blocks.total(sums_of, lambda left, right: left.merge(right)).kron_fisher[""]
    if len(of_delta) == 1:  # the delta may be as long as that, or longer than `WRITTEN`
        rows = blocks.concatenate(lambda seen: _rows_of(seen, rows_a_block)).double()
        basis, variances, rest = _leading_directions(rows)
    else:
        variances, vectors = torch.linalg.eigh(of_delta)
        variances, vectors = variances.flip(0).clamp_min(0), vectors.flip(1)
        basis, rest = (
            vectors[:, :BASIS],
            variances[BASIS:].mean() if len(variances) > BASIS else variances.new_zeros(()),
        )
        variances = variances[:BASIS]
    O, K = basis.shape
    mean = (variances.sum() + rest * (O - K)) / O
    ridge = (RIDGE * mean).clamp_min(torch.finfo(torch.float32).tiny)
    gains = (torch.cat([variances, rest.reshape(1)]) + ridge).rsqrt()
    found = {"activation_whitener": whitener(of_activation), "delta_basis": basis, "delta_gains": gains}
    return {name: value.to(blocks.like).contiguous() for name, value in found.items()}


def _is_finite(factor: Tensor) -> Tensor:
    """Which samples have squares that do not overflow, [N]: one that does would hide all directions of the others."""
    return factor.square().flatten(1).sum(1).isfinite()


def _rows_of(seen: Characterization, rows: int) -> Tensor:
    delta = seen.gradient.delta
    delta = delta[_is_finite(delta)].flatten(0, -2)
    return delta[:: max(1, len(delta) // rows)][: max(1, min(rows, KEPT_NUMBERS // delta.shape[1]))]


def _leading_directions(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For rows [n, O]: eigenvectors of their second moments [O, K], the eigenvalues [K], the mean of all others."""
    n, O = rows.shape
    values, vectors = torch.linalg.eigh(rows @ rows.mT / n)
    values, vectors = values.flip(0), vectors.flip(1)
    K = min(BASIS, int((values > 1e-10 * values[0]).sum()), O)
    K = max(K, 1)
    basis = rows.mT @ vectors[:, :K] / (n * values[:K].clamp_min(torch.finfo(values.dtype).tiny)).sqrt()
    rest = (values[K:].clamp_min(0).sum() / max(1, O - K)).clamp_min(0)
    return basis, values[:K].clamp_min(0), rest


def _neighbours(blocks: Blocks[Characterization]) -> dict[str, Tensor]:
    """The fields of `local_gradient`; of the inliers themselves each is left out among its own neighbours."""
    rows = max(1, -(-NEIGHBOURS // blocks.count))

    def some(seen: Characterization, factor: str) -> Tensor:
        usable = _is_finite(seen.gradient.delta) & _is_finite(seen.gradient.activation)
        return getattr(seen.gradient, factor)[usable][:: max(1, int(usable.sum()) // rows)][:rows].float()

    activation = blocks.concatenate(lambda seen: some(seen, "activation"))
    delta = blocks.concatenate(lambda seen: some(seen, "delta"))
    own = GradFactors(activation.double(), delta.double())
    of_activations, of_gradients = _distances(own, own)
    for distances in (of_activations, of_gradients):
        if len(distances) > 1:
            distances.fill_diagonal_(torch.inf)
    least = torch.finfo(torch.float32).tiny
    near = of_activations.topk(min(LOCAL, max(1, len(delta) - 1)), dim=1, largest=False)
    reach = near.values[:, -1]
    density = 1 / torch.maximum(near.values, reach[near.indices]).mean(1).clamp_min(least)
    logs = _local_logs(of_activations, of_gradients, reach, density)
    return {
        "neighbour_activation": activation.to(blocks.like.device),
        "neighbour_delta": delta.to(blocks.like.device),
    } | {
        name: value.to(blocks.like)
        for name, value in (
            ("neighbour_reach", reach),
            ("neighbour_density", density),
            ("local_moments", _moments(logs)),
        )
    }


def _whole_whitener(blocks: Blocks[Characterization], mean: Tensor) -> Tensor:
    if mean.numel() > WHOLE:
        raise ValueError(
            f"score 'gradient_mahalanobis': expected a layer of at most {WHOLE} weights, but got {list(mean.shape)}; "
            "choose another layer= or kronecker_fisher"
        )

    def sums_of(seen: Characterization) -> tuple[Tensor, int]:
        centred = (seen.gradient.materialize() - mean).flatten(1).double()
        centred = centred[centred.square().sum(1).isfinite()]
        return centred.mT @ centred, len(centred)

    square, count = blocks.total(sums_of, lambda left, right: (left[0] + right[0], left[1] + right[1]))
    return whitener(square / max(1, count)).to(blocks.like).contiguous()


def _distances(sample: GradFactors, others: GradFactors) -> tuple[Tensor, Tensor]:
    """Between the activations of each two, and between their gradients, [N, M]."""
    a, b = sample.activation.flatten(1), others.activation.flatten(1)
    of_activations = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * (a @ b.mT)
    of_gradients = sample.sq_norm()[:, None] + others.sq_norm() - 2 * sample.gram(others)
    return of_activations.clamp_min(0).sqrt(), of_gradients.clamp_min(0).sqrt()


def _local_logs(of_activations: Tensor, of_gradients: Tensor, reach: Tensor, density: Tensor) -> Tensor:
    """Of each sample the logarithms of the gradient's distance and of the activation's local outlier factor, [N, 2]."""
    most = len(reach) - 1 or 1
    distance = of_gradients.topk(min(NEAREST, most), dim=1, largest=False).values[:, -1]
    near = of_activations.topk(min(LOCAL, most), dim=1, largest=False)
    factor = torch.maximum(near.values, reach[near.indices]).mean(1) * density[near.indices].mean(1)
    return _log(torch.stack([distance, factor], dim=1))


def gradient_norm(sample: Characterization, statistics: Statistics) -> Tensor:
    """``‖∇_W L‖``, how far the sample would move the weights (the paper's Fig. 2c)."""
    return sample.gradient.norm()


def delta_norm(sample: Characterization, statistics: Statistics) -> Tensor:
    """``(Σ_t ‖δ_t‖²)^½``: the gradient's norm without the activation's.

    In this score and those built on it, a gradient that is stored itself (`GradFactors.of`: those of most convolutions)
    is used as its own delta.
    """
    return torch.linalg.vector_norm(sample.gradient.delta.flatten(1), dim=1)


def gradient_cosine(sample: Characterization, statistics: Statistics) -> Tensor:
    """``1 - cos(∇_W L, mean inlier gradient)``, after GradCon (Kwon et al., ECCV 2020); in [0, 2]."""
    return 1 - sample.gradient.cosine(_kept(statistics.mean_gradient))


def diagonal_fisher(sample: Characterization, statistics: Statistics) -> Tensor:
    """``(Σ_oi g_oi² / F_oi)^½``: the change of every weight in units of its changes for inliers.

    F is the diagonal of the empirical Fisher matrix, as in Kirkpatrick et al., PNAS 2017.
    """
    return sample.gradient.quadratic(_kept(statistics.inverse_fisher)).clamp_min(0).sqrt()


def kronecker_fisher(sample: Characterization, statistics: Statistics) -> Tensor:
    """``(gᵀ F⁻¹ g)^½`` with ``F ≈ D ⊗ A``: for one position ``((aᵀ A⁻¹ a)(δᵀ D⁻¹ δ))^½``.

    The factored Fisher matrix of Martens and Grosse, ICML 2015.
    """
    square = sample.gradient.quadratic_kron(_kept(statistics.activation_inverse), statistics.delta_inverses[0])
    return square.clamp_min(0).sqrt()


def whitened_delta_norm(sample: Characterization, statistics: Statistics) -> Tensor:
    """``(Σ_t δ_tᵀ D⁻¹ δ_t)^½``, the delta's part of the Kronecker Fisher norm: a Mahalanobis distance from zero."""
    return _whitened_norm(sample.gradient.delta, statistics.delta_inverses[0])


def gradient_mahalanobis(sample: Characterization, statistics: Statistics) -> Tensor:
    """``((g - m)ᵀ C⁻¹ (g - m))^½``: the Mahalanobis distance of the whole gradient from the inliers' mean.

    C is their covariance with all correlations, for small layers: the last one of a `RotationNet`.
    """
    centred = sample.gradient.materialize() - _kept(statistics.mean_gradient)
    return torch.linalg.vector_norm(centred.flatten(1) @ _kept(statistics.gradient_whitener), dim=1)


def whitened_gradient(sample: Characterization, statistics: Statistics) -> Tensor:
    """``(‖δ̃‖ ‖δ̃ ãᵀ‖)^½``: the geometric mean of the whitened delta's norm and the whitened gradient's.

    δ̃ = L_D⁻¹ δ and ã = L_A⁻¹ (a, 1) have the inliers' unit second moments, so that ``‖δ̃ ãᵀ‖`` is the Kronecker Fisher
    norm of weight and bias together: how far the sample would move the layer, in units of its changes for inliers. For
    one position the score is ``‖δ̃‖ ‖ã‖^½``: the Mahalanobis distance of the residual, times the root of the
    activation's, which separates less.
    """
    whitener, basis, gains = (
        _kept(value) for value in (statistics.activation_whitener, statistics.delta_basis, statistics.delta_gains)
    )
    gradient = with_constant(sample.gradient)
    own, others = gains[:-1], gains[-1]
    within = gradient.delta @ basis
    delta = within * own
    if basis.shape[0] > basis.shape[1]:
        delta = others * gradient.delta + (within * (own - others)) @ basis.mT
    activation = gradient.activation @ whitener
    of_delta = delta.square().flatten(1).sum(1)
    whole = of_delta * activation.square().sum(1) if delta.ndim == 2 else product(gradient, activation, delta).sq_norm()
    least = torch.finfo(delta.dtype).tiny  # the root's derivative is infinite at zero
    return (of_delta.clamp_min(least).sqrt() * whole.clamp_min(least).sqrt()).sqrt()


def local_gradient(sample: Characterization, statistics: Statistics) -> Tensor:
    """``z(log ‖g - g_5‖) + z(log LOF(a))``: how far off the sample's gradient is, and how thinly its surroundings lie.

    g_5 is the fifth nearest of the inliers' gradients, by the factored Gram matrix: none is written. LOF is the local
    outlier factor of the layer's input among theirs (Breunig et al., SIGMOD 2000; 20 neighbours), which for the first
    layer of an encoder is the sample itself. Made for images, on the first layer of an `Autoencoder`'s encoder.
    """
    kept = (statistics.neighbour_activation, statistics.neighbour_delta)
    activation, delta = (_kept(value).to(sample.gradient.dtype) for value in kept)
    distances = _distances(sample.gradient, product(sample.gradient, activation, delta))
    logs = _local_logs(*distances, _kept(statistics.neighbour_reach), _kept(statistics.neighbour_density))
    return _standardise(logs, _kept(statistics.local_moments)).sum(1)


def log_norm_density(sample: Characterization, statistics: Statistics) -> Tensor:
    """``Σ_l z_l² / 2``: minus the log density, constants aside, of normals fitted to every layer's log gradient norm.

    z standardises by the inliers' mean and standard deviation. Source: Dauncey et al., "Approximations to the Fisher
    information metric of deep generative models for out-of-distribution detection", 2024. Gradients that are too small
    count as novel too.
    """
    return _standardise(_log_gradient_norms(sample), _kept(statistics.gradient_moments)).square().sum(1) / 2


def combined_delta_norm(sample: Characterization, statistics: Statistics) -> Tensor:
    """``Σ_l z(log ‖δ_l‖)``: the evidence of all chosen layers, each on the scale of the inliers."""
    return _standardise(_log_delta_norms(sample), _kept(statistics.delta_moments)).sum(1)


def combined_whitened_norm(sample: Characterization, statistics: Statistics) -> Tensor:
    """``Σ_(l<L) z(log whitened ‖δ_l‖) + z(log ‖δ_L‖)``: as `combined_delta_norm`, all but the last one whitened.

    Choose the output layer last. Whitening the delta of a hidden layer gives weight to directions in which inliers do
    not vary; the delta of the output is the residual of every pixel, and whitening would give weight to pixels that are
    always blank. For a single layer, which is whitened, it is z of the `whitened_delta_norm`.
    """
    whitened = _standardise(_log_whitened_norms(sample, statistics), _kept(statistics.whitened_moments))
    last = _standardise(_log_delta_norms(sample), _kept(statistics.delta_moments))[:, len(statistics.delta_inverses) :]
    return whitened.sum(1) + last.sum(1)


def joint_density(sample: Characterization, statistics: Statistics) -> Tensor:
    """``zᵀ C⁻¹ z / 2``, z of every layer's log gradient norm and of the logs of both losses, C their correlations.

    Minus the log density, up to constants, of one normal fitted to all of them, where `log_norm_density` fits one each:
    a sample is also novel if its gradients are smaller than its losses suggest.
    """
    z = _standardise(_log_norms_and_losses(sample), _kept(statistics.joint_moments))
    return _half_square(z, _kept(statistics.joint_inverse))


def combined_evidence(sample: Characterization, statistics: Statistics) -> Tensor:
    """``z(joint density) + z(reconstruction error) + z(latent loss)``: evidence of losses and gradients.

    The losses are large for samples that the model reconstructs worse than inliers, the `joint_density` for samples
    that differ from them in either direction.
    """
    found = torch.cat([joint_density(sample, statistics)[:, None], _losses(sample)], dim=1)
    return _standardise(found, _kept(statistics.evidence_moments)).sum(1)


def reconstruction_error(sample: Characterization, statistics: Statistics) -> Tensor:
    """The summed binary cross entropy (Fig. 2a); nats."""
    return sample.reconstruction.sum(1)


def latent_loss(sample: Characterization, statistics: Statistics) -> Tensor:
    """The summed Kullback-Leibler divergence (Fig. 2b); nats."""
    return sample.latent.sum(1)


SCORES: dict[str, Callable[[Characterization, Statistics], Tensor]] = {
    score.__name__: score
    for score in (
        *(whitened_gradient, gradient_norm, delta_norm, gradient_cosine, diagonal_fisher, kronecker_fisher),
        *(whitened_delta_norm, gradient_mahalanobis, local_gradient),
        *(log_norm_density, combined_delta_norm, combined_whitened_norm, joint_density, combined_evidence),
        *(reconstruction_error, latent_loss),
    )
}
JOINT = ("joint_moments", "joint_inverse")
# The fields of `Statistics` that each score reads.
NEEDS: dict[str, tuple[str, ...]] = dict.fromkeys(SCORES, ()) | {
    "whitened_gradient": ("activation_whitener", "delta_basis", "delta_gains"),
    "local_gradient": (
        "neighbour_activation",
        "neighbour_delta",
        "neighbour_reach",
        "neighbour_density",
        "local_moments",
    ),
    "gradient_cosine": ("mean_gradient",),
    "gradient_mahalanobis": ("mean_gradient", "gradient_whitener"),
    "diagonal_fisher": ("inverse_fisher",),
    "kronecker_fisher": ("activation_inverse", "delta_inverses"),
    "whitened_delta_norm": ("delta_inverses",),
    "log_norm_density": ("gradient_moments",),
    "combined_delta_norm": ("delta_moments",),
    "combined_whitened_norm": ("delta_inverses", "delta_moments", "whitened_moments"),
    "joint_density": JOINT,
    "combined_evidence": (*JOINT, "evidence_moments"),
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


def _losses(sample: Characterization) -> Tensor:
    return torch.stack([sample.reconstruction.sum(1), sample.latent.sum(1)], dim=1)


def _log_norms_and_losses(sample: Characterization) -> Tensor:
    return torch.cat([_log_gradient_norms(sample), _log(_losses(sample))], dim=1)


def _half_square(z: Tensor, inverse: Tensor) -> Tensor:
    return ((z @ inverse) * z).sum(1) / 2


def _log_whitened_norms(sample: Characterization, statistics: Statistics) -> Tensor:
    gradients = list(sample.gradients.values())[: len(statistics.delta_inverses)]
    pairs = zip(gradients, statistics.delta_inverses, strict=True)
    return _log(torch.stack([_whitened_norm(gradient.delta, inverse) for gradient, inverse in pairs], dim=1))


def _whitened_norm(delta: Tensor, inverse: Tensor) -> Tensor:
    return ((delta @ inverse) * delta).flatten(1).sum(1).clamp_min(0).sqrt()


def _log(norms: Tensor) -> Tensor:
    """Logarithms, of the smallest normal number for zero."""
    return norms.clamp_min(torch.finfo(norms.dtype).tiny).log()


def _moments(values: Tensor) -> Tensor:
    """Mean and standard deviation over the samples, [N, K] -> [K, 2]; the deviation at least the type's epsilon."""
    wide = values.double()
    # Relative to the first sample, so that the mean of equal numbers is exact: their spread of zero allows no rounding.
    mean = wide[0] + (wide - wide[0]).mean(0)
    spread = wide.std(0, correction=0).clamp_min(torch.finfo(values.dtype).eps)
    return torch.stack([mean, spread], dim=1).to(values.dtype)


def _standardise(values: Tensor, moments: Tensor) -> Tensor:
    return (values - moments[..., 0]) / moments[..., 1]


def _ridge(moments: Tensor) -> Tensor:
    """`RIDGE` times the mean; a positive constant if all gradients are zero, which have no scale."""
    return (RIDGE * moments.mean()).clamp_min(torch.finfo(torch.float32).tiny)


def _ridge_inverse(matrix: Tensor) -> Tensor:
    return torch.cholesky_inverse(_damped_cholesky(matrix))


def whitener(matrix: Tensor) -> Tensor:
    """``L⁻ᵀ`` of the Cholesky factor of a matrix of second moments with its ridge: rows v become white as ``v L⁻ᵀ``."""
    factor = _damped_cholesky(matrix)
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor), device="cpu").to(factor), upper=False)
    return inverse.T.to(matrix.dtype).contiguous()


def _damped_cholesky(matrix: Tensor) -> Tensor:
    wide = matrix.double()
    return torch.linalg.cholesky(wide + torch.diag(_ridge(wide.diagonal()).expand(len(wide))))
