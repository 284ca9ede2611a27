"""What needs a GPU once: a training step of a language model with norms, and a larger detector on natural images.

    python benchmarks/gpu_extras.py --out DIR [--only step,detector] [--minutes 8] [--images CLASS.npz]
    python benchmarks/gpu_extras.py --prepare CIFAR --images CLASS.npz [--normal 0]    (where the images are)

`step` takes GPT-2's 124 M parameters with random weights (transformers), bf16 autocast, AdamW: a plain step, one with
each sample's gradient norm of the same backward (`gradext.watch(model, train=True)`), and one with the norms of ghost
clipping as Opacus computes them, written by hand with hooks. `detector` trains a wide residual network to tell the
rotations of one class of CIFAR-10 from each other and ranks the test set by its softmax, by the norm of the last
layer's gradient and by its Mahalanobis distance. CIFAR is the folder of data_batch_*.bin and test_batch.bin, or its
archive. Rows go to DIR/rows.jsonl, and `gpu_check.py --render DIR` shows them. --device cpu tries it with small sizes.
"""

from __future__ import annotations

import argparse
import math
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_check import Rows, render


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--only", default="step,detector", help="by comma")
    parser.add_argument("--minutes", type=float, default=8.0, help="of the detector's training")
    parser.add_argument("--images", type=Path, default=Path("cifar-class.npz"), metavar="CLASS.npz")
    parser.add_argument("--prepare", type=Path, metavar="CIFAR", help="write CLASS.npz of CIFAR-10's binary files")
    parser.add_argument("--normal", type=int, default=0, help="the class that is normal")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    arguments = parser.parse_args()
    if arguments.prepare:
        return prepare(arguments.prepare, arguments.normal, arguments.images)
    if not arguments.out:
        parser.error("expected --out")
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in arguments.only.split(","):
        rows, begin, state = Rows(arguments.out, name), time.time(), "done"
        try:
            {"step": step, "detector": detector}[name](arguments, rows)
        except Exception as error:
            state, failed = f"failed: {type(error).__name__}: {str(error)[:300]}", 1
        rows.write(state=state, took=time.time() - begin)
    return render(arguments.out) or failed


# --- a training step -------------------------------------------------------------------------------------------------


def step(arguments: argparse.Namespace, rows: Rows) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    device, small = arguments.device, arguments.device == "cpu"
    sizes = [(2, 16)] if small else [(8, 512), (16, 1024)]
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(n_layer=2, n_embd=48, n_head=2, vocab_size=101, **dropout) if small else GPT2Config(**dropout)
    for B, T in sizes:
        tokens = torch.randint(
            config.vocab_size, (B, T), device=device, generator=torch.Generator(device).manual_seed(0)
        )
        seconds, norms = {}, {}
        for route in ROUTES:
            torch.manual_seed(0)
            model = GPT2LMHeadModel(config).to(device)
            try:
                seconds[route], norms[route] = step_seconds(ROUTES[route], model, tokens)
            except Exception as error:
                rows.write(case=f"{route} [{B}, {T}]", error=f"{type(error).__name__}: {str(error)[:300]}")
            del model
        routes = {name: {"device": value, "host": value} for name, value in seconds.items()}
        rows.write(case=f"GPT-2, a step of [{B}, {T}]", routes=routes, over_plain=ratios(seconds), norms=norms)


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    return {name: value / seconds["plain"] for name, value in seconds.items()} if "plain" in seconds else {}


def token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """[B], each sample's mean over its tokens. Positions a sample, which is what hooks can tell apart."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = model(tokens, position_ids=positions).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def plain_step(model: nn.Module, tokens: Tensor) -> None:
    token_losses(model, tokens).mean().backward()


def watched_step(model: nn.Module, tokens: Tensor) -> Tensor:
    import gradext

    with gradext.watch(model, train=True) as watch:
        losses = token_losses(model, tokens)
    losses.mean().backward()
    return watch.factors().norm()


def ghost_step(model: nn.Module, tokens: Tensor) -> Tensor:
    """Norms by each layer's own formula from its input and its output's gradient, as ghost clipping has them.

    Embeddings as lookups and the tied head as a linear layer of its own, so that the norm of the tied weight leaves out
    the product of both, as with Opacus.
    """
    B, squares, handles = tokens.shape[0], [], []
    seen: dict[nn.Module, Tensor] = {}

    def forward(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        seen[module] = inputs[0].detach()

    def backward(module: nn.Module, _: tuple, gradients: tuple) -> None:
        squares.append(ghost_square(module, seen.pop(module), gradients[0] * B))

    for module in model.modules():
        if type(module).__name__ in ("Conv1D", "Linear", "LayerNorm", "Embedding"):
            handles += [module.register_forward_hook(forward), module.register_full_backward_hook(backward)]
    try:
        token_losses(model, tokens).mean().backward()
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(squares).sum(0).sqrt()


def ghost_square(module: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
    """The squared norm of each sample's gradient of a layer's own parameters -> [B]."""
    if isinstance(module, nn.Embedding):
        same = x[:, :, None] == x[:, None]
        return (torch.einsum("btd,bsd->bts", delta, delta).float() * same).sum((1, 2))
    if isinstance(module, nn.LayerNorm):
        normed = F.layer_norm(x.float(), module.normalized_shape)
        scale, shift = (delta * normed).sum(1), delta.sum(1)
        return scale.float().square().sum(1) + shift.float().square().sum(1)
    x = x.to(delta.dtype)
    square = torch.einsum("btd,bsd->bts", delta, delta).float() * torch.einsum("btd,bsd->bts", x, x).float()
    bias = 0 if module.bias is None else delta.sum(1).float().square().sum(1)
    return square.sum((1, 2)) + bias


ROUTES: dict[str, Callable] = {"plain": plain_step, "gradext": watched_step, "ghost clipping": ghost_step}


def step_seconds(route: Callable, model: nn.Module, tokens: Tensor) -> tuple[float, float | None]:
    """The median of whole steps between two waits, and the mean of the norms of the first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    times, first = [], None
    for n in range(3 if tokens.device.type == "cpu" else 12):
        wait(tokens)
        begin = time.perf_counter()
        norms = route(model, tokens)
        optimizer.step()
        optimizer.zero_grad()
        wait(tokens)
        times.append(time.perf_counter() - begin)
        if n == 0 and norms is not None:
            first = norms.mean().item()
    return sorted(times[1:])[len(times[1:]) // 2], first


def wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize()


# --- a detector ------------------------------------------------------------------------------------------------------


def prepare(cifar: Path, normal: int, images: Path) -> int:
    """The training images of one class and 2,000 of the test set, half of them of that class, small enough to carry."""

    def batches():
        if cifar.is_dir():
            yield from ((path.name, path.read_bytes()) for path in sorted(cifar.rglob("*.bin")))
            return
        with tarfile.open(cifar) as archive:
            for member in archive:
                if member.name.endswith(".bin"):
                    yield member.name, archive.extractfile(member).read()

    parts: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for name, content in batches():
        parts["test" in name].append(np.frombuffer(content, np.uint8).reshape(-1, 3073))
    train, test = (np.concatenate(parts[is_test]) for is_test in (False, True))
    others = np.random.default_rng(0).choice(np.flatnonzero(test[:, 0] != normal), 1000, replace=False)
    chosen = np.concatenate([test[test[:, 0] == normal], test[others]])
    train = train[train[:, 0] == normal]
    shape = (-1, 3, 32, 32)
    labels = chosen[:, 0] != normal
    np.savez_compressed(images, train=train[:, 1:].reshape(shape), test=chosen[:, 1:].reshape(shape), novel=labels)
    print(f"{images}: {len(train)} for training, {len(chosen)} for the test, {images.stat().st_size >> 20} MiB")
    return 0


class Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(into), nn.BatchNorm2d(out)
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(into, out, 1, stride, bias=False) if stride > 1 or into != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        return self.conv2(F.relu(self.norm2(self.conv1(h)))) + self.skip(h)


def network(width: int, depth: int) -> nn.Sequential:
    """A wide residual network of four rotations."""
    blocks, channels = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)], 16
    for stage, out in enumerate((width, 2 * width, 4 * width)):
        for n in range(depth):
            blocks.append(Block(channels, out, 2 if stage > 0 and n == 0 else 1))
            channels = out
    return nn.Sequential(
        *blocks, nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)
    )


def rotations(x: Tensor) -> Tensor:
    """[4 B, ...]: all of a batch by 0, 90, 180 and 270 degrees."""
    return torch.cat([torch.rot90(x, k, (2, 3)) for k in range(4)])


def detector(arguments: argparse.Namespace, rows: Rows) -> None:
    device, small = arguments.device, arguments.device == "cpu"
    images = np.load(arguments.images)
    train, test = (torch.from_numpy(images[name]).to(device).float() / 127.5 - 1 for name in ("train", "test"))
    novel = torch.from_numpy(images["novel"])
    if small:
        train, test, novel = train[:64], test[::100], novel[::100]
    torch.manual_seed(0)
    net = network(*((8, 1) if small else (160, 2))).to(device, memory_format=torch.channels_last)
    losses = fit(net, train, 8 if small else 128, 1 if small else 60, 60 * arguments.minutes)
    probabilities, last = features(net, test)
    _, seen = features(net, train)
    scores = {
        "softmax": -probabilities.sum(1),
        "log softmax": -probabilities.clamp_min(1e-12).log().sum(1),
        "norm of the last layer's gradient": last.norm(dim=1),
        "Mahalanobis distance of it": mahalanobis(last, seen),
    }
    rows.write(
        case="rotations", loss=losses[-1], epochs=len(losses), auroc={n: auroc(s, novel) for n, s in scores.items()}
    )


def fit(net: nn.Module, train: Tensor, batch: int, epochs: int, seconds: float) -> list[float]:
    """SGD of one cycle; ends with the time, at whatever epoch."""
    steps, end, losses = max(1, len(train) // batch), time.time() + seconds, []
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * steps)
    net.train()
    for _ in range(epochs):
        total = 0.0
        for index in torch.randperm(len(train), device=train.device)[: steps * batch].view(steps, batch):
            x = train[index]
            x = x.flip(3) if torch.rand(()) < 0.5 else x
            x = torch.roll(x, torch.randint(-4, 5, (2,)).tolist(), (2, 3))
            x = rotations(x).contiguous(memory_format=torch.channels_last)
            target = torch.arange(4, device=x.device).repeat_interleave(batch)
            with torch.autocast(x.device.type, torch.bfloat16):
                loss = F.cross_entropy(net(x).float(), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        losses.append(float(total) / steps)
        if time.time() > end:
            break
    return losses


@torch.no_grad()
def features(net: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image the probability of its true rotations [N, 4], and the gradient of the sum of its four losses
    with respect to the last layer's weight [N, 4 C], by its closed form.
    """
    net.eval()
    probabilities, gradients = [], []
    for part in x.split(500):
        hidden = net[:-1](rotations(part).contiguous(memory_format=torch.channels_last))
        softmax = net[-1](hidden).softmax(1)
        target = torch.arange(4, device=x.device).repeat_interleave(len(part))
        delta = (softmax - F.one_hot(target, 4)).unflatten(0, (4, -1))
        gradients.append(torch.einsum("kbo,kbi->boi", delta, hidden.unflatten(0, (4, -1))).flatten(1))
        probabilities.append(softmax.gather(1, target[:, None]).view(4, -1).mT)
    return torch.cat(probabilities), torch.cat(gradients)


def mahalanobis(x: Tensor, seen: Tensor) -> Tensor:
    centred = (seen - seen.mean(0)).double()
    covariance = centred.mT @ centred / len(seen)
    covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance), device=x.device)
    z = (x - seen.mean(0)).double()
    return (z * torch.linalg.solve(covariance, z.mT).mT).sum(1)


def auroc(score: Tensor, novel: Tensor) -> float:
    """The probability that a novel sample has the greater score, ties counted half."""
    score, novel = score.double().cpu(), novel.cpu()
    assert not math.isnan(score.sum().item())
    greater = (score[novel][:, None] > score[~novel]).double().mean()
    return float(greater + (score[novel][:, None] == score[~novel]).double().mean() / 2)


if __name__ == "__main__":
    sys.exit(main())
