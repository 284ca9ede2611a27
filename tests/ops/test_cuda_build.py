"""What ptxas reports of the CUDA kernels for every GPU target: registers, spills, and the machine code.

That is: how wide its stores are, how many loads are on their way before one is waited for, and how many instructions
lie between two stores.

Compiles for a minute or two, hence ``slow``: ``pytest tests/ops/test_cuda_build.py -m slow``. Needs nvcc, and no GPU.
"""

import ast
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no sources beside the tests"),
]
ARCHS = ("75", "80", "86", "89", "90", "100", "120")
DISASSEMBLED = ("80", "90", "100")
# By kernel, for sums in fp32 and in fp64: 64 registers let a multiprocessor hold four blocks of 256 threads, 80 three,
# 128 two.
MOST_REGISTERS = {
    "outer_rows": (64, 64),
    "outer_runs": (64, 64),
    "outer_group": (80, 80),
    "outer_sum": (80, 128),
    "sq_norm_layers": (128, 224),
    "sum_shares": (64, 64),
}
KERNELS = {
    "outer_rows": 16,
    "outer_runs": 8,
    "outer_group": 16,
    "outer_sum": 8,
    "sq_norm_layers": 8,
    "sum_shares": 4,
}
OUT_BYTES = {"6__half": 2, "13__nv_bfloat16": 2, "f": 4, "d": 8}  # by the end of the mangled arguments


class Kernel(NamedTuple):
    arch: str
    name: str  # without template arguments
    symbol: str
    registers: int
    stack: int
    spilled: int
    shared: int


def kernel_name(symbol: str) -> str:
    return next(name for name in KERNELS if f"{len(name)}{name}" in symbol)


@pytest.fixture(scope="module")
def cubins(nvcc, tmp_path_factory):
    """Folder of <file>_<arch>.cubin and .log, all as setup.py compiles them."""
    folder = tmp_path_factory.mktemp("cubins")

    def compile_one(job):
        source, arch = job
        target = folder / f"{source.stem}_{arch}.cubin"
        command = [nvcc, "-O3", "-std=c++17", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", source, "-o", target]
        result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        target.with_suffix(".log").write_text(result.stderr)

    sources = [ROOT / "csrc" / "cuda" / f"{name}.cu" for name in ("outer", "sq_norm")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, [(source, arch) for arch in ARCHS for source in sources]))
    return folder


@pytest.fixture(scope="module")
def kernels(cubins):
    entry = re.compile(
        r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<arch>\d+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    found = []
    for log in sorted(cubins.glob("*.log")):
        for match in entry.finditer(log.read_text()):
            shared = re.search(r"(\d+) bytes smem", match["rest"])
            found.append(
                Kernel(
                    match["arch"],
                    kernel_name(match["symbol"]),
                    match["symbol"],
                    int(match["registers"]),
                    int(match["stack"]),
                    int(match["stores"]) + int(match["loads"]),
                    int(shared[1]) if shared else 0,
                )
            )
    return found


def test_every_kernel_is_compiled_for_every_target(kernels):
    default = re.search(r"^DEFAULT_ARCHS = (.*)$", (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
    assert ast.literal_eval(default) == list(ARCHS)
    for arch in ARCHS:
        names = [kernel.name for kernel in kernels if kernel.arch == arch]
        assert {name: names.count(name) for name in KERNELS} == KERNELS, arch


def test_nothing_spills_and_no_kernel_has_a_stack(kernels):
    assert [kernel for kernel in kernels if kernel.spilled or kernel.stack] == []


def test_registers_and_shared_memory_leave_room_for_other_blocks(kernels):
    for kernel in kernels:
        doubles = f"{kernel.name}Id" in kernel.symbol
        assert kernel.registers <= MOST_REGISTERS[kernel.name][doubles], kernel
        assert kernel.shared <= 21 << 10, kernel


def disassembler(name: str) -> str:
    """The one in the Triton wheel, else the toolkit's."""
    spec = importlib.util.find_spec("triton")
    if spec is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        if path.is_file():
            return str(path)
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is neither in the Triton wheel nor on PATH")
    return found


@pytest.fixture(scope="module")
def functions(cubins):
    """The machine code of a source and an architecture: by symbol a list of instructions and labels."""
    program = disassembler("nvdisasm")

    @functools.cache
    def disassemble(source: str, arch: str) -> dict[str, list[str]]:
        command = [program, "-c", str(cubins / f"{source}_{arch}.cubin")]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        parts = re.split(r"^\.text\.(\w+):", code, flags=re.MULTILINE)[1:]
        line = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(.*?)\s*;|^(\.L_\w+):", re.MULTILINE)
        return {
            symbol: [found[1] or found[2] for found in line.finditer(body)]
            for symbol, body in zip(parts[::2], parts[1::2], strict=True)
        }

    return disassemble


def mnemonic(instruction: str) -> str:
    return instruction.split()[1 if instruction.startswith("@") else 0]


def loops(code: list[str]) -> list[list[str]]:
    """The instructions from a label to the last branch back to it, innermost first."""
    begins = {name: place for place, name in enumerate(code) if name.startswith(".L_")}
    spans = {}
    for place, instruction in enumerate(code):
        target = re.search(r"BRA.*`\((\.L_\w+)\)", instruction)
        if target and begins[target[1]] < place:
            spans[begins[target[1]]] = place
    found = [[line for line in code[a : b + 1] if not line.startswith(".L_")] for a, b in spans.items()]
    return sorted(found, key=len)


@pytest.mark.parametrize("arch", DISASSEMBLED)
def test_machine_code_stores_16_bytes_past_the_cache(arch, functions):
    seen = dict.fromkeys(KERNELS, 0)
    for symbol, code in functions("outer", arch).items():
        name = kernel_name(symbol)
        seen[name] += 1
        stores = [mnemonic(line) for line in code if mnemonic(line).startswith("ST") and "STS" not in line]
        assert stores, symbol
        assert not any(mnemonic(line) in ("LDL", "STL") for line in code), f"{symbol}: local memory"
        arguments = re.search(rf"{name}I(.+?)E", symbol)[1].replace("S2_", "")
        cached = arguments.endswith("Lb0")
        size = next(n for kind, n in OUT_BYTES.items() if re.sub(r"Lb[01]$", "", arguments).endswith(kind))
        element = {2: "STG.E.EF.U16", 4: "STG.E.EF", 8: "STG.E.EF.64"}[size]
        patch = "STG.E.EF.64" if name == "outer_sum" and size == 2 else "STG.E.EF.128"  # 4 numbers a thread and row
        # The main loops take four steps at once; `outer_group` has those of whole rows and of any others.
        wide = {"outer_rows": 4, "outer_runs": 4, "outer_group": 4, "outer_sum": 4 * max(1, size // 4)}[name]
        allowed = {element, patch} | ({"STG.E.128"} if cached else set())
        assert set(stores) <= allowed, f"{symbol}: {stores}"
        assert stores.count(patch) + stores.count("STG.E.128") >= wide, f"{symbol}: {stores}"
        if name == "outer_rows":
            assert set(stores) == {"STG.E.128" if cached else patch}, symbol
    assert {name: count for name, count in seen.items() if count} == {
        name: count for name, count in KERNELS.items() if name.startswith("outer")
    }


def test_whole_rows_take_few_instructions_a_store(functions):
    """A store of 8 numbers takes as many multiplications and their rounding too; four deltas come before the first."""
    for symbol, code in functions("outer", "90").items():
        if kernel_name(symbol) != "outer_rows":
            continue
        half = re.search(r"outer_rowsI(.+?)Lb", symbol)[1].endswith(("6__half", "13__nv_bfloat16", "S2_"))
        inner = next(loop for loop in loops(code) if sum("STG" in mnemonic(line) for line in loop) == 4)
        kinds = [mnemonic(line)[:3] for line in inner]
        assert kinds.index("STG") > [place for place, kind in enumerate(kinds) if kind == "LDG"][3], symbol
        assert len(inner) / 4 <= (22 if half else 12), f"{symbol}: {len(inner) / 4}"
        prologue = next(place for place, line in enumerate(code) if line == inner[0])
        assert prologue < 100, f"{symbol}: {prologue}"


def test_any_rows_take_few_instructions_a_store(functions):
    """Two deltas a store, those of four stores before the first, and numbers chosen from both; and no division.

    Before the first store there are the ends of a run too, and the loop of rows shorter than 16 bytes: a thread has the
    one or the other.
    """
    for symbol, code in functions("outer", "90").items():
        name = kernel_name(symbol)
        if name == "outer_sum":
            continue
        assert not any(mnemonic(line).startswith(("MUFU", "I2F")) for line in code), symbol
        if name != "outer_runs":
            continue
        half = re.search(r"outer_runsI(.+?)E", symbol)[1].endswith(("6__half", "13__nv_bfloat16", "S2_"))
        inner = next(loop for loop in loops(code) if sum("STG" in mnemonic(line) for line in loop) == 4)
        kinds = [mnemonic(line)[:3] for line in inner]
        assert kinds.index("STG") > [place for place, kind in enumerate(kinds) if kind == "LDG"][7], symbol
        assert len(inner) / 4 <= (36 if half else 22), f"{symbol}: {len(inner) / 4}"
        first = next(place for place, line in enumerate(code) if "STG.E.EF.128" in mnemonic(line))
        assert first < 400, f"{symbol}: {first}"


def loads_before_stores(code: list[str]) -> list[tuple[int, int]]:
    """For each run of stores to shared memory the loads on their way before it: all, and those of 16 bytes."""
    found, loads, wide = [], 0, 0
    for kind in map(mnemonic, code):
        if kind.startswith("LDG"):
            loads, wide = loads + 1, wide + ("128" in kind)
        elif kind.startswith("STS"):
            found += [(loads, wide)] if loads else []
            loads = wide = 0
    return found


@pytest.mark.parametrize("arch", DISASSEMBLED)
def test_tiles_have_several_loads_on_their_way(arch, functions):
    """Of a slice of both factors a thread has 8 numbers, or in wide tiles 4 times 16 bytes, before it stores one."""
    for symbol, code in functions("outer", arch).items():
        if kernel_name(symbol) == "outer_sum":
            assert loads_before_stores(code) == [(8, 0)], symbol
    for symbol, code in functions("sq_norm", arch).items():
        if kernel_name(symbol) != "sq_norm_layers":
            continue
        found = loads_before_stores(code)
        if "sq_norm_layersI6__half" in symbol or "sq_norm_layersI13__nv_bfloat16" in symbol:
            # Tiles of the two gradients and of both Gram matrices; across an edge numbers are read one by one.
            assert arch != "90" or all(loads >= 4 for loads, _ in found), f"{symbol}: {found}"
            assert sum(wide >= 4 for _, wide in found) == 4, f"{symbol}: {found}"
            assert sum(kind.startswith("HMMA.16816.F32") for kind in map(mnemonic, code)) >= 2 * 16 + 3 * 4, symbol
        else:  # the tiles of 16 x 16 and 32 x 32 positions have 2 and 4
            tiles = sorted(loads for loads, _ in found)
            assert tiles[:4] == [2, 2, 4, 4], f"{symbol}: {found}"
            assert tiles.count(8) >= (1 if "sq_norm_layersId" in symbol else 3), f"{symbol}: {found}"
