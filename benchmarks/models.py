"""Real models: `python -m benchmarks.models [--out FILE] [--threads N] [--seconds S]` writes one table of their times.

GPT-2, Llama and a ViT (hidden size 256, four layers, 64 tokens), LoRA on that Llama and ResNet-18, of transformers and
peft with random weights in eval mode, all parameters that require grad. `pytest benchmarks --grid models` measures them
against the peers at several batch sizes; the table here is of 16 samples, and of a small chain and a VAE at one.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gradext.novelty import VAE

from . import measure
from .peers import ROUTES, Case, Problem

T, VOCABULARY = 64, 1000
CALLS = 5  # that are profiled
SIZE = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}


def language_loss(output, ids: Tensor) -> Tensor:
    return F.cross_entropy(output.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").sum(1)


def class_loss(output, target: Tensor) -> Tensor:
    return F.cross_entropy(output.logits, target, reduction="none")


def vae_loss(output, target: Tensor) -> Tensor:
    reconstruction, mu, logvar = output
    return (reconstruction - target).square().sum(1) + (mu.square() + logvar.exp() - logvar - 1).sum(1) / 2


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=4, n_head=4, n_embd=256, n_positions=T, **SIZE))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(pad_token_id=None, **size, **SIZE))


def llama_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():  # it starts at zero, where half of the gradients are zero
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    size = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=4, num_labels=10, **size))


def resnet18() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(embedding_size=64, num_labels=10, **sizes))


def tokens(B: int) -> tuple[dict[str, Tensor], Tensor]:
    ids = torch.randint(3, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids}, ids


def images(B: int) -> tuple[dict[str, Tensor], Tensor]:
    pixels = torch.rand(B, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels}, torch.arange(B) % 10


def with_positions(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """A table's positions for each sample: Opacus takes the one row that GPT-2 looks up for all for a batch of one."""
    return x | {"position_ids": torch.arange(T).expand(len(x["input_ids"]), T)}


def case(name: str, build: Callable, loss: Callable, batch: Callable, **options) -> Case:
    return Case(name, build, (), loss, None, batch=batch, **options)


CASES = {
    case.name: case
    for case in (
        case("GPT-2", gpt2, language_loss, tokens, for_opacus=with_positions),
        case("Llama", llama, language_loss, tokens),
        case("LoRA on Llama", llama_lora, language_loss, tokens),
        case("ViT", vit, class_loss, images),
        case("ResNet-18", resnet18, class_loss, images),
    )
}
ALONE = (
    Case(
        "chain 64-32-64, one sample",
        lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64)),
        (64,),
        "mse",
        None,
    ),
    Case("VAE 784-400-20, one sample", lambda: VAE(784, 400, 20), (784,), vae_loss, None),
)
COLUMNS = {  # heading -> route
    "plain": "batched backward: sum",
    "gradients": "gradext: gradients",
    "by vmap(grad)": "vmap(grad): gradients",
    "norms": "gradext: norms",
    "clipped sum": "gradext: clipped",
    "training step": "training step: step",
    "with norms": "gradext: step norms",
}


def times(problem: Problem, seconds: float) -> list[str]:
    """The best times in ms, each result checked before; ratios to the plain one, of the last to the plain step."""
    calls = {heading: ROUTES[key].setup(problem) for heading, key in COLUMNS.items()}
    for heading, key in COLUMNS.items():
        error = problem.expected.error(ROUTES[key].computes, calls[heading]())
        if error > ROUTES[key].tolerance:
            raise AssertionError(f"{problem.case.name}, {heading}: wrong by {error:.2g}")
    ms = {heading: times["best"] for heading, times in measure.in_turns(calls, seconds).items()}
    base = dict.fromkeys(list(COLUMNS)[1:-2], ms["plain"]) | {"with norms": ms["training step"]}
    return [f"{t:.2f} ({t / base[h]:.2f})" if h in base else f"{t:.2f}" for h, t in ms.items()]


def added(problem: Problem, top: int = 6) -> list[list[str]]:
    """Which of torch's operators take the time that norms add to a training step: rows of ms, without and with them."""
    found = []
    for key in ("training step: step", "gradext: step norms"):
        call = ROUTES[key].setup(problem)
        for _ in range(3):
            call()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(CALLS):
                call()
        found.append(Counter({e.key: e.self_cpu_time_total / 1e3 / CALLS for e in profiled.key_averages()}))
    plain, watched = found
    most = sorted({*plain, *watched}, key=lambda key: plain[key] - watched[key])[:top]
    rows = [("all", plain.total(), watched.total()), *((key, plain[key], watched[key]) for key in most)]
    return [[problem.case.name, key, f"{a:.1f}", f"{b:.1f}", f"{(b - a) / plain.total():.1%}"] for key, a, b in rows]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="of measurement a model")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    provenance = measure.provenance()
    lines = [
        "# Real models, all parameters",
        "",
        f"Made by `python -m benchmarks.models` at {provenance['commit']}, {provenance['versions']}, transformers "
        f"{measure.version('transformers')}, on {provenance['machine']}. The best of the calls in turns, in ms; in "
        "brackets the ratio to the plain forward and backward, for the training step with norms to the plain step.",
        "",
        "| model | " + " | ".join(COLUMNS) + " |",
        "| --- |" + " --- |" * len(COLUMNS),
    ]
    print("\n".join(lines), flush=True)
    problems = [Problem(case, 16) for case in CASES.values()]
    problems += [Problem(case, 1) for case in ALONE]
    for problem in problems:
        lines.append("| " + " | ".join([problem.case.name, *times(problem, options.seconds)]) + " |")
        print(lines[-1], flush=True)
    heading = [
        "",
        "## What norms add to a training step",
        "",
        "Own time of torch's operators, ms, without and with norms, as its profiler sees them; the share is of the "
        "whole plain step. `bmm` makes the norms; others are slower where memory that the factors hold cannot be used "
        "again. What is not torch's operators is left out.",
        "",
        "| model | operator | plain | with norms | added |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += heading
    print("\n".join(heading), flush=True)
    for problem in problems[: len(CASES)]:
        rows = ["| " + " | ".join(row) + " |" for row in added(problem)]
        lines += rows
        print("\n".join(rows), flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
