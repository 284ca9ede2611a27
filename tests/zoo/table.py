"""Writes docs/models.md: every model of the zoo, whether it is complete and exact, and its time.

python -m tests.zoo.table [--out FILE] [--only WORD ...]
"""

import argparse
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import gradext
from benchmarks import measure

from . import oracle
from .judge import Verdict, judge, unavailable
from .models import MODELS

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARIES = ("torch", "transformers", "peft", "timm", "diffusers", "segmentation-models-pytorch")
B = 16  # samples of the timed calls
SECONDS = 0.5  # of measurements a model


def by_vmap(model: nn.Module, loss: Callable, x: Any, target: Any) -> Callable[[], oracle.Grads]:
    """`vmap(grad)` of the model as a function of its parameters, each sample a batch of one."""
    parameters = {name: p.detach() for name, p in oracle.trained(model).items()}

    def sample_loss(parameters: dict[str, Tensor], x: Any, target: Any) -> Tensor:
        x, target = pytree.tree_map(lambda t: t.unsqueeze(0), (x, target))
        arguments = ((), x) if isinstance(x, dict) else ((x,), None)
        return loss(functional_call(model, parameters, *arguments), target)[0]

    return lambda: vmap(grad(sample_loss), (None, 0, 0), randomness="different")(parameters, x, target)


def times(name: str) -> dict[str, float | str]:
    """Milliseconds of each way in fp32 (bf16 models in bf16), or why it does not run or is wrong."""
    case = MODELS[name]
    model, loss, x, target = oracle.make(case, B, case.dtype if case.dtype == torch.bfloat16 else torch.float32)
    ways = {
        "gradext": lambda: gradext.batch_layer_grads(model, x, loss=case.loss, target=target),
        "vmap": by_vmap(model, loss, x, target),
        "loop": lambda: oracle.alone(model, loss, x, target),
    }
    result: dict[str, float | str] = {}
    want = oracle.alone(model, loss, x, target)
    size = oracle.whole(want)
    for way in ("gradext", "vmap"):
        try:
            found = ways[way]()
            off = torch.stack(list(oracle.distances(found, want).values())).norm(dim=0) / size
            if not off.max() < 0.05:  # that it is the same quantity, in this precision
                result[way] = "wrong"
        except Exception as error:
            result[way] = reason(str(error))
    ways = {way: call for way, call in ways.items() if way not in result}
    return result | {way: row["ms"] for way, row in measure.in_turns(ways, SECONDS, rounds=7).items()}


REASONS = {  # a part of an error of vmap(grad) -> what it is about
    "calling .item()": "control flow that depends on data",
    "inplace arithmetic": "in-place change of a tensor without samples",
    "autograd.Function with functorch": "custom autograd function",
    "yet support sa": "checkpointing",
    "requires_grad_()": "checkpointing",
    ".data": "use of .data",
}


def reason(message: str) -> str:
    return "fails: " + next((r for part, r in REASONS.items() if part in message), " ".join(message.split())[:60])


def row(name: str, verdict: Verdict, ms: dict[str, float | str]) -> str:
    refused = verdict.refused.splitlines()[0][:160] if verdict.refused else ""
    exact = f"refused: {refused}" if refused else f"yes, {verdict.error:.0e}" if verdict.right else f"**NO**: {verdict}"
    rules = ", ".join(f"{rule} {count}" for rule, count in verdict.rules.items())
    ours = ms["gradext"]

    def against(way: str) -> str:
        other = ms[way]
        return other if isinstance(other, str) else f"{other / ours:.2f}" if isinstance(ours, float) else "-"

    cells = [
        name, f"{verdict.tensors} ({verdict.elements:,})", exact, "yes" if verdict.fallback else "no", rules,
        f"{ours:.1f}" if isinstance(ours, float) else ours, against("vmap"), against("loop"),
    ]  # fmt: skip
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def render(verdicts: dict[str, Verdict], ms: dict[str, dict[str, float | str]], skipped: dict[str, str]) -> str:
    exact = sum(verdict.right for verdict in verdicts.values())
    refused = sum(bool(verdict.refused) for verdict in verdicts.values())
    fallback = sum(bool(verdict.fallback) for verdict in verdicts.values())
    paired = [m for m in ms.values() if isinstance(m["gradext"], float) and isinstance(m["vmap"], float)]
    ahead = sum(m["vmap"] >= m["gradext"] for m in paired)
    source = measure.provenance()
    versions = [f"{name} {measure.version(name)}" for name in LIBRARIES if measure.version(name)]
    lines = [
        "# Real models",
        "",
        f"{len(verdicts)} tiny, randomly initialised configurations of real models; every parameter that requires grad,"
        " for each of 4 samples, in double precision against that sample alone by plain autograd (lower precisions by"
        " their own measure: `tests/zoo/oracle.py`). `pytest -m zoo` checks the same; `python -m tests.zoo.table`"
        " writes this page.",
        "",
        f"- complete and exact: {exact} of {len(verdicts)}; refused: {refused}; some parameter by the fallback, one"
        f" backward a sample: {fallback}",
        f"- no slower than `vmap(grad)`: {ahead} of the {len(paired)} models on which both run;"
        f" `vmap(grad)` does not run, or is wrong, on {sum(isinstance(m['vmap'], str) for m in ms.values())}",
        "",
        "Error: the largest relative error of a parameter of a sample, in lower precision of its whole gradient."
        " Rules: how many parameters each rule served."
        f" Times: medians of one call for {B} samples, all parameters, in fp32 (bf16 where the model's name says so);"
        " the last two columns are times as fast as `vmap(grad)` and as a loop of single backwards, larger than 1 where"
        " gradext is ahead. Models of this size measure the cost of each call more than arithmetic.",
        "",
        f"Made at {source['commit']}, with {', '.join(versions)}, on {source['machine']}.",
        "",
        "| model | parameters (elements) | complete and exact | fallback | rules | ms | vs vmap(grad) | vs loop |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(row(name, verdict, ms[name]) for name, verdict in verdicts.items()),
    ]
    if skipped:
        lines += ["", "Left out here: " + "; ".join(f"{name} ({reason})" for name, reason in skipped.items()) + "."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "models.md", metavar="FILE")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="models whose name has one of the words"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # the models are tiny
    verdicts, ms, skipped = {}, {}, {}
    for name, case in MODELS.items():
        if not any(word in name for word in arguments.only):
            continue
        if unavailable(case):
            skipped[name] = unavailable(case)
            continue
        verdicts[name] = judge(name)
        ms[name] = times(name)
        print(row(name, verdicts[name], ms[name]), flush=True)
    arguments.out.write_text(render(verdicts, ms, skipped))


if __name__ == "__main__":
    main()
