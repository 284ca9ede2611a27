"""watch(train=True) in whole training loops: accumulation, compiled losses, several processes, all of it together."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradext

pytestmark = pytest.mark.usefixtures("double_precision")

B, D = 4, 6


class Residual(nn.Module):
    def __init__(self, checkpointed: bool = False):
        super().__init__()
        self.e, self.a, self.norm, self.b = nn.Embedding(11, D), nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 11)
        self.checkpointed = checkpointed

    def forward(self, ids):
        h = self.e(ids)
        block = lambda h: h + self.a(self.norm(h)).tanh()  # noqa: E731
        return self.b(checkpoint(block, h, use_reentrant=False) if self.checkpointed else block(h))


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().transpose(1, 2), ids, reduction="none").mean(1)


def norms_alone(model: nn.Module, ids: Tensor) -> Tensor:
    parameters = list(model.parameters())
    samples = (torch.autograd.grad(token_losses(model(i), i).sum(), parameters) for i in ids.split(1))
    return torch.stack([torch.stack([g.norm() for g in grads]).norm() for grads in samples])


def batches(count: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, 11, (B, 5)) for _ in range(count)]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_norms_of_every_batch_that_is_accumulated(checkpointed, set_to_none):
    """A step of two batches each: the norms are those of the batch's own samples, at the weights of then."""
    torch.manual_seed(0)
    model = Residual(checkpointed)
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), 0.05) for m in (model, plain)]
    for k, ids in enumerate(batches(6)):
        expected = norms_alone(plain, ids)
        (token_losses(plain(ids), ids).mean() / 2).backward()
        with gradext.watch(model, train=True) as watch:
            losses = token_losses(model(ids), ids)
        (losses.mean() / 2).backward()
        torch.testing.assert_close(watch.factors().norm(), expected)
        if k % 2:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("what", ["the loss", "the model", "both"])
def test_what_is_compiled(what):
    torch.manual_seed(0)
    model, (ids,) = Residual(), batches(1)
    expected = norms_alone(model, ids)
    token_losses(model(ids), ids).mean().backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    forward, loss = model, token_losses
    if what != "the loss":
        forward = torch.compile(model, backend="aot_eager")
    if what != "the model":
        loss = torch.compile(token_losses, backend="aot_eager")
    for _ in range(2):
        with gradext.watch(model, train=True) as watch:
            losses = loss(forward(ids), ids)
        losses.mean().backward()
        torch.testing.assert_close(watch.factors().norm(), expected)
        torch.testing.assert_close([p.grad for p in model.parameters()], grads)
        model.zero_grad()
        loss(forward(ids), ids).mean().backward()  # as compiled code, between watched steps
        torch.testing.assert_close([p.grad for p in model.parameters()], grads)
        model.zero_grad()


def test_autocast_with_a_scaled_loss_and_checkpoints():
    """As mixed precision trains: the scale is undone, and the norms are those of fp32 beyond bf16's rounding."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    model, (ids,) = Residual(checkpointed=True), batches(1)
    expected = norms_alone(model, ids)
    plain = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = token_losses(plain(ids), ids)
    (2.0**16 * losses.mean()).backward()
    with torch.autocast("cpu", torch.bfloat16), gradext.watch(model, train=True) as watch:
        losses = token_losses(model(ids), ids)
    (2.0**16 * losses.mean()).backward()
    torch.testing.assert_close(watch.factors().norm().float(), expected, rtol=3e-2, atol=0)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


DISTRIBUTED = """
import sys
import torch, gradext
import torch.distributed as dist
from torch import nn

dist.init_process_group("gloo")
rank, whole = dist.get_rank(), torch.load(sys.argv[1], weights_only=False)
model = whole["model"]
wrapped = nn.parallel.DistributedDataParallel(model)
squared = lambda output: output.square().sum(1)
for step in range(2):
    model.zero_grad()
    first, second = whole["x"][rank].chunk(2)
    with wrapped.no_sync(), gradext.watch(model, train=True) as watch:
        losses = squared(wrapped(first))
        (losses.sum() / 6).backward()
    norms = [watch.factors(losses).norm()]
    with gradext.watch(wrapped, train=True) as watch:
        losses = squared(wrapped(second))
    (losses.sum() / 6).backward()
    norms.append(watch.factors().norm())
    for p, want in zip(model.parameters(), whole["grads"]):
        torch.testing.assert_close(p.grad, want)
    torch.testing.assert_close(torch.cat(norms), whole["norms"][rank])
dist.destroy_process_group()
"""


@pytest.mark.medium
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes(tmp_path):
    """DistributedDataParallel over gloo, with accumulation: gradients are averaged, norms are each rank's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(2, 6, D)
    parameters = list(model.parameters())
    norms, total = [], 0
    for samples in x:
        rows = []
        for sample in samples.split(1):
            grads = torch.autograd.grad(model(sample).square().sum(), parameters)
            rows.append(torch.stack([g.norm() for g in grads]).norm())
            total = total + torch.cat([g.flatten() for g in grads])
        norms.append(torch.stack(rows))
    parts = (total / 12).split([p.numel() for p in parameters])
    grads = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
    (tmp_path / "script.py").write_text(DISTRIBUTED)
    torch.save({"model": model, "x": x, "norms": norms, "grads": grads}, tmp_path / "whole.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
               "--rdzv-endpoint=127.0.0.1:0", str(tmp_path / "script.py"), str(tmp_path / "whole.pt")]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
