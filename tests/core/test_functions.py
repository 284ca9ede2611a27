"""Functions of samples and a parameter where every dimension equals the batch size, so that shapes decide nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("double_precision")

B = 4


class Net(nn.Module):
    """f(x, parameter) after a layer, or on the input itself."""

    def __init__(self, function, shapes, layer: bool):
        super().__init__()
        self.function = function
        self.a = nn.Linear(B, B) if layer else None
        self.p = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x):
        return self.function(x if self.a is None else torch.tanh(self.a(x)), *self.p)


VECTOR, MATRIX, CUBE = (B,), (B, B), (B, B, B)

# Of x [B, B, B] (samples, positions, features) and parameters of the given shapes.
OF_CUBES = {
    "add": (lambda x, p: x + p, [VECTOR]),
    "add a matrix": (lambda x, p: p + x, [MATRIX]),
    "add with alpha": (lambda x, p: torch.add(x, p, alpha=3), [MATRIX]),
    "subtract": (lambda x, p: p - x, [MATRIX]),
    "rsub": (lambda x, p: torch.rsub(x, p), [VECTOR]),
    "multiply": (lambda x, p: x * p, [MATRIX]),
    "multiply by a column": (lambda x, p: x * p[:, None], [VECTOR]),
    "multiply in place": (lambda x, p: x.clone().mul_(p), [MATRIX]),
    "add in place": (lambda x, p: x.clone().add_(p, alpha=2), [VECTOR]),
    "divide": (lambda x, p: x / (1 + p.square()), [MATRIX]),
    "divide by": (lambda x, p: p / (1 + x.square()), [MATRIX]),
    "power": (lambda x, p: x.abs().pow(p), [MATRIX]),
    "exponent of samples": (lambda x, p: p.abs() ** x, [VECTOR]),
    "maximum": (lambda x, p: torch.maximum(x, p), [MATRIX]),
    "where": (lambda x, p: torch.where(x > 0, x, p), [MATRIX]),
    "where the parameter is positive": (lambda x, p: torch.where(p > 0, x * p, x), [MATRIX]),
    "clamp": (lambda x, p: torch.clamp(x, -p.abs(), p.abs()), [MATRIX]),
    "lerp": (lambda x, p, w: torch.lerp(x, p, w.sigmoid()), [MATRIX, VECTOR]),
    "addcmul": (lambda x, p, q: torch.addcmul(x, p, q, value=0.5), [MATRIX, VECTOR]),
    "addcdiv": (lambda x, p, q: torch.addcdiv(x, p, 1 + q.square()), [MATRIX, MATRIX]),
    "atan2": (lambda x, p: torch.atan2(x, p), [MATRIX]),
    "logaddexp": (lambda x, p: torch.logaddexp(p, x), [MATRIX]),
    "hypot": (lambda x, p: torch.hypot(x, p), [VECTOR]),
    "matmul": (lambda x, p: x @ p, [MATRIX]),
    "matmul on the left": (lambda x, p: p @ x, [MATRIX]),
    "matmul with a vector": (lambda x, p: x @ p, [VECTOR]),
    "a vector from the left": (lambda x, p: p @ x, [VECTOR]),
    "matmul with a cube": (lambda x, p: torch.einsum("bti,tij->btj", x, p), [CUBE]),
    "bmm over positions": (lambda x, p: torch.bmm(x.transpose(0, 1), p).transpose(0, 1), [CUBE]),
    "bmm of an expanded weight": (lambda x, p: torch.bmm(p.expand_as(x), x), [MATRIX]),
    "baddbmm": (lambda x, p, q: torch.baddbmm(p, x.transpose(0, 1), q).transpose(0, 1), [(B, 1, B), CUBE]),
    "tensordot": (lambda x, p: torch.tensordot(x, p, dims=([2], [1])), [CUBE]),
    "tensordot over two": (lambda x, p: torch.tensordot(x, p, dims=2), [CUBE]),
    "inner": (lambda x, p: torch.inner(x, p), [MATRIX]),
    "einsum, positions": (lambda x, p: torch.einsum("bti,ts->bsi", x, p), [MATRIX]),
    "einsum, diagonal": (lambda x, p: torch.einsum("bti,ti->bi", x, p), [MATRIX]),
    "einsum, elementwise": (lambda x, p: torch.einsum("bti,ti->bti", x, p), [MATRIX]),
    "einsum, of two parameters": (lambda x, p, q: torch.einsum("bti,ij,ts->bsj", x, p, q), [MATRIX, MATRIX]),
    "einsum, quadratic": (lambda x, p: torch.einsum("bti,ij,btj->bt", x, p, x), [MATRIX]),
    "einsum, samples second": (lambda x, p: torch.einsum("ij,bti->jbt", p, x).permute(1, 2, 0), [MATRIX]),
    "multi_dot": (lambda x, p, q: torch.stack([torch.linalg.multi_dot([p, v, q]) for v in x]), [MATRIX, MATRIX]),
    "linear": (lambda x, p, q: F.linear(x, p, q), [MATRIX, VECTOR]),
    "linear of the transpose": (lambda x, p: F.linear(x.mT, p).mT, [MATRIX]),
    "bilinear": (lambda x, p, q: F.bilinear(x, x.flip(2), p, q), [CUBE, VECTOR]),
    "cdist": (lambda x, p: torch.cdist(x, p), [MATRIX]),
    "cdist to a row for each position": (lambda x, p: torch.cdist(x.transpose(0, 1), p).transpose(0, 1), [CUBE]),
    "cosine similarity": (lambda x, p: F.cosine_similarity(x, p, dim=2), [MATRIX]),
    "pairwise distance": (lambda x, p: F.pairwise_distance(x, p), [MATRIX]),
    "concatenated in positions": (lambda x, p: torch.cat([x, p.expand(len(x), -1, -1)], 1).cumsum(1).sin(), [MATRIX]),
    "concatenated in features": (lambda x, p: torch.cat([p.expand_as(x), x], 2).cumsum(2).sin(), [MATRIX]),
    "stacked": (lambda x, p: torch.stack([x, p.expand_as(x)], 1).cumsum(1).sin(), [MATRIX]),
    "a token in place": (lambda x, p: x.index_copy(1, torch.tensor([2]), p.expand(len(x), 1, -1)), [VECTOR]),
    "masked_scatter": (lambda x, p: x.masked_fill(x > 0, 0) + p * (x > 0), [MATRIX]),
    "layer norm": (lambda x, p, q: F.layer_norm(x, (B,), p, q), [VECTOR, VECTOR]),
    "layer norm over two": (lambda x, p, q: F.layer_norm(x, (B, B), p, q), [MATRIX, MATRIX]),
    "rms norm": (lambda x, p: F.rms_norm(x, (B,), p), [VECTOR]),
    "group norm": (lambda x, p, q: F.group_norm(x, 2, p, q), [VECTOR, VECTOR]),
    "instance norm": (lambda x, p, q: F.instance_norm(x, weight=p, bias=q), [VECTOR, VECTOR]),
    "prelu": (lambda x, p: F.prelu(x, p), [VECTOR]),
    "conv1d": (lambda x, p, q: F.conv1d(x, p, q, padding=2), [CUBE, VECTOR]),
    "conv1d, grouped": (lambda x, p: F.conv1d(x, p, padding=1, groups=B), [(B, 1, 3)]),
    "conv1d over the positions' dimension": (lambda x, p: F.conv1d(x.mT, p, padding=2).mT, [CUBE]),
    "conv_transpose1d": (lambda x, p: F.conv_transpose1d(x, p), [CUBE]),
    "conv2d of one channel": (lambda x, p: F.conv2d(x[:, None], p, padding=1), [(B, 1, 3, 3)]),
    "conv1d without a batch": (lambda x, p: torch.stack([F.conv1d(v, p, padding=2) for v in x]), [CUBE]),
    "sdpa, keys of all": (
        lambda x, p, q: F.scaled_dot_product_attention(x, p.expand_as(x), q.expand_as(x)),
        [MATRIX, MATRIX],
    ),
    "sdpa, a bias": (lambda x, p: F.scaled_dot_product_attention(x, x, x, attn_mask=p), [MATRIX]),
    "sdpa, a bias of heads": (
        lambda x, p: F.scaled_dot_product_attention(*[x[:, None].expand(-1, B, -1, -1)] * 3, attn_mask=p),
        [CUBE],
    ),
    "gather by the samples": (lambda x, p: p.expand_as(x).gather(2, x.argsort(2)) + x, [MATRIX]),
    "take_along_dim": (lambda x, p: p[None].take_along_dim(x.argsort(1), 1) * x, [MATRIX]),
    "an index of the samples": (lambda x, p: p[x.argmax(2)] + x, [MATRIX]),
    "two indices of the samples": (lambda x, p: p[x.argmax(2), x.argmin(2)][..., None] * x, [MATRIX]),
    "index_select": (lambda x, p: p.index_select(0, x.argmax(2).flatten()).view_as(x) * x, [MATRIX]),
    "embedding": (lambda x, p: F.embedding(x.argmax(2), p) * x, [MATRIX]),
    "embedding_bag": (lambda x, p: F.embedding_bag(x.argmax(2), p) * x.sum(1), [MATRIX]),
    "one_hot": (lambda x, p: F.one_hot(x.argmax(2), B).to(x.dtype) @ p + x, [MATRIX]),
    "grid_sample": (
        lambda x, p: F.grid_sample(p.expand(len(x), 1, B, B), x[:, :, None, :2].tanh(), align_corners=False),
        [MATRIX],
    ),
    "fold": (lambda x, p: F.unfold(x[:, None], 2).mT @ p, [(B, 3)]),
    "kron of each": (lambda x, p: torch.stack([torch.kron(v, p) for v in x]), [MATRIX]),
    "outer of each": (lambda x, p: x[..., None] * p, [VECTOR]),
    "complex": (lambda x, p: torch.view_as_real(torch.complex(x, p.expand_as(x)).exp()), [MATRIX]),
    "fft": (lambda x, p: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(p), n=B), [MATRIX]),
    "solve": (lambda x, p: torch.linalg.solve(p @ p.mT + 3 * torch.eye(B), x), [MATRIX]),
    "triangular solve": (
        lambda x, p: torch.linalg.solve_triangular(p.tril(-1) + torch.eye(B), x, upper=False),
        [MATRIX],
    ),
    "a matrix exponential": (lambda x, p: x @ torch.matrix_exp(p - p.mT), [MATRIX]),
    "a recurrence": (lambda x, p: recurrence(x, p), [MATRIX]),
    "a softmax of parameters and samples": (lambda x, p: (x + p).softmax(1), [MATRIX]),
    "log_softmax over heads": (lambda x, p: (x[..., None] * p).log_softmax(-1), [MATRIX]),
    "vmapped": (lambda x, p: torch.func.vmap(lambda v: v @ p)(x), [MATRIX]),
    "vmapped over both": (lambda x, p: torch.func.vmap(lambda v, q: v @ q, (1, 0), 1)(x, p), [CUBE]),
}  # fmt: skip

# Of x [B, B]: samples and features.
OF_MATRICES = {
    "add": (lambda x, p: x + p, [VECTOR]),
    "multiply": (lambda x, p: p * x, [VECTOR]),
    "multiply by one number": (lambda x, p: p * x, [()]),
    "matmul": (lambda x, p: x @ p, [MATRIX]),
    "matmul on the left of the transpose": (lambda x, p: (p @ x.t()).t(), [MATRIX]),
    "addmm": (lambda x, p, q: torch.addmm(q, x, p), [MATRIX, VECTOR]),
    "addmm, scaled": (lambda x, p, q: torch.addmm(q, x, p, beta=2, alpha=3), [MATRIX, VECTOR]),
    "addmm, samples added": (lambda x, p: torch.addmm(x, x.sin(), p), [MATRIX]),
    "addmv": (lambda x, p, q: torch.addmv(q.sum(), x, p)[:, None], [VECTOR, VECTOR]),
    "mv": (lambda x, p: torch.mv(x, p)[:, None], [VECTOR]),
    "a weight on the vector of each": (lambda x, p: torch.stack([torch.mv(p, v) for v in x]), [MATRIX]),
    "outer": (lambda x, p: torch.stack([torch.outer(v, p) for v in x]), [VECTOR]),
    "addr": (lambda x, p, q: torch.stack([torch.addr(q, v, p) for v in x]), [VECTOR, MATRIX]),
    "dot": (lambda x, p: torch.stack([torch.dot(v, p) for v in x])[:, None], [VECTOR]),
    "cross": (lambda x, p: torch.linalg.cross(x[:, :3], p[:3].expand(len(x), 3)), [VECTOR]),
    "einsum, second order": (lambda x, p: torch.einsum("bi,bj,ijk->bk", x, x, p), [CUBE]),
    "linear": (lambda x, p, q: F.linear(x, p, q), [MATRIX, VECTOR]),
    "cdist": (lambda x, p: torch.cdist(x, p), [MATRIX]),
    "distances by broadcasting": (lambda x, p: (x[:, None] - p).square().sum(-1), [MATRIX]),
    "an unbatched matrix of each": (lambda x, p: torch.stack([(v[:, None] * p).softmax(0) for v in x]), [VECTOR]),
    "batch norm in evaluation": (
        lambda x, p, q: F.batch_norm(x, torch.zeros(B), torch.ones(B), p, q),
        [VECTOR, VECTOR],
    ),
    "an index": (lambda x, p: p[x.argmax(1)] + x, [MATRIX]),
    "an index of both": (lambda x, p: (p[x.argmax(1), x.argmin(1)] * x[:, 0])[:, None], [MATRIX]),
    "a row of a cube": (lambda x, p: torch.bmm(p[x.argmax(1)], x[..., None]).squeeze(2), [CUBE]),
    "embedding_bag with offsets": (
        lambda x, p: F.embedding_bag(x.argsort(1).flatten(), p, torch.arange(len(x)) * B) * x,
        [MATRIX],
    ),
    "lstm cell": (
        lambda x, p, q: torch.lstm_cell(x, (x.sin(), x.cos()), p, q)[0],
        [(4 * B, B), (4 * B, B)],
    ),
    "multi-head weights": (lambda x, p: torch.einsum("bi,hij->bhj", x, p).softmax(1), [CUBE]),
    "expanded to a matrix of each": (lambda x, p: torch.bmm(p.expand(len(x), -1, -1), x[..., None]), [MATRIX]),
    "repeated": (lambda x, p: x.repeat_interleave(2, 0).mul(p).view(len(x), -1), [VECTOR]),
    "repeated, with a row for each view": (
        lambda x, p: (x.repeat(B, 1) * p.repeat_interleave(len(x), 0)).view(B, len(x), B).transpose(0, 1),
        [MATRIX],
    ),
}


def recurrence(x: Tensor, p: Tensor) -> Tensor:
    state, states = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = torch.tanh(x[:, t] + state @ p)
        states.append(state)
    return torch.stack(states, 1)


# As many samples as there are of everything, half as many, one; and the function of the input itself.
SITUATIONS = {
    "all of one size": (B, True),
    "a multiple": (2, True),
    "one sample": (1, True),
    "of the input": (B, False),
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", OF_CUBES)
def test_functions_of_samples_with_positions(name, situation, judge):
    (function, shapes), (batch, layer) = OF_CUBES[name], SITUATIONS[situation]
    judge(lambda: {"model": Net(function, shapes, layer), "x": torch.randn(batch, B, B), "frozen": batch == B})


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", OF_MATRICES)
def test_functions_of_samples(name, situation, judge):
    (function, shapes), (batch, layer) = OF_MATRICES[name], SITUATIONS[situation]
    judge(lambda: {"model": Net(function, shapes, layer), "x": torch.randn(batch, B), "frozen": batch == B})


LOSSES = {
    "a variance": lambda o, y, p: F.gaussian_nll_loss(
        o, o.detach().round(), p.exp().expand_as(o), reduction="none"
    ).sum(1),
    "a temperature": lambda o, y, p: F.cross_entropy(o / p[0].exp(), y, reduction="none"),
    "centres": lambda o, y, p: (o - p[y, None]).square().sum(1),
    "a margin": lambda o, y, p: F.relu(p + o - o.gather(1, y[:, None])).sum(1),
    "uncertainty of tasks": lambda o, y, p: (torch.exp(-p) * o.square() + p).sum(1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_parameters_in_the_loss(name, judge):
    def case():
        model = Net(lambda x, p: x, [VECTOR], True)
        return {
            "model": model,
            "x": torch.randn(MATRIX),
            "target": torch.tensor([2, 0, 1, 1]),
            "loss": lambda output, target: LOSSES[name](output, target, model.p[0]),
        }

    judge(case)
