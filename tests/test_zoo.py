"""Every layer type and situation, in double precision against autograd one sample at a time and `vmap(grad)`.

A model here is a function that makes it and one that makes its input; all its parameters are asked for.
"""

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
    """Half the squared norm of a sample's output, whatever the target: every output element has a gradient."""
    if isinstance(output, Mapping):
        return sum(squared(value, target) for value in output.values())
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
    scale = expected.abs().max().clamp_min(1e-30)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * scale, ((actual - expected).abs().max() / scale).item()


def any_target(x):
    return x if isinstance(x, Tensor) else next(iter(x.values() if isinstance(x, Mapping) else x))


@pytest.mark.parametrize("name", MODELS)
def test_equals_autograd_sample_by_sample(name, loop):
    model, x = make(name)
    expected = loop(model, x, any_target(x), squared)
    for frozen in False, True:
        model.requires_grad_(not frozen)
        grads = gradext.batch_layer_grads(model, x, loss=squared, layers="all", include_bias=True, check="sum")
        assert set(grads) == {key for key, _ in model.named_parameters()}
        for key, value in grads.items():
            assert_close(value, expected[key])


@pytest.mark.parametrize("name", MODELS)
def test_factors_stand_for_the_same_gradients(name, loop):
    model, x = make(name)
    expected = loop(model, x, any_target(x), squared)
    factors = gradext.batch_layer_factors(model, x, loss=squared, layers="all", include_bias=True)
    assert len(factors) == len(expected)
    for key, value in expected.items():
        f = factors[key.removesuffix(".weight")]
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
