"""The Triton backend without a GPU: operators in the interpreter, kernels compiled for three GPUs, its choice.

Kernels are compiled by Triton for the arguments of real calls: only the launch is left out. The product of all sizes,
types and GPUs takes minutes and is marked ``slow``: ``pytest tests/ops/test_triton.py -m slow``.
"""

import contextlib
import functools
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gradext
from gradext import backends, ops
from gradext.backends import triton as backend
from gradext.errors import BackendError

# --- operators -------------------------------------------------------------------------------------------------------


def version(module) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def run_python(*arguments, **environment):
    environment = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


FEW = "group or short_rows or mixed or strided_inputs or writes or 33-129"  # of these tests, in seconds


@pytest.mark.parametrize("device", ["few", pytest.param("interpreter", marks=pytest.mark.slow), "gpu"])
def test_operators(device):
    """The contract and `triton_operators.py`, in a process of their own."""
    triton = pytest.importorskip("triton")
    if device == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if device != "gpu" and version(triton) < (3, 7) and version(np) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 and older does not know NumPy 2.4: it converts arrays to int")
    tests = [str(Path(__file__).with_name(name)) for name in ("test_contract.py", "triton_operators.py")]
    interpret = None if device == "gpu" else "1"
    chosen = ("-k", FEW) if device == "few" else ()
    run = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, *chosen, TRITON_INTERPRET=interpret)
    assert run.returncode == 0, run.stdout + run.stderr


# --- compilation -----------------------------------------------------------------------------------------------------

GPUS = (80, 90, 100)
TYPES = {
    "fp32": torch.float32, "tf32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
# What each call is to launch: name -> (kernel, operator, shapes of its operands, options).
CALLS = {
    "outer aligned": ("outer_tiles", "outer", [(64, 400), (64, 784)], {}),
    "outer of few rows": ("outer_tiles", "outer", [(64, 16), (64, 784)], {}),
    "outer of fewer rows": ("outer_tiles", "outer", [(64, 8), (64, 784)], {}),
    "outer to bf16": ("outer_tiles", "outer", [(64, 400), (64, 784)], {"dtype": torch.bfloat16}),
    "outer to fp32": ("outer_tiles", "outer", [(64, 400), (64, 784)], {"dtype": torch.float32}),
    "outer of 4 positions": ("outer_tiles", "outer", [(64, 4, 400), (64, 4, 784)], {}),
    "outer odd": ("outer_flat", "outer", [(63, 401), (63, 785)], {}),
    "outer narrow": ("outer_flat", "outer", [(63, 10), (63, 32)], {}),
    "outer odd to bf16": ("outer_flat", "outer", [(63, 401), (63, 785)], {"dtype": torch.bfloat16}),
    "outer odd of 4 positions": ("outer_flat", "outer", [(63, 4, 401), (63, 4, 785)], {}),
    "outer of 64 positions": ("outer_dot", "outer", [(64, 64, 400), (64, 64, 784)], {"dtype": torch.float16}),
    "outer of short rows": ("outer_flat", "outer", [(64, 33), (64, 1)], {}),
    "outer odd of 65 positions": (
        "outer_dot", "outer", [(64, 65, 400), (64, 65, 784)], {"dtype": torch.float16}
    ),
    "group": ("outer_group", "outer_group", [(64, 400), (64, 784), (64, 784), (64, 400), (64, 16), (64, 256)], {}),
    "group of 8": ("outer_group", "outer_group", [(64, 400), (64, 784)] * 8, {}),
    "norm": ("sq_norm_rows", "sq_norm", [(64, 400), (64, 784)], {}),
    "norm short": ("sq_norm_rows", "sq_norm", [(64, 400), (64, 384)], {}),
    "norm odd": ("sq_norm_rows", "sq_norm", [(64, 401), (64, 785)], {}),
    "norm of 11 positions": ("sq_norm_gram", "sq_norm", [(64, 11, 400), (64, 11, 784)], {}),
    "norm odd of 11 positions": ("sq_norm_gram", "sq_norm", [(64, 11, 401), (64, 11, 785)], {}),
    "norm of 27 positions": ("sq_norm_gram", "sq_norm", [(64, 27, 400), (64, 27, 784)], {}),
    "norm odd of 27 positions": ("sq_norm_gram", "sq_norm", [(64, 27, 401), (64, 27, 785)], {}),
    "norm of 96 positions": ("sq_norm_gram", "sq_norm", [(64, 96, 400), (64, 96, 784)], {}),
    "norm odd of 97 positions": ("sq_norm_gram", "sq_norm", [(64, 97, 401), (64, 97, 785)], {}),
    "norm of 4096 positions": ("sq_norm_gradient", "sq_norm", [(4, 4096, 400), (4, 4096, 784)], {}),
    "norm odd of 4096 positions": ("sq_norm_gradient", "sq_norm", [(4, 4096, 401), (4, 4096, 785)], {}),
    "linear": ("bilinear", "linear", [(64, 400), (64, 784), (100, 400, 784)], {}),
    "linear short": ("bilinear", "linear", [(64, 784), (64, 20), (100, 784, 20)], {}),
    "linear odd": ("bilinear", "linear", [(64, 785), (64, 401), (100, 785, 401)], {}),
    "linear of many positions": ("bilinear", "linear", [(64, 9, 400), (64, 9, 784), (1, 400, 784)], {}),
    "sum": ("weighted_sum", "weighted_sum", [(8, 512, 400), (8, 512, 784), (8,)], {}),
    "sum odd": ("weighted_sum", "weighted_sum", [(8, 513, 401), (8, 513, 785), (8,)], {}),
    "project": ("project", "project", [(8, 512, 400), (8, 512, 784), (400, 16), (784, 16)], {}),
    "project odd": ("project", "project", [(8, 513, 401), (8, 513, 785), (401, 64), (785, 50)], {}),
    "gram": ("gram", "gram", [(2048, 400), (2048, 784), (2000, 400), (2000, 784)], {}),
    "gram odd": ("gram", "gram", [(2047, 401), (2047, 785), (2001, 401), (2001, 785)], {}),
    "gram small": ("gram", "gram", [(64, 400), (64, 784), (32, 400), (32, 784)], {}),
    "gram small odd": ("gram", "gram", [(63, 401), (63, 785), (31, 401), (31, 785)], {}),
    "gram of 5 positions": ("gram", "gram", [(512, 5, 400), (512, 5, 784), (512, 16, 400), (512, 16, 784)], {}),
    "gram odd of 9 positions": ("gram", "gram", [(9, 9, 401), (9, 9, 785), (9, 3, 401), (9, 3, 785)], {}),
    "gram of 100 positions": ("gram", "gram", [(9, 100, 4096), (9, 100, 4096), (9, 90, 4096), (9, 90, 4096)], {}),
    "gram of itself": ("gram", "gram", [(2048, 400), (2048, 784)], {}),
}  # fmt: skip
QUICK = {
    (90, "fp32"): ("outer aligned", "outer odd", "group", "norm", "norm odd of 27 positions", "linear"),
    (90, "bf16"): (
        "outer aligned",
        "outer odd",
        "norm odd of 97 positions",
        "linear short",
        "gram",
        "gram odd",
        "sum odd",
        "project",
        "project odd",
    ),
    (90, "fp64"): ("outer aligned", "outer odd", "linear"),
    (90, "tf32"): ("norm of 27 positions", "gram of 5 positions"),
    (80, "fp32"): ("outer odd", "norm odd of 4096 positions"),
    (80, "bf16"): ("sum", "outer of few rows", "outer of 64 positions", "linear odd", "gram of itself"),
    (100, "fp32"): ("outer odd", "norm of 4096 positions"),
    (100, "bf16"): ("outer aligned", "outer odd of 65 positions", "norm odd of 4096 positions", "linear"),
    (100, "fp16"): ("outer of short rows", "gram odd of 9 positions"),
}
ON_TENSOR_CORES = ("gram", "weighted_sum", "project")  # alone
# Consumer cards have no more shared memory for a block: sm_86, sm_89 and sm_120.
SHARED_MEMORY = 99 * 1024


def calls(dtype: str) -> list[str]:
    """The calls that launch a kernel in this type."""
    return [
        call for call, (kernel, *_) in CALLS.items() if kernel not in ON_TENSOR_CORES or dtype not in ("fp32", "fp64")
    ]


def compilations():
    for gpu in GPUS:
        for dtype in TYPES:
            for call in calls(dtype):
                marks = pytest.mark.medium if call in QUICK.get((gpu, dtype), ()) else pytest.mark.slow
                yield pytest.param(gpu, dtype, call, marks=marks, id=f"sm_{gpu}-{dtype}-{call.replace(' ', '-')}")


def call_operator(call: str, dtype: str) -> None:
    _, operator, shapes, options = CALLS[call]
    operands = [torch.empty(shape, dtype=TYPES[dtype]) for shape in shapes]
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    if operator == "outer_group":
        pairs = zip(operands[::2], operands[1::2], strict=True)
        backend.outer_group([(d, a, d.new_empty(*d.shape, a.shape[1])) for d, a in pairs])
    elif operator == "gram" and len(operands) == 2:
        backend.gram(*operands, *operands)
    else:
        getattr(backend, operator)(*operands, **options)


@pytest.fixture
def jit():
    """triton.runtime.jit.JITFunction, where kernels are those of the compiler."""
    pytest.importorskip("triton")
    if backend.interpreting():
        pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile")
    from triton.runtime.jit import JITFunction

    allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    yield JITFunction
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32


@pytest.fixture
def compiled(jit, monkeypatch, tmp_path):
    """A function that makes a call for a GPU, and returns each (name, kernel, ptxas report) instead of launching it."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        """Stands for a GPU that is not there."""

        def __init__(self, gpu):
            self.gpu = gpu

        def get_current_device(self):
            return f"sm_{self.gpu}"  # Triton keeps its kernels by device

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", self.gpu, 32)

    monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))  # a cached kernel has no report
    run = jit.run

    def compile_call(gpu, dtype, call):
        kernels = []

        def compile_only(self, *arguments, grid, warmup, **options):
            self.device_caches.pop(f"sm_{gpu}", None)
            with contextlib.redirect_stdout(io.StringIO()) as report:
                kernel = run(self, *arguments, grid=grid, warmup=True, **options)
            kernels.append((self.__name__, kernel, report.getvalue()))

        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(gpu))
        monkeypatch.setattr(jit, "run", compile_only)
        call_operator(call, dtype)
        return kernels

    return compile_call


@pytest.mark.parametrize(("gpu", "dtype", "call"), list(compilations()))
def test_compiles_without_spills(compiled, gpu, dtype, call):
    expected, *_ = CALLS[call]
    kernels = compiled(gpu, dtype, call)
    assert [name for name, _, _ in kernels] == [expected]
    [(_, kernel, report)] = kernels
    ptx, report = kernel.asm["ptx"], " ".join(report.split())
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills.groups() == ("0", "0"), report
    assert int(re.search(r"Used (\d+) registers", report)[1]) <= 255
    assert kernel.metadata.shared <= SHARED_MEMORY

    if expected.startswith("outer"):
        stores = re.findall(r"st\.global(\S*)", ptx)
        assert all(".cs" in store for store in stores), "streaming stores"
        wide = [store for store in stores if store.endswith((".v4.b32", ".v2.b64", ".v8.b32", ".v4.b64"))]
        if expected == "outer_flat":  # beside them, the last program's masked ones
            vectors, elements = flat_stores_per_thread(call, dtype)
            assert len(wide) >= vectors
            assert len(stores) <= vectors + elements
        else:
            assert wide == stores
    if expected in ("outer_dot", "sq_norm_gram", "sq_norm_gradient", "bilinear", *ON_TENSOR_CORES):
        tensor_cores = re.search(r"(mma\.sync|wgmma|tcgen05\.mma)", ptx) is not None
        assert tensor_cores or dtype in ("fp32", "fp64")
        in_parts = expected == "project"  # whose sums over positions are split into parts that TF32 holds
        assert ("tf32" in ptx) == (dtype == "tf32" or in_parts), "TF32 where it was asked for, and only there"


def flat_stores_per_thread(call: str, dtype: str) -> tuple[int, int]:
    """How many 16-byte vectors and how many elements each thread of `outer_flat` stores."""
    from gradext.kernels import outer as kernels

    _, _, shapes, options = CALLS[call]
    size = options.get("dtype", TYPES[dtype]).itemsize
    halved = len(shapes[0]) == 3 or shapes[1][-1] * size < 16
    elements = kernels.FLAT[size] // (2 if halved else 1) // (32 * kernels.WARPS)
    return elements * size // 16, elements


def test_calls_cover_the_tile_tables(jit, monkeypatch):
    """Every configuration of every table is launched by some call above, so that the slow tests compile them all."""
    from gradext.kernels import bilinear, gram, outer, sq_norm, sums

    launched = set()

    def record(self, *arguments, grid, warmup, num_warps, num_stages, **constants):
        blocks = (value for name, value in constants.items() if name.startswith(("BLOCK", "ROWS", "COLUMNS", "VECTOR")))
        launched.add((self.__name__, *blocks, num_warps))

    monkeypatch.setattr(jit, "run", record)
    for dtype in TYPES:
        for call in calls(dtype):
            call_operator(call, dtype)

    def configurations(kernel):
        return {configuration[1:] for configuration in launched if configuration[0] == kernel}

    assert {(o, i) for o, i, _ in configurations("outer_tiles")} >= {
        (o, outer.TILE_I[size]) for o in (8, 16, outer.TILE_O) for size in (2, 4, 8)
    }
    assert {block for _, block, _ in configurations("outer_flat")} == {
        block // halves for block in outer.FLAT.values() for halves in (1, 2)
    }
    assert {(o, i, t, w) for t, o, i, w in configurations("outer_dot")} == {
        (*blocks, warps) for blocks, warps, _ in outer.DOT_TILES.values()
    }
    assert {(r, c) for r, c, _ in configurations("sq_norm_rows")} == {sq_norm.SHORT_ROWS, sq_norm.LONG_ROWS}
    assert configurations("sq_norm_gram") == {
        (*blocks, warps) for table in sq_norm.GRAM_TILES.values() for blocks, warps, _ in table
    }
    assert {(o, i, t, w) for t, o, i, w in configurations("sq_norm_gradient")} == {
        (*blocks, warps) for blocks, warps, _ in sq_norm.GRADIENT_TILES.values()
    }
    assert {(r, h * n, k, w) for r, h, n, k, w in configurations("bilinear")} == {
        (*blocks, warps) for blocks, warps, _ in bilinear.TILES.values()
    }
    assert {(o, i, r, w) for o, i, r, w in configurations("weighted_sum")} == {
        (*blocks, warps) for blocks, warps, _ in sums.SUM_TILES.values()
    }
    assert {(t, k, w) for t, k, _, _, w in configurations("project")} == {
        (*blocks, warps) for blocks, warps, _ in sums.PROJECT_TILES.values()
    }
    assert {(b * t, c * s, k, w) for b, t, c, s, k, w in configurations("gram")} == {
        (rows, rows, k, warps) for table in gram.TILES.values() for (rows, k), warps, _ in table
    }


def test_newer_tf32_flag_is_followed():
    """torch's older flag must not even be read once the newer one was set."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("needs torch 2.9")
    before = matmul.fp32_precision
    try:
        for asked in ("tf32", "ieee"):
            matmul.fp32_precision = asked
            assert backend._precision(torch.float32) == asked
    finally:
        matmul.fp32_precision = before


# --- choice ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    """`available()` asked anew, without the interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "available", functools.cache(backend.available.__wrapped__))
    return monkeypatch


def test_cpu_tensors_are_refused(fresh):
    pytest.importorskip("triton")
    reason = "does not take tensors on cpu" if torch.cuda.is_available() else "torch sees no GPU; TRITON_INTERPRET=1"
    with pytest.raises(BackendError, match=reason):
        ops.outer(torch.ones(2, 3), torch.ones(2, 4), backend="triton")


def test_missing_triton_is_told(fresh):
    fresh.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendError, match=r"triton.*cannot be imported.*pip install triton"):
        ops.outer(torch.ones(2, 3), torch.ones(2, 4), backend="triton")


def test_old_gpu_is_told(fresh):
    pytest.importorskip("triton")
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    fresh.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "this one has 7.5" in backend.available()


def test_gpu_chooses_triton_before_plain_torch(fresh):
    """Without the compiled module's own kernels, CUDA tensors go to Triton where it works, else to plain torch."""
    fresh.setattr(backends, "_working", {})
    fresh.setattr(backends.cuda, "available", lambda: "not built")
    fresh.setattr(backend, "available", lambda: None)
    call = backends.Call(torch.empty(2, 3), torch.empty(2, 3, 4))
    assert backends.choose("outer", None, "cuda", call) is backend
    assert backends.choose("outer", "triton", "cuda", call) is backend
    fresh.setattr(backends, "_working", {})
    fresh.setattr(backend, "available", lambda: "no")
    assert backends.choose("outer", None, "cuda", call) is backends.reference


@pytest.mark.medium
def test_import_leaves_triton_alone():
    code = "import sys; sys.modules['triton'] = None; import gradext; import gradext.backends.triton"
    run = run_python("-c", code, PYTHONPATH=str(Path(gradext.__file__).parents[1]))
    assert run.returncode == 0, run.stderr
