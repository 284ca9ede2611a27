"""gradext without its optional parts, and with warnings as errors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.medium

ROOT = Path(__file__).resolve().parents[2]

USE = """
import torch, gradext
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 4))
x = torch.rand(5, 4)
assert gradext.batch_layer_grads(model, x)["0.weight"].shape == (5, 3, 4)
assert gradext.batch_layer_factors(model, x)["2.weight"].norm().shape == (5,)
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


# What a binary does without torch: the package's own __init__ would import it.
COMPILED = """
import array, sys, types
package = types.ModuleType("gradext")
package.__path__ = [sys.argv[1] + "/gradext"]
sys.modules["gradext"] = package
from gradext import native
assert native.C is not None, native.reason
assert not native.C.build_config()["cuda"]
B, O, I = 2, 3, 4
delta, activation = array.array("f", range(B * O)), array.array("f", range(B * I))
out = array.array("f", [0.0] * (B * O * I))
address = lambda values: values.buffer_info()[0]
addresses = address(delta), address(activation), address(out)
native.C.outer_cpu((*addresses, B, 1, O, I, O, 0, 1, I, 0, 1, O * I, I, 0, 0), 1)
assert list(out) == [delta[b * O + o] * activation[b * I + i] for b in range(B) for o in range(O) for i in range(I)]
print("works")
"""


def python(*arguments: str, executable: str | Path = sys.executable) -> str:
    # Outside of the source folder, whose package would come before an installed one.
    result = subprocess.run([executable, *arguments], capture_output=True, text=True, timeout=900, cwd="/")
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def pythons() -> list[str]:
    """Interpreters of 3.10 to 3.13, one of each: named by GRADEXT_PYTHONS, as PATH is, or found on the PATH."""
    named = os.environ.get("GRADEXT_PYTHONS")
    found = named.split(os.pathsep) if named else [shutil.which(f"python3.{minor}") for minor in range(10, 14)]
    return [path for path in found if path and subprocess.run([path, "-V"], capture_output=True).returncode == 0]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The project's sdist, unpacked nowhere near its source folder, with no nvcc to be found."""
    folder = tmp_path_factory.mktemp("sdist")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    for name in files.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    pytest.importorskip("build", reason="the package build is not installed")
    python("-m", "build", "--sdist", "--outdir", str(folder), str(folder / "source"))
    (path,) = folder.glob("*.tar.gz")
    return path


def wheel(sdist: Path, folder: Path, executable: str | Path) -> Path:
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "GRADEXT_CUDA")}
    command = [executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, sdist]
    result = subprocess.run(
        command, env={**environment, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("executable", pythons())
def test_a_wheel_from_the_sdist_works_on(executable, sdist, tmp_path):
    """As far as that goes without torch: every file compiles, and the compiled module gives the products."""
    built = wheel(sdist, tmp_path, executable)
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), str(built),
           executable=executable)  # fmt: skip
    assert (tmp_path / "site" / "gradext" / "py.typed").is_file()
    python("-W", "error", "-m", "compileall", "-q", "-f", str(tmp_path / "site" / "gradext"), executable=executable)
    assert python("-c", COMPILED, str(tmp_path / "site"), executable=executable) == "works"


@pytest.mark.slow
def test_a_wheel_from_the_sdist_works_in_an_environment_of_torch_and_numpy_alone(sdist, tmp_path):
    python("-m", "venv", str(tmp_path / "venv"))
    executable = tmp_path / "venv" / "bin" / "python"
    built = wheel(sdist, tmp_path, executable)
    release = torch.__version__.partition("+")[0]
    python("-m", "pip", "install", "--quiet", f"torch=={release}", "numpy", executable=executable)
    python("-m", "pip", "uninstall", "--quiet", "--yes", "triton", executable=executable)  # of torch's GPU builds
    python("-m", "pip", "install", "--quiet", "--no-deps", str(built), executable=executable)
    code = f"""{USE}
import importlib.util
from gradext.backends import BACKENDS, choose, Call
others = ("triton", "sklearn", "matplotlib", "safetensors", "PIL", "tqdm")
assert not any(map(importlib.util.find_spec, others))
assert BACKENDS["cpu"].available() is None and BACKENDS["reference"].available() is None
assert BACKENDS["triton"].available() and BACKENDS["cuda"].available()
"""
    assert python("-c", code, executable=executable) == "works"


def test_import_warns_of_nothing():
    """Of torch's own warnings at import gradext is not the cause: torch comes first."""
    assert (
        python("-c", "import torch, warnings; warnings.simplefilter('error'); import gradext; print('works')")
        == "works"
    )


@pytest.mark.parametrize("missing", ["triton", "sklearn", "matplotlib", "tqdm", "gradext._C"])
def test_gradients_work_without(missing):
    """Nor is any of these imported by `import gradext`."""
    if missing == "gradext._C":
        code = f"{WITHOUT_BINARY}{USE}from gradext import native\nassert native.C is None and native.reason"
    else:
        code = f"import sys; sys.modules[{missing!r}] = None\n{USE}"
    assert python("-c", code) == "works"
