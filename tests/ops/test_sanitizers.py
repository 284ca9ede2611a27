"""The C++ of the CPU backend under compiler warnings, sanitizers, and clang-tidy if it is installed."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "csrc" / "cpu"
COMPILER = shutil.which("g++") or shutil.which("c++")
X86 = platform.machine() in ("x86_64", "AMD64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bf16"]
KERNELS = {"baseline": ["-DGRADEXT_ISA=baseline"]} | (
    {"avx2": ["-DGRADEXT_ISA=avx2", *AVX2], "avx512bf16": ["-DGRADEXT_ISA=avx512bf16", *AVX512]} if X86 else {}
)
SANITIZERS = {
    "address and undefined behaviour": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "threads": ["-fsanitize=thread"],
}
# Of clang-tidy's: what finds bugs. Left out is what the kernels do on purpose: integers that a caller could exchange
# (strides and sizes), shifts of signed constants, copies of a whole line of which the end is not used, padding between
# aligned arrays, and the number of lanes as a quotient of sizes.
LEFT_OUT = (
    "bugprone-easily-swappable-parameters",
    "bugprone-signed-bitwise",
    "bugprone-sizeof-expression",
    "clang-analyzer-optin.performance.Padding",
    "clang-analyzer-unix.cstring.UninitializedRead",
)
CHECKS = ",".join(["-*", "bugprone-*", "clang-analyzer-*", *(f"-{name}" for name in LEFT_OUT)])

pytestmark = [
    pytest.mark.skipif(not CPU.is_dir(), reason="no sources beside the tests"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


def sources() -> list[tuple[Path, list[str]]]:
    """Every file with the flags that it is compiled by, the kernel once for each instruction set."""
    return [
        *((CPU / f"{name}.cpp", []) for name in ("outer", "threads", "workspace")),
        *((CPU / "outer_kernel.cpp", flags) for flags in KERNELS.values()),
    ]


def run(*command: object) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.slow
def test_no_warnings(tmp_path):
    pybind11 = pytest.importorskip("pybind11")
    includes = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    bindings = [*includes, "-DGRADEXT_VERSION=0", "-DGRADEXT_SOURCE_HASH=0"]
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-Wno-psabi", "-Werror"]
    for source, flags in [
        *sources(),
        (ROOT / "csrc" / "bindings.cpp", bindings),
        (ROOT / "tests/ops/sanitize.cpp", []),
    ]:
        run(COMPILER, "-std=c++17", *warnings, *flags, "-c", source, "-o", tmp_path / "unused.o")


@pytest.mark.slow
@pytest.mark.parametrize("name", SANITIZERS)
def test_sanitizers(name, tmp_path):
    flags = ["-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-pthread", "-Wno-psabi", *SANITIZERS[name]]
    objects = []
    for k, (source, own) in enumerate([*sources(), (ROOT / "tests/ops/sanitize.cpp", [])]):
        objects.append(tmp_path / f"{k}.o")
        run(COMPILER, *flags, *own, "-c", source, "-o", objects[-1])
    program = tmp_path / "sanitize"
    run(COMPILER, *flags, *objects, "-ldl", "-o", program)
    assert run(program).strip() == "right"


@pytest.mark.slow
def test_clang_tidy():
    clang_tidy = shutil.which("clang-tidy")
    if clang_tidy is None:
        pytest.skip("clang-tidy is not installed: pip install clang-tidy")
    for source, flags in sources():
        run(clang_tidy, "--quiet", f"--checks={CHECKS}", "--warnings-as-errors=*", source, "--", "-std=c++17", *flags)
