"""Statistics of per-sample gradients over a data set of any size, gathered batch by batch and by several workers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .factors import GradFactors, LayerFactors
from .factors.products import add_matrices

_KINDS = ("mean", "diag_fisher", "kron_fisher")


class GradStatistics:
    """Means and Fisher matrices of the gradients of each layer, from their factors, in fp64.

    >>> import torch, gradext
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.Tanh(), torch.nn.Linear(3, 6))
    >>> statistics = gradext.GradStatistics(kron_fisher=True)
    >>> for batch in torch.rand(100, 6).split(30):
    ...     _ = statistics.partial_fit(gradext.batch_layer_factors(model, batch))
    >>> weights = statistics.mean["0.weight"], *statistics.kron_fisher["2.weight"]
    >>> statistics.count, *(tuple(matrix.shape) for matrix in weights)
    (100, (3, 6), (3, 3), (6, 6))

    mean: the mean gradient (OI numbers a layer); diag_fisher: the mean of its squares, ``(1/N) Σ G²`` (OI);
    kron_fisher: the Kronecker factors A and D of `GradFactors.kron_fisher` (I² + O²). How the data are cut into batches
    and the order of merging change results by rounding only.
    """

    def __init__(self, *, mean: bool = True, diag_fisher: bool = True, kron_fisher: bool = False) -> None:
        self._kinds = tuple(k for k, wanted in zip(_KINDS, (mean, diag_fisher, kron_fisher), strict=True) if wanted)
        if not self._kinds:
            raise ValueError(f"expected at least one of {', '.join(_KINDS)} to be gathered, but all are False")
        self.count = 0
        self._sums: dict[str, dict[str, tuple[Tensor, ...]]] = {}

    def partial_fit(self, factors: LayerFactors | Mapping[str, GradFactors]) -> GradStatistics:
        """Add the gradients of one more batch; returns itself. Raises ValueError for other layers than before."""
        sizes = {len(f) for f in factors.values()}
        if len(sizes) != 1:
            raise ValueError(f"factors: expected the same samples in every layer, but got {sorted(sizes)} samples")
        if self._sums and set(factors) != set(self._sums):
            raise ValueError(f"factors: expected the layers {sorted(self._sums)}, but got {sorted(factors)}")
        (batch,) = sizes
        if batch:
            self._add(batch, {name: self._of_batch(f.detach()) for name, f in factors.items()})
        return self

    def merge(self, other: GradStatistics) -> GradStatistics:
        """Add the sums of another `GradStatistics`, of other samples; returns itself."""
        if other._kinds != self._kinds:
            raise ValueError(f"other: expected one that gathers {self._kinds}, but got {other._kinds}")
        if self._sums and other._sums and set(other._sums) != set(self._sums):
            raise ValueError(f"other: expected the layers {sorted(self._sums)}, but got {sorted(other._sums)}")
        if other.count:
            self._add(other.count, other._sums)
        return self

    def _of_batch(self, factors: GradFactors) -> dict[str, tuple[Tensor, ...]]:
        factors, batch = factors.to(torch.float64), len(factors)
        found = {
            "mean": lambda: (factors.sum(),),
            "diag_fisher": lambda: (factors.diag_fisher() * batch,),
            "kron_fisher": lambda: tuple(matrix * batch for matrix in factors.kron_fisher()),
        }
        return {kind: found[kind]() for kind in self._kinds}

    def _add(self, count: int, sums: Mapping[str, Mapping[str, tuple[Tensor, ...]]]) -> None:
        # All sums are made before any is stored: an error or Ctrl-C leaves the statistics unchanged.
        added = {
            name: {
                kind: tuple(
                    new.clone() if not self._sums else add_matrices(old, new.to(old.device))
                    for old, new in zip(self._sums[name][kind] if self._sums else parts, parts, strict=True)
                )
                for kind, parts in kinds.items()
            }
            for name, kinds in sums.items()
        }
        self._sums, self.count = added, self.count + count

    @property
    def mean(self) -> dict[str, Tensor]:
        """``(1/N) Σ G`` by layer, in the parameter's shape."""
        return {name: parts[0] for name, parts in self._means("mean").items()}

    @property
    def diag_fisher(self) -> dict[str, Tensor]:
        """``(1/N) Σ G²`` elementwise by layer, in the parameter's shape."""
        return {name: parts[0] for name, parts in self._means("diag_fisher").items()}

    @property
    def kron_fisher(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(A [I, I], D [O, O]) by layer; an embedding's D is diagonal and given as its diagonal [O]."""
        return {name: (A, D) for name, (A, D) in self._means("kron_fisher").items()}

    def _means(self, kind: str) -> dict[str, tuple[Tensor, ...]]:
        if kind not in self._kinds:
            raise ValueError(f"{kind}: not gathered; make GradStatistics({kind}=True) before partial_fit")
        if not self.count:
            raise ValueError(f"{kind}: expected at least one sample, but partial_fit has seen none")
        return {name: tuple(part / self.count for part in kinds[kind]) for name, kinds in self._sums.items()}

    def kron_inverses(self, damping: float = 1e-3) -> dict[str, tuple[Tensor, Tensor]]:
        """``(A + √λ ā I)⁻¹`` and ``(D + √λ d̄ I)⁻¹`` by layer, as `GradFactors.quadratic_kron` takes them.

        λ = ``damping``; ā and d̄ are the means of the eigenvalues, so that each factor is damped in proportion to its
        own scale. Source: the factored Tikhonov damping of Martens and Grosse, ICML 2015, section 6.3.
        """
        if not damping > 0:
            raise ValueError(f"damping: expected a positive number, but got {damping!r}")
        found = {}
        for name, matrices in self.kron_fisher.items():
            inverses = []
            for matrix in matrices:
                diagonal = matrix if matrix.ndim == 1 else matrix.diagonal()
                scale = diagonal.mean().clamp_min(torch.finfo(matrix.dtype).tiny)
                if matrix.ndim == 1:
                    inverses.append(1 / (matrix + damping**0.5 * scale))
                    continue
                eye = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
                inverses.append(torch.cholesky_inverse(torch.linalg.cholesky(matrix + damping**0.5 * scale * eye)))
            A_inv, D_inv = inverses
            found[name] = A_inv, D_inv
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Everything gathered as tensors by name, as safetensors and `torch.save` take them."""
        state = {"count": torch.tensor(self.count, device="cpu")}
        for name, kinds in self._sums.items():
            for kind, parts in kinds.items():
                state |= {f"{kind}.{k}.{name}": part for k, part in enumerate(parts)}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> GradStatistics:
        """Put back what `state_dict` gave, in place of what was gathered; returns itself."""
        sums: dict[str, dict[str, dict[int, Tensor]]] = {}
        for key, value in state.items():
            if key != "count":
                kind, place, name = key.split(".", 2)
                sums.setdefault(name, {}).setdefault(kind, {})[int(place)] = value.clone()
        for name, kinds in sums.items():
            if set(kinds) != set(self._kinds):
                raise ValueError(f"state: expected {self._kinds} for the layer {name!r}, but got {tuple(kinds)}")
        self._sums = {
            name: {kind: tuple(parts[k] for k in sorted(parts)) for kind, parts in kinds.items()}
            for name, kinds in sums.items()
        }
        self.count = int(state["count"])
        return self
