"""Times of real models: `python -m benchmarks.models [--out FILE] [--threads N] [--seconds S]` writes one table.

GPT-2, Llama and a ViT of transformers with random weights (hidden size 256, four layers, 64 tokens, 16 samples), all
parameters; a small chain and a VAE at one sample. Every way is checked before it is timed, and all of a
model are timed in turns. A plain forward and backward of the summed losses computes the weights' gradients, which
gradext does not; it is the floor of what a user pays anyway.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import gradext
from gradext.novelty import VAE

from . import measure

B, T, VOCABULARY = 16, 64, 1000


def language_loss(output, ids: Tensor) -> Tensor:
    return F.cross_entropy(output.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").sum(1)


def class_loss(output, target: Tensor) -> Tensor:
    return F.cross_entropy(output.logits, target, reduction="none")


def reconstruction(output, target: Tensor) -> Tensor:
    output = output if isinstance(output, Tensor) else output[0]
    return (output - target).square().sum(1)


def problems() -> dict[str, tuple[nn.Module, dict | Tensor, Callable, Tensor]]:
    """{name: (model, input, loss, target)}."""
    import transformers as t

    ids = torch.randint(3, VOCABULARY, (B, T))
    size = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = t.GPT2Config(n_layer=4, n_head=4, n_embd=256, n_positions=T, **size)
    llama = t.LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, pad_token_id=0, **size
    )
    vit = t.ViTConfig(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        image_size=32,
        patch_size=4,
        num_labels=10,
    )
    chain = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    images, one, digit = torch.rand(B, 3, 32, 32), torch.rand(1, 64), torch.rand(1, 784)
    return {
        "GPT-2": (t.GPT2LMHeadModel(gpt2), {"input_ids": ids}, language_loss, ids),
        "Llama": (t.LlamaForCausalLM(llama), {"input_ids": ids}, language_loss, ids),
        "ViT": (t.ViTForImageClassification(vit), {"pixel_values": images}, class_loss, torch.arange(B) % 10),
        "chain 64-32-64, one sample": (chain, one, reconstruction, one),
        "VAE 784-400-20, one sample": (VAE(784, 400, 20), digit, reconstruction, digit),
    }


def ways(model: nn.Module, x: dict | Tensor, loss: Callable, target: Tensor) -> dict[str, Callable]:
    parameters = dict(model.named_parameters())
    given = {"x": x, "loss": loss, "target": target}

    def output():
        return model(**x) if isinstance(x, dict) else model(x)

    def plain():
        torch.autograd.grad(loss(output(), target).sum(), list(parameters.values()), allow_unused=True)

    def step():
        loss(output(), target).mean().backward()
        model.zero_grad()

    def step_with_norms():
        with gradext.watch(model, train=True) as watch:
            losses = loss(output(), target)
        losses.mean().backward()
        norms = watch.factors().norm()
        model.zero_grad()
        return norms

    def by_vmap():
        def one(parameters, x, target):
            x, target = torch.utils._pytree.tree_map(lambda v: v[None], (x, target))
            call = ((), x) if isinstance(x, dict) else ((x,), {})
            return loss(functional_call(model, parameters, *call), target)[0]

        detached = {name: p.detach() for name, p in parameters.items()}
        return vmap(grad(one), (None, 0, 0), randomness="different")(detached, x, target)

    return {
        "plain forward and backward": plain,
        "gradients": lambda: gradext.batch_layer_grads(model, **given),
        "gradients by vmap(grad)": by_vmap,
        "norms": lambda: gradext.batch_layer_factors(model, **given).norm(),
        "training step": step,
        "training step with norms": step_with_norms,
    }


def check(model: nn.Module, calls: dict[str, Callable]) -> None:
    """All ways give what vmap(grad) gives, beyond rounding in fp32."""
    want, grads = calls["gradients by vmap(grad)"](), calls["gradients"]()
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in want.values()]).norm(dim=0)
    for name, g in want.items():
        if not ((grads[name] - g).flatten(1).norm(dim=1) <= 1e-3 * norms).all():
            raise AssertionError(f"{name}: wrong by {(grads[name] - g).abs().max():.2g}")
    for way in ("norms", "training step with norms"):
        torch.testing.assert_close(calls[way](), norms, rtol=1e-3, atol=0)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="of measurement a model")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    provenance = measure.provenance()
    lines = [
        "# Real models, all parameters",
        "",
        f"Made by `python -m benchmarks.models` at {provenance['commit']}, {provenance['versions']}, transformers "
        f"{measure.version('transformers')}, on {provenance['machine']}. The best of the calls in turns, in ms; in "
        "brackets the ratio to the plain forward and backward, for the training step with norms to the plain step.",
        "",
        "| model | plain | gradients | by vmap(grad) | norms | training step | with norms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    for name, problem in problems().items():
        model = problem[0].eval()
        calls = ways(*problem)
        check(model, calls)
        ms = {way: row["best"] for way, row in measure.in_turns(calls, options.seconds).items()}
        plain, grads, by_vmap, norms, step, with_norms = ms.values()
        cells = [f"{plain:.2f}", *(f"{t:.2f} ({t / plain:.2f})" for t in (grads, by_vmap, norms)), f"{step:.2f}"]
        lines.append("| " + " | ".join([name, *cells, f"{with_norms:.2f} ({with_norms / step:.2f})"]) + " |")
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
