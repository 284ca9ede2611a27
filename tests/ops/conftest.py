"""The CUDA kernels in an emulator, and the backends on which `test_contract.py` tests every operator."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from gradext.backends import BACKENDS, cuda, triton

CSRC = Path(__file__).resolve().parents[2] / "csrc"
_SANITIZERS = os.environ.get("GRADEXT_TEST_SANITIZERS")  # set by test_sanitizers for a process of its own


class Emulator:
    """The compiled module, `C`, and how it runs kernels."""

    def __init__(self, path: Path) -> None:
        spec = importlib.util.spec_from_file_location("gradext_emulated._C", path)
        self.C = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.C)
        self._library = ctypes.CDLL(str(path))
        self._library.emulator_configure.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int] * 3
        for name in ("launches", "last_grid", "stores"):
            getattr(self._library, f"emulator_{name}").restype = ctypes.c_int64

    def configure(self, max_blocks=0, blocks=range(0), backwards=False, multiprocessors=2, l2=0) -> None:
        """The most blocks of a grid; which of them run, where not all; the order of threads and blocks."""
        self._library.emulator_configure(max_blocks, blocks.start, len(blocks), backwards, multiprocessors, l2)

    @property
    def launches(self) -> int:
        return self._library.emulator_launches()

    @property
    def last_grid(self) -> int:
        """How many blocks the last launch asked for."""
        return self._library.emulator_last_grid()

    def divide(self, by: int):
        """`Divisor(by)` as a function of n: (n // by, n % by)."""
        library, pair = self._library, (ctypes.c_uint32 * 2)()

        def call(n: int) -> tuple[int, int]:
            library.emulator_divide(ctypes.c_int64(by), ctypes.c_uint32(n), pair)
            return pair[0], pair[1]

        return call

    def stores(self, nbytes: int) -> int:
        return self._library.emulator_stores(nbytes)


def compile_emulator(folder: Path, includes: list[str]) -> Path:
    pybind11 = pytest.importorskip("pybind11")
    here = Path(__file__).parent / "cuda_emulator"
    flags = ["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wno-unknown-pragmas"]
    flags += ["-Wall", "-Wextra", "-Werror"]
    sanitizers = [f"-fsanitize={_SANITIZERS}", "-fno-sanitize-recover=undefined"] if _SANITIZERS else []
    headers = [f"-I{here}", *(arg for path in includes for arg in ("-isystem", path))]
    python = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    jobs = {f"{path.stem}_cuda": ["-O1", "-x", "c++", path, *headers] for path in (CSRC / "cuda").glob("*.cu")}
    jobs["emulator"] = ["-O1", here / "emulator.cpp", *headers, f"-I{CSRC / 'cuda'}"]
    macros = {"VERSION": "0", "SOURCE_HASH": "0", "WITH_CUDA": "1", "CUDA_ARCHS": "90", "CUDA_PTX": "90"}
    jobs["bindings"] = [CSRC / "bindings.cpp", *python, *(f"-DGRADEXT_{key}={macros[key]}" for key in macros)]
    jobs |= {name: [CSRC / "cpu" / f"{name}.cpp"] for name in ("outer", "threads", "workspace")}
    kernel = [CSRC / "cpu" / "outer_kernel.cpp", "-Wno-psabi"]
    jobs["baseline"] = [*kernel, "-DGRADEXT_ISA=baseline"]
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    jobs["avx2"] = [*kernel, "-DGRADEXT_ISA=avx2", *avx2]
    avx512 = ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bf16"]
    jobs["avx512bf16"] = [*kernel, "-DGRADEXT_ISA=avx512bf16", *avx2, *avx512]

    def compile_one(name: str) -> Path:
        target = folder / f"{name}.o"
        judged = sanitizers if name.endswith(("_cuda", "emulator")) else []
        run("g++", *flags, *judged, *jobs[name], "-c", "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs))
    library = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    run("g++", "-shared", *sanitizers, *objects, "-pthread", "-o", library)
    return library


def run(*command) -> None:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stderr[-4000:]}"


@pytest.fixture(scope="session")
def built(tmp_path_factory, cuda_includes):
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("the emulator changes stacks as Linux on x86-64 does")
    return Emulator(compile_emulator(tmp_path_factory.mktemp("emulated"), cuda_includes))


@pytest.fixture
def emulator(built, monkeypatch):
    """`gradext.backends.cuda` over the emulated kernels, for CPU tensors."""
    monkeypatch.setattr(cuda, "_C", built.C)
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    built.configure()
    return built


if triton.interpreting():
    NAMES = ["triton"]
else:
    NAMES = ["reference", "cpu", pytest.param("emulator", marks=pytest.mark.medium)]
    NAMES += ["cuda", "triton"] if torch.cuda.is_available() else []


@pytest.fixture(params=NAMES)
def module(request, monkeypatch):
    """A backend's module, and the device of its tensors as ``module.DEVICE``."""
    if request.param == "emulator":
        request.getfixturevalue("emulator")
        found, device = cuda, "cpu"
    else:
        found = BACKENDS[request.param]
        if (reason := found.available()) is not None:
            pytest.skip(f"backend {request.param}: {reason}")
        device = "cpu" if request.param in ("reference", "cpu") or triton.interpreting() else "cuda"
    monkeypatch.setattr(found, "DEVICE", torch.device(device), raising=False)
    return found


@pytest.fixture(autouse=True)
def _products_of_bf16(monkeypatch) -> None:
    """Triton's interpreter multiplies the bit patterns of bf16 matrices; widen them, which loses nothing."""
    if not triton.interpreting():
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def widened(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)
