"""Private training of a GPT-2 as it comes from transformers: tied head, embeddings, position table and all.

    python -m experiments.private_gpt2

The step is that of `experiments.private_training`, which is Opacus'. Opacus itself wants the positions as an input, one
row a sample, and writes every parameter's gradient of every sample.
"""

from __future__ import annotations

import torch

from .counting import gpt2, losses, rows
from .private_training import private_step


def main() -> None:
    torch.manual_seed(0)
    train, test = rows(1024), rows(256)
    test = test[torch.arange(256) % 8 != 0]
    for noise_multiplier in 0.0, 0.5, 1.0:
        model = gpt2()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(6):
            for batch in train[torch.randperm(len(train))].split(64):
                private_step(
                    model,
                    optimizer,
                    lambda model=model, batch=batch: losses(model, batch),
                    max_norm=1.0,
                    noise_multiplier=noise_multiplier,
                )
        with torch.no_grad():
            print(f"noise multiplier {noise_multiplier}: loss {losses(model, test).mean():.2f} on rows that count")


if __name__ == "__main__":
    main()
