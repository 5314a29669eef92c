"""What our NF4 decoder is compared with: other decoders, and kernels that say how fast one could be.

A decoder takes (packed weight, bitsandbytes QuantState) and returns the weight. Unsloth is imported only when asked
for, because its import patches transformers, PEFT and TRL for good: ask in a process of its own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch
import triton
import triton.language as tl

from .nf4 import NF4_TABLE, current_stream, dequantize_kernel, dequantize_nf4, launch_options

Decoder = Callable[[torch.Tensor, bnb.QuantState], torch.Tensor]


@triton.jit
def plain_kernel(
    packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, table_ptr, out_ptr, n_elements,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The decoder one would write first: a word a lane, and for each nibble a table load and a multiplication."""
    shifts = (tl.arange(0, 8) * 4) ^ 4
    offset = tl.load(offset_ptr)
    for step in tl.static_range(STEPS):
        word = (tl.program_id(0) * STEPS + step) * STEP + tl.arange(0, STEP)
        inside = word * 8 < n_elements
        block = word * 8 // BLOCKSIZE
        code2 = tl.load(code2_ptr + tl.load(absmax_ptr + block, inside, 0).to(tl.int32))
        scale = tl.fma(code2, tl.load(absmax2_ptr + block // BLOCKSIZE2, inside, 0), 0.0) + offset
        codes = (tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + word, inside, 0)[:, None] >> shifts[None, :]) & 15
        weights = tl.load(table_ptr + codes) * scale[:, None]
        out = out_ptr + word[:, None] * 8 + tl.arange(0, 8)[None, :]
        tl.store(out, weights.to(out_ptr.dtype.element_ty), inside[:, None])


@triton.jit
def ceiling_kernel(packed_ptr, absmax_ptr, out_ptr, STEP: tl.constexpr, STEPS: tl.constexpr):
    """Reads and writes the bytes of a 16-bit decoder with blocks of 64, and decodes nothing."""
    for step in tl.static_range(STEPS):
        word = (tl.program_id(0).to(tl.int64) * STEPS + step) * STEP + tl.arange(0, STEP)
        absmax = tl.load(absmax_ptr + word // 8).to(tl.int32)
        value = tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + word, eviction_policy="evict_first") ^ absmax
        out = out_ptr.to(tl.pointer_type(tl.int32)) + word[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(out, tl.broadcast_to(value[:, None], [STEP, 4]))


@triton.jit
def null_kernel(x_ptr):
    """Does nothing worth timing but its launch."""
    tl.load(x_ptr)


def bare_launch(compiled, grid: int, *constants: int) -> Callable[..., None]:
    """The least that launching a compiled Triton kernel costs, given its pointers: only the stream is looked up."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    device = torch.cuda.current_device()

    def launch(*pointers: int) -> None:
        run(grid, 1, 1, current_stream(device), function, metadata, None, None, None, *pointers, *constants)

    return launch


def ours(asm: bool = True, hints: bool = True) -> Decoder:
    """`dequantize_kernel` with inline PTX and cache eviction hints, or without, as `launch_options` takes them."""

    def decode(weight, state):
        out = torch.empty(state.shape, dtype=state.dtype, device=weight.device)
        n = out.numel()
        options = launch_options(n, state.dtype, torch.cuda.get_device_capability(), asm=asm, hints=hints)
        dequantize_kernel[(triton.cdiv(n, options["GROUPS"] * options["GROUP"]),)](
            weight, state.absmax, state.state2.code, state.state2.absmax, state.offset, out, n, **options
        )
        return out

    return decode


@functools.cache
def _table(device: torch.device) -> torch.Tensor:
    return torch.tensor(NF4_TABLE, dtype=torch.float32, device=device)


def plain(weight: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """`plain_kernel` as a decoder."""
    out = torch.empty(state.shape, dtype=state.dtype, device=weight.device)
    plain_kernel[(triton.cdiv(out.numel(), 8192),)](
        weight, state.absmax, state.state2.code, state.state2.absmax, state.offset, _table(weight.device), out,
        out.numel(), BLOCKSIZE=64, BLOCKSIZE2=256, STEP=128, STEPS=8, num_warps=4,
    )  # fmt: skip
    return out


def ceiling(step: int, steps: int, num_warps: int) -> Decoder:
    """`ceiling_kernel` with these constants, called as a decoder is."""

    def copy(weight, state):
        out = torch.empty(state.shape, dtype=state.dtype, device=weight.device)
        ceiling_kernel[(out.numel() // (8 * step * steps),)](
            weight, state.absmax, out, STEP=step, STEPS=steps, num_warps=num_warps
        )
        return out

    return copy


def three_launches(weight: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """How decoders of early 2025 did it: scales by one CUDA kernel, `+= offset`, weights by another, through ctypes."""
    library, pointer = bnb.lib, bnb.get_ptr
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    absmax = torch.empty(state.absmax.shape, dtype=torch.float32, device=weight.device)
    out = torch.empty(state.shape, dtype=state.dtype, device=weight.device)
    library.cdequantize_blockwise_fp32(
        pointer(state.state2.code), pointer(state.absmax), pointer(state.state2.absmax), pointer(absmax),
        ctypes.c_int(state.state2.blocksize), ctypes.c_int(absmax.numel()), stream,
    )  # fmt: skip
    absmax += state.offset
    fp16 = state.dtype == torch.float16
    decode = library.cdequantize_blockwise_fp16_nf4 if fp16 else library.cdequantize_blockwise_bf16_nf4
    decode(
        pointer(None), pointer(weight), pointer(absmax), pointer(out),
        ctypes.c_int(state.blocksize), ctypes.c_int(out.numel()), stream,
    )  # fmt: skip
    return out


def public_decoders() -> dict[str, Decoder]:
    """The ways to decode a weight that this machine has, ours first."""
    from peft.utils.integrations import dequantize_bnb_weight

    found = {
        "ours": dequantize_nf4,
        "bitsandbytes": bnb.dequantize_4bit,
        "three launches": three_launches,
        "PEFT": lambda weight, state: dequantize_bnb_weight(weight),
    }
    if importlib.util.find_spec("unsloth"):
        from unsloth.kernels.utils import fast_dequantize

        found["Unsloth"] = fast_dequantize
    return found
