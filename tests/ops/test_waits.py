"""Where a call would keep the host waiting for a GPU, found on tensors without memory, whose values nobody can have."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradext
from gradext import losses

CPU = torch.device("cpu")
# What has a size that only values tell, or answers to Python.
SIZED = {"equal", "nonzero", "masked_select", "bincount", "argwhere", "repeat_interleave"}
SIZED |= {"_unique", "_unique2", "unique_dim", "unique_consecutive"}
# What reads the values of a mask.
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Waits(TorchDispatchMode):
    """The names of what waits for the device: reads of it, and copies from or to the host.

    A read gets ones, or True. What has a size that values decide raises. `torch.tensor` of numbers is not seen.
    """

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in ("_local_scalar_dense", "is_nonzero"):
            self.names.append(name)
            return True
        indices = [t for t in args[1] if t is not None] if name in INDEXING else []
        if name in SIZED or any(t.dtype in (torch.bool, torch.uint8) for t in indices):
            raise AssertionError(f"{func} waits for the device: its result has a size that values decide")
        if any(t.device != args[0].device for t in indices):
            self.names.append("copy from the host")
        if name == "_to_copy" and kwargs.get("device") == CPU and args[0].device != CPU:
            self.names.append("read")
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
        if name in ("_to_copy", "copy_") and not kwargs.get("non_blocking", False):
            devices = {args[0].device, args[1].device if name == "copy_" else kwargs.get("device", args[0].device)}
            if len(devices) > 1:
                self.names.append("copy from the host")
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def unnoticed(monkeypatch):
    """The mode looks on without being noticed: else differentiable forms would take the place of the fast ones."""
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
    monkeypatch.setattr(losses.torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # unknown there


# --- models ----------------------------------------------------------------------------------------------------------


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.mu, self.logvar = nn.Linear(784, 400), nn.Linear(400, 20), nn.Linear(400, 20)
        self.decoder = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784), nn.Sigmoid())

    def forward(self, x):
        hidden = self.encoder(x).relu()
        mu, logvar = self.mu(hidden), self.logvar(hidden)
        return self.decoder(mu + torch.randn_like(mu) * (logvar / 2).exp()), mu, logvar


class Block(nn.Module):
    """As in GPT-2: normalisations before attention and a network of two layers."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.attention(self.ln_1(x)).chunk(3, 2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token and position tables, two blocks, the token table once more as head."""

    def __init__(self, vocabulary=50, width=32, length=16):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks, self.ln = nn.Sequential(Block(width), Block(width)), nn.LayerNorm(width)

    def forward(self, index):
        x = self.tokens(index) + self.places(torch.arange(index.shape[1], device=index.device))
        return F.linear(self.ln(self.blocks(x)), self.tokens.weight)


class Flattened(nn.Module):
    """Positions of all samples side by side, [B·T, D], and a mean over each sample's."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        rows = self.second(self.first(x.flatten(0, 1)).relu()).relu()
        return self.last(rows.unflatten(0, x.shape[:2]).mean(1))


class Doubled(torch.autograd.Function):
    """Of which the graph does not tell whose rows are whose."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Hidden(Flattened):
    def forward(self, x):
        return self.last(Doubled.apply(self.first(x).relu()).mean(1))


class Taken(Flattened):
    """Rows of samples taken by indices, whose values tell whose they are."""

    def forward(self, x):
        return self.last(self.first(x)[torch.arange(len(x), device=x.device)].mean(1))


def next_token(output, index):
    return F.cross_entropy(output[:, :-1].mT, index[:, 1:], reduction="none").sum(1)


def of_first(output, target):
    return F.binary_cross_entropy(output[0], target, reduction="none").sum(1)


def labels(B=6, classes=3):
    return torch.zeros(B, dtype=torch.int64, device="meta")


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


def chain():
    return nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 784), nn.Sigmoid())


# model, shape and type of its input, and the loss with its target: None is the input.
CASES = {
    "chain": (chain, (6, 784), torch.float32, "auto", None),
    "chain, bce": (chain, (6, 784), torch.float32, "bce", None),
    "VAE": (VAE, (6, 784), torch.float32, "auto", None),
    "VAE, callable": (VAE, (6, 784), torch.float32, of_first, None),
    "conv net": (conv_net, (6, 1, 12, 12), torch.float32, "cross_entropy", labels),
    "GPT": (GPT, (6, 16), torch.int64, next_token, None),
    "flattened rows": (Flattened, (6, 10, 8), torch.float32, "cross_entropy", labels),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(50, 8), Flattened()),
        (6, 10),
        torch.int64,
        "cross_entropy",
        labels,
    ),
}


def made(case):
    model, shape, dtype, loss, target = CASES[case]
    x = torch.empty(shape, dtype=dtype, device="meta")
    target = x if target is None else target()
    if not callable(loss):
        named = {"auto": F.binary_cross_entropy, "bce": F.binary_cross_entropy, "cross_entropy": F.cross_entropy}[loss]

        def losses(output):
            output = output[0] if isinstance(output, tuple) else output
            found = named(output, target, reduction="none")
            return found.flatten(1).sum(1) if found.ndim > 1 else found
    else:
        losses = lambda output: loss(output, target)  # noqa: E731
    return model().to("meta"), x, {"loss": loss, "target": target}, losses


def counted(call):
    """What waits in the second call."""
    call()
    with Waits() as waits:
        call()
    return waits.names


@pytest.mark.parametrize("case", CASES)
def test_factors_and_their_methods(case):
    model, x, options, _ = made(case)

    def call():
        factors = gradext.batch_layer_factors(model, x, **options)
        factors.norm()
        factors.clipped_sum(1.0)
        factors.cosine({name: p.detach() for name, p in model.named_parameters()})
        factors.gram()
        factors.sketch(64)
        factors.project(4)
        for layer in factors.values():
            layer.diag_fisher()
            layer.quadratic(torch.empty(layer.shape[1:], device="meta"))
            layer.quadratic_kron(*layer.kron_fisher())

    assert counted(call) == []


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    model, x, options, _ = made(case)
    assert counted(lambda: gradext.batch_layer_grads(model, x, **options)) == []


@pytest.mark.parametrize("case", CASES)
def test_training_step(case):
    model, x, _, losses = made(case)

    def call():
        with gradext.watch(model, train=True) as watch:
            found = losses(model(x))
        found.mean().backward()
        watch.factors().norm()

    assert counted(call) == []


@pytest.mark.parametrize("model", [Hidden, Taken])
def test_a_proof_is_one_read(model, monkeypatch):
    """Of a second backward, or of the indices by which rows were taken."""
    monkeypatch.setitem(CASES, "proof", (model, (6, 10, 8), torch.float32, "cross_entropy", labels))
    network, x, options, _ = made("proof")
    with Waits():
        gradext.batch_layer_factors(network, x, **options)
    with Waits() as waits:
        gradext.batch_layer_factors(network, x, **options).norm()
    assert waits.names == ["read"]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0]),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x[torch.tensor([0, 2])],
    ],
)
def test_waits_are_seen(wait):
    with Waits() as waits:
        wait(torch.empty(3, device="meta"))
    assert len(waits.names) == 1


@pytest.mark.parametrize("wait", [torch.nonzero, lambda x: x[x > 0], lambda x: x.unique(), lambda x: torch.equal(x, x)])
def test_sizes_that_values_decide_are_seen(wait):
    with pytest.raises(AssertionError, match="waits for the device"), Waits():
        wait(torch.empty(3, device="meta"))
