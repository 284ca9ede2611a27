"""The outer product and the squared norm on CUDA tensors by the compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from . import cpu, reference

_C = native.C

# The input type of the kernels for each output type. Other inputs are converted first: they are small.
_READS = {
    torch.float64: (torch.float64,),
    torch.float32: (torch.float32, torch.float16, torch.bfloat16),
    torch.float16: (torch.float32, torch.float16),
    torch.bfloat16: (torch.float32, torch.bfloat16),
}

Problem = tuple[Tensor, Tensor, Tensor]  # delta [B, (T,) O], activation [B, (T,) I], out [B, O, I]


def available() -> str | None:
    """None if the compiled kernels can be used on this machine, else the reason why not."""
    if _C is None:
        return native.reason
    status = _C.cuda_status()
    return status["reason"] or lacking_code(status["capabilities"], _C.build_config())


def lacking_code(capabilities: Sequence[int], config: dict) -> str | None:
    """Which of the GPUs (by compute capability, 90 for 9.0) the binary of this build_config() has no code for."""
    archs, ptx = config["cuda_archs"], config["cuda_ptx"]
    for device, capability in enumerate(capabilities):
        if not any(_runs_on(capability, arch) for arch in archs) and not _compiles_for(capability, ptx):
            built = ", ".join(f"sm_{arch}" for arch in archs) + (f" and PTX of compute_{ptx}" if ptx else "")
            return (
                f"gradext was built for {built}, but GPU {device} has compute capability {capability / 10}: install "
                "it again with GRADEXT_CUDA_ARCHS=native on this machine, or hide that GPU by CUDA_VISIBLE_DEVICES"
            )
    return None


def _runs_on(capability: int, arch: str) -> bool:
    """Code for X.Y runs on X.Z with Z >= Y; code with architecture-specific features (sm_90a) runs on that one only."""
    number = int(arch.rstrip("af"))
    if arch.endswith("a"):
        return capability == number
    return capability // 10 == number // 10 and capability >= number


def _compiles_for(capability: int, ptx: str | None) -> bool:
    """The driver compiles PTX of compute_N for every GPU from N on, unless it has architecture-specific features."""
    if ptx is None:
        return False
    return _runs_on(capability, ptx) if ptx[-1] in "af" else capability >= int(ptx)


def outer(
    delta: Tensor,
    activation: Tensor,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Per-sample outer products, summed over T: ``out[b, o, i] = Σ_t delta[b, t, o] · activation[b, t, i]``.

    Args:
        delta: ``[B, O]`` or ``[B, T, O]``, any strides.
        activation: ``[B, I]`` or ``[B, T, I]``, with as many dimensions as ``delta``.
        out: ``[B, O, I]``, any strides, written and returned.
        dtype: of a result without ``out``; the inputs' promoted type by default.

    Sums are kept in fp32, or fp64 for fp64 results, and rounded once. Runs on the current stream of the
    tensors' device without synchronising, so that it can be captured into a CUDA graph.

    Cost: writes B·O·I elements by 16-byte streaming stores and reads the inputs; T > 1 adds the matrix
    product's arithmetic, on the CUDA cores.

    Raises:
        RuntimeError: the launch failed; the message holds sizes, device and what to do.
    """
    if out is None:
        if dtype is None:
            dtype = torch.promote_types(delta.dtype, activation.dtype)
        out = torch.empty(delta.shape[0], delta.shape[-1], activation.shape[-1], dtype=dtype, device=delta.device)
    if _takes(out):
        _launch([_readable(delta, activation, out)])
    else:
        reference.outer(delta, activation, out)
    return out


def outer_group(problems: Sequence[Problem]) -> None:
    """`outer` of each problem into its ``out``, in as few launches as possible.

    Up to 16 problems with T = 1, of one device and one pair of input and output types, share a launch; each with T > 1
    takes its own. If all layers are small, launches take most of the time.

    Raises:
        RuntimeError: a launch failed; the message holds sizes, device and what to do.
    """
    groups: dict[tuple, list[Problem]] = {}
    for problem in problems:
        if _takes(problem[2]):
            delta, _, out = readable = _readable(*problem)
            groups.setdefault((delta.device, delta.dtype, out.dtype), []).append(readable)
        else:
            reference.outer(*problem)
    for group in groups.values():
        _launch(group)


def _takes(out: Tensor) -> bool:
    return out.dtype in _READS and (out.stride(2) == 1 or out.shape[2] <= 1)


def _readable(delta: Tensor, activation: Tensor, out: Tensor) -> Problem:
    """The problem with both factors in the type that the kernels read for this type of out."""
    if delta.dtype is not activation.dtype or delta.dtype not in _READS[out.dtype]:
        compute = torch.float64 if out.dtype is torch.float64 else torch.float32
        delta, activation = delta.to(compute), activation.to(compute)
    return delta, activation, out


def _launch(problems: list[Problem]) -> None:
    """All problems on one device, of one pair of types."""
    delta = problems[0][0]
    fields = [cpu.outer_fields(*problem) for problem in problems]
    _C.outer_cuda(fields, delta.get_device(), _stream(delta.device))


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)  # without the object around it, which takes 2 µs


def sq_norm(delta: Tensor, activation: Tensor) -> Tensor:
    """`sq_norm_group` of one layer -> [B]."""
    return sq_norm_group([(delta, activation)])[0]


def sq_norm_group(layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """``‖G_l[b]‖² = Σ_ts (δ_t·δ_s)(a_t·a_s)`` of every layer l -> [L, B], fp64 for fp64 factors, else fp32.

    delta [B, (T,) O], activation [B, (T,) I], any strides, all of one type, device and B. One launch for up to 320
    layers, and one that adds up the shares of its blocks. T = 1: one pass over the factors. T > 1: through tiles of G,
    BTOI multiply-adds, or of the two Gram matrices, BT²(O + I) / 2, whichever is counted to take less time on this GPU
    in whole tiles, on tensor cores for half precision; only partial sums [B, splits] of each layer are written. Sums
    are in a fixed order: the same call gives the same bits. Runs on the current stream of the tensors' device without
    synchronising.

    Raises:
        RuntimeError: the launch failed; the message holds sizes, device and what to do.
    """
    delta = layers[0][0]
    B, device, code = delta.shape[0], delta.get_device(), cpu.CODE[delta.dtype]
    norms = delta.new_empty(len(layers), B, dtype=reference.accumulation_type(delta.dtype))
    fields = [(d.data_ptr(), a.data_ptr(), *cpu.sizes(d, a)) for d, a in layers]
    plans = _C.sq_norm_plan(fields, code, device)
    # Route 0 is that of one position, whose splits are warps.
    shares = norms.new_empty(B * sum(splits if route else 1 for route, splits in plans))
    _C.sq_norm_cuda(fields, plans, code, norms.data_ptr(), shares.data_ptr(), device, _stream(delta.device))
    return norms
