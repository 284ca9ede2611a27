"""The cases of `gpu_check.py`: what is compared with fp64 and timed, and beside what.

Short cases come first and types take turns. No result is larger than 8 GB. Half precision is compared with routes of
half precision: what one would write by hand, or what others write.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.gpu_check import ROOT, measured

LARGEST = 8 << 30  # bytes of a result


def timed(routes: dict[str, Callable], problems: list[tuple], exact, allowed: float, device: str, **facts) -> dict:
    """The row of a case: each route(*problem) compared with ``exact`` of the first problem, then timed."""
    row: dict = {**facts, "routes": {}}
    for name, route in routes.items():
        try:
            value = route(*problems[0])
            if exact is not None:
                error = ((value.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()
                if not error <= allowed:
                    row["routes"][name] = {"wrong": f"off by {error:.1e}, where {allowed:.0e} is allowed"}
                    continue
            del value
            row["routes"][name] = measured([partial(route, *problem) for problem in problems], device)
        except Exception as error:
            row["routes"][name] = {"wrong": f"{type(error).__name__}: {str(error)[:200]}"}
    return row


def drawn(*shapes: tuple[int, ...], dtype, device: str, seed: int = 0) -> list:
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


def copies(nbytes: int) -> int:
    """How many problems of so many bytes exceed a cache of 60 MB several times."""
    return max(1, min(8, math.ceil((256 << 20) / max(1, nbytes))))


def tolerance(dtype) -> float:
    import torch

    return {torch.float32: 1e-5, torch.float64: 1e-13}.get(dtype, 1e-2)


def machine_cases(device: str) -> Iterator:
    def facts() -> dict:
        import platform

        import torch

        found = {"python": platform.python_version(), "torch": torch.__version__, "device": device}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        found["commit"] = commit.stdout.strip() or "unknown"
        try:
            import triton

            found["triton"] = triton.__version__
        except ImportError:
            found["triton"] = "missing"
        if device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            found |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
            a = torch.empty(1 << 30, dtype=torch.float32, device=device)
            b = torch.empty_like(a)
            found["copy"] = 2 * a.nbytes / measured([partial(b.copy_, a)], device)["device"]
            found["fill"] = a.nbytes / measured([a.zero_], device)["device"]
            x, y = drawn((8192, 8192), (8192, 8192), dtype=torch.bfloat16, device=device)
            found["bf16_flops"] = 2 * 8192**3 / measured([lambda: x @ y], device)["device"]
        return found

    yield "machine", facts


def kernel_cases(device: str) -> Iterator:
    """Every kernel once on small odd sizes, for compute-sanitizer."""
    import torch

    from gradext import ops
    from gradext.backends import BACKENDS, reference

    names = [n for n in (("cuda",) if device == "cuda" else ("cpu", "reference")) if BACKENDS[n].available() is None]
    if not names:
        raise RuntimeError("no backend to check: " + str(BACKENDS["cuda"].available()))

    def right(backend, dtype, B, T, O, I) -> dict:
        shapes = [(B, O), (B, I)] if T is None else [(B, T, O), (B, T, I)]
        delta, activation = drawn(*shapes, dtype=dtype, device=device)
        for name in ("outer", "sq_norm"):
            if not hasattr(BACKENDS[backend], name):
                continue
            exact = getattr(reference, name)(delta.double(), activation.double())
            found = getattr(ops, name)(delta, activation, backend=backend)
            error = ((found.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()
            if not error <= 2 * tolerance(dtype):
                return {"error": f"{name} is off by {error:.1e}"}
        return {}

    sizes = [(3, None, 33, 129), (2, None, 64, 48), (5, None, 9, 1), (2, 3, 17, 9), (2, 40, 72, 80), (1, 70, 136, 264)]
    types = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    for size, dtype, name in itertools.product(sizes, types, names):
        yield f"{name} {size} {short(dtype)}", partial(right, name, dtype, *size)
    layers = [drawn((3, 5 + k, 9), (3, 5 + k, 7), dtype=torch.float32, device=device, seed=k) for k in range(5)]
    yield "norms of 5 layers", lambda: {"norms": ops.sq_norm_group(layers).sum().item()}


def short(dtype) -> str:
    names = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float64": "fp64", "torch.float16": "fp16"}
    return names[str(dtype)]


def outer_case(B: int, T: int | None, O: int, I: int, dtype, device: str) -> dict:
    import torch

    from gradext import ops
    from gradext.backends import reference

    nbytes = B * O * I * dtype.itemsize
    assert nbytes <= LARGEST, nbytes
    shapes = [(B, O), (B, I)] if T is None else [(B, T, O), (B, T, I)]
    problems = []
    for seed in range(copies(nbytes)):
        problems.append(
            (*drawn(*shapes, dtype=dtype, device=device, seed=seed), torch.empty(B, O, I, device=device, dtype=dtype))
        )
    few = slice(0, max(1, (64 << 20) // (8 * O * I)))
    exact = reference.outer(*(x[few].double() for x in problems[0][:2]))
    names = ("cuda", "triton") if device == "cuda" else ("cpu",)
    routes = {n: lambda d, a, out, n=n: ops.outer(d, a, out=out, backend=n)[few] for n in names}
    if T is None:
        routes["torch.mul"] = lambda d, a, out: torch.mul(d[:, :, None], a[:, None], out=out)[few]
    else:
        routes["torch.bmm"] = lambda d, a, out: torch.bmm(d.mT, a, out=out)[few]
    routes["fill"] = lambda d, a, out: out.zero_()[few]
    row = timed({"fill": routes.pop("fill")}, problems, None, 0, device)
    found = timed(routes, problems, exact, tolerance(dtype), device, bytes=nbytes, flops=2 * B * (T or 1) * O * I)
    return found | {"routes": found["routes"] | row["routes"]}


def norm_case(layers: int, B: int, T: int | None, O: int, I: int, dtype, device: str) -> dict:
    """The norms of several layers, beside the formulas of ghost clipping in the same type, a layer after the other."""
    import torch

    from gradext import ops
    from gradext.backends import reference

    shapes = [(B, O), (B, I)] if T is None else [(B, T, O), (B, T, I)]
    nbytes = layers * B * (T or 1) * (O + I) * dtype.itemsize
    problems = [
        ([drawn(*shapes, dtype=dtype, device=device, seed=layers * c + k) for k in range(layers)],)
        for c in range(copies(nbytes))
    ]
    exact = torch.stack([reference.sq_norm(d.double(), a.double()) for d, a in problems[0][0]])

    def ghost(pairs):
        if T is None:
            return torch.stack([d.float().square().sum(1) * a.float().square().sum(1) for d, a in pairs])
        return torch.stack([(torch.bmm(d, d.mT) * torch.bmm(a, a.mT)).float().sum((1, 2)) for d, a in pairs])

    routes = {"gradext": ops.sq_norm_group, "ghost": ghost}
    if T is not None:
        routes["gradients"] = lambda pairs: torch.stack(
            [torch.bmm(d.mT, a).float().square().sum((1, 2)) for d, a in pairs]
        )
        if device == "cuda" and dtype.itemsize == 2:
            routes["triton"] = lambda pairs: torch.stack([ops.sq_norm(d, a, backend="triton") for d, a in pairs])
    flops = 2 * layers * B * (O + I if T is None else min(T * T * (O + I) / 2, T * O * I))
    return timed(routes, problems, exact, tolerance(dtype), device, bytes=nbytes, flops=flops)


def factor_case(method: str, B: int, T: int, O: int, I: int, dtype, device: str) -> dict:
    """A method of `GradFactors` beside what one would write by hand in the same type."""
    import torch

    from gradext.factors import GradFactors

    nbytes = B * T * (O + I) * dtype.itemsize
    problems = [
        drawn((B, T, O), (B, T, I), (O, 16), (I, 16), dtype=dtype, device=device, seed=seed)
        for seed in range(copies(nbytes))
    ]
    weights = torch.linspace(0.1, 1, B, device=device)

    def by_hand(d, a, left, right):
        if method == "sum":
            return (d * weights.to(d.dtype)[:, None, None]).flatten(0, 1).mT @ a.flatten(0, 1)
        if method == "project":
            return torch.bmm((d @ left).mT, a @ right)
        return torch.einsum("bto,bti->boi", d, a).flatten(1).float() @ sketching

    def ours(d, a, left, right):
        factors = GradFactors(a, d)
        options = {"sum": (weights,), "project": (left, right), "sketch": (64,)}[method]
        return getattr(factors, method)(*options)

    routes = {"gradext": ours} | ({} if method == "sketch" else {"by hand": by_hand})
    sketching, exact = None, None
    if method != "sketch":
        exact = by_hand(*(x.double() for x in problems[0]))
    flops = 2 * B * T * {"sum": O * I, "project": 16 * (O + I + 16), "sketch": O + I}[method]
    return timed(routes, problems, exact, 2 * tolerance(dtype), device, bytes=nbytes, flops=flops)


def main_cases(device: str) -> Iterator:
    """Twelve, short ones first and types in turns."""
    import torch

    small = device == "cpu"
    fp32, bf16 = torch.float32, torch.bfloat16
    for dtype in (fp32, bf16):
        yield f"outer {short(dtype)} [64, 784, 400]", partial(outer_case, 64, None, 784, 400, dtype, device)
    for dtype in (fp32, bf16):
        B = 4 if small else 256
        yield (
            f"norms of 12 layers {short(dtype)} [{B}, 768, 768]",
            partial(norm_case, 12, B, None, 768, 768, dtype, device),
        )
    T = 32 if small else 512
    for dtype in (bf16, fp32):
        name = f"norms of 12 layers {short(dtype)} [4, {T}, 768, 768]"
        yield name, partial(norm_case, 12, 4, T, 768, 768, dtype, device)
    for method in ("sum", "project", "sketch"):
        yield f"{method} bf16 [8, {T}, 1024, 1024]", partial(factor_case, method, 8, T, 1024, 1024, bf16, device)
    B = 8 if small else 1024
    for dtype in (bf16, fp32):
        yield f"outer {short(dtype)} [{B}, 785, 401]", partial(outer_case, B, None, 785, 401, dtype, device)
    yield f"outer bf16 [4, {T}, 768, 768]", partial(outer_case, 4, T, 768, 768, bf16, device)


def language_cases(device: str) -> Iterator:
    import torch

    sizes = [(2, 32, 256)] if device == "cpu" else [(4, 512, 4096), (8, 512, 4096), (4, 2048, 4096), (8, 2048, 4096)]
    for (B, T, width), dtype in itertools.product(sizes, (torch.bfloat16, torch.float32)):
        shape, name = (B, T, width, width), f"{short(dtype)} [{B}, {T}, {width}, {width}]"
        yield f"norms of 4 layers {name}", partial(norm_case, 4, *shape, dtype, device)
        yield f"sum {name}", partial(factor_case, "sum", *shape, dtype, device)
        yield f"project {name}", partial(factor_case, "project", *shape, dtype, device)
        yield f"outer {name}", partial(outer_case, *shape, dtype, device)


def model_cases(device: str) -> Iterator:
    """Whole calls, beside a forward and backward of the batch, and whether a second one waits for the device."""
    import torch
    from torch import nn

    import gradext

    class Flattened(nn.Module):
        """Rows [B·T, D], as many language models have them."""

        def __init__(self, layers: int, width: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

        def forward(self, x):
            rows = x.flatten(0, 1)
            for layer in self.layers:
                rows = rows + torch.tanh(layer(rows))
            return rows.unflatten(0, x.shape[:2])

    def case(model, x) -> dict:
        model, x = model.to(device), x.to(device)

        def loss(output, _=None):
            return output.square().flatten(1).mean(1)

        def plain(x):
            return torch.autograd.grad(loss(model(x)).mean(), list(model.parameters()))[0]

        def norms(x):
            return gradext.batch_layer_factors(model, x, loss=loss, target=x).norm()

        row = timed({"norms": norms, "forward and backward": plain}, [(x,)], None, 0, device)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            try:
                norms(x)
                row["waits"] = "none"
            except RuntimeError as error:
                row["waits"] = str(error)[:200]
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return row

    chain = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 784))
    yield "two layers, B = 64", partial(case, chain, torch.randn(64, 784))
    yield "24 flattened layers, [8, 64, 256]", partial(case, Flattened(24, 256), torch.randn(8, 64, 256))


def route_cases(device: str) -> Iterator:
    """Each route of the norms' kernel, for `kCosts` in csrc/cuda/sq_norm.cu: its time a step of a tile."""
    import torch

    from gradext.backends import cpu, cuda

    if cuda.available() is not None:
        return
    C = cuda._C

    def case(route: str, B: int, T: int, O: int, I: int, dtype) -> dict:
        delta, activation = drawn((B, T, O), (B, T, I), dtype=dtype, device=device)
        number, tile = C.SQ_NORM_ROUTES.index(route), int(route.rsplit("_", 1)[1])
        side = -(-T // tile)
        gram = "gram" in route
        tiles = side * (side + 1) // 2 if gram else -(-O // tile) * -(-I // tile)
        splits = max(1, min(tiles, 528 // B))
        out = torch.empty(B, dtype=torch.float32, device=device)
        shares = torch.empty(B * splits, dtype=torch.float32, device=device)
        fields = [(delta.data_ptr(), activation.data_ptr(), *cpu.sizes(delta, activation))]

        def run():
            pointers = (out.data_ptr(), shares.data_ptr(), delta.get_device(), cuda._stream(delta.device))
            C.sq_norm_cuda(fields, [(number, splits)], cpu.CODE[dtype], *pointers)

        row = {"routes": {route: measured([run], device)}}
        steps = B * tiles * (O + I if gram else T)
        return row | {"picoseconds_a_step": 1e12 * row["routes"][route]["device"] / steps, "paste": "kCosts"}

    for dtype, names in ((torch.bfloat16, C.SQ_NORM_ROUTES[5:]), (torch.float32, C.SQ_NORM_ROUTES[1:5])):
        for route, T in itertools.product(names, (64, 512)):
            yield f"{route} {short(dtype)} [8, {T}, 1024, 1024]", partial(case, route, 8, T, 1024, 1024, dtype)


def tile_cases(device: str) -> Iterator:
    """Other tiles of Triton's kernels, for the tables in gradext/kernels: the row to paste is the fastest."""
    import torch

    from gradext.backends import triton

    if triton.available() is not None:
        return
    from gradext.kernels import bilinear, gram, outer

    def case(table: dict, key, entry, call: Callable) -> dict:
        former = table[key]
        table[key] = entry
        try:
            return {"routes": {str(entry): measured([call], device)}, "paste": f"{key}: {entry}"}
        finally:
            table[key] = former

    d, a = drawn((8, 512, 1024), (8, 512, 1024), dtype=torch.bfloat16, device=device)
    w, x, y = drawn((64, 1024, 1024), (512, 1024), (512, 1024), dtype=torch.bfloat16, device=device)
    for blocks in ((128, 128, 32), (128, 128, 64), (128, 256, 32), (64, 128, 64)):
        for warps, stages in ((4, 3), (8, 3), (8, 4)):
            entry = (blocks, warps, stages)
            for name, table, call in (
                ("outer.DOT_TILES", outer.DOT_TILES, partial(triton.outer, d, a)),
                ("bilinear.TILES", bilinear.TILES, partial(triton.linear, x, y, w)),
            ):
                yield f"{name} {entry}", partial(case, table, 2, entry, call)
    for rows, k in ((64, 32), (64, 64), (128, 32), (128, 64)):
        entry = (*gram.TILES[2][:1], ((rows, k), 8, 3), ((rows, k), 8, 3))
        yield f"gram.TILES {entry}", partial(case, gram.TILES, 2, entry, partial(triton.gram, d, a, d, a))


def block_cases(device: str) -> Iterator:
    """Blocks a multiprocessor of the outer product: each needs a build of its own, in a copy of the tree."""
    code = (
        "import json, torch; import benchmarks.gpu_cases as g; "
        f"rows = [g.outer_case(B, None, 784, 400, torch.float32, {device!r}) for B in (16, 64, 512)]; "
        "print(json.dumps([row['routes'] for row in rows]))"
    )

    def case(blocks: int) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder, "gradext")
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "*.so", "results"))
            variables = os.environ | {"NVCC_APPEND_FLAGS": f"-DGRADEXT_BLOCKS={blocks}", "PYTHONPATH": str(tree)}
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(build, cwd=tree, env=variables, check=True)
            run = [sys.executable, "-c", code]
            done = subprocess.run(run, cwd=tree, env=variables, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
        routes = {
            f"B = {B}": row["cuda" if device == "cuda" else "cpu"] for B, row in zip((16, 64, 512), found, strict=True)
        }
        return {"routes": routes, "paste": f"kBlocksOfMultiprocessor = {blocks}"}

    for blocks in (4, 8, 12, 24) if device == "cuda" else (12,):
        yield f"{blocks} blocks a multiprocessor", partial(case, blocks)


CASES: dict[str, Callable[[str], Iterator]] = {
    "machine": machine_cases,
    "memcheck": kernel_cases,
    "races": kernel_cases,
    "main": main_cases,
    "language": language_cases,
    "models": model_cases,
    "routes": route_cases,
    "tiles": tile_cases,
    "blocks": block_cases,
}
