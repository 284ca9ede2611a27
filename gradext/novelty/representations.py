"""The paper's three representations of samples by a trained autoencoder, in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..factors import GradFactors, LayerFactors
from ..layer_grads import batch_layer_factors
from ..selection import LayerChoice, select
from .models import latent_loss, rotation_loss, turns_made


@dataclass(frozen=True, eq=False)
class Characterization:
    """The representations of N samples; indexing selects samples.

    reconstruction: [N, D], the binary cross entropy of every pixel, nats, or its squared error; latent: [N, L], the
    Kullback-Leibler divergence to N(0, 1) of every latent dimension, nats (L = 0: no VAE); gradients: the factors of
    the per-sample gradient of the summed reconstruction error with respect to the weights of the chosen layers, by
    name, in the order of the choice.
    """

    reconstruction: Tensor
    latent: Tensor
    gradients: LayerFactors

    @property
    def gradient(self) -> GradFactors:
        """The gradient that scores of one layer use: that of the layer that was chosen first."""
        return next(iter(self.gradients.values()))

    @property
    def nbytes(self) -> int:
        return self.reconstruction.nbytes + self.latent.nbytes + sum(g.nbytes for g in self.gradients.values())

    def __len__(self) -> int:
        return len(self.reconstruction)

    def __getitem__(self, index: Any) -> Characterization:
        gradients = LayerFactors((name, factors[index]) for name, factors in self.gradients.items())
        return Characterization(self.reconstruction[index], self.latent[index], gradients)

    @staticmethod
    def cat(parts: list[Characterization]) -> Characterization:
        return Characterization(
            torch.cat([part.reconstruction for part in parts]),
            torch.cat([part.latent for part in parts]),
            LayerFactors.cat([part.gradients for part in parts]),
        )


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy of every element, ``-[t log p + (1 - t) log(1 - p)]`` -> [B, D]; nats.

    Linear in t, and so defined for the paper's noise-distorted images too, whose values leave [0, 1] and which
    `F.binary_cross_entropy` refuses. Logarithms are clamped at -100 as there.
    """
    target = target.reshape(output.shape)
    # If a sigmoid is saturated, the gradient is zero instead of NaN.
    p, q = output > 0, output < 1
    log_p = torch.where(p, torch.where(p, output, 1).log(), -100).clamp_min(-100)
    log_q = torch.where(q, torch.log1p(-torch.where(q, output, 0)), -100).clamp_min(-100)
    return -torch.lerp(log_q, log_p, target)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """``(output - target)²`` of every element -> [B, D]."""
    return (output - target.reshape(output.shape)).square()


def continued_bce(output: Tensor | tuple, target: Tensor) -> Tensor:
    """`reconstruction_loss` of a model's output, summed over each sample's elements -> [B]; nats."""
    output = output if isinstance(output, Tensor) else output[0]
    return reconstruction_loss(output, target).flatten(1).sum(1)


TURNED = 16  # images whose views are in memory together: more of them leave the cache
LayerChoices = LayerChoice | list[LayerChoice] | tuple[LayerChoice, ...]
RECONSTRUCTION_LOSSES = {"bce": reconstruction_loss, "mse": squared_error}
# By the name of a detector's loss: of `RotationNet` the turns' cross entropy stands for the reconstruction error.
ERRORS = RECONSTRUCTION_LOSSES | {"rotation": lambda output, target: rotation_loss(output)}


def parts_of(output: Tensor | tuple) -> tuple[Tensor, Tensor]:
    """(reconstruction [B, ...], latent loss [B, L]) of an output ``(reconstruction, mu, logvar)``; L = 0 of others."""
    if isinstance(output, Tensor):
        return output, output.new_zeros(len(output), 0)
    reconstruction, *rest = output
    if len(rest) == 2 and all(isinstance(v, Tensor) for v in rest) and rest[0].shape == rest[1].shape:
        return reconstruction, latent_loss(*rest).flatten(1)
    return reconstruction, reconstruction.new_zeros(len(reconstruction), 0)


def characterize(
    model: nn.Module,
    x: Tensor,
    *,
    layer: LayerChoices = "first",
    loss: str = "bce",
    batch_size: int = 1024,
) -> Characterization:
    """The three representations of ``x`` [N, ...] under a model that returns ``(reconstruction, mu, logvar)``.

    A model without a latent distribution returns the reconstruction alone. ``loss``: of `RECONSTRUCTION_LOSSES`.

    ``layer`` chooses as in `layer_names`, and ``("first", "last")`` both of these: the paper takes the first layer of
    the decoder for novel classes, the last for novel conditions. The model runs in evaluation mode and
    is left as it was; results are on its device. Memory O(N (D + L + O + I)): no gradient is written. Raises ValueError
    for an empty ``x``.

    >>> from gradext.novelty import VAE
    >>> seen = characterize(VAE(64, 32, 4), torch.rand(5, 64))
    >>> seen.reconstruction.shape, seen.latent.shape, seen.gradient
    (torch.Size([5, 64]), torch.Size([5, 4]), GradFactors(B=5, O=32, I=4, T=1, dtype=torch.float32, device=cpu))
    """
    if len(x) == 0:
        raise ValueError("x: expected at least one sample, but got none")
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    parts = []
    try:
        names = layer_names(model, x[:1].to(device), layer, loss)
        for batch in x.split(batch_size):
            batch = batch.to(device)
            if loss == "rotation" and names == ["head.weight"]:
                parts += [_of_turns(model, few) for few in batch.split(TURNED)]
                continue
            gradients = in_order(factors_of(model, batch, loss, names), names)
            with torch.no_grad():
                reconstruction, latent = parts_of(model(batch))
                pixels = ERRORS[loss](reconstruction, batch).flatten(1)
            parts.append(Characterization(pixels, latent, gradients))
    finally:
        for module, training in modes:
            module.training = training
    return Characterization.cat(parts)


@torch.no_grad()
def _of_turns(model: Any, x: Tensor) -> Characterization:
    """Of a `RotationNet` and its last layer, by one forward: δ is softmax minus the turn that was made, by view."""
    features = model.features(x)
    logits = model.head(features)
    gradient = GradFactors(features, logits.softmax(2) - turns_made(logits))
    return Characterization(rotation_loss(logits), features[:, 0, :0], LayerFactors({"head.weight": gradient}))


def factors_of(model: nn.Module, batch: Tensor, loss: str, layers: LayerChoice) -> LayerFactors:
    """The gradients of the reconstruction error called ``loss``.

    A loss by name has a closed form, which is exact where a sigmoid saturates, but only for targets in [0, 1]. Samples
    outside are computed separately, so that no sample's gradient depends on the other samples.
    """
    if loss == "rotation":
        return batch_layer_factors(model, batch, loss=_summed_turns, layers=layers)
    rows = ((batch >= 0) & (batch <= 1)).flatten(1).all(1) if loss == "bce" else None
    if rows is None or rows.all():
        return batch_layer_factors(model, batch, loss=loss, layers=layers)
    if not rows.any():
        return batch_layer_factors(model, batch, loss=continued_bce, layers=layers)
    parts = [
        batch_layer_factors(model, batch[rows], loss=loss, layers=layers),
        batch_layer_factors(model, batch[~rows], loss=continued_bce, layers=layers),
    ]
    order = torch.cat([rows.nonzero(), (~rows).nonzero()]).flatten().argsort()
    return LayerFactors((name, factors[order]) for name, factors in LayerFactors.cat(parts).items())


def _summed_turns(output: Tensor, target: Tensor) -> Tensor:
    return rotation_loss(output).sum(1)


def layer_names(model: nn.Module, x: Tensor, layer: LayerChoices, loss: str) -> list[str]:
    """The weights' names in the order of the choice, found by running the model on samples ``x``.

    A choice is ``"first"`` or ``"last"`` of the decoder's weight matrices (of the model's, where it has no decoder) in
    order of execution, None for all of these, ``"all"`` for those of the whole model, or anything that
    `gradext.batch_layer_grads` takes for ``layers=``, of which the weight matrices count. Raises ValueError where
    there are none.
    """
    named = {"bce": continued_bce, "rotation": _summed_turns}.get(loss, loss)
    names: dict[str, None] = {}
    choices: Iterable[LayerChoice] = layer if isinstance(layer, (list, tuple)) else [layer]
    for choice in choices:
        wanted: LayerChoice = choice
        if choice is None or (isinstance(choice, str) and choice in ("first", "last")):
            wanted = "decoder" if isinstance(getattr(model, "decoder", None), nn.Module) else None
        elif isinstance(choice, str) and choice == "all":
            wanted = None
        weights = [name for name, p in select(model, wanted).chosen.items() if p.ndim >= 2]
        if not weights:
            raise ValueError(f"layer: expected layers with weight matrices, but {choice!r} has none")
        factors = batch_layer_factors(model, x, loss=named, layers=weights)
        used = [name for name in factors if factors.coverage.rules[name] != "unused"] or list(factors)
        names |= dict.fromkeys(used[:1] if choice == "first" else used[-1:] if choice == "last" else used)
    return list(names)


def with_constant(gradient: GradFactors) -> GradFactors:
    """The factors of a layer's weight and bias together: the activations [B, (T,) I] with a 1 after them."""
    activation = gradient.activation
    return product(gradient, torch.cat([activation, torch.ones_like(activation[..., :1])], dim=-1), gradient.delta)


def product(like: GradFactors, activation: Tensor, delta: Tensor) -> GradFactors:
    """Gradients of these two factors, in the operators of ``like``: ONNX knows torch's own alone."""
    return (
        type(like)(activation, delta) if getattr(like, "in_torchs_operators", False) else GradFactors(activation, delta)
    )


def in_order(factors: LayerFactors, layers: list[str]) -> LayerFactors:
    """The same in the order of the weights' names."""
    return LayerFactors((name, factors[name]) for name in layers)


def distort(x: Tensor, *, std: float = 0.1, clip: bool = False, seed: int = 0) -> Tensor:
    """The paper's training outliers: ``x + N(0, std²)`` from a seeded generator, clipped to [0, 1] if asked."""
    if not std > 0:
        raise ValueError(f"std: expected a positive number, but got {std!r}")
    generator = torch.Generator().manual_seed(seed)
    noisy = x + std * torch.randn(x.shape, generator=generator, dtype=x.dtype, device="cpu").to(x.device)
    return noisy.clamp(0, 1) if clip else noisy
