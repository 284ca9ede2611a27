"""Common models and losses: every parameter exact, in whatever order a model has its rows."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gradext

from .common import B, D, Net, T, V, linear, parameter, tokens, x_of

H = 2  # heads
pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),
]


def case(forward, x, members=None, **more):
    """A case of a `Net`; layers a and b are there where no others are given."""
    members = {"a": linear(), "b": linear()} if members is None else members
    return {"model": Net(forward, **members), "x": x, **more}


# --- parameters that meet samples in other ways than by a layer ------------------------------------------------------


def rms_norm(weight, x, offset=0.0):
    return (offset + weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def positions_of(table, index):
    return table(torch.arange(index.shape[1]))


def buckets(length: int) -> Tensor:
    return (torch.arange(length)[:, None] - torch.arange(length)).clamp(-2, 2) + 2


def biased_attention(m, x, bias):
    """bias [heads, T, T], as T5's, Swin's and BEiT's."""
    q, k, v = (layer(x).unflatten(-1, (H, D // H)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    return ((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)


def projections():
    return {name: linear() for name in "qkv"}


def weight_normed(kind):
    if kind == "legacy":
        return torch.nn.utils.weight_norm(linear())
    return torch.nn.utils.parametrizations.weight_norm(linear())


PARAMETERS = {
    "a bare shift": lambda: case(lambda m, x: m.a(x + m.shift), x_of(), {"a": linear(), "shift": parameter(D)}),
    "a bare scale, added up over positions": lambda: case(
        lambda m, x: (m.scale * m.a(x)).sum(1), x_of(B, T, D), {"a": linear(), "scale": parameter(T, 1)}
    ),
    "one number": lambda: case(lambda m, x: m.a(x) * m.tau.exp(), x_of(), {"a": linear(), "tau": parameter()}),
    "a parameter of T features where T = B": lambda: case(
        lambda m, x: m.a(x) + m.shift[:, None], x_of(B, B, D), {"a": linear(), "shift": parameter(B)}
    ),
    "a parameter with B rows": lambda: case(
        lambda m, x: x @ m.prototypes.T @ m.prototypes, x_of(), {"prototypes": parameter(B, D)}
    ),
    "layer scale": lambda: case(
        lambda m, x: x + m.gamma * m.a(x), x_of(B, T, D), {"a": linear(), "gamma": parameter(D)}
    ),
    "an RMSNorm": lambda: case(lambda m, x: m.a(rms_norm(m.w, x)), x_of(B, T, D), {"a": linear(), "w": parameter(D)}),
    "an RMSNorm about one": lambda: case(
        lambda m, x: m.a(rms_norm(m.w, x, 1)), x_of(B, T, D), {"a": linear(), "w": parameter(D)}
    ),
    "an RMSNorm of a cast": lambda: case(
        lambda m, x: m.a(m.w * rms_norm(1.0, x.float()).to(x.dtype)), x_of(B, T, D), {"a": linear(), "w": parameter(D)}
    ),
    "a class token": lambda: case(
        lambda m, x: m.a(torch.cat([m.token.expand(len(x), -1, -1), x], 1))[:, 0].sin() + m.b(x).sum(1),
        x_of(B, T, D),
        {"a": linear(), "b": linear(), "token": parameter(1, 1, D)},
    ),
    "a class token by repeat": lambda: case(
        lambda m, x: m.a(torch.cat([m.token.repeat(len(x), 1, 1), x], 1)).cumsum(1).tanh(),
        x_of(B, T, D),
        {"a": linear(), "token": parameter(1, 1, D)},
    ),
    "a class token in place": lambda: case(
        lambda m, x: m.a(placed(x, m.token)), x_of(B, T, D), {"a": linear(), "token": parameter(D)}
    ),
    "a mask token": lambda: case(
        lambda m, x, mask: m.a(torch.where(mask[..., None], m.token, x)).tanh(),
        (x_of(B, T, D), torch.rand(B, T) > 0.5),
        {"a": linear(), "token": parameter(D)},
    ),
    "prompts": lambda: case(
        lambda m, x: m.a(torch.cat([m.prompt.unsqueeze(0).expand(len(x), -1, -1), x], 1)).cumsum(1).sin(),
        x_of(B, T, D),
        {"a": linear(), "prompt": parameter(2, D)},
    ),
    "prompts of a network of their own": lambda: case(
        lambda m, x: m.a(torch.cat([m.net(m.table(torch.arange(2).expand(len(x), 2))), x], 1)).cumsum(1).sin(),
        x_of(B, T, D),
        {"a": linear(), "net": nn.Sequential(linear(), nn.Tanh()), "table": nn.Embedding(2, D)},
    ),
    "prompts of a network for all samples": lambda: case(
        lambda m, x: m.a(torch.cat([m.net(m.prompt).expand(len(x), -1, -1), x], 1)).cumsum(1).sin(),
        x_of(B, T, D),
        {"a": linear(), "net": nn.Sequential(linear(), nn.Tanh()), "prompt": parameter(2, D)},
    ),
    "queries": lambda: case(
        lambda m, x: m.a((m.queries @ x.mT).softmax(-1) @ x), x_of(B, T, D), {"a": linear(), "queries": parameter(2, D)}
    ),
    "weight norm, legacy": lambda: {"model": nn.Sequential(weight_normed("legacy"), nn.Tanh(), linear()), "x": x_of()},
    "weight norm": lambda: {"model": nn.Sequential(weight_normed("new"), nn.Tanh(), linear()), "x": x_of(B, T, D)},
    "spectral norm": lambda: {
        "model": nn.Sequential(nn.utils.parametrizations.spectral_norm(linear()), nn.Tanh(), linear()).eval(),
        "x": x_of(),
    },
    "spectral norm, legacy": lambda: {
        "model": nn.Sequential(nn.utils.spectral_norm(linear()), nn.Tanh(), linear()).eval(),
        "x": x_of(),
    },
    "an orthogonal weight": lambda: {
        "model": nn.Sequential(nn.utils.parametrizations.orthogonal(linear(), use_trivialization=False), linear()),
        "x": x_of(),
    },
    "a parametrisation of one's own, of a convolution": lambda: {
        "model": nn.Sequential(symmetric(nn.Conv1d(2, 3, 3, padding=1)), nn.Tanh(), nn.Flatten(), linear(3 * D)),
        "x": x_of(B, 2, D),
    },
    "cached parametrisations": lambda: case(cached_parametrisation, x_of(), {"a": weight_normed("new"), "b": linear()}),
    "a standardised kernel": lambda: case(
        lambda m, x: F.conv2d(
            x, F.batch_norm(m.c.weight.flatten(1)[None], None, None, training=True).view_as(m.c.weight)
        ),
        x_of(B, 2, 5, 5),
        {"c": nn.Conv2d(2, 3, 3, bias=False)},
    ),
    "a normalised kernel": lambda: case(
        lambda m, x: F.conv2d(x, F.layer_norm(m.c.weight, m.c.weight.shape[1:]) * m.gain, m.c.bias),
        x_of(B, 2, 5, 5),
        {"c": nn.Conv2d(2, 3, 3), "gain": parameter(3, 1, 1, 1)},
    ),
    "a kernel by std_mean": lambda: case(
        lambda m, x: F.conv1d(x, standardised(m.c.weight)), x_of(B, 2, 5), {"c": nn.Conv1d(2, 3, 3, bias=False)}
    ),
    "W + B @ A": lambda: case(
        lambda m, x: F.linear(x, m.a.weight + m.up @ m.down, m.a.bias),
        x_of(B, T, D),
        {"a": linear(), "up": parameter(D, 2), "down": parameter(2, D)},
    ),
    "x @ A @ B beside a frozen weight": lambda: case(
        lambda m, x: m.a(x) + 0.5 * m.up(m.down(x)).sin(),
        x_of(B, T, D),
        {"a": linear().requires_grad_(False), "up": linear(2, D), "down": linear(D, 2)},
    ),
    "DoRA": lambda: case(
        dora, x_of(), {"a": linear(), "up": parameter(D, 2), "down": parameter(2, D), "m": parameter(D)}
    ),
    "IA3": lambda: case(
        lambda m, x: m.b(m.a(x) * m.scale), x_of(), {"a": linear(), "b": linear(), "scale": parameter(1, D)}
    ),
    "a weight on the left": lambda: case(lambda m, x: (m.w @ x.mT).mT, x_of(B, T, D), {"w": parameter(5, D)}),
    "a weight on the left of the transposed batch": lambda: case(
        lambda m, x: (m.w @ x.t()).t(), x_of(), {"w": parameter(5, D)}
    ),
    "a token mixing weight": lambda: case(
        lambda m, x: m.w @ m.a(x) + m.b, x_of(B, T, D), {"a": linear(), "w": parameter(5, T), "b": parameter(5, 1)}
    ),
    "a token mixing weight, T = B": lambda: case(
        lambda m, x: m.w @ m.a(x).tanh(), x_of(B, B, D), {"a": linear(), "w": parameter(B, B)}
    ),
    "a vector as the weight": lambda: case(lambda m, x: x @ m.v, x_of(B, T, D), {"v": parameter(D)}),
    "two weights and the samples between": lambda: case(
        lambda m, x: m.left @ x @ m.right, x_of(B, T, D), {"left": parameter(2, T), "right": parameter(D, 5)}
    ),
    **{
        f"einsum {equation}": lambda equation=equation, x=x, w=w: case(
            lambda m, x: torch.einsum(equation, x, m.w).flatten(1), x_of(*x), {"w": parameter(*w)}
        )
        for equation, x, w in (
            ("bi,oi->bo", (B, D), (5, D)),
            ("bti,io->bto", (B, T, D), (D, 5)),
            ("bti,ihd->bthd", (B, T, D), (D, H, 3)),
            ("bthd,hde->bthe", (B, T, H, 3), (H, 3, 4)),
            ("bti,ti->bt", (B, T, D), (T, D)),
            ("bti,ti->bt", (B, B, D), (B, D)),
            ("...i,io->...o", (B, T, D), (D, 5)),
            ("bij,ijk->bk", (B, T, D), (T, D, 5)),
            ("bi,bj,kij->bk", None, None),
        )
        if x
    },
    "a bilinear form by einsum": lambda: case(
        lambda m, x: torch.einsum("bi,bj,kij->bk", x, m.a(x), m.w), x_of(), {"a": linear(), "w": parameter(5, D, D)}
    ),
    "a bilinear layer": lambda: case(lambda m, x: m.l(x, x.sin()), x_of(), {"l": nn.Bilinear(D, D, 5)}),
    "bmm of an expanded weight": lambda: case(
        lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)), x_of(B, T, D), {"w": parameter(D, 5)}
    ),
    "baddbmm": lambda: case(
        lambda m, x: torch.baddbmm(m.b, x.transpose(0, 1), m.w).transpose(0, 1),
        x_of(B, T, D),
        {"w": parameter(T, D, 5), "b": parameter(T, 1, 5)},
    ),
    "baddbmm, T = B": lambda: case(
        lambda m, x: torch.baddbmm(m.b, x.transpose(0, 1), m.w).transpose(0, 1),
        x_of(B, B, D),
        {"w": parameter(B, D, 5), "b": parameter(B, 1, 5)},
    ),
    "a weight for each group of features": lambda: case(
        lambda m, x: torch.bmm(x.unflatten(1, (2, 3)).transpose(0, 1), m.w).transpose(0, 1).flatten(1),
        x_of(),
        {"w": parameter(2, 3, 3)},
    ),
    "fused projections, split": lambda: case(
        lambda m, x: [p.sin() for p in F.linear(x, m.w, m.b).split((2, 4, 6), -1)][2],
        x_of(B, T, D),
        {"w": parameter(12, D), "b": parameter(12)},
    ),
    "weights as one vector": lambda: case(
        lambda m, x: F.linear(F.linear(x, m.flat[:30].view(5, D), m.flat[30:35]).tanh(), m.flat[35:].view(2, 5)),
        x_of(),
        {"flat": parameter(45)},
    ),
    "a hypernetwork for all samples": lambda: case(
        lambda m, x: F.linear(x, m.net(m.z).view(5, D)), x_of(), {"net": linear(3, 5 * D), "z": parameter(3)}
    ),
    "a hypernetwork for each sample": lambda: case(
        lambda m, x: torch.bmm(m.net(x).view(-1, 5, D), x[..., None]), x_of(), {"net": linear(D, 5 * D)}
    ),
    "weights as an average": lambda: case(
        lambda m, x: F.linear(x, (torch.stack([m.a.weight, m.b.weight]) * m.mix.softmax(0)[:, None, None]).sum(0)),
        x_of(),
        {"a": linear(bias=False), "b": linear(bias=False), "mix": parameter(2)},
    ),
    "dynamic kernels, mixed by each sample": lambda: case(
        lambda m, x: torch.einsum("bk,koi,bi->bo", m.gate(x).softmax(1), m.w, x),
        x_of(),
        {"gate": linear(D, 2), "w": parameter(2, D, D)},
    ),
    "rounded weights": lambda: case(
        lambda m, x: F.linear(x, m.a.weight + ((4 * m.a.weight).round() / 4 - m.a.weight).detach()),
        x_of(),
        {"a": linear(bias=False)},
    ),
    "PReLU": lambda: case(lambda m, x: m.act(m.a(x)), x_of(B, D), {"a": linear(), "act": nn.PReLU(D)}),
    "PReLU of one number": lambda: case(lambda m, x: m.act(m.a(x)), x_of(B, T, D), {"a": linear(), "act": nn.PReLU()}),
    "a mixture of logistics": lambda: case(
        lambda m, x: -torch.logsumexp(m.logits.log_softmax(0) - ((x[:, :, None] - m.mu) / m.scale.exp()).square(), -1),
        x_of(),
        {"logits": parameter(3), "mu": parameter(3), "scale": parameter(3)},
    ),
    "prototypes and distances": lambda: case(
        lambda m, x: torch.cdist(m.a(x), m.p), x_of(), {"a": linear(), "p": parameter(5, D)}
    ),
    "a codebook, straight through": lambda: case(
        codebook, x_of(), {"a": linear(), "b": linear(), "table": nn.Embedding(5, D)}
    ),
    "Fourier features with learned frequencies": lambda: case(
        lambda m, x: m.a(torch.cat([(x @ m.w).sin(), (x @ m.w).cos()], -1)),
        x_of(),
        {"a": linear(8), "w": parameter(D, 4)},
    ),
    "a spline of each feature": lambda: case(
        lambda m, x: (torch.exp(-(x[..., None] - torch.linspace(-2, 2, 5)).square())[:, None] * m.w).sum((2, 3)),
        x_of(),
        {"w": parameter(4, D, 5)},
    ),
    "a state space": lambda: case(
        state_space, x_of(B, 5, D), {"log_a": parameter(D, 2), "b": linear(D, 2), "c": linear(D, 2), "d": parameter(D)}
    ),
    "a depthwise kernel, squeezed": lambda: case(
        lambda m, x: (x.unfold(2, 3, 1) * m.c.weight.squeeze(1)[:, None]).sum(-1) + m.c.bias[:, None],
        x_of(B, D, 5),
        {"c": nn.Conv1d(D, D, 3, groups=D)},
    ),
    "a depthwise kernel, one step": lambda: case(
        lambda m, x: torch.sum(x * m.c.weight[:, 0, :], dim=-1) + m.c.bias,
        x_of(B, D, 3),
        {"c": nn.Conv1d(D, D, 3, groups=D)},
    ),
    "a spectral layer": lambda: case(
        lambda m, x: torch.fft.irfft(torch.einsum("bft,fg->bgt", torch.fft.rfft(x), torch.complex(m.re, m.im))),
        x_of(B, 2, 6),
        {"re": parameter(2, 3), "im": parameter(2, 3)},
    ),
    "complex parameters": lambda: case(
        lambda m, x: torch.view_as_real(x.to(torch.complex128) @ m.w).flatten(1),
        x_of(),
        {"w": nn.Parameter(torch.randn(D, 3, dtype=torch.complex128))},
        outcome="right or refused",
    ),
    "a complex parameter, kept as real": lambda: case(
        lambda m, x: torch.view_as_real(x.to(torch.complex128) @ torch.view_as_complex(m.w)).flatten(1),
        x_of(),
        {"w": parameter(D, 3, 2)},
    ),
}


def placed(x, token):
    x = F.pad(x, (0, 0, 1, 0))
    x[:, 0] = token
    return x


def standardised(weight):
    std, mean = torch.std_mean(weight, dim=(1, 2), keepdim=True)
    return (weight - mean) / (std + 1e-5)


def symmetric(layer):
    class Symmetric(nn.Module):
        def forward(self, weight):
            return weight + weight.flip(2)

    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def cached_parametrisation(m, x):
    with torch.nn.utils.parametrize.cached():
        return m.b(m.a(m.a(x).tanh()).sin())


def dora(m, x):
    weight = m.a.weight + m.up @ m.down
    return F.linear(x, m.m[:, None] * weight / weight.norm(dim=1, keepdim=True), m.a.bias)


def codebook(m, x):
    h = m.a(x)
    index = torch.cdist(h.detach(), m.table.weight.detach()).argmin(1)
    q = m.table(index)
    return torch.cat([m.b(h + (q - h).detach()), q - h.detach(), h - q.detach()], 1)


def state_space(m, x):
    """A selective scan, step by step."""
    a, b, c = -m.log_a.exp(), m.b(x), m.c(x)
    state, outputs = x.new_zeros(len(x), D, 2), []
    for t in range(x.shape[1]):
        state = state * a.exp() + b[:, t, None] * x[:, t, :, None]
        outputs.append((state * c[:, t, None]).sum(-1) + m.d * x[:, t])
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_every_kind(name, judge):
    judge(PARAMETERS[name])


# Positions are for all samples: as many as samples, a multiple, one.
SIZES = [(4, 7), (4, 4), (4, 8), (1, 3)]
POSITIONS = {
    "a position table, by its module": lambda b, t: case(
        lambda m, i: m.a(m.e(i) + positions_of(m.p, i)),
        tokens(b, t),
        {"e": nn.Embedding(V, D), "p": nn.Embedding(9, D), "a": linear()},
    ),
    "a position table, sliced": lambda b, t: case(
        lambda m, i: m.a(m.e(i) + m.p[:, : i.shape[1]]),
        tokens(b, t),
        {"e": nn.Embedding(V, D), "p": parameter(1, 9, D), "a": linear()},
    ),
    "a position table, its weight": lambda b, t: case(
        lambda m, i: m.a(m.e(i) + m.p.weight[: i.shape[1]]),
        tokens(b, t),
        {"e": nn.Embedding(V, D), "p": nn.Embedding(9, D), "a": linear()},
    ),
    "a position table, by expanded positions": lambda b, t: case(
        lambda m, i: m.a(m.e(i) + m.p(torch.arange(i.shape[1]).expand_as(i))),
        tokens(b, t),
        {"e": nn.Embedding(V, D), "p": nn.Embedding(9, D), "a": linear()},
    ),
    "token types of zeros": lambda b, t: case(
        lambda m, i: m.a(m.e(i) + m.p(torch.zeros_like(i))),
        tokens(b, t),
        {"e": nn.Embedding(V, D), "p": nn.Embedding(2, D), "a": linear()},
    ),
    "token types of a buffer": lambda b, t: case(
        lambda m, i: m.a(m.e(i) + m.p(m.types[:, : i.shape[1]].expand(len(i), -1))),
        tokens(b, t),
        {
            "e": nn.Embedding(V, D),
            "p": nn.Embedding(2, D),
            "a": linear(),
            "types": torch.zeros(1, 9, dtype=torch.int64),
        },
    ),
    "positions through a layer": lambda b, t: case(
        lambda m, x: m.b(m.a(x) + m.p(torch.linspace(0, 1, x.shape[1])[:, None]).tanh()),
        x_of(b, t, D),
        {"a": linear(), "b": linear(), "p": linear(1, D)},
    ),
    "relative biases": lambda b, t: case(
        lambda m, x: biased_attention(m, x, m.r(buckets(x.shape[1])).permute(2, 0, 1)),
        x_of(b, t, D),
        {**projections(), "r": nn.Embedding(5, H)},
    ),
    "relative biases, indexed": lambda b, t: case(
        lambda m, x: biased_attention(
            m, x, m.r[buckets(x.shape[1]).view(-1)].view(x.shape[1], x.shape[1], H).permute(2, 0, 1)[None]
        ),
        x_of(b, t, D),
        {**projections(), "r": parameter(5, H)},
    ),
    "relative biases of a network": lambda b, t: case(
        lambda m, x: biased_attention(
            m, x, 16 * m.r(buckets(x.shape[1])[..., None].double()).permute(2, 0, 1).sigmoid()
        ),
        x_of(b, t, D),
        {**projections(), "r": nn.Sequential(linear(1, 3), nn.ReLU(), linear(3, H, bias=False))},
    ),
    "a learned mask": lambda b, t: case(
        lambda m, x: biased_attention(m, x, m.bias[: x.shape[1], : x.shape[1]]),
        x_of(b, t, D),
        {**projections(), "bias": parameter(9, 9)},
    ),
    "a causal mask": lambda b, t: case(
        lambda m, x: biased_attention(m, x, torch.full((x.shape[1],) * 2, -torch.inf).triu(1)),
        x_of(b, t, D),
        projections(),
    ),
    "slopes of a linear bias": lambda b, t: case(
        lambda m, x: biased_attention(m, x, m.slope[:, None, None] * buckets(x.shape[1])),
        x_of(b, t, D),
        {**projections(), "slope": parameter(H)},
    ),
    "sdpa with a mask": lambda b, t: case(sdpa, x_of(b, t, D), {**projections(), "bias": parameter(H, 9, 9)}),
    "a sinusoidal table": lambda b, t: case(
        lambda m, x: m.a(x + m.table[: x.shape[1]]), x_of(b, t, D), {"a": linear(), "table": x_of(9, D)}
    ),
    "rotary positions": lambda b, t: case(rotary, x_of(b, t, D), projections()),
    "disentangled attention": lambda b, t: case(
        disentangled, x_of(b, t, D), {**projections(), "r": nn.Embedding(5, D)}
    ),
}


def sdpa(m, x):
    q, k, v = (layer(x).unflatten(-1, (H, D // H)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    mask = m.bias[:, : x.shape[1], : x.shape[1]]
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def rotary(m, x):
    angle = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1, 0.01])
    c, s = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    q, k = (h * c + torch.cat([-h[..., 3:], h[..., :3]], -1) * s for h in (m.q(x), m.k(x)))
    return (q @ k.mT).softmax(-1) @ m.v(x)


def disentangled(m, x):
    """Content to position: the table's keys by the projection of the samples, gathered (DeBERTa)."""
    q, k = m.q(x), m.k(x)
    to_position = (q @ m.k(m.r.weight).t()).gather(2, buckets(x.shape[1]).expand(len(x), -1, -1))
    return (q @ k.mT + to_position).softmax(-1) @ m.v(x)


@pytest.mark.parametrize(("b", "t"), SIZES)
@pytest.mark.parametrize("name", POSITIONS)
def test_positions_as_many_as_samples(name, b, t, judge):
    judge(lambda: POSITIONS[name](b, t))


# --- layers ----------------------------------------------------------------------------------------------------------


def attention(**options):
    return nn.MultiheadAttention(D, H, batch_first=True, **options)


def packed(m, x, lengths):
    rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(m.rnn(rows)[0], batch_first=True, total_length=x.shape[1])[0]


def packed_last(m, x, lengths):
    _, last = m.rnn(pack_padded_sequence(x.transpose(0, 1), lengths, enforce_sorted=False))
    return m.b((last[0] if isinstance(last, tuple) else last)[-1])


LENGTHS = torch.tensor([2, 5, 1, 3])


def recurrent(kind, **options):
    return {"rnn": kind(D, 3, batch_first=True, **options), "b": linear(3)}


def outputs_and_states(m, x):
    outputs, states = m.rnn(x)
    return outputs, *(s.transpose(0, 1) for s in (states if isinstance(states, tuple) else (states,)))


def cells(m, x):
    state = None
    for t in range(x.shape[1]):
        state = m.cell(x[:, t], state)
    return state[0]


def step_by_step(m, x):
    state = m.start.expand(len(x), -1)
    for t in range(x.shape[1]):
        state = m.cell(x[:, t], state)
    return state


LAYERS = {
    **{
        f"{kind.__name__} {options or ''}": lambda kind=kind, options=options: case(
            lambda m, x: m.rnn(x)[0], x_of(B, 5, D), {"rnn": kind(D, 3, batch_first=True, **options)}
        )
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
        for options in ({}, {"num_layers": 2, "bidirectional": True}, {"bias": False})
    },
    **{
        f"{kind.__name__}, its outputs and its last states": lambda kind=kind: case(
            outputs_and_states, x_of(B, 5, D), {"rnn": kind(D, 3, batch_first=True)}
        )
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
    },
    "an LSTM cell, its first state": lambda: case(
        lambda m, x: m.cell(x), x_of(), {"cell": nn.LSTMCell(D, 3)}, loss=lambda o, t: o[0].sin().sum(1)
    ),
    "an LSTM cell, both states": lambda: case(lambda m, x: m.cell(x), x_of(), {"cell": nn.LSTMCell(D, 3)}),
    "LSTM cells, step by step": lambda: case(cells, x_of(B, 5, D), {"cell": nn.LSTMCell(D, 3)}),
    "an LSTM, its last state": lambda: case(lambda m, x: m.b(m.rnn(x)[1][0][-1]), x_of(B, 5, D), recurrent(nn.LSTM)),
    "an LSTM, projected": lambda: case(
        lambda m, x: m.rnn(x)[0], x_of(B, 5, D), {"rnn": nn.LSTM(D, 3, proj_size=2, batch_first=True)}
    ),
    "an LSTM, time-major": lambda: case(
        lambda m, x: m.rnn(x.transpose(0, 1))[0].transpose(0, 1), x_of(B, 5, D), {"rnn": nn.LSTM(D, 3)}
    ),
    "an LSTM, as many steps as samples": lambda: case(
        lambda m, x: m.rnn(x)[0], x_of(B, B, D), {"rnn": nn.LSTM(D, 3, batch_first=True)}
    ),
    "a GRU with a learned first state": lambda: case(
        lambda m, x: m.rnn(x, m.start.expand(-1, len(x), -1).contiguous())[0],
        x_of(B, 5, D),
        {"rnn": nn.GRU(D, 3, batch_first=True), "start": parameter(1, 1, 3)},
    ),
    "a cell, step by step": lambda: case(
        step_by_step, x_of(B, 5, D), {"cell": nn.GRUCell(D, 3), "start": parameter(1, 3)}
    ),
    "an RNN of ReLUs": lambda: case(
        lambda m, x: m.rnn(x)[0], x_of(B, 5, D), {"rnn": nn.RNN(D, 3, nonlinearity="relu", batch_first=True)}
    ),
    **{
        f"packed {kind.__name__}": lambda kind=kind: case(
            packed, (x_of(B, 5, D), LENGTHS), {"rnn": kind(D, 3, batch_first=True)}
        )
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
    },
    "packed LSTM, both directions, its last state": lambda: case(
        packed_last, (x_of(B, 5, D), LENGTHS), {"rnn": nn.LSTM(D, 3, num_layers=2, bidirectional=True), "b": linear(3)}
    ),
    "packed GRU, all of one length": lambda: case(
        packed_last, (x_of(B, B, D), torch.full((B,), B)), {"rnn": nn.GRU(D, 3), "b": linear(3)}
    ),
    "packed rows through a linear layer": lambda: case(packed_linear, (x_of(B, 5, D), LENGTHS), {"a": linear()}),
    "attention with a learned key and value": lambda: case(
        lambda m, x: m.a(x, x, x)[0], x_of(B, T, D), {"a": attention(add_bias_kv=True)}
    ),
    "attention with a learned key and value, T = B": lambda: case(
        lambda m, x: m.a(x, x, x)[0], x_of(B, B, D), {"a": attention(add_bias_kv=True, add_zero_attn=True)}
    ),
    "attention with its weights": lambda: case(
        lambda m, x: m.a(x, x, x, need_weights=True), x_of(B, T, D), {"a": attention()}
    ),
    "attention with a mask for all, T = B": lambda: case(
        lambda m, x: m.a(x, x, x, attn_mask=torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1))[0],
        x_of(B, B, D),
        {"a": attention()},
    ),
    "attention with padding": lambda: case(
        lambda m, x, pad: m.a(x, x, x, key_padding_mask=pad, need_weights=False)[0],
        (x_of(B, T, D), torch.arange(T) >= torch.tensor([1, 3, 2, 3])[:, None]),
        {"a": attention()},
    ),
    "attention, time-major, T = B": lambda: case(
        lambda m, x: m.a(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1), x_of(B, B, D), {"a": nn.MultiheadAttention(D, H)}
    ),
    "attention over queries of all samples": lambda: case(
        lambda m, x: m.a(m.q.expand(len(x), -1, -1), x, x)[0],
        x_of(B, T, D),
        {"a": attention(), "q": parameter(1, 2, D)},
    ),
    "a transformer's encoder": lambda: {
        "model": nn.TransformerEncoder(
            nn.TransformerEncoderLayer(D, H, 8, 0.0, batch_first=True, norm_first=True),
            2,
            nn.LayerNorm(D),
            enable_nested_tensor=False,
        ),
        "x": x_of(B, T, D),
    },
    "a transformer's encoder, in training": lambda: {
        "model": nn.TransformerEncoderLayer(D, H, 8, batch_first=True).train(),
        "x": x_of(B, T, D),
        "oracle": "batch",
        "seed": 5,
    },
    "a transformer's encoder, in evaluation": lambda: {
        "model": nn.TransformerEncoderLayer(D, H, 8, batch_first=True).eval(),
        "x": x_of(B, T, D),
    },
    "a transformer's decoder": lambda: {
        "model": nn.TransformerDecoderLayer(D, H, 8, 0.0, batch_first=True),
        "x": (x_of(B, T, D), x_of(B, 5, D)),
    },
    "a transformer, time-major": lambda: case(
        lambda m, x, y: m.t(x.transpose(0, 1), y.transpose(0, 1)).transpose(0, 1),
        (x_of(B, 5, D), x_of(B, T, D)),
        {"t": nn.Transformer(D, H, 1, 1, 8, 0.0)},
    ),
    "an EmbeddingBag": lambda: case(lambda m, i: m.e(i), tokens(B, 5), {"e": nn.EmbeddingBag(V, D, mode="mean")}),
    "an EmbeddingBag of the largest": lambda: case(
        lambda m, i: m.e(i), tokens(B, 5), {"e": nn.EmbeddingBag(V, D, mode="max")}
    ),
    "an EmbeddingBag with weights": lambda: case(
        lambda m, i, w: m.e(i, per_sample_weights=w),
        (tokens(B, 5), x_of(B, 5)),
        {"e": nn.EmbeddingBag(V, D, mode="sum")},
    ),
    "a convolution of unfolded patches": lambda: case(
        lambda m, x: (m.c.weight.flatten(1) @ F.unfold(x, 3)).unflatten(2, (3, 3)),
        x_of(B, 2, 5, 5),
        {"c": nn.Conv2d(2, 4, 3, bias=False)},
    ),
    "a convolution along the features": lambda: case(lambda m, x: m.c(x[:, None]), x_of(), {"c": nn.Conv1d(1, 3, 3)}),
    "a weight as a kernel": lambda: case(
        lambda m, x: F.conv1d(x, m.a.weight[:, :, None], m.a.bias), x_of(B, D, 5), {"a": linear()}
    ),
    "a kernel as a weight": lambda: case(
        lambda m, x: F.linear(x, m.c.weight.squeeze(2), m.c.bias), x_of(), {"c": nn.Conv1d(D, 5, 1)}
    ),
    "norms": lambda: {
        "model": nn.Sequential(nn.LayerNorm(D), linear(), nn.GroupNorm(2, D), linear(), nn.RMSNorm(D)),
        "x": x_of(),
    },
    "a batch norm in evaluation": lambda: {
        "model": nn.Sequential(linear(), nn.BatchNorm1d(D), nn.Tanh(), linear()).eval(),
        "x": x_of(),
    },
    "a list and a dict of parameters": lambda: case(
        lambda m, x: F.linear(x, m.l[0], m.d["b"]) * m.l[1],
        x_of(),
        {"l": nn.ParameterList([parameter(D, D), parameter(D)]), "d": nn.ParameterDict({"b": parameter(D)})},
    ),
}


def packed_linear(m, x, lengths):
    rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    rows = rows._replace(data=m.a(rows.data).tanh())
    return pad_packed_sequence(rows, batch_first=True, total_length=x.shape[1])[0]


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, judge):
    judge(LAYERS[name])


# --- orders of rows --------------------------------------------------------------------------------------------------

K = 3


def crops(x, size=4):
    """Three crops of each image, crop by crop: [K·B, ...]."""
    return torch.cat([x[..., :size, :size], x[..., -size:, -size:], x[..., 1 : size + 1, 1 : size + 1]])


def windows(m, x, size=2):
    """[B, H, W, D] -> [B·windows, size², D] -> back, as Swin's."""
    b, h, w, _ = x.shape
    parts = x.view(b, h // size, size, w // size, size, D).permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, D)
    parts = m.b((parts @ parts.mT).softmax(-1) @ m.a(parts) + m.bias)
    return parts.view(b, h // size, w // size, size, size, D).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, D)


def per_group(output, target):
    """Losses of B samples from outputs of K rows each, sample by sample."""
    return (output.unflatten(0, (-1, K)) + 0.1).square().flatten(1).sum(1)


def per_group_view_by_view(output, target):
    return (output.unflatten(0, (K, -1)) + 0.1).square().transpose(0, 1).flatten(1).sum(1)


def group(x, b):
    return x[b * K : (b + 1) * K]


def group_view_by_view(x, b):
    return x[b :: len(x) // K]


def token_losses(output, labels):
    """Of logits [B·T, V] and labels [B·T]."""
    return F.cross_entropy(output, labels.flatten(), reduction="none").view(len(labels), -1).sum(1)


def ctc(output, target):
    length = torch.full((output.shape[1],), output.shape[0])
    return F.ctc_loss(output.log_softmax(2), target, length, torch.full_like(length, target.shape[1]), reduction="none")


ROWS = {
    "time-major": lambda: case(lambda m, x: m.b(m.a(x.transpose(0, 1)).tanh()).transpose(0, 1), x_of(B, T, D)),
    "time-major, T = B": lambda: case(lambda m, x: m.b(m.a(x.transpose(0, 1)).tanh()).transpose(0, 1), x_of(B, B, D)),
    "time-major all the way": lambda: case(
        lambda m, x: m.b(m.a(x).tanh()),
        x_of(T, B, D),
        loss=lambda output, target: output.square().sum((0, 2)),
        part=lambda x, b: x[:, b : b + 1],
    ),
    "time-major all the way, T = B": lambda: case(
        lambda m, x: m.b(m.a(x).tanh()),
        x_of(B, B, D),
        loss=lambda output, target: output.square().sum((0, 2)),
        part=lambda x, b: x[:, b : b + 1],
    ),
    "samples in the last dimension": lambda: case(
        lambda m, x: m.w @ (m.v @ x).tanh(),
        x_of(D, B),
        {"w": parameter(5, D), "v": parameter(D, D)},
        loss=lambda output, target: output.square().sum(0),
        part=lambda x, b: x[:, b : b + 1],
    ),
    "samples in the middle": lambda: case(
        lambda m, x: m.a(x).sin() * m.scale,
        x_of(T, B, 2, D),
        {"a": linear(), "scale": parameter(T, 1, 2, D)},
        loss=lambda output, target: output.square().sum((0, 2, 3)),
        part=lambda x, b: x[:, b : b + 1],
    ),
    "[B·T]": lambda: case(lambda m, x: m.b(m.a(x.flatten(0, 1)).tanh()).unflatten(0, x.shape[:2]), x_of(B, T, D)),
    "[T·B]": lambda: case(
        lambda m, x: m.b(m.a(x.transpose(0, 1).flatten(0, 1)).tanh()).unflatten(0, (x.shape[1], -1)).transpose(0, 1),
        x_of(B, T, D),
    ),
    "[T·B], T = B": lambda: case(
        lambda m, x: m.b(m.a(x.transpose(0, 1).flatten(0, 1)).tanh()).unflatten(0, (x.shape[1], -1)).transpose(0, 1),
        x_of(B, B, D),
    ),
    "[B·T] and [T·B] in one model": lambda: case(
        lambda m, x: (
            m.b(m.a(x.flatten(0, 1)).unflatten(0, x.shape[:2]).transpose(0, 1).flatten(0, 1).tanh())
            .unflatten(0, (x.shape[1], -1))
            .transpose(0, 1)
        ),
        x_of(B, 2, D),
    ),
    "[B, T·D]": lambda: case(lambda m, x: m.a(x.flatten(1)), x_of(B, T, D), {"a": linear(T * D, 5)}),
    "position by position": lambda: case(
        lambda m, x: torch.stack([m.a(x[:, t]).tanh() for t in range(T)], 1), x_of(B, T, D), {"a": linear()}
    ),
    "position by position, T = B": lambda: case(
        lambda m, x: torch.stack([m.a(x[:, t]).tanh() for t in range(B)], 1), x_of(B, B, D), {"a": linear()}
    ),
    "sample by sample": lambda: case(lambda m, x: torch.stack([m.b(m.a(v).tanh()) for v in x]), x_of()),
    "sample by sample, T = B": lambda: case(lambda m, x: torch.stack([m.b(m.a(v).tanh()) for v in x]), x_of(B, B, D)),
    "sample by sample, by split": lambda: case(
        lambda m, x: torch.cat([m.b(m.a(v).tanh()) for v in x.split(1)]), x_of(B, B, D)
    ),
    "half of the samples at a time": lambda: case(
        lambda m, x: torch.cat([m.b(m.a(v).tanh()) for v in x.tensor_split(2)]), x_of()
    ),
    "three and one": lambda: case(lambda m, x: torch.cat([m.b(m.a(x[:3])), m.a(x[3:]).sin()]), x_of(), oracle="batch"),
    "two inputs as one batch": lambda: case(
        lambda m, x, y: m.a(torch.cat([x, y])).tanh().chunk(2)[0] - m.b(torch.stack([x, y])).sin()[1], (x_of(), x_of())
    ),
    "reversed and back": lambda: case(lambda m, x: m.b(m.a(x.flip(0)).tanh()).flip(0), x_of()),
    "rolled and back": lambda: case(lambda m, x: m.b(m.a(x.roll(1, 0)).tanh()).roll(-1, 0), x_of()),
    "permuted and back": lambda: case(
        lambda m, x, order: m.b(m.a(x[order]).tanh())[order.argsort()],
        (x_of(), torch.tensor([2, 0, 3, 1])),
        part=alone_in_order,
    ),
    "permuted and back, by index_select and gather": lambda: case(
        lambda m, x, order: m.b(m.a(x.index_select(0, order)).tanh()).gather(0, order.argsort()[:, None].expand(-1, D)),
        (x_of(), torch.tensor([2, 0, 3, 1])),
        part=alone_in_order,
    ),
    "permuted and put back in place": lambda: case(
        lambda m, x, order: torch.empty_like(x).index_copy(0, order, m.b(m.a(x[order]).tanh())),
        (x_of(), torch.tensor([2, 0, 3, 1])),
        part=alone_in_order,
    ),
    "positions permuted": lambda: case(
        lambda m, x: m.b(m.a(x.flatten(0, 1)[ORDER]).tanh())[ORDER.argsort()].unflatten(0, x.shape[:2]),
        x_of(B, T, D),
        oracle="batch",
    ),
    "only the positions that count": lambda: case(
        masked_rows, (x_of(B, T, D), torch.arange(T) < torch.tensor([1, 3, 2, 1])[:, None])
    ),
    "only the positions that count, as many as samples": lambda: case(
        masked_rows, (x_of(B, T, D), torch.eye(B, T).roll(1, 0) > 0)
    ),
    "windows": lambda: case(windows, x_of(B, 4, 4, D), {"a": linear(), "b": linear(), "bias": parameter(4, D)}),
    "windows, as many as samples": lambda: case(
        windows, x_of(4, 4, 4, D), {"a": linear(), "b": linear(), "bias": parameter(4, D)}
    ),
    "windows of a convolution": lambda: case(lambda m, x: m.a(x.unfold(1, 3, 1)).sum(1), x_of(B, 5), {"a": linear(3)}),
    "crops, averaged": lambda: case(
        lambda m, x: sum(m.c(crops(x)).tanh().chunk(K)), x_of(B, 2, 6, 6), {"c": nn.Conv2d(2, 3, 3)}
    ),
    "views by repeat": lambda: case(
        lambda m, x: sum((m.a(x.repeat(K, 1)) * m.s.repeat_interleave(len(x), 0)).chunk(K)).tanh(),
        x_of(),
        {"a": linear(), "s": parameter(K, D)},
    ),
    "views by repeat_interleave": lambda: case(
        lambda m, x: m.b(m.a(x.repeat_interleave(K, 0)).view(len(x), K, D) * m.s).sum(1),
        x_of(),
        {"a": linear(), "b": linear(), "s": parameter(K, D)},
    ),
    "views by expand": lambda: case(
        lambda m, x: m.b((x[:, None] + m.s).expand(len(x), K, D).reshape(-1, D)).view(len(x), -1),
        x_of(),
        {"b": linear(), "s": parameter(K, D)},
    ),
    "K augmentations of each sample": lambda: case(
        lambda m, x: m.b(m.a(x).tanh()), x_of(B * K, D), loss=per_group, part=group
    ),
    "K augmentations, view by view": lambda: case(
        lambda m, x: m.b(m.a(x).tanh()), x_of(K * B, D), loss=per_group_view_by_view, part=group_view_by_view
    ),
    "K augmentations of positions": lambda: case(
        lambda m, x: m.b(m.a(x).tanh()), x_of(B * K, T, D), loss=per_group, part=group
    ),
    "K augmentations, one loss of their mean": lambda: case(
        lambda m, x: m.a(x),
        x_of(B * K, D),
        {"a": linear()},
        loss=lambda o, t: o.view(-1, K, D).mean(1).sin().sum(1),
        part=group,
    ),
    "losses of [B·T, V] logits": lambda: case(
        lambda m, i: m.a(m.e(i)).flatten(0, 1),
        tokens(),
        {"e": nn.Embedding(V, D), "a": linear(D, V)},
        loss=token_losses,
    ),
    "losses of [B·T, V] logits, rows flattened below": lambda: case(
        lambda m, i: m.a(m.e(i.flatten()).tanh()),
        tokens(B, B),
        {"e": nn.Embedding(V, D), "a": linear(D, V)},
        loss=token_losses,
    ),
    "losses of tokens, shifted": lambda: case(
        lambda m, i: m.a(m.e(i)),
        tokens(B, 5),
        {"e": nn.Embedding(V, D), "a": linear(D, V)},
        target=tokens(B, 5).masked_fill(torch.rand(B, 5) < 0.3, -100),
        loss=lambda o, y: (
            F.cross_entropy(o[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction="none", ignore_index=-100)
            .view(len(y), -1)
            .sum(1)
            / (y != -100).sum(1)
        ),
    ),
    "CTC": lambda: case(
        lambda m, x: m.a(x.transpose(0, 1)),
        x_of(B, 7, D),
        {"a": linear(D, 5)},
        target=torch.randint(1, 5, (B, 2)),
        loss=ctc,
    ),
    "CTC, as many frames as samples": lambda: case(
        lambda m, x: m.rnn(x.transpose(0, 1))[0],
        x_of(6, 6, D),
        {"rnn": nn.GRU(D, 5)},
        target=torch.randint(1, 5, (6, 2)),
        loss=ctc,
    ),
    "squeezed": lambda: case(lambda m, x: m.b(m.a(x[:, None]).squeeze().view(-1, D)), x_of()),
    "squeezed, one sample": lambda: case(lambda m, x: m.b(m.a(x[:, None]).squeeze()).view(-1, D), x_of(1, D)),
    "squeezed to one loss": lambda: case(
        lambda m, x: m.a(x).squeeze(), x_of(1, D), {"a": linear(D, 1)}, loss=lambda o, t: (o - 1).square().reshape(-1)
    ),
    "one sample": lambda: case(lambda m, x: m.b(m.a(x).tanh()), x_of(1, D)),
    "one sample, one position, one feature": lambda: case(
        lambda m, x: m.b(m.a(x).tanh()), x_of(1, 1, 1), {"a": linear(1, 1), "b": linear(1, 1)}
    ),
}

ORDER = torch.randperm(B * T, generator=torch.Generator().manual_seed(1))


def alone_in_order(tree, b):
    if isinstance(tree, tuple):
        return tree[0][b : b + 1], torch.zeros(1, dtype=torch.int64)
    return tree[b : b + 1]


def masked_rows(m, x, mask):
    y = m.b(m.a(x[mask]).tanh())
    return torch.zeros_like(x).masked_scatter(mask[..., None].expand_as(x), y)


@pytest.mark.parametrize("name", ROWS)
def test_orders_of_rows(name, judge):
    judge(ROWS[name])


# --- rows of which the data decide whose they are --------------------------------------------------------------------


def experts(kind, x=None):
    members = {"gate": linear(D, 3), "e": nn.ModuleList(linear() for _ in range(3)), "head": linear()}
    if kind in ("bmm over experts", "one-hot dispatch"):
        members["e"] = None
        members |= {"up": parameter(3, D, 4), "down": parameter(3, 4, D), "bias": parameter(3, 1, D)}
    return case(ROUTES[kind], x_of(B, T, D) if x is None else x, members)


def top1(m, x):
    h = x.flatten(0, -2)
    p, route = m.gate(h).softmax(1).max(1)
    return h, p[:, None], route


def by_where(m, x):
    h, p, route = top1(m, x)
    out = torch.zeros_like(h)
    for k, expert in enumerate(m.e):
        rows = torch.where(route == k)[0]
        out = out.index_add(0, rows, p[rows] * expert(h[rows]))
    return m.head(out.view_as(x))


def by_mask(m, x):
    h, p, route = top1(m, x)
    out = torch.zeros_like(h)
    for k, expert in enumerate(m.e):
        if (route == k).any():
            out[route == k] = p[route == k] * expert(h[route == k]).tanh()
    return m.head(out.view_as(x))


def by_sort(m, x):
    """Rows sorted by expert, cut into their parts and put back, as grouped products want them."""
    h, p, route = top1(m, x)
    order = route.argsort(stable=True)
    parts = h[order].split(torch.bincount(route, minlength=3).tolist())
    out = torch.cat([expert(part) for expert, part in zip(m.e, parts, strict=True)])
    return m.head((p * out[order.argsort()]).view_as(x))


def of_two(m, x):
    """Two experts a token, as Mixtral's."""
    h = x.flatten(0, -2)
    p, route = m.gate(h).softmax(1).topk(2)
    out = torch.zeros_like(h)
    mask = F.one_hot(route, 3).permute(2, 1, 0)
    for k, expert in enumerate(m.e):
        place, rows = torch.where(mask[k])
        out.index_add_(0, rows, expert(h[None, rows].reshape(-1, D)) * p[rows, place, None])
    return m.head(out.view_as(x))


def dense(m, x):
    h, _, _ = top1(m, x)
    p = m.gate(h).softmax(1)
    return m.head(sum(p[:, k, None] * expert(h).tanh() for k, expert in enumerate(m.e)).view_as(x))


def over_experts(m, x):
    """Every expert on every token by one batched product (Llama 4)."""
    h, _, _ = top1(m, x)
    y = torch.bmm(torch.bmm(h.expand(3, *h.shape), m.up).tanh(), m.down) + m.bias
    return m.head((y * m.gate(h).softmax(1).t()[..., None]).sum(0).view_as(x))


def one_hot(m, x):
    h, p, route = top1(m, x)
    sent = F.one_hot(route, 3).to(h.dtype)
    y = torch.einsum("ne,nd,edf->enf", sent, h, m.up).tanh()
    return m.head((torch.einsum("enf,efd,ne->nd", y, m.down, sent) * p).view_as(x))


ROUTES = {
    "where and index_add": by_where,
    "a mask": by_mask,
    "a sort": by_sort,
    "two experts a token": of_two,
    "all experts": dense,
    "bmm over experts": over_experts,
    "one-hot dispatch": one_hot,
}


@pytest.mark.parametrize("name", ROUTES)
def test_experts(name, judge):
    judge(lambda: experts(name))
    judge(lambda: experts(name, x_of(B, D)))


def graph(b: int):
    """b graphs of 1 + k nodes, as (x [N, D], edges [2, E], whose [N])."""
    sizes = [1 + k % 3 for k in range(b)]
    start, edges, whose = 0, [], []
    for k, size in enumerate(sizes):
        edges += [(start + i, start + (i + 1) % size) for i in range(size)]
        whose += [k] * size
        start += size
    return x_of(start, D), torch.tensor(edges).t(), torch.tensor(whose)


def one_graph(tree, b):
    if not isinstance(tree, tuple):  # the target: of the nodes
        return tree
    x, edges, whose = tree
    nodes = (whose == b).nonzero()[:, 0]
    mine = edges[:, whose[edges[0]] == b] - nodes[0]
    return x[nodes], mine, torch.zeros(len(nodes), dtype=torch.int64)


def convolved(m, x, edges, whose):
    for layer in (m.a, m.b):
        h = layer(x)
        x = torch.tanh(m.own(x) + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))
    pooled = x.new_zeros(int(whose.max()) + 1, D).index_add(0, whose, x)
    return m.head(pooled)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_graphs_with_a_batch_vector(count, told, judge):
    def of_graphs():
        torch.manual_seed(count)
        x = graph(count)
        members = {name: linear() for name in ("a", "b", "own", "head")}
        options = {"segments": x[2]} if told else {}
        outcome = "right" if told else "right or refused"
        return case(convolved, x, members, part=one_graph, options=options, outcome=outcome)

    judge(of_graphs)


def bags(b: int):
    sizes = torch.tensor([2, 0, 3, 1, 4, 2])[:b]
    return tokens(int(sizes.sum())), torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)[:-1]])


def one_bag(tree, b):
    if not isinstance(tree, tuple):
        return tree
    index, offsets = tree
    ends = [*offsets.tolist(), len(index)]
    return index[ends[b] : ends[b + 1]], torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_embedding_bags_with_offsets(count, mode, told, judge):
    def of_bags():
        x = bags(count)
        ends = torch.tensor([*x[1][1:].tolist(), len(x[0])])
        owners = torch.repeat_interleave(torch.arange(count), ends - x[1])
        return {
            "model": Net(lambda m, i, o: m.a(m.e(i, o).tanh()), e=nn.EmbeddingBag(V, D, mode=mode), a=linear()),
            "x": x,
            "part": one_bag,
            "options": {"segments": owners} if told else {},
        }

    judge(of_bags)


@pytest.mark.parametrize("lengths", [[3, 1, 2, 4], [2, 2, 2, 2], [1, 1, 1, 1], [4, 0, 0, 4]])
def test_sequences_packed_into_one_row(lengths, judge):
    """[N, D] of sequences one after the other, whose attention stays within each."""

    def attend(m, x, owners):
        mask = owners[:, None] == owners
        a = (m.a(x) @ m.b(x).t()).masked_fill(~mask, -torch.inf).softmax(1)
        return a @ x

    def of_sequences():
        owners = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
        x = x_of(len(owners), D)

        def loss(output, target):
            return output.new_zeros(4 if len(target) == len(x) else 1).index_add(
                0, owners if len(target) == len(x) else owners[: len(output)] * 0, output.square().sum(1)
            )

        def part(tree, b):
            return (tree[0][owners == b], owners[owners == b]) if isinstance(tree, tuple) else tree[owners == b]

        members = {"a": linear(), "b": linear()}
        return case(attend, (x, owners), members, loss=loss, part=part, options={"segments": owners}, oracle="batch")

    judge(of_sequences)


# --- samples that use others as constants, and samples that mix ------------------------------------------------------


def normalised(values):
    return (values - values.mean()) / (values.std() + 1e-8)


def policy(m, x, *_):
    h = m.a(x).tanh()
    return m.pi(h).log_softmax(1), m.v(h).squeeze(1)


def ppo(output, target):
    """Clipped surrogate with advantages that are normalised over the batch, a value loss and an entropy bonus."""
    log_p, value = output
    action, old, advantage, returned = target
    ratio = (log_p.gather(1, action[:, None]).squeeze(1) - old).exp()
    advantage = normalised(advantage)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return -surrogate + 0.5 * (value - returned).square() + 0.01 * (log_p.exp() * log_p).sum(1)


def ppo_case(**more):
    x = x_of()
    target = (torch.randint(0, 3, (B,)), -torch.rand(B), x_of(B), x_of(B))
    members = {"a": linear(), "pi": linear(D, 3), "v": linear(D, 1)}
    return case(policy, x, members, target=target, loss=ppo, oracle="batch", **more)


def of_two_views(detached: bool):
    def loss(output, target):
        a, b = output.chunk(2)
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        logits = a @ (b.detach() if detached else b).t()
        return F.cross_entropy(logits, torch.arange(len(a)), reduction="none")

    return loss


CONSTANTS = {
    "loss / B": lambda: case(
        lambda m, x: m.b(m.a(x).tanh()), x_of(), loss=lambda o, t: o.square().sum(1) / len(o), oracle="batch"
    ),
    "a detached batch mean in the loss": lambda: case(
        lambda m, x: m.b(m.a(x).tanh()),
        x_of(),
        loss=lambda o, t: (o - o.mean(0).detach()).square().sum(1),
        oracle="batch",
    ),
    "weights of the losses by their rank": lambda: case(
        lambda m, x: m.b(m.a(x).tanh()),
        x_of(),
        loss=lambda o, t: (v := o.square().sum(1)) * v.detach().argsort().argsort(),
        oracle="batch",
    ),
    "weights of the losses by a softmax": lambda: case(
        lambda m, x: m.b(m.a(x).tanh()),
        x_of(),
        loss=lambda o, t: (v := o.square().sum(1)) * (-v.detach()).softmax(0),
        oracle="batch",
    ),
    "a statistic under no_grad in the model": lambda: case(
        lambda m, x: m.b(m.a(x) - torch.no_grad()(lambda: m.a(x).mean(0))()), x_of(), oracle="batch"
    ),
    "a whitening that is a constant": lambda: case(
        lambda m, x: m.b(x @ torch.linalg.inv(torch.eye(D) + x.t() @ x).detach() + m.a(x)), x_of(), oracle="batch"
    ),
    "the input's own statistics": lambda: case(
        lambda m, x: m.b(m.a((x - x.mean(0)) / x.std(0)).tanh()), x_of(), oracle="batch"
    ),
    "normalised advantages": lambda: ppo_case(),
    "a baseline of the other samples": lambda: case(
        lambda m, x: m.a(x).log_softmax(1),
        x_of(),
        {"a": linear(D, 3)},
        target=x_of(B),
        loss=lambda o, r: -(r - (r.sum() - r) / (len(r) - 1)) * o[:, 0],
        oracle="batch",
    ),
    "negatives that are detached": lambda: case(
        lambda m, x: m.b(m.a(x).tanh()),
        x_of(),
        loss=lambda o, t: -((o * o).sum(1, keepdim=True) - o @ o.detach().t()).sigmoid().log().sum(1),
        oracle="batch",
    ),
    "a momentum encoder": lambda: case(
        lambda m, x: (m.a(x), torch.no_grad()(m.b)(x)),
        x_of(),
        loss=lambda o, t: F.cross_entropy(o[0] @ o[1].t(), torch.arange(len(o[0])), reduction="none"),
        oracle="batch",
    ),
    "two views, the second detached": lambda: case(
        lambda m, x, y: m.b(m.a(torch.cat([x, y])).tanh()), (x_of(), x_of()), loss=of_two_views(True), oracle="batch"
    ),
    "a mixed input": lambda: case(lambda m, x: m.b(m.a(0.7 * x + 0.3 * x.roll(1, 0)).tanh()), x_of(), oracle="batch"),
    "a batch norm in training below a frozen part": lambda: {
        "model": nn.Sequential(linear(), nn.BatchNorm1d(D).train(), nn.Tanh()).requires_grad_(False).append(linear()),
        "x": x_of(),
        "oracle": "batch",
    },
    "a batch norm in training below the chosen head": lambda: {
        "model": nn.Sequential(linear(), nn.BatchNorm1d(D).train(), nn.Tanh(), linear()),
        "x": x_of(),
        "oracle": "batch",
        "options": {"layers": ["3"]},
        "names": {"3.weight", "3.bias"},
    },
    "a loss of ranks within a sample": lambda: case(
        lambda m, x: m.b(m.a(x).tanh()), x_of(), loss=lambda o, t: (o.sort(1).values * torch.arange(D)).sum(1)
    ),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_other_samples_as_constants(name, judge):
    judge(CONSTANTS[name])


MIXED = {
    "batch norm in training": lambda: {
        "model": nn.Sequential(linear(), nn.BatchNorm1d(D), nn.Tanh(), linear()),
        "x": x_of(),
    },
    "batch norm in training, of a convolution": lambda: {
        "model": nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Flatten(), linear(12)),
        "x": x_of(B, 2, D),
    },
    "batch norm in training by its function": lambda: case(
        lambda m, x: m.b(F.batch_norm(m.a(x), None, None, m.scale, training=True)),
        x_of(),
        {"a": linear(), "b": linear(), "scale": parameter(D)},
    ),
    "batch norm without running statistics": lambda: {
        "model": nn.Sequential(linear(), nn.BatchNorm1d(D, track_running_stats=False), linear()).eval(),
        "x": x_of(),
    },
    "attention over the batch": lambda: case(lambda m, x: m.b((m.a(x) @ m.a(x).t()).softmax(1) @ x), x_of()),
    "attention over the batch by its module": lambda: case(
        lambda m, x: m.a(x, x, x)[0], x_of(), {"a": nn.MultiheadAttention(D, H)}
    ),
    "batch-first input of time-major attention": lambda: case(
        lambda m, x: m.a(x, x, x)[0], x_of(B, B, D), {"a": nn.MultiheadAttention(D, H)}
    ),
    "batch-first input of a time-major LSTM": lambda: case(
        lambda m, x: m.rnn(x)[0], x_of(B, B, D), {"rnn": nn.LSTM(D, 3)}
    ),
    **{
        f"{name} over the batch": lambda f=f: case(lambda m, x: m.b(f(m.a(x).tanh())), x_of())
        for name, f in {
            "roll": lambda h: h + h.roll(1, 0),
            "flip": lambda h: h + h.flip(0),
            "sort": lambda h: h + h.sort(0).values,
            "cumsum": lambda h: h.cumsum(0),
            "softmax": lambda h: h.softmax(0),
            "max": lambda h: h - h.max(0).values,
            "norm": lambda h: h / h.norm(),
            "diff": lambda h: torch.cat([h[:1], h.diff(dim=0)]),
            "einsum": lambda h: torch.einsum("bi,ci->bi", h, h),
            "matrix": lambda h: (h.t() @ h @ h.t()).t(),
            "convolution": lambda h: F.conv1d(h.t()[:, None], torch.ones(1, 1, 3), padding=1)[:, 0].t(),
            "interpolation": lambda h: F.interpolate(h.t()[None], len(h) * 2)[0, :, : len(h)].t(),
            "gather": lambda h: h.gather(0, h.argmax(0).expand_as(h)),
        }.items()
    },
    "batch statistics in the loss": lambda: case(
        lambda m, x: m.a(x), x_of(), {"a": linear()}, loss=lambda o, t: (o - o.mean(0)).square().sum(1)
    ),
    "a standardised output in the loss": lambda: case(
        lambda m, x: m.a(x), x_of(), {"a": linear()}, loss=lambda o, t: ((o - o.mean(0)) / o.std(0)).pow(3).sum(1)
    ),
    "a contrastive loss": lambda: case(
        lambda m, x, y: m.b(m.a(torch.cat([x, y])).tanh()), (x_of(), x_of()), loss=of_two_views(False)
    ),
    "a contrastive loss of two towers": lambda: case(
        lambda m, x, y: F.normalize(m.a(x), dim=1) @ F.normalize(m.b(y), dim=1).t() * m.t.exp(),
        (x_of(), x_of()),
        {"a": linear(), "b": linear(), "t": parameter()},
        loss=lambda o, t: F.cross_entropy(o, torch.arange(len(o)), reduction="none"),
    ),
    "a triplet loss in the batch": lambda: case(
        lambda m, x: m.a(x),
        x_of(),
        {"a": linear()},
        loss=lambda o, t: (
            F.relu(1 + (o - o.roll(1, 0)).square().sum(1) - (o - o.roll(2, 0)).square().sum(1)) + o.sum(1)
        ),
    ),
    "a variance of the batch": lambda: case(
        lambda m, x: m.a(x), x_of(), {"a": linear()}, loss=lambda o, t: o.square().sum(1) + F.relu(1 - o.var(0)).sum()
    ),
    "a loss in another order": lambda: case(
        lambda m, x: m.b(m.a(x).tanh()), x_of(), loss=lambda o, t: o.square().sum(1) + o.square().sum(1).flip(0)
    ),
    "a mean of the losses, for each": lambda: case(
        lambda m, x: m.a(x), x_of(), {"a": linear()}, loss=lambda o, t: o.square().sum(1).mean().expand(len(o))
    ),
    "normalised losses": lambda: case(
        lambda m, x: m.a(x), x_of(), {"a": linear()}, loss=lambda o, t: normalised(o.square().sum(1))
    ),
    "advantages that are not detached": lambda: case(
        lambda m, x: m.a(x), x_of(), {"a": linear()}, loss=lambda o, t: normalised(o[:, 0]) * o[:, 1]
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_samples_that_mix_are_refused(name, judge):
    judge(lambda: {"oracle": "batch", "outcome": "refused", "frozen": False, **MIXED[name]()})


@pytest.mark.parametrize("name", MIXED)
def test_samples_that_mix_have_exact_gradients_on_request(name, judge):
    judge(lambda: {"oracle": "batch", "options": {"mixing": "allow"}, **MIXED[name]()})


# Each element counts in the loss of one sample, though not always of the one in whose row it is.
EXCHANGED = {
    "roll": lambda h: h.roll(1, 0),
    "sort": lambda h: h.sort(0).values,
    "gather": lambda h: h.gather(0, h.argsort(0).flip(0)),
    "sums of pairs": lambda h: torch.zeros_like(h).index_add(0, torch.arange(len(h)) // 2, h),
    "transposition": lambda h: F.pad(h, (0, 0, 0, 6 - len(h))).t()[: len(h)],
}


@pytest.mark.parametrize("name", EXCHANGED)
def test_samples_that_are_exchanged_are_right_or_refused(name, judge):
    change = EXCHANGED[name]
    judge(
        lambda: case(
            lambda m, x: m.b(change(m.a(x).tanh())), x_of(), oracle="batch", outcome="right or refused", frozen=False
        )
    )


def test_a_refusal_of_mixing_says_what_to_do():
    model = nn.Sequential(linear(), nn.BatchNorm1d(D), linear())
    with pytest.raises(gradext.CaptureError, match=r"(?s)1 \(BatchNorm1d\).*eval\(\)"):
        gradext.batch_layer_grads(model, x_of())
    with pytest.raises(gradext.CaptureError, match='mixing="allow"'):
        gradext.batch_layer_grads(model, x_of())


# --- inputs, outputs and losses of every structure -------------------------------------------------------------------


class Output(dict):
    """As transformers': a mapping whose entries are attributes."""

    __getattr__ = dict.__getitem__


def vae(m, x, noise):
    mu, logvar = m.encode(x).chunk(2, 1)
    return m.decode(mu + noise * (logvar / 2).exp()), mu, logvar


def vae_loss(output, target):
    reconstruction, mu, logvar = output
    kl = 0.5 * (mu.square() + logvar.exp() - logvar - 1).sum(1)
    return F.binary_cross_entropy_with_logits(reconstruction, target, reduction="none").sum(1) + kl


def vae_members():
    return {"encode": nn.Sequential(linear(D, 5), nn.Tanh(), linear(5, 4)), "decode": linear(2)}


STRUCTURES = {
    "a loss that takes a VAE's tuple": lambda: case(vae, (torch.rand(B, D), x_of(B, 2)), vae_members(), loss=vae_loss),
    "a VAE that draws its noise": lambda: case(
        lambda m, x: vae(m, x, torch.randn(len(x), 2)),
        torch.rand(B, D),
        vae_members(),
        loss=vae_loss,
        oracle="batch",
        seed=1,
    ),
    "dropout": lambda: case(lambda m, x: m.b(F.dropout(m.a(x))), x_of(B, T, D), oracle="batch", seed=1),
    "forward(batch_dict)": lambda: case(
        lambda m, batch: {"embedding": m.a(batch["x"]) * batch["mask"][:, None]},
        {"batch": {"x": x_of(), "mask": torch.rand(B)}},
        {"a": linear()},
    ),
    "forward(batch_dict), as one positional argument": lambda: case(
        lambda m, features: {"embedding": m.a(features["x"])},
        ({"x": x_of(), "more": [tokens(), {"y": x_of()}]},),
        {"a": linear()},
    ),
    "a list of inputs of different lengths": lambda: case(
        lambda m, xs: sum(m.a(x).tanh().mean(1) for x in xs), ([x_of(B, t, D) for t in (1, 3, 4)],), {"a": linear()}
    ),
    "an output object": lambda: case(
        lambda m, x: Output(logits=m.a(x), hidden=(x, m.b(x))),
        x_of(),
        loss=lambda o, t: o.logits.sin().sum(1) + o.hidden[1].square().sum(1),
    ),
    "an output that is the losses": lambda: case(
        lambda m, x, y: F.cross_entropy(m.a(x), y, reduction="none"),
        (x_of(), torch.arange(B)),
        {"a": linear()},
        loss=lambda o, t: o,
    ),
    "a dict of targets": lambda: case(
        lambda m, x: (m.a(x), m.b(x)),
        x_of(),
        target={"class": torch.arange(B), "value": x_of()},
        loss=lambda o, t: F.cross_entropy(o[0], t["class"], reduction="none") + (o[1] - t["value"]).square().sum(1),
    ),
    "numbers, strings and None among the inputs": lambda: case(
        lambda m, x, scale, mode=None, cache=None: m.a(x) * scale if mode == "on" and cache is None else m.b(x),
        {"x": x_of(), "scale": 3.0, "mode": "on", "cache": None},
    ),
    "a distribution": lambda: case(
        lambda m, x: torch.distributions.Normal(m.a(x), m.b(x).exp()),
        x_of(),
        target=x_of(),
        loss=lambda o, t: -o.log_prob(t).sum(1),
    ),
    "unused layers and heads": lambda: case(
        lambda m, x: (m.a(x), m.head(x))[0],
        x_of(),
        {"a": linear(), "head": linear(), "spare": linear(), "table": parameter(7), "e": nn.Embedding(V, D)},
    ),
    "a layer whose output is detached": lambda: case(lambda m, x: m.a(x) * m.b(x).detach(), x_of()),
    "a layer under no_grad": lambda: case(lambda m, x: m.a(x) * torch.no_grad()(m.b)(x), x_of()),
    "a layer whose weight counts and whose bias does not": lambda: case(
        lambda m, x: (h := m.a(x)) - h.detach() + m.a.weight.sum() + x @ m.b.weight, x_of()
    ),
    "an expert that gets nothing": lambda: case(lambda m, x: m.a(x) + m.b(x[:0]).sum(), x_of()),
    "frozen parts": lambda: case(
        lambda m, x: m.c(m.b(m.a(x).tanh()).sin()),
        x_of(),
        {"a": linear(), "b": linear().requires_grad_(False), "c": linear()},
    ),
    "a frozen bias": lambda: {"model": frozen_bias(), "x": x_of()},
    "a decoder is not all": lambda: case(
        lambda m, x: m.decoder(m.encoder(x).tanh()), x_of(), {"encoder": linear(), "decoder": linear()}
    ),
    "a shared module": lambda: {"model": nn.Sequential(*[linear(), nn.Tanh()] * 3), "x": x_of()},
    "a shared weight": lambda: {"model": sharing(), "x": x_of()},
    "a shared weight, transposed": lambda: case(
        lambda m, x: F.linear(m.a(x).sin(), m.a.weight.t(), m.bias), x_of(), {"a": linear(), "bias": parameter(D)}
    ),
    "a forward that runs twice": lambda: case(lambda m, x: m.b(m.a(x)) - m.b(m.a(x.sin())), x_of()),
    "a forward that fails and runs again": lambda: case(retries, x_of()),
    "a regulariser in the loss": lambda: regularised(),
    "vmap inside": lambda: case(lambda m, x: m.b(torch.func.vmap(m.a)(x)), x_of()),
    "vmap over positions": lambda: case(lambda m, x: torch.func.vmap(m.a, 1, 1)(x), x_of(B, T, D), {"a": linear()}),
    "vmap over models": lambda: case(
        lambda m, x: torch.func.vmap(lambda w, b: F.linear(x, w, b), out_dims=1)(m.w, m.b).sin(),
        x_of(),
        {"w": parameter(3, 5, D), "b": parameter(3, 5)},
    ),
    "jvp inside": lambda: case(
        lambda m, x: torch.func.jvp(lambda v: m.b(m.a(v).sin()), (x,), (torch.ones_like(x),))[1],
        x_of(),
        outcome="right or refused",
    ),
    "jacrev inside": lambda: case(
        lambda m, x: torch.func.vmap(torch.func.jacrev(lambda v: m.b(m.a(v).sin())))(x),
        x_of(),
        outcome="right or refused",
    ),
    "functional_call inside": lambda: case(
        lambda m, x: torch.func.functional_call(m.a, {"weight": 2 * m.a.weight}, (x,)), x_of(), {"a": linear()}
    ),
    "an equilibrium, with its gradient in a hook": lambda: case(equilibrium, x_of(), outcome="right or refused"),
    "gradients that are reversed": lambda: case(lambda m, x: m.b(Reversed.apply(m.a(x).tanh())), x_of()),
    "features in inference mode": lambda: case(
        lambda m, x: m.b(torch.inference_mode()(lambda: m.a(x))().clone().tanh()), x_of()
    ),
    "gradients switched off in between": lambda: case(switched_off, x_of()),
    "layers that are not registered": lambda: case(
        lambda m, x: m.b(m.hidden[0](x).tanh()), x_of(), {"b": linear(), "hidden": [linear()]}
    ),
    "a parameter beside one that is not registered": lambda: case(
        lambda m, x: F.linear(x, m.b.weight * m.hidden[0].weight),
        x_of(),
        {"b": linear(bias=False), "hidden": [linear()]},
    ),
    "an auxiliary loss that the model keeps": lambda: auxiliary(),
    "a codebook that moves in the forward": lambda: case(
        moving_codebook,
        x_of(),
        {"a": linear(), "b": linear(), "table": x_of(3, D), "start": x_of(3, D)},
        oracle="batch",
        trains=False,
    ),
    "a hard choice, straight through": lambda: case(
        lambda m, x: m.b(F.gumbel_softmax(m.a(x), hard=True)), x_of(), oracle="batch", seed=2
    ),
    "samples written into a copy of a parameter": lambda: case(
        written_into, x_of(), {"a": linear(), "p": parameter(D)}
    ),
    "a parameter written into samples": lambda: case(
        lambda m, x: m.a(torch.cat([x[:, :2], m.p.expand(len(x), 4)], 1)), x_of(), {"a": linear(), "p": parameter(4)}
    ),
    "a loss by vmap": lambda: case(
        lambda m, x: m.b(m.a(x).tanh()), x_of(), target=x_of(), loss=lambda o, t: torch.func.vmap(F.mse_loss)(o, t)
    ),
    "a list of losses": lambda: case(
        lambda m, x: m.b(m.a(x).tanh()), x_of(), loss=lambda o, t: torch.stack([v.square().sum() for v in o])
    ),
    "several types of one input": lambda: case(
        lambda m, x: m.b(m.a(x.float().double()).tanh()) + x.to(torch.bfloat16).double(), x_of()
    ),
    "a weight through .data": lambda: case(
        lambda m, x: m.a(x) @ m.b.weight.data, x_of(), {"a": linear(), "b": linear()}
    ),
    "a position table that is interpolated": lambda: case(
        lambda m, x: m.a(x + F.interpolate(m.p, x.shape[1], mode="linear").mT),
        x_of(B, T, D),
        {"a": linear(), "p": parameter(1, D, 5)},
    ),
    "a weight of a decomposition": lambda: case(
        lambda m, x: x @ torch.linalg.qr(m.w)[0], x_of(), {"w": parameter(D, D)}
    ),
    "a Cayley transform": lambda: case(
        lambda m, x: x @ torch.linalg.solve(torch.eye(D) + m.w - m.w.t(), torch.eye(D) - m.w + m.w.t()),
        x_of(),
        {"w": parameter(D, D)},
    ),
    "largest and its place": lambda: case(
        lambda m, x: torch.max(m.a(x) + m.p, 1),
        x_of(B, T, D),
        {"a": linear(), "p": parameter(T, 1)},
        loss=lambda o, t: o.values.square().sum(1),
    ),
    "mean and deviation": lambda: case(
        lambda m, x: torch.cat(torch.std_mean(x * m.p, 1), 1), x_of(B, T, D), {"p": parameter(D)}
    ),
    "a jagged batch": lambda: jagged(),
    "an in-place chain": lambda: case(lambda m, x: m.b(m.a(x).relu_() * 2).sigmoid_(), x_of(B, T, D)),
    "an output that is written in parts": lambda: case(written_in_parts, x_of(B, T, D)),
    "an input that is overwritten": lambda: case(lambda m, x: m.a(x.clone().mul_(2)), x_of(), {"a": linear()}),
    "in-place on the input of a layer that is left out": lambda: case(
        overwritten, x_of(), {"a": linear().requires_grad_(False), "b": linear()}
    ),
    "a sparse input": lambda: case(
        lambda m, x: torch.sparse.mm(x.to_sparse(), m.a.weight.t()),
        x_of(),
        {"a": linear(bias=False)},
        outcome="right or refused",
    ),
    "a sparse embedding": lambda: case(
        lambda m, i: m.a(m.e(i)),
        tokens(),
        {"e": nn.Embedding(V, D, sparse=True), "a": linear()},
        outcome="right or refused",
    ),
    "an embedding with padding": lambda: case(
        lambda m, i: m.a(m.e(i)), tokens(B, 9), {"e": nn.Embedding(V, D, padding_idx=2), "a": linear()}
    ),
    "an embedding scaled by frequency": lambda: case(
        lambda m, i: m.a(m.e(i)),
        tokens(B, 9),
        {"e": nn.Embedding(V, D, scale_grad_by_freq=True), "a": linear()},
        oracle="batch",
        outcome="right or refused",
    ),
    "an integer buffer and an integer parameter": lambda: case(
        lambda m, x: m.b(F.linear(x, m.q.to(x.dtype) * m.scale)),
        x_of(),
        {
            "b": linear(),
            "q": nn.Parameter(torch.randint(-3, 4, (D, D), dtype=torch.int8), requires_grad=False),
            "scale": parameter(D, 1),
        },
        names={"b.weight", "b.bias", "scale"},
        frozen=False,
    ),
    "three types": lambda: case(
        lambda m, x: m.a(x) + F.linear(x.float(), m.a.weight.float()).double(), x_of(), {"a": linear()}, tolerance=1e-6
    ),
}


def equilibrium(m, x):
    """A fixed point, found without a graph; its gradient is solved for in a hook (deep equilibrium models)."""
    step = lambda z: torch.tanh(0.3 * m.a(z) + x)  # noqa: E731
    with torch.no_grad():
        z = x
        for _ in range(60):
            z = step(z)
    z = step(z)
    if z.requires_grad:
        z0 = z.detach().requires_grad_()
        f0 = step(z0)

        def solve(g):
            y = g
            for _ in range(60):
                y = torch.autograd.grad(f0, z0, y, retain_graph=True)[0] + g
            return y

        z.register_hook(solve)
    return m.b(z)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


def switched_off(m, x):
    h = m.a(x)
    previous = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    gate = m.a(h).sigmoid()
    torch.set_grad_enabled(previous)
    return m.b(h * gate)


def auxiliary():
    def forward(m, x):
        m.auxiliary = m.a(x).square().mean(1)
        return m.b(x)

    model = Net(forward, a=linear(), b=linear())
    return {"model": model, "x": x_of(), "loss": lambda o, t: o.sin().sum(1) + model.auxiliary, "trains": False}


def moving_codebook(m, x):
    m.table.copy_(m.start)  # every forward begins with the same one
    h = m.a(x)
    index = torch.cdist(h.detach(), m.table).argmin(1)
    q = m.table[index]
    y = m.b(h + (q - h).detach())
    with torch.no_grad():
        m.table.mul_(0.9).index_add_(0, index, 0.1 * h.detach())
    return torch.cat([y, h - q], 1)


def written_into(m, x):
    rows = m.p.expand(len(x), D).clone()
    rows[:, :2] = x[:, :2]
    return m.a(rows).tanh()


def jagged():
    def forward(m, x, lengths):
        parts = [v[:n] for v, n in zip(x, lengths.tolist(), strict=True)]
        nested = torch.nested.nested_tensor(parts, layout=torch.jagged) if not x.requires_grad else None
        h = m.a(nested).to_padded_tensor(0.0)
        return m.b(h.sum(1))

    return case(forward, (x_of(B, T, D), torch.tensor([1, 3, 2, 2])), outcome="right or refused")


def frozen_bias():
    model = nn.Sequential(linear(), nn.Tanh(), linear())
    model[0].bias.requires_grad_(False)
    return model


def sharing():
    model = nn.Sequential(linear(), nn.Tanh(), linear())
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    return model


def retries(m, x):
    try:
        return m.b(m.a(x)[:, :3])
    except RuntimeError:
        return m.b(m.a(x))


def regularised():
    model = Net(lambda m, x: m.b(m.a(x).tanh()), a=linear(), b=linear())

    def loss(output, target):
        return output.square().sum(1) + 0.1 * model.a.weight.square().sum() + model.b.bias.abs().sum()

    return {"model": model, "x": x_of(), "loss": loss}


def written_in_parts(m, x):
    out = torch.empty_like(x)
    out[:, 0] = m.a(x[:, 0])
    out[:, 1:] = m.b(x[:, 1:])
    out[:, :, :2] *= 2
    return out.tanh()


def overwritten(m, x):
    h = x + 1
    y = m.a(h)
    h.mul_(2)
    return m.b(y + h)


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name, judge):
    judge(STRUCTURES[name])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(B, D), (B, T, D)])
def test_a_layers_input_that_is_overwritten_is_refused(shape, frozen):
    """As in plain torch, where the weight requires grad."""
    model = Net(overwritten, a=linear(), b=linear()).requires_grad_(not frozen)
    with pytest.raises(gradext.CaptureError, match=r"a\.weight.*in place"):
        gradext.batch_layer_grads(model, x_of(*shape), loss="mse")


class Named(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.a, self.shape = linear(D, 3), shape

    def forward(self, x):
        return self.shape(self.a(x))


OUTPUTS = {
    "a tensor": lambda y: y,
    "a tuple": lambda y: (y, y.sum(), None),
    "a list": lambda y: [y],
    "an object with logits": lambda y: Output(loss=None, logits=y, hidden=(y, y)),
    "a dict with logits": lambda y: {"logits": y, "attention": None},
}


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce_logits", "auto"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_named_losses_of_every_output(name, loss, right):
    torch.manual_seed(0)
    model, x = Named(OUTPUTS[name]), x_of()
    target = torch.tensor([0, 2, 1, 1]) if loss == "cross_entropy" else torch.rand(B, 3)
    plain = Named(OUTPUTS["a tensor"])
    plain.load_state_dict(model.state_dict())
    expected = gradext.batch_layer_grads(plain, x, loss=loss, target=target)
    right(gradext.batch_layer_grads(model, x, loss=loss, target=target), expected)


@pytest.mark.parametrize(
    "create", [lambda: nn.LazyLinear(D), lambda: nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(D))]
)
def test_lazy_layers(create, judge):
    """Refused with what to do, or materialised; right as soon as the model has run."""
    model, x, refusal = create(), x_of(), None
    try:
        gradext.batch_layer_grads(model, x)
    except (gradext.CaptureError, ValueError) as error:
        refusal = str(error)
        model(x)
    assert refusal is None or re.search("lazy|uninitialized", refusal, re.IGNORECASE), refusal
    assert len(gradext.batch_layer_grads(model, x)) == len(list(model.parameters()))

    def materialised():
        model = create()
        model(x_of())
        return {"model": model, "x": x_of()}

    judge(materialised)


# --- what a model keeps ----------------------------------------------------------------------------------------------


class Keeping(nn.Module):
    """Keeps a form of its weight, made in its first forward, and uses it in all later ones."""

    def __init__(self, form, use):
        super().__init__()
        self.a, self.b, self.form, self.use, self.kept = linear(), linear(), form, use, None

    def forward(self, x):
        if self.kept is None:
            self.kept = [self.form(self.a.weight)]
        return self.b(torch.tanh(self.use(x, *self.kept)))


KEPT = {
    "a slice": (lambda w: w[:3], lambda x, w: F.pad(x @ w.t(), (0, 3))),
    "a transpose": (lambda w: w.t(), lambda x, w: x @ w),
    "a part": (lambda w: w.narrow(0, 3, 3), lambda x, w: F.linear(x, w).repeat(1, 2)),
    "a view": (lambda w: w.view(2, 3, D), lambda x, w: F.linear(x, w.flatten(0, 1))),
    "an expanded weight": (lambda w: w.expand(2, D, D), lambda x, w: x @ w[1]),
    "a squeezed weight": (lambda w: w[None].squeeze(0), lambda x, w: x @ w),
    "a row": (lambda w: w[2], lambda x, w: x * w),
    "a list of rows": (lambda w: [w[:2], w[2:]], lambda x, w: torch.cat([x @ part.t() for part in w], 1)),
    "a detached weight": (lambda w: w.detach(), lambda x, w: x @ w),
    "a copy of its values": (lambda w: w.data.clone(), lambda x, w: x @ w),
    "the weight itself": (lambda w: w, lambda x, w: x @ w),
}


def steps(model, batches, before) -> list[Tensor]:
    """Three steps of training, ``before`` the first and the last of which something may happen."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.05), []
    for k, x in enumerate(batches):
        if k != 1:
            before(model, x)
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(p.detach().clone() for p in model.parameters())]


@pytest.mark.parametrize("first", ["grads", "watch", "frozen", "another layer"])
@pytest.mark.parametrize("name", KEPT)
def test_what_a_model_keeps_of_its_weights_goes_on_training_it(name, first):
    form, use = KEPT[name]

    def call(model, x):
        loss = lambda output, target: output.square().sum(1)  # noqa: E731
        try:
            if first == "watch":
                with gradext.watch(model) as watch:
                    losses = loss(model(x), x)
                watch.factors(losses)
            else:
                gradext.batch_layer_grads(model, x, loss=loss, layers="b" if first == "another layer" else None)
        except gradext.CaptureError:
            pass  # a view that was made before the call

    found = []
    for before in (lambda model, x: None, call):
        torch.manual_seed(0)
        model, batches = Keeping(form, use), [x_of() for _ in range(3)]
        if first == "frozen":  # made by a forward in which the weight does not require grad
            model.requires_grad_(False)
            before(model, batches[0])
            model.requires_grad_()
            model.kept = None
        found.append(steps(model, batches, before))
    for plain, after in zip(*found, strict=True):
        assert torch.equal(plain, after)


@pytest.mark.parametrize("name", KEPT)
def test_a_form_that_is_kept_is_right_or_refused(name, judge):
    form, use = KEPT[name]
    judge(lambda: {"model": Keeping(form, use), "x": x_of(), "outcome": "right or refused", "frozen": False})


# --- large tables ----------------------------------------------------------------------------------------------------

LARGE = 50_000


class SkipGram(nn.Module):
    """word2vec with negative samples, of one table or two."""

    def __init__(self, tables: int, look_up):
        super().__init__()
        self.words = nn.Embedding(LARGE, 4)
        self.contexts = self.words if tables == 1 else nn.Embedding(LARGE, 4)
        self.look_up = look_up

    def forward(self, center, context, negatives):
        word = self.look_up(self.words, center)
        positive = (word * self.look_up(self.contexts, context)).sum(-1)
        negative = (self.look_up(self.contexts, negatives) @ word[..., None]).squeeze(-1)
        return F.logsigmoid(positive) + F.logsigmoid(-negative).sum(-1)


LOOK_UPS = {
    "its module": lambda table, index: table(index),
    "F.embedding": lambda table, index: F.embedding(index, table.weight),
    "an index": lambda table, index: table.weight[index],
}


@pytest.mark.parametrize("tables", [1, 2])
@pytest.mark.parametrize("look_up", LOOK_UPS)
def test_a_large_table_never_becomes_one_hot(look_up, tables, largest_result):
    torch.manual_seed(0)
    model, b = SkipGram(tables, LOOK_UPS[look_up]), 16
    x = (torch.randint(0, LARGE, (b,)), torch.randint(0, LARGE, (b,)), torch.randint(0, LARGE, (b, 5)))
    x[1][0] = x[0][0]  # the word itself in its context
    loss = lambda output, target: -output  # noqa: E731
    expected = []
    for k in range(b):
        (value,) = loss(model(*(v[k : k + 1] for v in x)), None)
        expected.append(sum(g.square().sum() for g in torch.autograd.grad(value, list(model.parameters()))).sqrt())
    with largest_result() as largest:
        factors = gradext.batch_layer_factors(model, x, loss=loss)
        norms = factors.norm()
        sketches = [f.sketch(64) for f in factors.values()]
        gram = sum(f.gram() for f in factors.values())
    torch.testing.assert_close(norms, torch.stack(expected), rtol=1e-9, atol=0)
    torch.testing.assert_close(gram.diagonal().sqrt(), norms, rtol=1e-9, atol=0)
    assert all(sketch.shape[0] == b for sketch in sketches)
    assert largest.elements <= 2 * LARGE * 4  # the table itself, not b times as much


def test_a_tied_table_never_becomes_one_hot(largest_result):
    """The logits are [B, T, V], as in every plain forward; nothing of the gradient is larger."""
    torch.manual_seed(0)
    b, t, v = 4, 5, 2000
    model = Net(lambda m, i: F.linear(m.a(m.e(i)).tanh(), m.e.weight), e=nn.Embedding(v, 8), a=linear(8, 8))
    index = torch.randint(0, v, (b, t))
    loss = lambda o, y: F.cross_entropy(o.transpose(1, 2), y, reduction="none").sum(1)  # noqa: E731
    expected = []
    for k in range(b):
        value = loss(model(index[k : k + 1]), index[k : k + 1]).sum()
        expected.append(sum(g.square().sum() for g in torch.autograd.grad(value, list(model.parameters()))).sqrt())
    with largest_result() as largest:
        norms = gradext.batch_layer_factors(model, index, loss=loss).norm()
    torch.testing.assert_close(norms, torch.stack(expected), rtol=1e-9, atol=0)
    assert largest.elements <= b * t * v


# --- precision and placement -----------------------------------------------------------------------------------------


def test_bfloat16_autocast():
    """Every parameter, within what the type loses, with float32 results."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    model = Net(
        lambda m, x: m.b(m.norm(m.a(x) * m.scale).relu()) + m.p,
        a=linear(), b=linear(), norm=nn.LayerNorm(D), scale=parameter(D), p=parameter(T, D),
    )  # fmt: skip
    x = x_of(B, T, D)
    loss = lambda output, target: output.float().square().flatten(1).sum(1)  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        found = gradext.batch_layer_grads(model, x, loss=loss)
        with gradext.watch(model) as watch:
            losses = loss(model(x), x)
        watched = watch.grads(losses)
        after = model(x)
    names = [name for name, _ in model.named_parameters()]
    assert set(found) == set(watched) == set(names)
    for b in range(B):
        value = loss(model(x[b : b + 1]), None).sum()
        for name, want in zip(names, torch.autograd.grad(value, list(model.parameters())), strict=True):
            assert found[name].dtype == torch.float32
            for gradients in (found, watched):
                assert (gradients[name][b] - want).abs().max() <= 16 * 2**-8 * want.abs().max(), name
    after.sum().backward()  # what the call cast is not in autocast's cache
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    torch.manual_seed(0)
    model, x = nn.Sequential(linear(), nn.LayerNorm(D), nn.Tanh(), linear()), torch.rand(B, D)
    exact = gradext.batch_layer_grads(model, x, loss="mse")
    found = gradext.batch_layer_grads(model.to(dtype), x.to(dtype), loss="mse")
    for name, want in exact.items():
        assert found[name].dtype == dtype
        assert (found[name].double() - want).abs().max() <= 16 * torch.finfo(dtype).eps * max(1, want.abs().max()), name


def test_parameters_that_are_spread_over_processes(tmp_path):
    """DTensor parameters, as FSDP2's: right or refused by name, never zeros."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model, x = nn.Sequential(linear(), nn.Tanh(), linear()), x_of()
        expected = gradext.batch_layer_grads(model, x, loss="mse")
        for layer in (model[0], model[2]):
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
            layer.bias = nn.Parameter(distribute_tensor(layer.bias.detach(), mesh, [Shard(0)]))
        from torch.distributed.tensor import DTensor

        given, refusals = DTensor.from_local(x, mesh), []
        for value in (x, given):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    found = gradext.batch_layer_grads(model, value, loss="mse", target=x)
                except (gradext.CaptureError, TypeError) as error:
                    refusals.append(str(error))
                    continue
            for name, gradients in found.items():
                whole = gradients.full_tensor() if isinstance(gradients, DTensor) else gradients
                torch.testing.assert_close(whole, expected[name])
        assert all("DTensor" in refusal or "FSDP" in refusal for refusal in refusals), refusals
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("shape", [(0, D), (0, T, D)])
def test_an_empty_batch(shape):
    """Of every model that takes one: gradients without rows."""
    members = {"a": linear(), "n": nn.LayerNorm(D), "s": parameter(D), "t": parameter(1, D), "b": linear()}
    model = Net(lambda m, x: m.b(m.n(m.a(x) * m.s).tanh() + m.t), **members)
    found = gradext.batch_layer_grads(model, x_of(*shape), loss="mse")
    assert {name: tuple(g.shape) for name, g in found.items()} == {
        n: (0, *p.shape) for n, p in model.named_parameters()
    }
    factors = gradext.batch_layer_factors(model, x_of(*shape), loss="mse")
    assert factors.norm().shape == (0,)


def test_samples_that_are_not_finite_stay_alone(right):
    """Their gradients are as autograd's; the others' are untouched, and nothing looks like mixing."""
    torch.manual_seed(0)
    for forward in (
        lambda m, x: m.b(m.a(x).relu()),
        lambda m, x: m.b(m.a(x.transpose(0, 1).flatten(0, 1)).relu()).unflatten(0, (T, -1)).transpose(0, 1),
    ):
        for value in (math.nan, math.inf):
            model, x = Net(forward, a=linear(), b=linear()), x_of(B, T, D)
            loss = lambda output, target: output.square().flatten(1).sum(1)  # noqa: E731
            expected = gradext.batch_layer_grads(model, x, loss=loss)
            x[1, 0, 2] = value
            found = gradext.batch_layer_grads(model, x, loss=loss)
            others = [0, 2, 3]
            right({n: g[others] for n, g in found.items()}, {n: g[others] for n, g in expected.items()})
            assert not all(g[1].isfinite().all() for g in found.values())
