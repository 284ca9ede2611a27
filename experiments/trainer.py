"""Every sample's gradient norm in transformers' Trainer, and samples kept or dropped by it.

    python -m experiments.trainer

A callback sees neither the inputs nor the losses, so this is a Trainer: a class to put before any subclass of it. The
norms are those of the very backward that trains. With ``keep`` they come before it, by one partial backward more, and
the samples that are not kept have weight 0 in the loss. Accumulation, autocast, checkpointing without reentrance and
the optimizer are the Trainer's own.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainingArguments

import gradext

from .counting import gpt2, rows


def next_token_losses(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A causal language model's summed cross entropy and number of tokens, of each sample -> [B], [B]."""
    losses = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none")
    return losses.sum(1), (labels[:, 1:] != -100).sum(1)


class SampleTrainer(Trainer):
    """Writes the gradient norms of every training batch, and drops the samples that ``keep`` refuses.

    Args:
        losses: (outputs, labels) -> each sample's own loss [B] and what it counts in the batch's mean [B].
        keep: norms [B] -> whether each sample trains, a mask [B]. None: all do.
        norms_file: JSON lines ``{"step", "norms", "kept"}``, one a batch, with "samples" where the data set has a
            column "sample" (and ``remove_unused_columns=False``).
    """

    def __init__(
        self,
        *args: Any,
        losses: Callable[[Any, Tensor], tuple[Tensor, Tensor]] = next_token_losses,
        keep: Callable[[Tensor], Tensor] | None = None,
        norms_file: str | Path,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._losses, self._keep, self._file = losses, keep, Path(norms_file)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        samples = inputs.pop("sample", None)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._norms is None:
            self._norms = self._watch.factors(self._batch).norm()
        row = {"step": self.state.global_step, "norms": self._norms.tolist(), "kept": self._kept.tolist()}
        with self._file.open("a") as file:
            file.write(json.dumps(row | ({} if samples is None else {"samples": list(map(int, samples))})) + "\n")
        del self._watch, self._batch, self._norms, self._kept
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        with gradext.watch(self.accelerator.unwrap_model(model), train=True) as self._watch:
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            self._batch, counts = self._losses(outputs, labels)
        self._norms, self._kept = None, torch.ones_like(counts, dtype=torch.bool)
        if self._keep is not None:
            self._norms = self._watch.factors(self._batch).norm()
            self._kept = self._keep(self._norms)
        shared = num_items_in_batch is not None and self.model_accepts_loss_kwargs  # with the step's other batches
        return torch.where(self._kept, self._batch, 0).sum() / (num_items_in_batch if shared else counts.sum())


def main() -> None:
    torch.manual_seed(0)
    data = [{"input_ids": row, "labels": row, "sample": k} for k, row in enumerate(rows(64))]
    options = {"remove_unused_columns": False, "report_to": [], "disable_tqdm": True, "learning_rate": 3e-3}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, max_steps=150, per_device_train_batch_size=16, **options)
        norms, keep = Path(folder) / "norms.jsonl", lambda norms: norms <= 4 * norms.median()
        SampleTrainer(gpt2(), arguments, train_dataset=data, norms_file=norms, keep=keep).train()
        last = [json.loads(line) for line in norms.read_text().splitlines()[-40:]]
    dropped = [k % 8 == 0 for row in last for k, kept in zip(row["samples"], row["kept"], strict=True) if not kept]
    print(f"of {len(dropped)} samples dropped in the last 40 steps, {sum(dropped)} are noise")


if __name__ == "__main__":
    main()
