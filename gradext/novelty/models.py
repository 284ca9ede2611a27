"""Models for novelty detection.

The forward of a model returns ``(reconstruction, mu, logvar)``, its ``loss(x)`` the training objective [B], and it has
a ``decoder`` whose layers `gradext.batch_layer_grads` finds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import bce_logits

WIDE_INPUT = 196  # elements from which on an `Autoencoder` is made for images


class Autoencoder(nn.Module):
    """A plain autoencoder as a multilayer perceptron, D-H-L-H-D with ReLU; the code and the reconstruction are linear.

    forward: x [B, D] or image-shaped [B, ...] with D elements a sample -> reconstruction [B, D]. hidden_dim, latent_dim
    None: 128 and half of D, at most 20; from 196 elements on, 256 and 32. Trained by the squared error on values about
    zero: the divergence of a VAE prevents learning the columns of a small table, and a sigmoid hides values outside.

    >>> import torch
    >>> Autoencoder(input_dim=64)(torch.randn(5, 1, 8, 8)).shape
    torch.Size([5, 64])
    """

    def __init__(self, input_dim: int, hidden_dim: int | None = None, latent_dim: int | None = None) -> None:
        super().__init__()
        wide = input_dim >= WIDE_INPUT
        hidden = (256 if wide else 128) if hidden_dim is None else hidden_dim
        latent = (32 if wide else max(1, min(20, input_dim // 2))) if latent_dim is None else latent_dim
        for name, value in (("input_dim", input_dim), ("hidden_dim", hidden), ("latent_dim", latent)):
            if value < 1:
                raise ValueError(f"{name}: expected a positive integer, but got {value!r}")
        self.input_dim = input_dim
        self.encoder = nn.Sequential(nn.Linear(input_dim, hidden), nn.ReLU(), nn.Linear(hidden, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, input_dim))

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction [B, D]."""
        x = x.flatten(1)
        if x.shape[1] != self.input_dim:
            raise ValueError(f"x: expected {self.input_dim} elements a sample, but got {x.shape[1]}")
        return self.decoder(self.encoder(x))

    @property
    def sizes(self) -> dict[str, int]:
        """What makes one of the same architecture."""
        encoder: Any = self.encoder
        first, last = encoder[0], encoder[2]
        return {"input_dim": self.input_dim, "hidden_dim": first.out_features, "latent_dim": last.out_features}


class VAE(nn.Module):
    """The variational autoencoder of Kingma and Welling (2014) as a multilayer perceptron, D-H-L-H-D with ReLU.

    ``q(z|x) = N(mu, exp(logvar))``, ``p(x|z)`` Bernoulli with the decoder's sigmoid outputs as its means. In training
    mode z is drawn, in evaluation mode ``z = mu``, so that scores are deterministic.

    forward: x [B, D] or image-shaped [B, ...] with D elements a sample -> (reconstruction [B, D], mu [B, L],
    logvar [B, L]).

    >>> import torch
    >>> reconstruction, mu, logvar = VAE(input_dim=64, hidden_dim=32, latent_dim=4)(torch.rand(5, 1, 8, 8))
    >>> reconstruction.shape, mu.shape
    (torch.Size([5, 64]), torch.Size([5, 4]))
    """

    def __init__(self, input_dim: int = 784, hidden_dim: int = 400, latent_dim: int = 20) -> None:
        super().__init__()
        for name, value in (("input_dim", input_dim), ("hidden_dim", hidden_dim), ("latent_dim", latent_dim)):
            if value < 1:
                raise ValueError(f"{name}: expected a positive integer, but got {value!r}")
        self.input_dim = input_dim
        self.sample_shape: tuple[int, ...] = (input_dim,)
        self.encoder = nn.Sequential(nn.Linear(input_dim, hidden_dim), nn.ReLU())
        self.mu = nn.Linear(hidden_dim, latent_dim)
        self.logvar = nn.Linear(hidden_dim, latent_dim)
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, input_dim), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction [B, D], mu [B, L], logvar [B, L])."""
        z, mu, logvar = self._encode(x)
        return self.decoder(z), mu, logvar

    @property
    def sizes(self) -> dict[str, int]:
        """What makes one of the same architecture."""
        return {"input_dim": self.input_dim, "hidden_dim": self.mu.in_features, "latent_dim": self.mu.out_features}

    def loss(self, x: Tensor) -> Tensor:
        """The training objective, ``BCE(x, reconstruction) + KL``, each summed over its elements -> [B]; nats.

        The paper's equation (2), from the logits of the reconstruction: stable, and several times as fast.
        """
        z, mu, logvar = self._encode(x)
        logits = self.decoder[:-1](z)
        return bce_logits(logits, x.flatten(1)) + latent_loss(mu, logvar).sum(1)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.flatten(1)
        if x.shape[1] != self.input_dim:
            raise ValueError(f"x: expected {self.input_dim} elements a sample, but got {x.shape[1]}")
        hidden = self.encoder(x.reshape(-1, *self.sample_shape))
        mu, logvar = self.mu(hidden), self.logvar(hidden)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar) if self.training else mu
        return z, mu, logvar


class ConvVAE(VAE):
    """A `VAE` of images [C, H, W]: two convolutions with stride 2, two transposed ones, LeakyReLU between.

    H and W: multiples of 4; the first layer of the decoder is linear, the last a transposed convolution. Inputs and
    outputs are those of `VAE`, reconstruction [B, C·H·W].

    >>> import torch
    >>> reconstruction, mu, logvar = ConvVAE((1, 8, 8), channels=4, latent_dim=2)(torch.rand(5, 64))
    >>> reconstruction.shape, mu.shape
    (torch.Size([5, 64]), torch.Size([5, 2]))
    """

    def __init__(self, image_shape: Sequence[int] = (1, 28, 28), channels: int = 16, latent_dim: int = 20) -> None:
        nn.Module.__init__(self)
        C, H, W = image_shape
        if min(C, H, W, channels, latent_dim) < 1 or H % 4 or W % 4:
            raise ValueError(
                f"image_shape, channels, latent_dim: expected [C, H, W] with multiples of 4 as H and W, and positive "
                f"numbers, but got {tuple(image_shape)}, {channels}, {latent_dim}"
            )
        self.input_dim, self.sample_shape = C * H * W, (C, H, W)
        small = (2 * channels, H // 4, W // 4)
        self.encoder = nn.Sequential(
            nn.Conv2d(C, channels, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 2 * channels, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(),
        )  # fmt: skip
        self.mu = nn.Linear(math.prod(small), latent_dim)
        self.logvar = nn.Linear(math.prod(small), latent_dim)
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, math.prod(small)), nn.LeakyReLU(0.2), nn.Unflatten(1, small),
            nn.ConvTranspose2d(2 * channels, channels, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(channels, C, 4, 2, 1), nn.Flatten(), nn.Sigmoid(),
        )  # fmt: skip

    @property
    def sizes(self) -> dict[str, Any]:
        """What makes one of the same architecture."""
        channels = self.encoder[0].out_channels
        return {"image_shape": list(self.sample_shape), "channels": channels, "latent_dim": self.mu.out_features}


class RotationNet(nn.Module):
    """A small residual network that is trained to predict by how many quarter turns an image was rotated.

    Its prediction is worse for novel images, which lack the features that it has learned from normal ones. The rotation
    is known when scoring too, so that each sample has a loss with a gradient: of the last layer, over all rotations.
    Source: Golan and El-Yaniv, "Deep anomaly detection using geometric transformations", NeurIPS 2018.

    forward: images [B, C, H, W] in [0, 1], H = W a multiple of 4 -> logits [B, V, 4], of the views by the turns that
    were made: view v is the image, mirrored where v is 4 and more, turned v mod 4 times; V = 8. In training there are
    four views of each image, which is mirrored or not and shifted by up to an eighth of its side, at random. Where
    the processor multiplies in bfloat16, training does.

    >>> import torch
    >>> RotationNet((3, 8, 8), channels=4).eval()(torch.rand(5, 3, 8, 8)).shape
    torch.Size([5, 8, 4])
    """

    def __init__(self, image_shape: Sequence[int] = (3, 32, 32), channels: int = 16) -> None:
        super().__init__()
        C, H, W = image_shape
        if min(C, H, W, channels) < 1 or H != W or H % 4:
            raise ValueError(
                f"image_shape, channels: expected [C, H, W] with H = W, a multiple of 4, and positive numbers, but got "
                f"{tuple(image_shape)}, {channels}; --size HxW and --pad bring images to a square"
            )
        self.input_dim, self.sample_shape = C * H * W, (C, H, W)

        def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
            )

        self.body = nn.Sequential(
            convolution(C, channels), convolution(channels, 2 * channels, 2), _Residual(2 * channels),
            convolution(2 * channels, 4 * channels, 2), _Residual(4 * channels), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(4 * channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, V, turn told]."""
        return self.head(self.features(x))

    def features(self, x: Tensor, *, mirrored: bool = True) -> Tensor:
        """What the last layer sees of every view, [B, V, 4 · channels]; without those that are mirrored V = 4."""
        x = 4 * (x.reshape(-1, *self.sample_shape) - 0.5)
        views = [view for face in ([x, x.flip(3)] if mirrored else [x]) for view in _turns(face)]
        flat = torch.stack(views, dim=1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return self.body(flat).reshape(-1, len(views), self.head.in_features)

    def loss(self, x: Tensor) -> Tensor:
        """The training objective, the mean cross entropy of four views -> [B]; nats."""
        x = x.reshape(-1, *self.sample_shape)
        if self.training:
            x = _shifted(torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x), x.shape[-1] // 8)
        return rotation_loss(self._quick(x)).mean(1)

    @torch.no_grad()
    def accuracy(self, x: Tensor) -> float:
        """The share of the views, four of each image, whose turn is told."""
        logits = self._quick(x)
        return float((logits.argmax(2) == turns_made(logits).argmax(1)).float().mean())

    def _quick(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=x.device.type == "cpu" and _has_bfloat16()):
            return self.head(self.features(x, mirrored=False)).to(x.dtype)

    @property
    def sizes(self) -> dict[str, Any]:
        """What makes one of the same architecture."""
        body: Any = self.body
        return {"image_shape": list(self.sample_shape), "channels": body[0][0].out_channels}


def _turns(x: Tensor) -> list[Tensor]:
    """[B, C, H, W] turned by no, one, two and three quarters, as `torch.rot90` does."""
    across = x.transpose(2, 3)
    return [x, across.flip(2), x.flip((2, 3)), across.flip(3)]


def _shifted(x: Tensor, most: int) -> Tensor:
    """Each of [B, C, H, W] by its own number of pixels up to ``most``, down or up and left or right; edges mirrored."""
    B, _, H, W = x.shape
    padded = nn.functional.pad(x, (most,) * 4, mode="reflect")
    down, right = (
        torch.randint(2 * most + 1, (B, 1), device=x.device) + torch.arange(n, device=x.device) for n in (H, W)
    )
    rows = torch.arange(B, device=x.device)[:, None, None]
    return padded[rows, :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)


def _has_bfloat16() -> bool:
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm_a, self.norm_b = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm_a(self.a(x)))
        return torch.relu(x + self.norm_b(self.b(inner)))


def turns_made(logits: Tensor) -> Tensor:
    """Of logits [B, V, 4] the turns that were made, as rows of a unit matrix: [V, 4]."""
    return torch.eye(4, dtype=logits.dtype, device=logits.device).repeat(logits.shape[1] // 4, 1)


def rotation_loss(logits: Tensor) -> Tensor:
    """``-log softmax(logits)[b, v, v mod 4]``: the cross entropy of every view, [B, V, 4] -> [B, V]; nats."""
    return -(logits.log_softmax(2) * turns_made(logits)).sum(2)


def latent_loss(mu: Tensor, logvar: Tensor) -> Tensor:
    """``KL(N(mu, e^logvar) ‖ N(0, 1)) = (mu² + e^logvar - 1 - logvar) / 2`` of every latent dimension -> [B, L]."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)
