"""README's Python examples run as they stand, and the docstrings' examples print what they say."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

import gradext

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def test_readme_examples_run_one_after_the_other():
    rng = np.random.default_rng(0)
    names = {"X_normal": rng.random((60, 16)), "X": rng.random((5, 16)), "__name__": "readme"}
    assert len(EXAMPLES) >= 3
    for source in EXAMPLES:
        exec(compile(source, str(README), "exec"), names)
    assert names["norms"].shape == (256,)


MODULES = [
    "gradext",
    *(m.name for m in pkgutil.walk_packages(gradext.__path__, "gradext.") if "__main__" not in m.name),
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    if name.startswith("gradext.kernels") or name == "gradext._C":
        pytest.skip("kernels have no examples, and the compiled module no docstrings")
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0
