"""Training of the models: summed BCE + KL, Adam, the best validation epoch kept."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..layer_grads import batch_layer_factors
from .batches import rows_at_a_time
from .representations import LayerChoices, continued_bce, layer_names
from .writing import atomic_write, clear_leftovers


@dataclass
class History:
    """Mean loss of a sample by epoch, nats; ``best_epoch`` (from 0) is the one whose weights were kept."""

    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best_epoch: int = -1


@dataclass(frozen=True)
class Checkpoint:
    """A file with the state of a training, from which a stopped run resumes with the same result.

    run: identifies data, options and versions, everything that the result depends on; the file of another run raises.
    """

    path: Path
    run: str

    SECONDS: ClassVar[float] = 10.0  # between two writings

    def load(self) -> dict | None:
        """The state of the last `save` of this run; None: there is no file. ValueError: of another run, or damaged."""
        if not self.path.exists():
            return None
        try:
            kept = torch.load(self.path, weights_only=True, map_location="cpu")
        except Exception as error:  # of zipfile, pickle and torch
            raise ValueError(f"{self.path}: damaged; delete it to start anew ({error})") from error
        if not isinstance(kept, dict) or kept.get("run") != self.run:
            raise ValueError(
                f"{self.path}: left over from a training with other data, options or versions; delete it to start anew"
            )
        return kept

    def save(self, state: dict) -> None:
        with atomic_write(self.path) as file:
            torch.save({"run": self.run, **state}, file)

    def remove(self) -> None:
        """Delete the file, after the result is saved."""
        self.path.unlink(missing_ok=True)
        clear_leftovers(self.path)


def auto_epochs(samples: int, batch_size: int, *, steps: int = 2000, least: int = 50) -> int:
    """``least`` epochs, or more on small sets, for at least ``steps`` steps."""
    return max(least, math.ceil(steps / math.ceil(samples / batch_size)))


class ProgressLines:
    """If standard error is not a terminal, which shows a bar: a line at each tenth, with the time left.

    quiet: seconds before the first line, so that short work prints nothing.
    """

    def __init__(self, total: int, what: str, unit: str, *, shown: bool, begun: int = 0, quiet: float = 0.0) -> None:
        self.total, self.what, self.unit, self.begun, self.quiet = total, what, unit, begun, quiet
        self.shown, self.start, self.tenth = shown and not sys.stderr.isatty(), time.monotonic(), 0

    def at(self, done: int, state: str = "") -> None:
        """``done`` of the total are done."""
        tenth, passed = 10 * done // max(1, self.total), time.monotonic() - self.start
        if not self.shown or tenth <= self.tenth or passed < self.quiet:
            return
        self.tenth = tenth
        left = passed / max(1, done - self.begun) * (self.total - done)
        state = f", {state}" if state else ""
        print(f"{self.what}: {self.unit} {done} of {self.total}{state}, {left:.0f} s left", file=sys.stderr, flush=True)

    def end(self, state: str) -> None:
        """Print the last line."""
        if self.shown and self.tenth:
            print(f"{self.what}: {state}, {time.monotonic() - self.start:.0f} s", file=sys.stderr, flush=True)


class PlainAdam:
    """Adam (Kingma and Ba, ICLR 2015). The first use of one of torch's imports the compiler, over a second of CPU time.

    Only with the defaults, ``β = (0.9, 0.999), ε = 1e-8``, on plain tensors.
    """

    BETAS, EPSILON = (0.9, 0.999), 1e-8

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        self.parameters, self.lr, self.steps = parameters, lr, 0
        self.mean, self.square = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        first, second = self.BETAS
        rate, root = self.lr / (1 - first**self.steps), math.sqrt(1 - second**self.steps)
        for parameter, mean, square in zip(self.parameters, self.mean, self.square, strict=True):
            gradient = parameter.grad
            if gradient is None:
                continue
            mean.lerp_(gradient, 1 - first)
            square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            parameter.addcdiv_(mean, (square.sqrt() / root).add_(self.EPSILON), value=-rate)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for name in ("mean", "square"):
            for own, kept in zip(getattr(self, name), state[name], strict=True):
                own.copy_(kept)


class OneCycle:
    """Stochastic gradient descent with Nesterov's momentum 0.9, whose rate rises and falls once in ``steps`` steps.

    From ``lr / 25`` by a cosine to ``lr`` in the first third, then to nearly zero; weights decay by 5e-4. Source: Smith
    and Topin, "Super-convergence", 2019. What convolutions with batch normalisation are trained best by in few epochs.
    """

    MOMENTUM, DECAY, RISE, START = 0.9, 5e-4, 0.3, 1 / 25

    def __init__(self, parameters: list[nn.Parameter], lr: float, steps: int) -> None:
        self.parameters, self.lr, self.total, self.steps = parameters, lr, steps, 0
        self.momentum = [torch.zeros_like(p) for p in parameters]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @property
    def rate(self) -> float:
        """Of the next step."""
        peak = max(1.0, self.RISE * self.total)
        part = min(1.0, self.steps / peak) if self.steps < peak else 1 - (self.steps - peak) / max(1, self.total - peak)
        least = self.START if self.steps < peak else 0.0
        return self.lr * (least + (1 - least) * (1 - math.cos(math.pi * part)) / 2)

    @torch.no_grad()
    def step(self) -> None:
        rate = self.rate
        for parameter, momentum in zip(self.parameters, self.momentum, strict=True):
            if parameter.grad is None:
                continue
            gradient = parameter.grad.add(parameter, alpha=self.DECAY)
            momentum.mul_(self.MOMENTUM).add_(gradient)
            parameter.add_(gradient.add_(momentum, alpha=self.MOMENTUM), alpha=-rate)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "momentum": self.momentum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for own, kept in zip(self.momentum, state["momentum"], strict=True):
            own.copy_(kept)


class Samples(Protocol):
    """N samples, in memory or not: ``samples[index] -> [n, ...]`` for an index or a slice."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor | slice) -> Tensor: ...


def train(
    model: nn.Module,
    x: Tensor | Samples,
    x_validation: Tensor | Samples,
    *,
    epochs: int | None = None,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    loss: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    penalty: Callable[[nn.Module, Tensor], Tensor] | None = None,
    progress: bool = True,
    description: str = "training",
    checkpoint: Checkpoint | None = None,
    patience: int | None = None,
    one_cycle: bool = False,
) -> History:
    """Train ``model`` in place on ``x`` [N, ...] in [0, 1] and load the weights of the best validation epoch.

    Tensors are moved to the model's device once, other `Samples` batch by batch.
    Adam on the mean over the batch of ``loss(x) -> [B]`` (default ``model.loss``) plus ``penalty(model, batch)``, such
    as a `GradientAlignment`, which the history and the choice of the epoch leave out. ``epochs`` None: `auto_epochs`.
    ``patience``: end after so many epochs without a better validation loss; None: run all. ``one_cycle``: by `OneCycle`
    in place of Adam.
    The same seed, data, machine and thread count give the same weights, with a ``checkpoint`` even if the run was
    stopped and goes on; the file stays for its owner to remove. The global random state is left as it was. The bar is
    shown on terminals only. Raises ValueError for empty data, RuntimeError if the loss becomes NaN.
    """
    for name, data in (("x", x), ("x_validation", x_validation)):
        if len(data) == 0:
            raise ValueError(f"{name}: expected at least one sample, but got none")
    device = next(model.parameters()).device
    x, x_validation = (data.to(device) if isinstance(data, Tensor) else data for data in (x, x_validation))
    epochs = auto_epochs(len(x), batch_size) if epochs is None else epochs
    if epochs < 1:
        raise ValueError(f"epochs: expected a positive integer, but got {epochs!r}")
    if checkpoint is not None and penalty is not None:
        raise ValueError("checkpoint: expected None with a penalty, which has a state of its own")
    objective: Any = model.loss if loss is None else loss  # a model's own attributes are of any type
    rows = rows_at_a_time(x_validation[:1].numel())
    on_gpu = device.type != "cpu"
    make: Any = partial(torch.optim.Adam, fused=True) if on_gpu else PlainAdam
    if one_cycle:
        make = partial(OneCycle, steps=epochs * math.ceil(len(x) / batch_size))
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    order = torch.Generator().manual_seed(seed)
    history, best = History(), model.state_dict()
    was_training = model.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        kept = None if checkpoint is None else checkpoint.load()
        if kept is not None:
            model.load_state_dict(kept["model"])
            optimizer.load_state_dict(kept["optimizer"])
            history, best = History(**kept["history"]), {key: value.to(device) for key, value in kept["best"].items()}
            _set_random_states(kept["random"], order, device)
        saved, begun = time.monotonic(), len(history.train)
        bar = tqdm(
            range(begun, epochs), initial=begun, total=epochs, desc=description, unit="epoch", leave=False,
            disable=None if progress else True,
        )  # fmt: skip
        lines = ProgressLines(epochs, description, "epoch", shown=progress, begun=begun)
        for epoch in bar:
            if patience is not None and epoch - history.best_epoch > patience:
                break
            model.train()
            total = torch.zeros((), device=device)
            for index in torch.randperm(len(x), generator=order, device="cpu").split(batch_size):
                batch = x[index.to(device)].to(device)
                value = objective(batch).mean()
                penalised = value if penalty is None else value + penalty(model, batch)
                optimizer.zero_grad(set_to_none=True)
                penalised.backward()
                optimizer.step()
                total += value.detach() * len(index)
            model.eval()
            with torch.no_grad():
                starts = range(0, len(x_validation), rows)
                blocks = (x_validation[start : start + rows].to(device) for start in starts)
                validation = sum((objective(block).sum().item() for block in blocks), 0.0) / len(x_validation)
            history.train.append(total.item() / len(x))
            history.validation.append(validation)
            if not math.isfinite(validation):
                raise RuntimeError(f"the validation loss became {validation} in epoch {epoch}; lower learning_rate")
            if history.best_epoch < 0 or validation < history.validation[history.best_epoch]:
                history.best_epoch, best = epoch, {key: value.clone() for key, value in model.state_dict().items()}
            lines.at(epoch + 1, f"validation loss {validation:.4g}, best so far in epoch {history.best_epoch + 1}")
            bar.set_postfix(train=f"{history.train[-1]:.1f}", validation=f"{validation:.1f}")
            if checkpoint is not None and (epoch + 1 == epochs or time.monotonic() - saved > checkpoint.SECONDS):
                random = _random_states(order, device)
                checkpoint.save(
                    {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": asdict(history)}
                    | {"best": best, "random": random}
                )
                saved = time.monotonic()
    lines.end(f"{len(history.train)} epochs, the best was {history.best_epoch + 1}")
    optimizer.zero_grad(set_to_none=True)
    model.load_state_dict(best)
    model.train(was_training)
    return history


def _random_states(order: torch.Generator, device: torch.device) -> list[Tensor]:
    states = [order.get_state(), torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_states(states: list[Tensor], order: torch.Generator, device: torch.device) -> None:
    order.set_state(states[0])
    torch.set_rng_state(states[1])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[2], device)


class GradientAlignment:
    """GradCon's training penalty, ``-weight · mean_b mean_l cos(∇_l L_b, m_l)``; nats.

    It aligns the gradients of inliers, so that a gradient in another direction is novel (`gradient_cosine`).
    L_b is the reconstruction error of a sample, m_l the mean gradient of layer l over all batches so far. The cosines
    are those of every sample, as in scoring; GradCon takes that of the batch. They are computed from the factors and
    are differentiable, so that training writes no per-sample gradient. The first batch has no penalty.
    Source: Kwon, Prabhushankar, Temel, AlRegib, "Backpropagated gradient representations for anomaly detection", ECCV
    2020.
    """

    def __init__(self, weight: float = 10.0, layers: LayerChoices = None) -> None:
        self.weight, self.layers = weight, layers
        self._names: list[str] | None = None
        self.mean: dict[str, Tensor] = {}
        self.batches = 0

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        if self._names is None:
            self._names = layer_names(model, x[:1], self.layers, "bce")
        factors = batch_layer_factors(model, x, loss=continued_bce, layers=self._names, create_graph=True)
        value = x.new_zeros(())
        for name, gradient in factors.items():
            if name in self.mean:
                value = value - self.weight / len(factors) * gradient.cosine(self.mean[name]).mean()
            new = gradient.detach().mean()
            old = self.mean.get(name, torch.zeros_like(new))
            self.mean[name] = old + (new - old) / (self.batches + 1)
        self.batches += 1
        return value
