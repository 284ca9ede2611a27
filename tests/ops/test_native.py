"""The compiled module: the CPU kernel against fp64 torch, the workspace, the build, the stale-binary rule."""

import importlib.metadata
import itertools
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
import torch

from gradext import native
from gradext.backends import cpu, cuda

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"

pytestmark = pytest.mark.skipif(native.C is None, reason=f"no compiled module: {native.reason}")
C = native.C

NEVER, ALWAYS = 1 << 60, 0  # stream_from: plain stores for every size, streaming stores for every size
TYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
]
CANARY = 7.0
ISAS = [] if C is None else C.build_config()["cpu_isas"]


def kernel(delta, activation, out, threads=1, stream_from=-1, isa=""):
    """The C function itself on [B, T, ·] tensors."""
    C.outer_cpu(cpu.outer_fields(delta, activation, out), threads, stream_from, isa)
    return out


def factors(B, T, O, I, dtype=torch.float32):
    generator = torch.Generator().manual_seed(B + 10 * T + 100 * O + 1000 * I)
    return (torch.randn(B, T, n, generator=generator, dtype=dtype) for n in (O, I))


def expected(delta, activation):
    return torch.bmm(delta.double().transpose(1, 2), activation.double())


def assert_correct(out, delta, activation):
    """One rounding for T = 1; else at most twice the error of torch.bmm in the type of the sum."""
    exact = expected(delta, activation)
    if delta.shape[1] == 1:
        torch.testing.assert_close(out, (delta.transpose(1, 2) * activation).to(out.dtype), rtol=0, atol=0)
        return
    by_torch = torch.bmm(delta.transpose(1, 2), activation).to(out.dtype)
    rounding = torch.finfo(out.dtype).eps * exact.abs().max().clamp(1)
    if delta.dtype is torch.float64:  # the oracle is no more exact than what it judges
        rounding = rounding * delta.shape[1]
    bound = 2 * (by_torch.double() - exact).abs().max() + rounding
    assert (out.double() - exact).abs().max() <= bound


def guarded(B, O, I, dtype, gap_o=0, gap_b=0, offset=0):
    """An output with gaps between rows and samples, and the memory around it full of canaries."""
    out_o, out_b = I + gap_o, O * (I + gap_o) + gap_b
    memory = torch.full((offset + B * out_b + 64,), CANARY, dtype=dtype)
    return memory, memory.as_strided((B, O, I), (out_b, out_o, 1), offset)


def assert_nothing_else_written(memory, out):
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(False)
    assert (memory[outside] == CANARY).all()


@pytest.mark.parametrize("stream_from", [NEVER, ALWAYS], ids=["plain", "stream"])
@pytest.mark.parametrize(("in_dtype", "out_dtype"), TYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("T", [1, 2, 5, 33])
def test_every_shape_type_and_kind_of_store(T, isa, in_dtype, out_dtype, stream_from):
    for B, O, I in itertools.product([1, 3], [1, 7], [1, 2, 5, 8, 9, 20, 31, 300, 1030]):
        delta, activation = factors(B, T, O, I, in_dtype)
        for gap_o, gap_b, offset in [(0, 0, 0), (0, 0, 3), (0, 5, 1), (3, 2, 1)]:
            memory, out = guarded(B, O, I, out_dtype, gap_o, gap_b, offset)
            kernel(delta, activation, out, 1, stream_from, isa)
            assert_correct(out, delta, activation)
            assert_nothing_else_written(memory, out)


@pytest.mark.parametrize("stream_from", [NEVER, ALWAYS], ids=["plain", "stream"])
@pytest.mark.parametrize(("in_dtype", "out_dtype"), TYPES, ids=lambda dtype: str(dtype)[6:])
def test_short_rows_at_every_phase(in_dtype, out_dtype, stream_from):
    for I in range(1, 71):
        for B, O, stride in [(5, 1, 1), (5, 3, 1), (2, 29, 2), (1, 2500 if I % 8 == 3 else 130, 1)]:
            wide, activation = factors(B, 1, O * stride, I, in_dtype)
            delta = wide[:, :, ::stride]
            for offset in range(8) if B > 1 else [I % 8]:
                memory, out = guarded(B, O, I, out_dtype, 0, 0, offset)
                kernel(delta, activation, out, 1, stream_from)
                assert_correct(out, delta, activation)
                assert_nothing_else_written(memory, out)


@pytest.mark.parametrize("stream_from", [NEVER, ALWAYS], ids=["plain", "stream"])
@pytest.mark.parametrize("I", [3, 8, 20, 31, 39])
def test_threads_cut_short_rows_in_mid_sample(I, stream_from):
    for B, O, dtype in itertools.product([1, 3], [40_001, 65_000], [torch.float32, torch.bfloat16]):
        delta, activation = factors(B, 1, O, I)
        memory, out = guarded(B, O, I, dtype, 0, 0, 1)
        kernel(delta, activation, out, 3, stream_from)
        assert_correct(out, delta, activation)
        assert_nothing_else_written(memory, out)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("stream_from", [NEVER, ALWAYS], ids=["plain", "stream"])
@pytest.mark.parametrize(
    ("B", "T", "O", "I"), [(5, 1, 301, 783), (3000, 1, 7, 33), (40001, 2, 3, 5), (9, 1, 1, 200_001)]
)
def test_threads_share_the_output_without_gaps(B, T, O, I, stream_from, threads):
    delta, activation = factors(B, T, O, I)
    for gap in (0, 1):
        memory, out = guarded(B, O, I, torch.float32, gap, 0, 1)
        kernel(delta, activation, out, threads, stream_from)
        assert_correct(out, delta, activation)
        assert_nothing_else_written(memory, out)


@pytest.mark.parametrize("stream_from", [NEVER, ALWAYS], ids=["plain", "stream"])
@pytest.mark.parametrize("I", [1, 5, 40])
def test_strided_inputs(I, stream_from):
    B, T, O = 3, 2, 6
    wide_delta, wide_activation = factors(2 * B, T, 2 * O, 3 * I)
    pairs = {
        "sliced": (wide_delta[::2, :, ::2], wide_activation[::2, :, ::3]),
        "transposed": (
            wide_delta[:B, :, :O].permute(2, 1, 0).contiguous().permute(2, 1, 0),
            wide_activation[:B, :, :I].transpose(1, 2).contiguous().transpose(1, 2),
        ),
        "expanded over samples": (
            wide_delta[:1, :, :O].expand(B, T, O),
            wide_activation[:1, :, :I].expand(B, T, I),
        ),
        "expanded over features": (
            wide_delta[:B, :, :1].expand(B, T, O),
            wide_activation[:B, :, :1].expand(B, T, I),
        ),
    }
    for name, (delta, activation) in pairs.items():
        out = kernel(delta, activation, torch.empty(B, O, I), 1, stream_from)
        torch.testing.assert_close(out.double(), expected(delta, activation), rtol=1e-6, atol=1e-6, msg=name)


def test_negative_strides():
    delta, activation = factors(4, 1, 3, 11)
    out = torch.empty(4, 3, 11)
    last = lambda t: t.data_ptr() + (t.numel() - 1) * 4  # noqa: E731
    fields = (last(delta), last(activation), out.data_ptr(), 4, 1, 3, 11, -3, 0, -1, -11, 0, -1, 33, 11, 0, 0)
    C.outer_cpu(fields, 1, 0)
    assert_correct(out, delta.flip(0, 2), activation.flip(0, 2))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stream_from", [NEVER, ALWAYS], ids=["plain", "stream"])
def test_narrowing_rounds_to_even_and_keeps_specials(dtype, stream_from, isa):
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).float()
    ordered = every[every.isfinite()].sort().values
    bits = torch.arange(0, 1 << 32, 10_007, dtype=torch.int64)
    values = torch.cat(
        [
            (bits - (1 << 31)).to(torch.int32).view(torch.float32),
            torch.tensor(
                [
                    0.0,
                    -0.0,
                    float("inf"),
                    -float("inf"),
                    float("nan"),
                    65519.99,
                    65520.0,
                    5.9e-8,
                    2.9e-8,
                    3.4e38,
                ]
            ),
            torch.arange(-2048, 2048).add(0.5) * 2.0**-26,
            every,
            (ordered[1:].double() + ordered[:-1]).div(2).float(),  # the ties
        ]
    )
    ones = torch.ones(1, 1, 1)
    out = kernel(ones, values.view(1, 1, -1), torch.empty(1, 1, values.numel(), dtype=dtype), 1, stream_from, isa)
    out = out.flatten()
    wanted = values.to(dtype)
    assert torch.equal(out.isnan(), wanted.isnan())
    keep = ~wanted.isnan()
    assert torch.equal(out[keep].view(torch.int16), wanted[keep].view(torch.int16))


def test_zeros_keep_their_sign():
    delta, activation = torch.tensor([[[-0.0, 0.0, 1.0]]]), torch.full((1, 1, 21), -0.0)
    for stream_from in (NEVER, ALWAYS):
        out = kernel(delta, activation, torch.empty(1, 3, 21), 1, stream_from)
        assert torch.equal(out.signbit(), (delta.transpose(1, 2) * activation).signbit())


def test_fill_stays_inside():
    memory = torch.zeros(3_000_001, dtype=torch.uint8)
    C.nt_fill_cpu(memory.data_ptr() + 3, 2_999_000, 2)
    assert memory[:3].sum() == 0
    assert memory[2_999_003:].sum() == 0
    assert (memory[3:2_999_003] == 1).all()


def test_workspace_gives_the_same_memory_again():
    delta, activation = factors(64, 1, 100, 100)
    C.workspace_empty_cache()
    before = C.workspace_stats()
    first = cpu.outer(delta, activation)
    kept = first[0, 0].clone()
    address = first.data_ptr()
    assert address % (2 << 20) == 0
    del first
    assert C.workspace_stats()["bytes_cached"] == 4 << 20
    second = cpu.outer(delta, activation)
    assert second.data_ptr() == address
    assert torch.equal(second[0, 0], kept)
    view = second[1:]
    del second
    third = cpu.outer(delta, activation)  # the view still holds the block
    assert third.data_ptr() != address
    after = C.workspace_stats()
    assert (after["hits"] - before["hits"], after["misses"] - before["misses"]) == (1, 2)
    assert after["bytes_in_use"] - before["bytes_in_use"] == 8 << 20
    del view, third
    C.workspace_empty_cache()
    assert C.workspace_stats()["bytes_cached"] == 0
    assert C.workspace_stats()["bytes_in_use"] == before["bytes_in_use"]


def test_workspace_reuses_blocks_of_nearly_the_size_only():
    C.workspace_empty_cache()
    megabyte = 1 << 20
    C.HostBuffer(20 * megabyte)
    hits = C.workspace_stats()["hits"]
    C.HostBuffer(14 * megabyte)  # 20 > 1.25 * 14
    assert C.workspace_stats()["hits"] == hits
    C.HostBuffer(17 * megabyte)  # a block of 18 needs at most 22
    assert C.workspace_stats()["hits"] == hits + 1
    C.workspace_empty_cache()


def test_workspace_error_says_how_much():
    with pytest.raises(MemoryError, match=str(1 << 60)):
        C.HostBuffer(1 << 60)


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.medium
def test_workspace_limit_from_the_environment():
    code = (
        "from gradext.native import C\n"
        "a, b, c = (C.HostBuffer(4 << 20) for _ in range(3))\n"
        "del a, b, c\n"
        "print(C.workspace_stats()['bytes_cached'])"
    )
    assert run_python(code, GRADEXT_WORKSPACE_MB="9") == str(8 << 20)
    assert run_python(code, GRADEXT_WORKSPACE_MB="0") == "0"


def test_calls_from_many_threads():
    delta, activation = factors(40, 1, 100, 101)
    wanted = delta.transpose(1, 2) * activation
    wrong = []

    def work():
        for _ in range(30):
            if not torch.equal(cpu.outer(delta, activation), wanted):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.medium
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_kernel_and_workspace_work_after_fork():
    code = (
        "import os, torch\n"
        "from gradext.backends import cpu\n"
        "d, a = torch.randn(50, 100), torch.randn(50, 300)\n"
        "wanted = d[:, :, None] * a[:, None]\n"
        "assert torch.equal(cpu.outer(d, a), wanted)\n"
        "pid = os.fork()\n"
        "same = lambda t: (t.numpy() == wanted.numpy()).all()  # torch's own OpenMP dies in a fork\n"
        "ok = same(cpu.outer(d, a, torch.empty_like(wanted))) and same(cpu.outer(d, a))\n"
        "if pid == 0:\n"
        "    os._exit(0 if ok else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), ok)"
    )
    assert run_python(code) == "0 True"


def test_build_config():
    config = C.build_config()
    from gradext._version import __version__

    assert config["version"] == __version__
    assert config["cpu_isas"][-1] == "baseline"
    with pytest.raises(ValueError, match="isa: expected one of this machine's, but got none"):
        kernel(*factors(1, 1, 2, 3), torch.empty(1, 2, 3), isa="none")
    assert isinstance(config["cuda"], bool)
    assert bool(config["cuda_archs"]) == config["cuda"]
    status = C.cuda_status()
    assert (status["reason"] is None) == (status["device_count"] > 0)
    if status["reason"] is not None:
        assert cuda.available() == status["reason"]
    assert cpu.available() is None


@pytest.mark.skipif(not CSRC.is_dir(), reason="no sources beside the tests")
def test_stale_binaries_are_refused(tmp_path):
    config = C.build_config()
    assert config["source_hash"] == native.source_hash(CSRC)  # setup.py and native.py agree
    assert native._stale(config, config["version"], CSRC) is None
    assert "0.0.0" in native._stale(config, "0.0.0", CSRC)
    shutil.copytree(CSRC, tmp_path / "csrc")
    (tmp_path / "csrc" / "outer.h").open("a").write("\n")
    assert "other sources" in native._stale(config, config["version"], tmp_path / "csrc")
    assert native._stale(config, config["version"], tmp_path / "none") is None


@pytest.mark.medium
def test_a_stale_binary_warns_and_a_missing_one_does_not(tmp_path):
    package = tmp_path / "gradext"
    shutil.copytree(Path(native.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = "import warnings; warnings.simplefilter('error'); import gradext; print(gradext.native.C)"
    run = lambda: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True
    )
    if not list(native._binaries(Path(native.__file__).parent)):
        pytest.skip("the package in use has no binary of its own")
    shutil.copy(C.__file__, package)
    (package / "_version.py").write_text('__version__ = "0.0.0"\n')
    stale = run()
    assert stale.returncode != 0
    assert "runs without its compiled kernels" in stale.stderr
    assert "this is 0.0.0: run `pip install .`" in stale.stderr
    (package / Path(C.__file__).name).unlink()
    installed = list(importlib.metadata.distributions(name="gradext"))
    if not installed:
        assert run().stdout == "None\n"


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no sources beside the tests")
def test_sdist_holds_every_native_source(tmp_path):
    for name in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "LICENSE",
        "README.md",
        "csrc",
        "gradext",
        "tests",
    ):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif source.is_file():
            shutil.copy(source, tmp_path / name)
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "setup.py", "-q", "sdist"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env={**os.environ, "GRADEXT_CUDA": "0"})
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    wanted = {path.relative_to(ROOT).as_posix() for path in CSRC.rglob("*") if path.is_file()}
    assert wanted | {"setup.py", "MANIFEST.in", "pyproject.toml"} <= held


def build(folder, **environment):
    pytest.importorskip("pybind11")
    places = ("--build-lib", str(folder), "--build-temp", str(folder))
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *places],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def program(folder, name, script) -> str:
    """A folder for PATH with such a program."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


NVCC_KNOWS = "echo compute_75; echo compute_80; echo compute_90; echo compute_120"
MISSING = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no sources beside the tests")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"GRADEXT_CUDA": "yes"}, "GRADEXT_CUDA must be"),
        ({"GRADEXT_CUDA": "1", "PATH": "/nowhere", "CUDA_HOME": "", "CUDA_PATH": ""}, "nvcc is neither"),
    ],
)
@needs_sources
def test_build_errors_say_what_to_do(environment, message, tmp_path):
    result = build(tmp_path, **environment)
    assert result.returncode != 0
    assert message in result.stderr


@needs_sources
def test_a_failing_nvcc_fails_no_install(tmp_path):
    """Unless GRADEXT_CUDA=1 asks for the CUDA kernels."""
    path = program(tmp_path / "bin", "nvcc", f'case "$*" in *list-gpu-arch*) {NVCC_KNOWS};; *) exit 1;; esac')
    options = {"PATH": path, "CUDA_HOME": "", "CUDA_PATH": "", "GRADEXT_CUDA": "", "GRADEXT_CUDA_ARCHS": "90"}
    options |= MISSING  # which saves the time of compiling the rest
    result = build(tmp_path, **options)
    assert result.returncode == 0, result.stderr
    assert "could not compile the CUDA kernels" in result.stderr
    assert "left out, and Triton takes their place" in result.stderr
    result = build(tmp_path, **options | {"GRADEXT_CUDA": "1"})
    assert result.returncode != 0
    assert "could not compile the CUDA kernels" in result.stderr


@needs_sources
def test_a_missing_compiler_fails_no_install(tmp_path):
    """As on Windows, whose compiler takes none of the flags."""
    result = build(tmp_path, **MISSING, GRADEXT_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert "installed without them and runs on plain torch" in result.stderr
    assert "install one (apt install g++" in result.stderr
    assert not list(tmp_path.rglob("_C*"))


@pytest.mark.medium
@pytest.mark.parametrize(
    ("answer", "targets"), [("echo 9.0; echo 7.5; echo 9.0", ["75", "90"]), ("echo 12.0", ["120"]), ("exit 9", None)]
)
@needs_sources
def test_native_is_what_this_machines_gpus_are(answer, targets, tmp_path):
    nvcc = f'case "$*" in *list-gpu-arch*) {NVCC_KNOWS};; *) echo "$*" >&2; exit 1;; esac'
    program(tmp_path / "bin", "nvcc", nvcc)
    path = program(tmp_path / "bin", "nvidia-smi", answer)
    options = {"PATH": path, "CUDA_HOME": "", "CUDA_PATH": "", "CUDA_VISIBLE_DEVICES": "-1"}
    result = build(tmp_path / "built", **options, GRADEXT_CUDA="1", GRADEXT_CUDA_ARCHS="native")
    assert result.returncode != 0
    if targets is None:
        assert "neither nvidia-smi nor torch tells the compute capability of a GPU" in result.stderr
        return
    for target in targets:
        assert f"-gencode=arch=compute_{target},code=sm_{target}" in result.stderr
    assert f"code=compute_{targets[0]}" in result.stderr
    assert result.stderr.count("code=sm_") // result.stderr.count("code=compute_") == len(targets)


@needs_sources
def test_amd_is_told_no(tmp_path):
    path = program(tmp_path / "bin", "hipcc", "exit 1")
    bare = os.pathsep.join(folder for folder in path.split(os.pathsep) if not (Path(folder) / "nvcc").exists())
    result = build(tmp_path / "built", PATH=bare, CUDA_HOME="", CUDA_PATH="", GRADEXT_CUDA="", **MISSING)
    assert result.returncode == 0, result.stderr
    assert "ROCm is not supported" in result.stderr
