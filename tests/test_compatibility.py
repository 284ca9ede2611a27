"""gradext where something is missing or warnings are errors."""

from __future__ import annotations

import subprocess
import sys

import pytest

USE = """
import torch, gradext
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 4))
x = torch.rand(5, 4)
assert gradext.batch_layer_grads(model, x)["0.weight"].shape == (5, 3, 4)
assert gradext.batch_layer_factors(model, x)["2"].norm().shape == (5,)
print("works")
"""

WITHOUT_BINARY = """
import importlib.util
found = importlib.util.spec_from_file_location
def hidden(name, *arguments, **options):
    if name == "gradext._C":
        raise ImportError("hidden")
    return found(name, *arguments, **options)
importlib.util.spec_from_file_location = hidden
"""


def python(*arguments: str) -> str:
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def test_import_warns_of_nothing():
    """Of torch's own warnings at import gradext is not the cause: torch comes first."""
    assert (
        python("-c", "import torch, warnings; warnings.simplefilter('error'); import gradext; print('works')")
        == "works"
    )


@pytest.mark.parametrize("missing", ["triton", "sklearn", "matplotlib", "gradext._C"])
def test_gradients_work_without(missing):
    """Nor is any of these imported by `import gradext`."""
    if missing == "gradext._C":
        code = f"{WITHOUT_BINARY}{USE}from gradext import native\nassert native.C is None and native.reason"
    else:
        code = f"import sys; sys.modules[{missing!r}] = None\n{USE}"
    assert python("-c", code) == "works"
