"""One model through gradext: whether every parameter of every sample is present and right."""

import importlib
import warnings
from collections import Counter
from dataclasses import dataclass, field

import torch

import gradext

from . import oracle
from .models import MODELS, Case


@dataclass
class Verdict:
    """What one call gave. ``refused`` is the error's message where there was one."""

    tensors: int
    elements: int
    tolerance: str  # of the relative error
    error: float = float("nan")  # relative: of the worst parameter; in lower precision of the whole gradient
    missing: list[str] = field(default_factory=list)
    wrong: dict[str, float] = field(default_factory=dict)  # parameter -> relative error of its worst sample
    refused: str = ""
    fallback: str = ""  # the warning, where a parameter was added by one backward a sample
    rules: dict[str, int] = field(default_factory=dict)  # rule -> number of parameters

    @property
    def right(self) -> bool:
        return not (self.refused or self.missing or self.wrong)

    def __str__(self) -> str:
        if self.refused:
            return f"refused: {self.refused}"
        parts = [f"missing: {', '.join(self.missing)}"] if self.missing else []
        if self.wrong:
            listed = ", ".join(f"{name} ({error:.1e})" for name, error in self.wrong.items())
            parts.append(f"wrong, with an error beyond {self.tolerance}: {listed}")
        return "; ".join(parts) or f"complete and exact, error {self.error:.1e}"


def unavailable(case: Case) -> str:
    """Why the case cannot be built here, or nothing."""
    for library in case.libraries:
        try:
            importlib.import_module(library)
        except Exception as error:  # torchvision beside a torch that it was not built for raises a RuntimeError
            return f"{library} cannot be imported: {error}"
    return ""


def judge(name: str, B: int = 4) -> Verdict:
    """Compare every parameter of B samples with each sample alone."""
    case = MODELS[name]
    model, x, target, want, bound, tolerance = oracle.expect(case, B)
    parameters = oracle.trained(model)
    verdict = Verdict(len(parameters), sum(p.numel() for p in parameters.values()), tolerance)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = gradext.batch_layer_grads(model, x, loss=case.loss, target=target)
        except gradext.CaptureError as error:
            verdict.refused = f"{type(error).__name__}: {error}"
            return verdict
    messages = [str(warning.message) for warning in caught]
    verdict.fallback = next((m for m in messages if any(name in m for name in parameters)), "")
    verdict.rules = dict(Counter(found.coverage.rules.values()).most_common())
    verdict.missing = [name for name in parameters if name not in found]
    off = [name for name, g in found.items() if name not in want or g.shape != want[name].shape]
    there = {name: g for name, g in want.items() if name in found and name not in off}
    distances, sizes = oracle.distances(found, there), oracle.norms(want)
    floor = 1e-6 * oracle.whole(want)
    errors = {name: (d / sizes[name].maximum(floor)).max().item() for name, d in distances.items()}
    if case.dtype == torch.float64:
        verdict.error = max(errors.values(), default=float("nan"))
    else:
        verdict.error = (
            (oracle.whole({n: found[n].double() - g for n, g in there.items()}) / oracle.whole(want)).max().item()
        )
    verdict.wrong = {name: errors[name] for name, d in distances.items() if not (d <= bound[name]).all()}
    verdict.wrong |= dict.fromkeys(off, float("inf"))
    return verdict
