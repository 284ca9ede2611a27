"""Every layer type and situation, in double precision against autograd one sample at a time and `vmap(grad)`.

A model here is a function that makes it and one that makes its input; all its parameters are asked for.
"""

import functools
import math
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradext

B = 4
VOCABULARY = 11


def squared(output, target) -> Tensor:
    """Half the squared norm of a sample's (first) output, whatever the target: each of its elements has a gradient."""
    if isinstance(output, Mapping):
        return sum(squared(value, target) for value in output.values())
    if isinstance(output, tuple):
        return squared(output[0], target)
    weights = torch.linspace(0.5, 1.5, math.prod(output.shape[1:]), dtype=output.dtype)
    return (weights * (output.flatten(1) + 0.1) ** 2).sum(1)


def images(channels: int, *size: int):
    return lambda: torch.randn(B, channels, *size)


def vectors(*shape: int):
    return lambda: torch.randn(B, *shape)


def tokens(length: int):
    return lambda: torch.randint(0, VOCABULARY, (B, length))


class Lambda(nn.Module):
    """Layers by name, and a forward over them."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, *args, **kwargs):
        return self._forward(self, *args, **kwargs)


class BasicBlock(nn.Module):
    """As in ResNet: in-place activations and an in-place sum."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.down = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.down(x)
        return self.relu(out)


class GPTBlock(nn.Module):
    """As GPT-2's: projections by addmm on flattened rows, pre-normalisation."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        rows = self.norm(x).view(-1, x.shape[-1])
        h = torch.addmm(self.up.bias, rows, self.up.weight.t())
        return x + self.down(F.gelu(h)).view(x.shape)


class TiedLanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6, padding_idx=2)
        self.block = GPTBlock(6)
        self.head = nn.Linear(6, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, index):
        return self.head(self.block(self.embedding(index)))


class ConvVAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6))
        self.decoder = nn.Sequential(
            nn.Linear(3, 64),
            nn.Unflatten(1, (4, 4, 4)),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 2, 3, 2, 1, output_padding=1),
            nn.ELU(),
            nn.Conv2d(2, 1, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return self.decoder(mu), mu, logvar


class MixtureOfExperts(nn.Module):
    """The route is chosen by each batch's own values, so that some layers may not run."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.gate = nn.Linear(6, 3)

    def forward(self, x):
        gates = self.gate(x).softmax(1)
        return sum(gates[:, k : k + 1] * expert(x) for k, expert in enumerate(self.experts))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(2, 4, 3, 2, 1)
        self.middle = nn.Conv2d(4, 4, 3, padding="same", dilation=2)
        self.up = nn.ConvTranspose2d(4, 2, 4, 2, 1)
        self.out = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        h = F.silu(self.down(x))
        return self.out(torch.cat([x, self.up(F.silu(self.middle(h)))], dim=1))


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, 4)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Masked(nn.Module):
    """Ragged sequences, padded, with a mask."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, index, lengths):
        padding = torch.arange(index.shape[1]) >= lengths[:, None]
        h = self.encoder(self.embedding(index), src_key_padding_mask=padding)
        return self.head(h.masked_fill(padding[..., None], 0).sum(1))


def hooked(x, change):
    """x, with its gradient changed, as gradients are clipped or reversed."""
    if x.requires_grad:
        x.register_hook(change)
    return x


def attention(**options):
    return nn.MultiheadAttention(6, 2, batch_first=True, **options)


def conv(layer, size):
    return (lambda: layer().double()), images(layer().in_channels, *size)


MODELS = {
    # layers
    "linear, four dimensions": (lambda: nn.Linear(6, 5), vectors(2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 4, 2, 3, dilation=2), images(3, 12)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), (2, 1), (1, 2)), images(3, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1, stride=(1, 2, 2)), images(2, 3, 4, 5)),
    "conv2d, stride leaves a rest": (lambda: nn.Conv2d(3, 5, 3, 3), images(3, 8, 10)),
    "conv2d, same": (lambda: nn.Conv2d(3, 5, (4, 3), padding="same", dilation=(1, 2)), images(3, 6, 7)),
    "conv2d, valid": (lambda: nn.Conv2d(3, 5, 3, padding="valid"), images(3, 6, 7)),
    "conv2d, circular": (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), images(3, 5, 6)),
    "conv2d, reflect": (lambda: nn.Conv2d(3, 5, 3, padding="same", padding_mode="reflect"), images(3, 5, 6)),
    "conv2d, replicate": (lambda: nn.Conv2d(3, 5, 3, padding=2, padding_mode="replicate"), images(3, 5, 6)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), images(4, 5, 5)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), images(4, 5, 5)),
    "conv2d, one output position": (lambda: nn.Conv2d(8, 9, 3), images(8, 3, 3)),
    "conv2d, factors smaller than gradients": (lambda: nn.Conv2d(12, 14, 3, padding=1), images(12, 2, 2)),
    "conv2d, pointwise": (lambda: nn.Conv2d(6, 5, 1), images(6, 4, 4)),
    "conv transpose 1d": (lambda: nn.ConvTranspose1d(3, 4, 5, 3, 2, output_padding=2), images(3, 6)),
    "conv transpose 2d": (lambda: nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1), images(3, 4, 5)),
    "conv transpose 2d, dilated groups": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2, padding=1),
        images(4, 4, 5),
    ),
    "conv transpose 2d, few positions": (lambda: nn.ConvTranspose2d(12, 14, 3), images(12, 2, 1)),
    "conv transpose 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, 2), images(2, 2, 3, 2)),
    "embedding": (lambda: nn.Embedding(VOCABULARY, 5), tokens(7)),
    "embedding, padding": (lambda: nn.Embedding(VOCABULARY, 5, padding_idx=-3), tokens(20)),
    "embedding of one index": (lambda: nn.Embedding(VOCABULARY, 5), lambda: torch.arange(B)),
    "embedding, two dimensions": (lambda: nn.Embedding(VOCABULARY, 5), lambda: torch.randint(0, 11, (B, 2, 3))),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm((3, 6)), nn.Linear(6, 2), nn.LayerNorm(2)), vectors(5, 3, 6)),
    "rms norm": (lambda: nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 3), nn.RMSNorm(3)), vectors(6)),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.GELU()), images(2, 5, 6)),
    "batch norm 1d": (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh()), vectors(6)),
    "batch norm 2d": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), images(2, 5, 6)),
    "batch norm 3d": (lambda: nn.Sequential(nn.BatchNorm3d(2), nn.Conv3d(2, 2, 2)), images(2, 3, 3, 3)),
    "instance norm": (lambda: nn.Sequential(nn.InstanceNorm1d(3, affine=True), nn.Conv1d(3, 2, 2)), images(3, 6)),
    "instance norm, running": (
        lambda: nn.Sequential(nn.InstanceNorm2d(3, affine=True, track_running_stats=True), nn.Conv2d(3, 2, 2)),
        images(3, 4, 5),
    ),
    "self attention": (lambda: Lambda(lambda m, x: m.a(x, x, x)[0], a=attention()), vectors(5, 6)),
    "cross attention": (
        lambda: Lambda(lambda m, x, y: m.a(x, y, y, need_weights=False)[0], a=attention()),
        lambda: (torch.randn(B, 5, 6), torch.randn(B, 3, 6)),
    ),
    "attention of three": (
        lambda: Lambda(lambda m, x, y: m.a(x, y, y * 2)[0], a=attention()),
        lambda: (torch.randn(B, 5, 6), torch.randn(B, 3, 6)),
    ),
    "separate projections": (
        lambda: Lambda(lambda m, x, y, z: m.a(x, y, z)[0], a=attention(kdim=3, vdim=5)),
        lambda: (torch.randn(B, 5, 6), torch.randn(B, 7, 3), torch.randn(B, 7, 5)),
    ),
    "attention without bias": (lambda: Lambda(lambda m, x: m.a(x, x, x)[0], a=attention(bias=False)), vectors(5, 6)),
    "attention, as many positions as samples": (
        lambda: Lambda(lambda m, x: m.a(x, x, x)[0], a=attention()),
        vectors(B, 6),
    ),
    "time-major attention": (
        lambda: Lambda(lambda m, x: m.a(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1), a=nn.MultiheadAttention(6, 2)),
        vectors(5, 6),
    ),
    "transformer encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2, norm=nn.LayerNorm(6)),
        vectors(5, 6),
    ),
    "transformer decoder": (
        lambda: nn.TransformerDecoderLayer(6, 2, 8, batch_first=True),
        lambda: (torch.randn(B, 5, 6), torch.randn(B, 3, 6)),
    ),
    "transformer": (
        lambda: nn.Transformer(6, 2, 1, 1, 8, batch_first=True),
        lambda: (torch.randn(B, 5, 6), torch.randn(B, 3, 6)),
    ),
    # architectures
    "residual network": (
        lambda: nn.Sequential(BasicBlock(3, 4, 2), BasicBlock(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        images(3, 8, 8),
    ),
    "convolutional VAE": (ConvVAE, images(1, 8, 8)),
    "U-Net": (UNet, images(2, 8, 6)),
    "vision transformer": (VisionTransformer, images(1, 8, 12)),
    "tied language model": (TiedLanguageModel, tokens(6)),
    "mixture of experts": (MixtureOfExperts, vectors(6)),
    "ragged, masked": (Masked, lambda: (torch.randint(0, 11, (B, 6)), torch.tensor([6, 2, 5, 1]))),
    # situations
    "flattened rows": (
        lambda: Lambda(lambda m, x: m.a(x.view(-1, 6)).view(len(x), -1), a=nn.Linear(6, 5)),
        vectors(3, 6),
    ),
    "time-major": (
        lambda: Lambda(lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1), a=nn.Linear(6, 5)),
        vectors(3, 6),
    ),
    "time-major, flattened": (
        lambda: Lambda(
            lambda m, x: m.a(x.transpose(0, 1).reshape(-1, 6)).view(3, -1, 5).transpose(0, 1), a=nn.Linear(6, 5)
        ),
        vectors(3, 6),
    ),
    "time-major, as many positions as samples": (
        lambda: Lambda(lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1), a=nn.Linear(6, 5)),
        vectors(B, 6),
    ),
    "time-distributed convolution": (
        lambda: Lambda(
            lambda m, x: m.b(m.a(x.flatten(0, 1))).unflatten(0, x.shape[:2]), a=nn.Conv2d(2, 3, 3), b=nn.BatchNorm2d(3)
        ),
        vectors(3, 2, 5, 5),
    ),
    "time-distributed group": (
        lambda: Lambda(lambda m, x: m.a(x.flatten(0, 1)).unflatten(0, x.shape[:2]), a=nn.Conv1d(4, 4, 3, groups=2)),
        vectors(3, 4, 6),
    ),
    "convolution called twice": (
        lambda: Lambda(lambda m, x: m.a(torch.tanh(m.a(x))), a=nn.Conv2d(3, 3, 3, padding=1)),
        images(3, 4, 4),
    ),
    "convolution through F.conv2d": (
        lambda: Lambda(
            lambda m, x: m.a(x) + F.conv2d(x, weight=m.a.weight, padding=1), a=nn.Conv2d(3, 3, 3, padding=1)
        ),
        images(3, 4, 4),
    ),
    "tied norms": (
        lambda: Lambda(lambda m, x: m.a(m.b(m.a(x))), a=nn.LayerNorm(6), b=nn.Linear(6, 6)),
        vectors(3, 6),
    ),
    "split weight": (
        lambda: Lambda(
            lambda m, x: (
                F.linear(x, m.a.weight[:2]).sum(1, keepdim=True) + F.linear(x, *[p[2:] for p in m.a.parameters()])
            ),
            a=nn.Linear(6, 5),
        ),
        vectors(6),
    ),
    "rows of a convolution's weight": (
        lambda: Lambda(
            lambda m, x: torch.cat([m.a(x), F.conv2d(x, m.a.weight[-2:], groups=2)], 1), a=nn.Conv2d(4, 6, 2, groups=2)
        ),
        images(4, 3, 3),
    ),
    "rows of a transposed convolution's weight": (
        lambda: Lambda(
            lambda m, x: F.conv_transpose1d(x[:, :2], m.a.weight.chunk(2)[1]),
            a=nn.ConvTranspose1d(4, 3, 2, bias=False),
        ),
        images(4, 3),
    ),
    "rows of an embedding": (
        lambda: Lambda(
            lambda m, i: m.a(i) + F.embedding(i % 3, m.a.weight[2:5], padding_idx=1), a=nn.Embedding(VOCABULARY, 5)
        ),
        tokens(7),
    ),
    "parts of a norm": (
        lambda: Lambda(lambda m, x: F.layer_norm(x[..., :3], (3,), m.a.weight[:3], m.a.bias[3:]), a=nn.LayerNorm(6)),
        vectors(5, 6),
    ),
    "convolution and its transpose": (
        lambda: Lambda(
            lambda m, x: F.conv2d(F.conv_transpose2d(x, m.a.weight), m.a.weight), a=nn.Conv2d(4, 3, 3, bias=False)
        ),
        images(3, 4, 5),
    ),
    "index of 32 bits": (
        lambda: Lambda(lambda m, i: m.a(i.int()), a=nn.Embedding(VOCABULARY, 5)),
        tokens(7),
    ),
    "two inputs as one batch": (
        lambda: Lambda(
            lambda m, x, y: m.a(torch.cat([x, y])).chunk(2)[0] - m.a(torch.stack([x, y]))[1], a=nn.Linear(6, 5)
        ),
        lambda: (torch.randn(B, 6), torch.randn(B, 6)),
    ),
    "samples repeated": (
        lambda: Lambda(
            lambda m, x: (
                sum(m.a(x.repeat(3, 1)).tanh().chunk(3)) + m.a(x.repeat_interleave(2, 0)).view(len(x), 2, -1)[:, 1]
            ),
            a=nn.Linear(6, 5),
        ),
        vectors(6),
    ),
    "hooks that multiply gradients": (
        lambda: Lambda(
            lambda m, x: hooked(
                torch.tanh_(hooked(m.b(torch.relu_(hooked(m.a(x), lambda g: 2 * g))), lambda g: 3 * g)), torch.neg
            ),
            a=nn.Linear(6, 5),
            b=nn.Linear(5, 4),
        ),
        vectors(6),
    ),
    "hooks that clip gradients": (
        lambda: Lambda(
            lambda m, x: m.b(hooked(m.a(x).view(len(x), -1), lambda g: g.clamp(-0.1, 0.1)).view(len(x), 3, 5)),
            a=nn.Linear(6, 5),
            b=nn.Linear(5, 4),
        ),
        vectors(3, 6),
    ),
    "bias that is normalised away": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 2, bias=True), nn.InstanceNorm1d(4), nn.Conv1d(4, 2, 2)),
        images(3, 7),
    ),
    "matrix product": (lambda: Lambda(lambda m, x: x @ m.a.weight.T, a=nn.Linear(6, 5, bias=False)), vectors(3, 6)),
    "dictionary in, dictionary out": (
        lambda: Lambda(lambda m, a, b: {"sum": m.a(a) + b, "more": m.b(b)}, a=nn.Linear(6, 5), b=nn.Linear(5, 2)),
        lambda: {"b": torch.randn(B, 5), "a": torch.randn(B, 6)},
    ),
    "several outputs": (
        lambda: Lambda(lambda m, x: (m.a(x), m.b(x)), a=nn.Linear(6, 5), b=nn.Linear(6, 2)),
        vectors(6),
    ),
}


def make(name, dtype=torch.float64):
    torch.manual_seed(0)
    build, sample = MODELS[name]
    model = build().to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # affine parameters begin as ones and zeros
        for b in model.buffers():
            if b.is_floating_point():
                b.add_(0.3 * torch.rand_like(b))
    return model, _cast(sample(), dtype)


def _cast(x, dtype):
    if isinstance(x, Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    if isinstance(x, Mapping):
        return {key: _cast(value, dtype) for key, value in x.items()}
    return tuple(_cast(value, dtype) for value in x)


def assert_close(actual, expected, tolerance=1e-11):
    scale = expected.abs().max().clamp_min(1e-4)  # what cancels to less is rounding noise
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * scale, ((actual - expected).abs().max() / scale).item()


def any_target(x):
    return x if isinstance(x, Tensor) else next(iter(x.values() if isinstance(x, Mapping) else x))


@pytest.mark.parametrize("name", MODELS)
def test_equals_autograd_sample_by_sample(name, loop):
    model, x = make(name)
    expected = loop(model, x, any_target(x), squared)
    for frozen in False, False, True:
        model.requires_grad_(not frozen)
        grads = gradext.batch_layer_grads(model, x, loss=squared)
        assert set(grads) == {key for key, _ in model.named_parameters()}
        for key, value in grads.items():
            assert_close(value, expected[key])


@pytest.mark.parametrize("name", MODELS)
def test_factors_stand_for_the_same_gradients(name, loop):
    model, x = make(name)
    expected = loop(model, x, any_target(x), squared)
    factors = gradext.batch_layer_factors(model, x, loss=squared)
    assert len(factors) == len(expected)
    for key, value in expected.items():
        f = factors[key]
        reference = torch.randn_like(value[0])
        flat = value.flatten(1)
        assert_close(f.materialize(), value)
        assert_close(f.norm(), flat.norm(dim=1))
        assert_close(f.norm(1), flat.abs().sum(1))
        assert_close(f.dot(reference), flat @ reference.flatten(), 1e-9)
        bank = torch.randn(3, *value.shape[1:], dtype=value.dtype)
        assert_close(f.linear(bank), flat @ bank.flatten(1).T, 1e-9)
        assert_close(f.gram(), flat @ flat.T)
        assert_close(f.gram(f[1:3]), flat @ flat[1:3].T)
        assert_close(f.sum(), value.sum(0), 1e-10)
        assert_close(f.diag_fisher(), value.square().mean(0))
        assert_close(f.quadratic(reference.square()), (value.square() * reference.square()).flatten(1).sum(1))
        assert_close(f[[2, 0]].materialize(), value[[2, 0]])
        assert_close(type(f).cat([f[:1], f[1:]]).norm(), flat.norm(dim=1))


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_batch(name):
    model, x = make(name)
    empty = torch.utils._pytree.tree_map(lambda value: value[:0], x)
    try:
        model(**empty) if isinstance(empty, Mapping) else model(*empty) if isinstance(empty, tuple) else model(empty)
    except (RuntimeError, IndexError) as error:
        pytest.skip(f"the model itself takes no empty batch: {error}")
    grads = gradext.batch_layer_grads(model, empty, loss=squared)
    assert {key: tuple(g.shape) for key, g in grads.items()} == {k: (0, *p.shape) for k, p in model.named_parameters()}
    factors = gradext.batch_layer_factors(model, empty, loss=squared)
    assert factors.norm().shape == (0,)
    assert factors.gram().shape == (0, 0)
    for key, total in factors.sum().items():
        assert not total.any(), key


# --- what once had no rule, or rows in another order than the samples -------------------------------------------------


def swapped(x: Tensor, i: int, j: int) -> Tensor:
    order = list(range(len(x)))
    if max(i, j) < len(x):  # a sample alone stays where it is
        order[i], order[j] = order[j], order[i]
    return x[order]


def with_prototypes(count: int):
    model = Lambda(lambda m, x: x @ m.a(m.prototypes).T, a=nn.Linear(6, 6))
    model.register_buffer("prototypes", torch.randn(count, 6))
    return model


def broadcast_bias(*shape: int):
    layer = nn.Linear(6, 5)
    layer.bias = nn.Parameter(torch.zeros(shape))
    return layer


def each(layer):
    return lambda: Lambda(lambda m, x: torch.stack([m.a(sample) for sample in x]), a=layer())


# For many of these the shapes do not tell whose a row is, above all where T = B.
ROWS = {
    **{
        f"{T} positions, {name}": (make, lambda T=T, sample=sample: sample(T))
        for T in (1, 3, B, 2 * B)
        for name, make, sample in (
            (
                "embedded alone",
                lambda: Lambda(
                    lambda m, i: m.a(i) + m.b(torch.arange(i.shape[1])),
                    a=nn.Embedding(VOCABULARY, 5),
                    b=nn.Embedding(VOCABULARY, 5),
                ),
                lambda T: torch.randint(0, 11, (B, T)),
            ),
            ("sample by sample", each(lambda: nn.Linear(6, 5)), lambda T: torch.randn(B, T, 6)),
            ("normalised sample by sample", each(lambda: nn.LayerNorm(6)), lambda T: torch.randn(B, T, 6)),
        )
    },
    "positions beside the samples": (
        lambda: Lambda(
            lambda m, x: m.a(x.transpose(0, 1).flatten(1, 2)).unflatten(1, (-1, 2)).transpose(0, 1), a=nn.Linear(6, 5)
        ),
        vectors(B, 2, 6),
    ),
    "as many prototypes as samples": (lambda: with_prototypes(B), vectors(6)),
    "more prototypes": (lambda: with_prototypes(2 * B), vectors(6)),
    "sorted by value": (
        lambda: Lambda(lambda m, x: m.a(x[x[:, 0].argsort()])[x[:, 0].argsort().argsort()], a=nn.Linear(6, 5)),
        vectors(6),
    ),
    **{
        f"samples {i} and {j} exchanged": (
            lambda i=i, j=j: Lambda(lambda m, x: swapped(m.a(swapped(x, i, j)), i, j), a=nn.Linear(6, 5)),
            vectors(6),
        )
        for i in range(B)
        for j in range(i)
    },
    "images without a batch dimension": (each(lambda: nn.Conv1d(4, 4, 2)), vectors(4, 6)),
    "kernel as a matrix": (
        lambda: Lambda(lambda m, x: F.linear(x, m.a.weight.squeeze(2)), a=nn.Conv1d(6, 5, 1)),
        vectors(6),
    ),
    "a vector as the weight": (
        lambda: Lambda(lambda m, x: F.linear(x, m.a.weight), a=nn.LayerNorm(6, bias=False)),
        vectors(3, 6),
    ),
    "a bias for all features": (lambda: broadcast_bias(1), vectors(6)),
    "a bias with a row": (lambda: broadcast_bias(1, 5), vectors(3, 6)),
    "every other row": (lambda: Lambda(lambda m, x: F.linear(x, m.a.weight[::2]), a=nn.Linear(6, 5)), vectors(6)),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_rows_in_every_order_are_right(name, frozen, loop):
    torch.manual_seed(0)
    build, sample = ROWS[name]
    model, x = build().double().requires_grad_(not frozen), _cast(sample(), torch.float64)
    expected = loop(model, x, x, squared)
    for _ in range(2):
        grads = gradext.batch_layer_grads(model, x, loss=squared)
        assert set(grads) == {key for key, _ in model.named_parameters()}
        for key, value in grads.items():
            assert_close(value, expected[key])


UNUSUAL = {
    "embedding with max_norm": (lambda: nn.Embedding(VOCABULARY, 5, max_norm=1), tokens(7)),
    "complex numbers": (
        lambda: Lambda(lambda m, x: (x * 1j) @ m.a.weight.to(torch.complex128), a=nn.Linear(6, 6, bias=False)),
        vectors(6),
    ),
    "a sparse input": (
        lambda: Lambda(lambda m, x: x.to_sparse() @ m.a.weight.T, a=nn.Linear(6, 6, bias=False)),
        vectors(6),
    ),
}


def magnitudes(output, target):
    return squared(torch.view_as_real(output) if output.is_complex() else output, target)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_uses_are_right_or_refused(name, frozen, loop):
    torch.manual_seed(0)
    build, sample = UNUSUAL[name]
    model, x = build().double().requires_grad_(not frozen), _cast(sample(), torch.float64)
    expected = loop(model, x, any_target(x), magnitudes)
    for _ in range(2):
        try:
            grads = gradext.batch_layer_grads(model, x, loss=magnitudes)
        except gradext.CaptureError:
            continue
        for key, value in grads.items():
            assert_close(value, expected[key])


# --- what is refused -------------------------------------------------------------------------------------------------

MIXED = "samples mix"
MIXING = {
    "centred by the batch": (lambda: Lambda(lambda m, x: m.a(x) - m.a(x).mean(0), a=nn.Linear(6, 5)), vectors(6)),
    "batch-first input of time-major attention": (
        lambda: Lambda(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(6, 2)),
        vectors(B, 6),
    ),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_refused(name, frozen):
    torch.manual_seed(0)
    build, sample = MIXING[name]
    model, x = build().double().requires_grad_(not frozen), _cast(sample(), torch.float64)
    for _ in range(2):  # nothing that was refused counts as proved
        with pytest.raises(gradext.CaptureError, match=MIXED):
            gradext.batch_layer_grads(model, x, loss=squared)


class Centred(nn.Module):
    """Of the batch in training mode: a mixing layer."""

    def forward(self, x):
        return x - x.mean(0) if self.training else x


@pytest.mark.parametrize("change", ["another layer", "mode", "hook", "hook before"])
def test_what_a_changed_model_does_is_proved_again(change):
    torch.manual_seed(0)
    model = Lambda(lambda m, x: m.b(m.mix(m.a(x)).sin()), a=nn.Linear(6, 5), mix=Centred(), b=nn.Linear(5, 4)).eval()
    x = torch.randn(B, 6)
    if change == "another layer":
        model.mix = nn.Identity()
    gradext.batch_layer_grads(model, x, loss=squared)
    if change == "another layer":
        model.mix = Centred().train()
    elif change == "mode":
        model.mix.train()
    elif change == "hook":
        model.mix.register_forward_hook(lambda module, args, output: output - output.mean(0))
    else:
        model.mix.register_forward_pre_hook(lambda module, args: args[0] - args[0].mean(0))
    for _ in range(2):
        with pytest.raises(gradext.CaptureError, match=MIXED):
            gradext.batch_layer_grads(model, x, loss=squared)


def test_each_loss_is_proved():
    torch.manual_seed(0)
    model, x = Lambda(lambda m, x: m.b(m.a(x).sin()), a=nn.Linear(6, 5), b=nn.Linear(5, 4)), torch.randn(B, 6)
    for loss in lambda output, target: squared(output, target), functools.partial(squared), squared:
        gradext.batch_layer_grads(model, x, loss=loss)
    mixing = lambda output, target: squared(output, target).cumsum(0)  # noqa: E731
    for loss in mixing, functools.partial(mixing), lambda output, target: squared(output - output.mean(0), target):
        for _ in range(2):
            with pytest.raises(gradext.CaptureError, match=MIXED):
                gradext.batch_layer_grads(model, x, loss=loss)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_does_not_look_like_mixing(value, loop):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double(), torch.randn(B, 6).double()
    x[1, 2] = value
    expected = loop(model, x, x, squared)
    for name, gradients in gradext.batch_layer_grads(model, x, loss=squared).items():
        torch.testing.assert_close(gradients, expected[name], equal_nan=True)


def test_quantised_weights_are_left_out_by_name():
    class Quantised(nn.Linear):
        def __init__(self):
            super().__init__(6, 5, bias=False)
            self.weight = nn.Parameter(torch.randint(-3, 4, (5, 6)), requires_grad=False)

        def forward(self, x):
            return F.linear(x, self.weight.to(x.dtype))

    model, x = nn.Sequential(Quantised(), nn.Linear(5, 4)), torch.randn(B, 6)
    grads = gradext.batch_layer_grads(model, x, loss=squared)
    assert set(grads) == {"1.weight", "1.bias"}
    assert "int64" in grads.coverage.left_out["0.weight"]
    with pytest.raises(gradext.UnsupportedLayerError, match=r"0\.weight is of type torch\.int64"):
        gradext.batch_layer_grads(model, x, loss=squared, layers="0")
