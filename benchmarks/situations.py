"""Ordinary and unusual situations in which a library is asked for per-sample gradients, for `benchmarks.conformance`.

A `Situation` makes everything anew: a model, its inputs, a loss. What is right is ∂ losses[b] / ∂ parameter of the run
itself, by one backward a sample. Knows no library.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

B, D = 4, 6
Part = Callable[[Any, int], Any]


def rows(tree: Any, b: int) -> Any:
    """Sample b of every tensor, as a batch of one."""
    return pytree.tree_map(lambda t: t[b : b + 1] if isinstance(t, Tensor) and t.ndim else t, tree)


@dataclass(frozen=True)
class Call:
    """The run of a model on its inputs: ``call(model)``; ``call[b]`` is that on one sample."""

    x: Any  # a tensor, a tuple of positional inputs, a dict of keywords
    part: Part = rows

    @property
    def arguments(self) -> tuple[tuple, dict]:
        if isinstance(self.x, Mapping):
            return (), dict(self.x)
        return (self.x if isinstance(self.x, tuple) else (self.x,)), {}

    def __call__(self, model: nn.Module) -> Any:
        positional, keywords = self.arguments
        return model(*positional, **keywords)

    def __getitem__(self, b: int) -> Call:
        return Call(self.part(self.x, b))


@dataclass(frozen=True)
class Loss:
    """Each sample's own loss of an output: ``loss(output)`` [B]; ``loss[b]`` is that of one sample, [1]."""

    function: Callable[[Any, Any], Tensor]
    target: Any
    part: Part = rows

    def __call__(self, output: Any) -> Tensor:
        return self.function(output, self.target)

    def __len__(self) -> int:
        return B

    def __getitem__(self, b: int) -> Loss:
        return Loss(self.function, self.part(self.target, b))


@dataclass(frozen=True)
class Situation:
    """``make()`` gives (model, [(call, loss), ...]); the last pair is judged, after the others were asked for."""

    kind: str
    make: Callable[[], tuple[nn.Module, list[tuple[Call, Loss]]]]
    tolerance: float = 1e-6
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    again: bool = False  # asked once more with other inputs before the result is judged: is it still the same?
    dtype: torch.dtype = torch.float64
    unavailable: str = ""


def expected(situation: Situation) -> dict[str, Tensor]:
    """Of the last pair, ∂ losses[b] / ∂ parameter by one backward a sample, {name: [B, *shape]}."""
    samples = []
    for b in range(B):
        model, pairs = situation.make()
        for call, loss in pairs:
            model.zero_grad()
            loss(call(model))[b].backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        samples.append({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()})
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


# --- building blocks --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers by name, and a forward over them: ``forward(self, *inputs)``."""

    def __init__(self, forward: Callable, **members: Any):
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self, *args, **kwargs)


def squared(output: Any, target: Any = None) -> Tensor:
    output = output if isinstance(output, Tensor) else output[0]
    weights = torch.linspace(0.5, 1.5, output[0].numel(), dtype=output.dtype)
    return (weights * (output.flatten(1) + 0.1).square()).sum(1)


def classes(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


def linear(i: int = D, o: int = D, **options: Any) -> nn.Linear:
    return nn.Linear(i, o, **options)


def table(rows: int = 11, columns: int = D) -> nn.Embedding:
    return nn.Embedding(rows, columns)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def perceptron(activation: nn.Module) -> nn.Module:
    return nn.Sequential(linear(D, 5), activation, linear(5, 4))


def reals(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(B, *shape)


def tokens(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 11, (B, *shape))


SITUATIONS: dict[str, Situation] = {}
# fmt: off


def add(kind: str, name: str, model: Callable[[], nn.Module], *inputs: Callable[[], Any], function: Callable = squared,
        target: Callable[[], Any] = lambda: torch.zeros(B), part: Part = rows, before: Callable | None = None,
        **options: Any) -> None:
    """A situation of a model, its inputs each by a function, and a loss.

    ``before(x, loss)`` gives another (x, loss) that is asked for first.
    """

    def make():
        torch.manual_seed(0)
        built = model()
        x = inputs[0]() if len(inputs) == 1 else tuple(value() for value in inputs)
        loss = Loss(function, target(), part)
        pairs = [(x, loss)] if before is None else [before(x, loss), (x, loss)]
        return built, [(Call(x, part), loss) for x, loss in pairs]

    SITUATIONS[name] = Situation(kind, make, **options)


# --- what every model does --------------------------------------------------------------------------------------------

PLAIN = "Ordinary models"
add(PLAIN, "`model.eval()`", lambda: perceptron(nn.ReLU()).eval(), reals(D))
add(PLAIN, "`model.train()`", lambda: perceptron(nn.ReLU()), reals(D))
add(PLAIN, "in-place ReLU after a Linear", lambda: perceptron(nn.ReLU(inplace=True)), reals(D))
add(PLAIN, "input `(B, T, D)`", lambda: perceptron(nn.Tanh()), reals(3, D))
add(PLAIN, "input `(B, T1, T2, D)`", lambda: perceptron(nn.Tanh()), reals(3, 2, D))
add(PLAIN, "layer input passed by keyword", lambda: Net(lambda m, x: m.a(input=x), a=linear()), reals(D))
add(PLAIN, "a model that takes a dict of inputs", lambda: Net(lambda m, f: m.a(f["x"]) * f["y"], a=linear()),
    lambda: {"f": {"x": torch.randn(B, D), "y": torch.rand(B, D)}})
add(PLAIN, "a loss of a tuple of outputs", lambda: Net(lambda m, x: (m.a(x), m.b(x)), a=linear(), b=linear()), reals(D),
    function=lambda o, t: squared(o[0]) + (o[1].exp() - o[1]).sum(1))
add(PLAIN, "`Conv2d` with groups", lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), reals(4, 5, 5))
add(PLAIN, "`ConvTranspose2d`", lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), reals(3, 4, 4))
add(PLAIN, "`MultiheadAttention`",
    lambda: Net(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(D, 2, batch_first=True)), reals(5, D))
add(PLAIN, "`LSTM`", lambda: Net(lambda m, x: m.a(x)[0], a=nn.LSTM(D, 5, batch_first=True)), reals(3, D))
add(
    PLAIN,
    "BatchNorm in eval mode",
    lambda: nn.Sequential(linear(D, 5), nn.BatchNorm1d(5), linear(5, 4)).eval(),
    reals(D),
)
add(PLAIN, "GroupNorm and LayerNorm", lambda: nn.Sequential(nn.Conv1d(4, 6, 1), nn.GroupNorm(2, 6), nn.LayerNorm(5)),
    reals(4, 5))
add(PLAIN, "RMSNorm written by hand",
    lambda: Net(lambda m, x: m.a(m.scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)), a=linear(),
                scale=parameter(D)), reals(3, D))
add(PLAIN, "a layer that does not run", lambda: Net(lambda m, x: m.a(x), a=linear(), spare=linear()), reals(D))
add(PLAIN, "a frozen base with adapters",
    lambda: Net(lambda m, x: m.base(x) + m.up(m.down(x)), base=linear().requires_grad_(False),
                down=linear(D, 2, bias=False), up=linear(2, D, bias=False)), reals(3, D))


def autocast() -> nn.Module:
    def forward(m, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.layers(x)

    return Net(forward, layers=perceptron(nn.ReLU()))


add(PLAIN, "bf16 autocast", autocast, reals(D), tolerance=3e-2, dtype=torch.float32)
add(PLAIN, "activations of 1e20, deltas of 1e-20",
    lambda: Net(lambda m, x: m.a(x * 1e20) * 1e-20, a=linear()), reals(D), tolerance=1e-4, dtype=torch.float32)

# --- parameters that are used in other ways ---------------------------------------------------------------------------

PARAMETERS = "Parameters used in other ways than once by their own layer"
add(PARAMETERS, "a layer called twice", lambda: Net(lambda m, x: m.a(torch.tanh(m.a(x))), a=linear()), reals(D))


def shared() -> nn.Module:
    model = nn.Sequential(linear(), nn.Tanh(), linear())
    model[2].weight = model[0].weight
    return model


add(PARAMETERS, "two modules sharing one Parameter", shared, reals(D))
add(PARAMETERS, "weight used again through `F.linear`",
    lambda: Net(lambda m, x: F.linear(torch.tanh(m.a(x)), m.a.weight), a=linear()), reals(D))
add(PARAMETERS, "`Embedding`, tied to the output", lambda: Net(lambda m, i: F.linear(m.a(i), m.a.weight), a=table()),
    tokens(3))
add(PARAMETERS, "one table looked up twice (word2vec)",
    lambda: Net(lambda m, i, j: (m.a(i).unsqueeze(1) * m.a(j)).sum(-1).sigmoid(), a=table()), tokens(), tokens(5))
for length in (3, B, 2 * B):
    add(PARAMETERS, f"a position table, T = {length} of {B} samples",
        lambda: Net(lambda m, i: m.a(i) + m.p(torch.arange(i.shape[1])), a=table(), p=table(16)), tokens(length))
add(PARAMETERS, "a class token and position table as parameters",
    lambda: Net(lambda m, x: m.a(torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.p), a=linear(),
                p=parameter(1, 4, D), token=parameter(1, 1, D)), reals(3, D))
add(PARAMETERS, "a transposed weight on flattened rows (GPT-2's Conv1D)",
    lambda: Net(lambda m, x: torch.addmm(m.bias, x.view(-1, D), m.weight).view(B if len(x) == B else 1, 3, 5),
                weight=parameter(D, 5), bias=parameter(5)), reals(3, D))
add(PARAMETERS, "a convolution's weight read by slices",
    lambda: Net(lambda m, x: (x * m.c.weight.squeeze(1)).sum(-1) + m.c.bias, c=nn.Conv1d(D, D, 4, groups=D)),
    reals(D, 4))
add(PARAMETERS, "`W + B @ A` merged in the forward",
    lambda: Net(lambda m, x: F.linear(x, m.w + m.up @ m.down), w=parameter(D, D), up=parameter(D, 2),
                down=parameter(2, D)), reals(3, D))
add(PARAMETERS, "weight normalisation", lambda: nn.utils.parametrizations.weight_norm(linear()), reals(D))


def standardised(m: nn.Module, x: Tensor) -> Tensor:
    weight = F.batch_norm(m.c.weight.reshape(1, 4, -1), None, None, training=True, momentum=0.0)
    return F.conv2d(x, weight.reshape_as(m.c.weight), m.c.bias)


add(
    PARAMETERS,
    "a weight standardised by `F.batch_norm`",
    lambda: Net(standardised, c=nn.Conv2d(3, 4, 3)),
    reals(3, 5, 5),
)


def cached(m: nn.Module, x: Tensor) -> Tensor:
    if not hasattr(m, "kept"):
        m.kept = m.w[:3]
    return F.linear(x, m.kept)


add(PARAMETERS, "a slice of a weight kept from the first forward", lambda: Net(cached, w=parameter(D, D)), reals(D),
    before=lambda x, loss: (x, loss))


class MatMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.mT, x.mT @ grad


class FusedCrossEntropy(torch.autograd.Function):
    """Takes its gradients in the forward, as fused heads of language models do."""

    @staticmethod
    def forward(ctx, h, weight, target):
        with torch.enable_grad():
            h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_()
            losses = F.cross_entropy(h @ weight.mT, target, reduction="none")
            ctx.save_for_backward(*torch.autograd.grad(losses.sum(), h), h, weight, target)
        return losses.detach()

    @staticmethod
    def backward(ctx, grad):
        of_h, h, weight, target = ctx.saved_tensors
        delta = torch.softmax(h @ weight.mT, 1) - F.one_hot(target, len(weight))
        return of_h * grad[:, None], (delta * grad[:, None]).mT @ h, None


add(PARAMETERS, "a custom autograd function",
    lambda: Net(lambda m, x: MatMul.apply(torch.tanh(m.a(x)), m.a.weight.mT), a=linear(bias=False)), reals(D))
add(PARAMETERS, "a tied head in a fused cross entropy",
    lambda: Net(lambda m, i, y: FusedCrossEntropy.apply(m.a(i).mean(1), m.a.weight.to(torch.float64), y), a=table()),
    tokens(3), tokens(), function=lambda o, t: o)


def scripted() -> nn.Module:
    return Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=linear(), b=torch.jit.script(linear()))


add(PARAMETERS, "a scripted layer", scripted, reals(D))


def exchanged(m: nn.Module, x: Tensor) -> Tensor:
    y, kept = m.b(torch.tanh(m.a(x))), m.a.weight.data
    m.a.weight.data = 1.5 * kept
    y = y + m.b(torch.tanh(m.a(x)))
    m.a.weight.data = kept
    return y


add(PARAMETERS, "`weight.data` exchanged between two uses", lambda: Net(exchanged, a=linear(), b=linear()), reals(D))


def inner_step(m: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(m.a(torch.ones(1, D, dtype=x.dtype)).square().sum(), m.a.weight)
    return m.b(torch.tanh(m.a(x @ (torch.eye(D, dtype=x.dtype) - 0.1 * grad))))


add(
    PARAMETERS,
    "a forward that differentiates by its own weights",
    lambda: Net(inner_step, a=linear(), b=linear()),
    reals(D),
)


def patched() -> nn.Module:
    model = nn.Sequential(linear(), nn.Tanh(), linear())
    model[0].forward = types.MethodType(lambda m, x: F.linear(x * 0.5, m.weight, m.bias), model[0])
    return model


add(PARAMETERS, "a layer whose forward was replaced", patched, reals(D))
add(PARAMETERS, "lazy layers", lambda: nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(3)), reals(D))

# --- rows in another order --------------------------------------------------------------------------------------------

ROWS = "Rows that are not samples, or not in their order"
add(ROWS, "logits of all tokens flattened, `[B·T, V]`",
    lambda: Net(lambda m, i: m.h(m.a(i)).flatten(0, 1), a=table(), h=linear(D, 11)), tokens(3),
    function=lambda o, t: F.cross_entropy(o, t.flatten(), reduction="none").view(len(t), -1).sum(1), target=tokens(3))
add(ROWS, "three views a sample, `[B·3, D]`",
    lambda: Net(lambda m, x: m.a(x.flatten(0, 1)), a=linear()), reals(3, D),
    function=lambda o, t: squared(o).view(-1, 3).sum(1))
add(ROWS, "output `[T, B, C]` under CTC",
    lambda: Net(lambda m, x: m.a(x).transpose(0, 1).log_softmax(2), a=linear(D, 5)), reals(7, D),
    function=lambda o, t: F.ctc_loss(o, t, torch.full((len(t),), 7), torch.full((len(t),), 2), reduction="none"),
    target=lambda: torch.randint(1, 5, (B, 2)))


def packed(m: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    rows = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return m.r(rows)[1][0].squeeze(0)


add(
    ROWS,
    "a packed LSTM",
    lambda: Net(packed, r=nn.LSTM(D, 5, batch_first=True)),
    reals(5, D),
    lambda: torch.tensor([5, 2, 4, 1]),
)


def by_length(m: nn.Module, x: Tensor, length: Tensor) -> Tensor:
    order = torch.argsort(length, descending=True)
    return m.b(torch.tanh(m.a(x[order])))[torch.argsort(order)]


add(ROWS, "sorted by length; the first batch was sorted already",
    lambda: Net(by_length, a=linear(), b=linear()), reals(D), lambda: torch.tensor([4, 9, 5, 7]),
    before=lambda x, loss: ((x[0], torch.tensor([9, 8, 7, 6])), loss))


def experts(m: nn.Module, x: Tensor, route: Tensor) -> Tensor:
    h, out = x.flatten(0, 1), torch.zeros(len(x) * x.shape[1], D, dtype=x.dtype)
    for k, expert in enumerate(m.experts):
        chosen = torch.where(route.flatten() == k)[0]
        out = out.index_add(0, chosen, expert(h[chosen]).tanh())
    return m.head(out.view(x.shape)).sum(1)


def routed() -> nn.Module:
    return Net(experts, experts=nn.ModuleList(linear() for _ in range(3)), head=linear())


add(
    ROWS,
    "experts chosen by data, one without rows",
    routed,
    reals(2, D),
    lambda: torch.tensor([[0, 1], [0, 0], [1, 1], [1, 0]]),
)
add(ROWS, "experts that get other samples' rows in the second call", routed, reals(2, D),
    lambda: torch.tensor([[0, 0], [0, 0], [1, 1], [1, 1]]),
    before=lambda x, loss: ((x[0], torch.tensor([[0, 1]] * B)), loss))

BAGS = torch.tensor([0, 3, 4, 7])


def bag_part(tree: Any, b: int) -> Any:
    if not isinstance(tree, tuple):
        return rows(tree, b)
    start, end = [*BAGS.tolist(), 9][b : b + 2]
    return tree[0][start:end], torch.zeros(1, dtype=torch.long)


add(ROWS, "`EmbeddingBag` with offsets", lambda: Net(lambda m, i, o: m.a(i, o), a=nn.EmbeddingBag(11, D)),
    lambda: torch.randint(0, 11, (9,)), lambda: BAGS, part=bag_part)


def graph_part(tree: Any, b: int) -> Any:
    if not isinstance(tree, tuple):
        return rows(tree, b)
    mine = tree[1] == b
    return tree[0][mine], torch.zeros(int(mine.sum()), dtype=torch.long)


def pooled(m: nn.Module, x: Tensor, graph: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    return m.b(torch.zeros(int(graph.max()) + 1, D, dtype=x.dtype).index_add(0, graph, h))


add(ROWS, "graphs with a batch vector", lambda: Net(pooled, a=linear(), b=linear()), lambda: torch.randn(9, D),
    lambda: torch.tensor([0, 0, 1, 1, 1, 1, 2, 3, 3]), part=graph_part)
add(ROWS, "a mask `[T, T]` for all samples, T = B",
    lambda: Net(lambda m, x: m.a(x + torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril() @ m.b(x)), a=linear(),
                b=linear()), reals(B, D))

# --- forwards that do more --------------------------------------------------------------------------------------------

FORWARDS = "Forwards that do more than run"


def checkpointed(reentrant: bool) -> Callable[[], nn.Module]:
    def forward(m, x):
        h = checkpoint(lambda h: torch.tanh(m.block(h)), m.a(x), use_reentrant=reentrant)
        return m.block(h)

    return lambda: Net(forward, a=linear(), block=linear())


add(FORWARDS, "a checkpoint", checkpointed(False), reals(D))
add(FORWARDS, "a reentrant checkpoint", checkpointed(True), reals(D))


def node_hook(m: nn.Module, x: Tensor) -> Tensor:
    y = m.b(torch.tanh(m.a(x)))
    if y.grad_fn is not None:
        y.grad_fn.register_prehook(lambda grads: (2 * grads[0],))
    return y


def tensor_hook(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    if h.requires_grad:
        h.register_hook(lambda grad: 0.5 * grad)
    return m.b(h)


add(FORWARDS, "a hook on a tensor", lambda: Net(tensor_hook, a=linear(), b=linear()), reals(D))
add(FORWARDS, "a hook on a node of the graph", lambda: Net(node_hook, a=linear(), b=linear()), reals(D))


class Memory(nn.Module):
    """Reads an average of what it has seen, which it changes in place in every forward."""

    def __init__(self):
        super().__init__()
        self.a, self.seen = linear(), torch.randn(B, D, dtype=torch.float64)

    def forward(self, x):
        self.seen.mul_(0.5).add_(x.detach())
        return self.a(self.seen) + torch.tanh(x)


add(FORWARDS, "a memory that the next forward overwrites", Memory, reals(D), again=True)
add(FORWARDS, "a forward that runs a part twice under `no_grad` first",
    lambda: Net(lambda m, x: m.a(x) * (m.a(x).detach() > 0), a=linear()), reals(D))

# --- other samples as constants, and samples that mix -----------------------------------------------------------------

CONSTANTS = "Losses that use other samples as constants"
add(CONSTANTS, "`loss / B`", lambda: perceptron(nn.Tanh()), reals(D), function=lambda o, t: squared(o) / len(o))
add(CONSTANTS, "a detached statistic of the batch", lambda: perceptron(nn.Tanh()), reals(D),
    function=lambda o, t: squared(o / o.detach().std(0, correction=0).add(0.1)))
add(CONSTANTS, "advantages normalised over the batch (PPO)", lambda: perceptron(nn.Tanh()), reals(D),
    function=lambda o, t: -((t - t.mean()) / t.std(correction=0).add(1e-3)) * o.log_softmax(1)[:, 0], target=reals())
add(CONSTANTS, "a frozen BatchNorm in training mode below the head",
    lambda: nn.Sequential(linear().requires_grad_(False), nn.BatchNorm1d(D, affine=False), linear()), reals(D))

MIXING = "Samples that mix: right is ∂ losses[b] of the batch as it stands, and so is a refusal"
add(MIXING, "BatchNorm in training mode", lambda: nn.Sequential(linear(), nn.BatchNorm1d(D), linear()), reals(D))
add(MIXING, "a contrastive loss", lambda: perceptron(nn.Tanh()), reals(D),
    function=lambda o, t: F.cross_entropy(o @ o.detach().mT + o @ o.mT, torch.arange(len(o)), reduction="none"))
add(MIXING, "a loss that mixes from the second call on", lambda: perceptron(nn.Tanh()), reals(D),
    function=lambda o, t: squared(o) + (o @ o.mT).sum(1), before=lambda x, loss: (x, Loss(squared, loss.target)))
add(MIXING, "two samples that read each other, beside an outlier of 1e9",
    lambda: Net(lambda m, x, other: m.b(torch.tanh(m.a(x)) + torch.tanh(m.a(x))[other]), a=linear(), b=linear()),
    reals(D), lambda: torch.tensor([2, 1, 0, 3]), function=lambda o, t: (o - t).square().sum(1),
    target=lambda: torch.randn(B, D) * torch.tensor([1.0, 1e9, 1.0, 1.0])[:, None])


# fmt: on
# --- real models ------------------------------------------------------------------------------------------------------


def zoo() -> dict[str, Situation]:
    """The dozen models that stand for the zoo of tests/."""
    from tests.zoo import judge, models, oracle

    def situation(case) -> Situation:
        def make():
            model, function, x, target = oracle.make(case, B)
            return model, [(Call(x), Loss(function, target))]

        return Situation("Real models, tiny", make, dtype=case.dtype, unavailable=judge.unavailable(case))

    return {name: situation(case) for name, case in models.MODELS.items() if case.quick}
