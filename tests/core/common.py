"""What the core's tests share: sizes, small models, a loss, gradients by plain autograd, and their comparison."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

B, T, D, V = 4, 3, 6, 11  # samples, positions, features, vocabulary


class Net(nn.Module):
    """Members by name (plain tensors become buffers), and a forward over them."""

    def __init__(self, forward, **members):
        super().__init__()
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)
        self._run = forward

    def forward(self, *args, **kwargs):
        return self._run(self, *args, **kwargs)


class Product(torch.autograd.Function):
    """``x @ weight`` as a custom function, which no torch function mode sees."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.flatten(0, -2).t() @ grad.flatten(0, -2)


class LinearFunction(torch.autograd.Function):
    """``x @ weight.t()`` for x [B, I] as a custom function."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


def linear(into: int = D, out: int = D, **options) -> nn.Linear:
    return nn.Linear(into, out, **options)


def x_of(*shape: int) -> Tensor:
    return torch.randn(*(shape or (B, D)))


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, V, shape or (B, T))


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def squared(output: Tensor, target: Tensor | None = None) -> Tensor:
    return output.square().flatten(1).sum(1)


def own_gradients(model: nn.Module, losses: Tensor) -> dict[str, Tensor]:
    """∂ losses[b] / ∂ parameter by B backwards of plain torch."""
    named = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(loss, list(named.values()), retain_graph=True, materialize_grads=True) for loss in losses
    ]
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(named)}


def assert_right(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance=1e-9, largest=None) -> None:
    """No parameter's largest error is above ``tolerance`` times its largest gradient."""
    largest = largest_of(expected) if largest is None else largest
    for name, value in found.items():
        want = expected[name]
        assert value.shape == want.shape, name
        if want.numel():
            error, scale = (value - want).abs().max().item(), want.abs().max().item()
            assert error <= tolerance * scale + 1e-12 * largest, f"{name}: error {error:.2e} at a scale of {scale:.2e}"


def largest_of(tensors: Mapping[str, Tensor]) -> float:
    return max((value.abs().max().item() for value in tensors.values() if value.numel()), default=0.0)


def in_threads(*functions: Callable[[], None]) -> None:
    """Run each in a thread of its own; raises the first exception of any."""
    problems: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if problems:
        raise problems[0]
