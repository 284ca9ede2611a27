"""Ready models for novelty detection.

A model's forward gives ``(reconstruction, mu, logvar)``, its ``loss(x)`` the training objective [B], and it has a
``decoder`` whose layers `gradext.batch_layer_grads` finds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..losses import bce_logits


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
        hidden = self.encoder(x)
        mu, logvar = self.mu(hidden), self.logvar(hidden)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar) if self.training else mu
        return z, mu, logvar


def latent_loss(mu: Tensor, logvar: Tensor) -> Tensor:
    """``KL(N(mu, e^logvar) ‖ N(0, 1)) = (mu² + e^logvar - 1 - logvar) / 2`` of every latent dimension -> [B, L]."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)
