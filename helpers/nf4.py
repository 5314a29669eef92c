"""Dequantize bitsandbytes' 4-bit weights (NF4 and FP4) in one Triton launch.

A quantized weight is a string of 4-bit codes, high nibble first, in blocks of `blocksize` elements that share one scale
("absmax"). With double quantization the scale is itself an 8-bit code:

    scale  = fl32(fl32(code2[absmax[block]] * absmax2[block // blocksize2]) + offset)     # two roundings, never an FMA
    weight = round_to_dtype(fl32(table[nibble] * scale))

A block has only 16 possible outputs. So each lane rounds the 16 products of its own block once, splits them into byte
planes (4 registers of low bytes, 4 of high bytes) and looks four nibbles up at a time with PTX `prmt`: per output no
multiplication, no conversion, no memory access. fp32 outputs, odd sizes and the interpreter take the same kernel's body
in plain Triton.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch.library import custom_op, triton_op, wrap_triton

NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_MAGNITUDES = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
FP4_TABLE = _FP4_MAGNITUDES + tuple(-x for x in _FP4_MAGNITUDES)  # code 8 is -0.0, as in bitsandbytes' CUDA kernels
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_NF4 = tl.constexpr(NF4_TABLE)
_FP4 = tl.constexpr(FP4_TABLE)

# Four 16-bit products -> their low bytes and their high bytes, one register each.
_SPLIT_16 = tl.constexpr("""{
    .reg .b32 ab, cd;
    mov.b32 ab, {$2, $3};
    mov.b32 cd, {$4, $5};
    prmt.b32 $0, ab, cd, 0x6420;
    prmt.b32 $1, ab, cd, 0x7531;
}""")
# The same for products that sit in the upper half of 32-bit words.
_SPLIT_32 = tl.constexpr("""{
    .reg .b32 ab, cd;
    prmt.b32 ab, $2, $3, 0x7632;
    prmt.b32 cd, $4, $5, 0x7632;
    prmt.b32 $0, ab, cd, 0x6420;
    prmt.b32 $1, ab, cd, 0x7531;
}""")
# Eight nibbles ($4) -> eight 16-bit outputs ($0..$3), from low-byte planes $5..$8 and high-byte planes $9..$12.
# A prmt selector has 3 bits a nibble, so codes 0-7 and 8-15 are looked up apart and blended by bit 3 of the code, which
# prmt's sign-replicating mode spreads over a byte. Memory order is high nibble first: element 0 is bits 4-7.
_LOOKUP = tl.constexpr("""{
    .reg .b32 select, shifted, mask, low, low8, high, high8;
    and.b32 select, $4, 0x77777777;
    shl.b32 shifted, $4, 4;
    prmt.b32 mask, $4, shifted, 0x9d8c;
    prmt.b32 low, $5, $6, select;
    prmt.b32 low8, $7, $8, select;
    lop3.b32 low, mask, low8, low, 0xca;
    prmt.b32 high, $9, $10, select;
    prmt.b32 high8, $11, $12, select;
    lop3.b32 high, mask, high8, high, 0xca;
    prmt.b32 $0, low, high, 0x4051;
    prmt.b32 $1, low, high, 0x6273;
    shr.u32 select, select, 16;
    prmt.b32 mask, $4, shifted, 0xbfae;
    prmt.b32 low, $5, $6, select;
    prmt.b32 low8, $7, $8, select;
    lop3.b32 low, mask, low8, low, 0xca;
    prmt.b32 high, $9, $10, select;
    prmt.b32 high8, $11, $12, select;
    lop3.b32 high, mask, high8, high, 0xca;
    prmt.b32 $2, low, high, 0x4051;
    prmt.b32 $3, low, high, 0x6273;
}""")


@triton.jit
def _round_bf16(x):
    """fp32 to bf16, to nearest even, in integers: the result is the upper half of 32 bits.

    For GPUs below sm_80, which have no such conversion, and Triton's interpreter, which truncates. The NaN that a GPU's
    multiplication makes is 0x7fffffff: clamped, rounding does not carry it into the sign.
    """
    bits = tl.minimum(x.to(tl.int32, bitcast=True), 0x7FFF0000)
    return bits + ((bits >> 16) & 1) + 0x7FFF


@triton.jit
def _product(scale, FP4: tl.constexpr, i: tl.constexpr, DTYPE: tl.constexpr, ROUND_BF16: tl.constexpr):
    """The output for code `i`, as 16 bits (or, with ROUND_BF16, as the upper half of 32)."""
    product = scale * (_FP4[i] if FP4 else _NF4[i])
    return _round_bf16(product) if ROUND_BF16 else product.to(DTYPE).to(tl.int16, bitcast=True)


@triton.jit
def _planes(scale, FP4: tl.constexpr, i: tl.constexpr, DTYPE: tl.constexpr, ROUND_BF16: tl.constexpr):
    """Low and high bytes of the outputs for codes `i` to `i + 3`."""
    a = _product(scale, FP4, i, DTYPE, ROUND_BF16)
    b = _product(scale, FP4, i + 1, DTYPE, ROUND_BF16)
    c = _product(scale, FP4, i + 2, DTYPE, ROUND_BF16)
    d = _product(scale, FP4, i + 3, DTYPE, ROUND_BF16)
    if ROUND_BF16:
        planes = tl.inline_asm_elementwise(
            _SPLIT_32, "=r,=r,r,r,r,r", [a, b, c, d], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        planes = tl.inline_asm_elementwise(
            _SPLIT_16, "=r,=r,h,h,h,h", [a, b, c, d], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    return planes[0][:, None], planes[1][:, None]


# Nothing is assumed of the alignment of the statistics, which are read element by element.
@triton.jit(
    do_not_specialize=["n_elements"],
    do_not_specialize_on_alignment=["absmax_ptr", "code2_ptr", "absmax2_ptr", "offset_ptr"],
)
def dequantize_kernel(
    packed_ptr,  # 4-bit codes, any dtype, read as bytes or as 32-bit words
    absmax_ptr,  # uint8 codes of the scales if NESTED, else the fp32 scales
    code2_ptr,  # [256] what a scale's code stands for
    absmax2_ptr,  # fp32 scale of the scales, one for BLOCKSIZE2 of them
    offset_ptr,  # [] added to every scale
    out_ptr,
    n_elements,
    BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    NESTED: tl.constexpr,
    FP4: tl.constexpr,
    GROUPS: tl.constexpr,  # runs of at most 64 elements of one block that a program makes; a lane has the table of one
    UNIT: tl.constexpr,  # bytes read at once: 4, or 1 where size or alignment forbids
    EVEN: tl.constexpr,  # the programs divide the weight: no masks
    ASM: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    GROUP: tl.constexpr = 64 if BLOCKSIZE > 64 else BLOCKSIZE
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    block = group // (BLOCKSIZE // GROUP)
    inside = None if EVEN else group * GROUP < n_elements
    absmax = tl.load(absmax_ptr + block, mask=inside, eviction_policy="evict_first")
    if NESTED:
        code2 = tl.load(code2_ptr + absmax.to(tl.int32), mask=inside, eviction_policy="evict_last").to(tl.float32)
        absmax2 = tl.load(absmax2_ptr + block // BLOCKSIZE2, mask=inside, eviction_policy="evict_last")
        # fma(a, b, 0) is the rounded product, which the compiler may not contract with the sum that follows.
        scale = tl.fma(code2, absmax2.to(tl.float32), 0.0) + tl.load(offset_ptr).to(tl.float32)
    else:
        scale = absmax.to(tl.float32)

    if ASM:
        if ROUND_BF16:
            # A NaN that did not come from a multiplication (times 1.0 there is none) gets a payload that rounds safely.
            bits = scale.to(tl.int32, bitcast=True)
            scale = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits).to(tl.float32, bitcast=True)
        low0, high0 = _planes(scale, FP4, 0, DTYPE, ROUND_BF16)
        low4, high4 = _planes(scale, FP4, 4, DTYPE, ROUND_BF16)
        low8, high8 = _planes(scale, FP4, 8, DTYPE, ROUND_BF16)
        low12, high12 = _planes(scale, FP4, 12, DTYPE, ROUND_BF16)
        word_mask = None if EVEN else inside[:, None]
        # Four words, one 16-byte load, at a time: wider tiles make Triton spread a group over several lanes.
        for part in tl.static_range(GROUP // 32):
            word = group[:, None] * (GROUP // 8) + part * 4 + tl.arange(0, 4)[None, :]
            codes = tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + word, word_mask, eviction_policy="evict_first")
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                _LOOKUP,
                "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
                [codes, low0, low4, low8, low12, high0, high4, high8, high12],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
            pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(GROUPS, 16)
            pair = group[:, None] * (GROUP // 2) + part * 16 + tl.arange(0, 16)[None, :]
            tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + pair, pairs, word_mask)
    else:
        code = tl.arange(0, 16)
        table = tl.zeros([16], tl.float32)
        for i in tl.static_range(16):
            table = tl.where(code == i, _FP4[i] if FP4 else _NF4[i], table)
        products = scale[:, None] * table[None, :]
        if ROUND_BF16:
            products = (_round_bf16(products) >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        else:
            products = products.to(DTYPE)
        UNITS: tl.constexpr = GROUP // (2 * UNIT)
        unit = group[:, None] * UNITS + tl.arange(0, UNITS)[None, :]
        if UNIT == 4:
            packed_ptr = packed_ptr.to(tl.pointer_type(tl.int32))
        else:
            packed_ptr = packed_ptr.to(tl.pointer_type(tl.uint8))
        units = tl.load(
            packed_ptr + unit, None if EVEN else unit * (2 * UNIT) < n_elements, eviction_policy="evict_first"
        )
        shifts = (tl.arange(0, 2 * UNIT) * 4) ^ 4
        codes = (units[:, :, None].to(tl.int32) >> shifts[None, None, :]) & 15
        weights = tl.gather(products, codes.reshape(GROUPS, GROUP), 1)
        element = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        tl.store(out_ptr + element, weights, None if EVEN else element < n_elements)


INTERPRETED = not isinstance(dequantize_kernel, triton.JITFunction)  # TRITON_INTERPRET=1: the kernel runs on the CPU


def launch_options(n: int, blocksize: int, dtype: torch.dtype, words: bool, capability: tuple[int, int]) -> dict:
    """Compile-time choices for `n` elements; `words`: the packed weight and the output are aligned to 4 bytes."""
    group = min(blocksize, 64)
    if INTERPRETED:  # a program costs milliseconds there, whatever its size
        groups, num_warps = min(triton.next_power_of_2(triton.cdiv(n, group)), 16384), 1
    else:
        groups, num_warps = 128, 4
    return {
        "GROUPS": groups,
        "UNIT": 4 if words and n % 8 == 0 else 1,
        "EVEN": n % (groups * group) == 0,
        "ASM": words and n % group == 0 and dtype != torch.float32 and not INTERPRETED,
        "ROUND_BF16": dtype == torch.bfloat16 and capability < (8, 0),
        "num_warps": num_warps,
    }


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code2: torch.Tensor | None,
    absmax2: torch.Tensor | None,
    offset: torch.Tensor | None,
    blocksize: int,
    blocksize2: int,
    fp4: bool,
    shape: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    n, blocksize = out.numel(), int(blocksize)
    options = launch_options(
        n, blocksize, dtype, packed.storage_offset() * packed.itemsize % 4 == 0, _capability(packed.device)
    )
    kernel = dequantize_kernel if INTERPRETED else wrap_triton(dequantize_kernel)
    statistics = (absmax, absmax, absmax, absmax) if code2 is None else (absmax, code2, absmax2, offset)
    grid = (triton.cdiv(n, options["GROUPS"] * min(blocksize, 64)),)
    kernel[grid](
        packed, *statistics, out, n,
        BLOCKSIZE=blocksize, BLOCKSIZE2=int(blocksize2), NESTED=code2 is not None, FP4=fp4, **options,
    )  # fmt: skip
    return out


if INTERPRETED:  # an interpreted kernel cannot be traced, so torch.compile sees an opaque operator
    _op = custom_op("qlora::dequantize_nf4", _dequantize, mutates_args=())
    _op.register_fake(lambda packed, *args: torch.empty(args[-2], dtype=args[-1], device=packed.device))
else:
    _op = triton_op("qlora::dequantize_nf4", _dequantize, mutates_args=())


def _check(weight: torch.Tensor, quant_state, dtype: torch.dtype) -> None:
    if not hasattr(quant_state, "quant_type"):
        raise TypeError(
            f"quant_state is a {type(quant_state).__name__}, but dequantize_nf4 needs a bitsandbytes QuantState: "
            "quantize the weight again, or load it with QuantState.from_dict"
        )
    if quant_state.quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type {quant_state.quant_type!r} is not 'nf4' or 'fp4': decode it with bitsandbytes")
    if quant_state.blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize {quant_state.blocksize} is not one of bitsandbytes' {BLOCKSIZES}")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype {dtype} is not float16, bfloat16 or float32: pass one of them as dtype")
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise ValueError("the weight is packed for bitsandbytes' CPU inference: move it to a GPU, or reload the model")
    if weight.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"the weight is on {weight.device}: move the model to a GPU, or set TRITON_INTERPRET=1 before triton is "
            "imported to run the kernel on a CPU"
        )
    if quant_state.absmax.device != weight.device:
        raise ValueError(
            f"the weight is on {weight.device} but its statistics are on {quant_state.absmax.device}: "
            "call quant_state.to(weight.device)"
        )
    shape, held = tuple(quant_state.shape), weight.numel() * weight.itemsize
    needed = (math.prod(shape) + 1) // 2
    if held < needed:
        raise ValueError(f"the weight holds {held} bytes, but shape {shape} in 4 bits needs {needed}")


def _check_out(out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if out.shape != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}, contiguous: {out.is_contiguous()}; "
            f"it must be contiguous {shape} {dtype} on {device}"
        )


# Compiled kernels, by everything that the compilation depends on. `compiled[grid]` looks up the device's current stream
# and the profilers' hooks at every call, as `kernel[grid]` does, and saves binding and specializing 16 arguments.
_RUNNERS: dict[tuple, tuple] = {}


def _dequantize_eager(weight: torch.Tensor, quant_state, out: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """`_dequantize` without the dispatcher, which would cost about as much as the kernel of a small weight."""
    absmax, blocksize, device = quant_state.absmax, quant_state.blocksize, weight.device
    shape, state2 = tuple(quant_state.shape), quant_state.state2
    if state2 is None:
        blocksize2, statistics = 1, (absmax, absmax, absmax, absmax)
    else:
        blocksize2, statistics = state2.blocksize, (absmax, state2.code, state2.absmax, quant_state.offset)
    fp4 = quant_state.quant_type == "fp4"
    key = (
        weight.numel(), weight.dtype, device, shape, dtype, quant_state.quant_type, blocksize, blocksize2,
        *[x.dtype for x in statistics],
    )  # fmt: skip
    runner, constants = _RUNNERS.get(key, (None, ()))
    if runner is None:
        _check(weight, quant_state, dtype)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    else:
        _check_out(out, shape, dtype, device)
    n, pointers = out.numel(), weight.data_ptr() | out.data_ptr()
    if runner is not None and pointers % 16 == 0:
        runner(weight, *statistics, out, n, *constants)
        return out
    options = launch_options(n, blocksize, dtype, pointers % 4 == 0, _capability(device))
    num_warps = options.pop("num_warps")
    constants = (blocksize, blocksize2, state2 is not None, fp4, *options.values())
    grid = (triton.cdiv(n, options["GROUPS"] * min(blocksize, 64)), 1, 1)
    compiled = dequantize_kernel[grid](weight, *statistics, out, n, *constants, num_warps=num_warps)
    if compiled is not None and pointers % 16 == 0:  # the interpreter returns None
        _RUNNERS[key] = compiled[grid], constants
    return out


def dequantize_nf4(
    weight: torch.Tensor, quant_state, out: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """What `bitsandbytes.functional.dequantize_4bit(weight, quant_state, out=out)` returns, bit for bit, in one launch.

    Args:
        weight: packed 4-bit codes of any storage dtype, [bytes, 1]; as bitsandbytes does, [1, bytes] asks for the
            transposed result.
        quant_state: bitsandbytes QuantState of type "nf4" or "fp4", nested (double quantization) or not.
        out: optional contiguous tensor to write to, [*quant_state.shape] of the output dtype.
        dtype: float16, bfloat16 or float32; `quant_state.dtype` where not given.

    Returns: [*quant_state.shape]. Allocates nothing else.

    Raises: TypeError or ValueError where state, weight and `out` do not fit, before anything is launched.
    """
    if not hasattr(quant_state, "state2"):
        _check(weight, quant_state, dtype)
    dtype = quant_state.dtype if dtype is None else dtype
    # torch.compile and dispatch modes (fake tensors, selective checkpointing, ...) must see an operator.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        _check(weight, quant_state, dtype)
        state2 = quant_state.state2
        result = torch.ops.qlora.dequantize_nf4(
            weight.contiguous(),
            quant_state.absmax,
            None if state2 is None else state2.code,
            None if state2 is None else state2.absmax,
            None if state2 is None else quant_state.offset,
            quant_state.blocksize,
            1 if state2 is None else state2.blocksize,
            quant_state.quant_type == "fp4",
            list(quant_state.shape),
            dtype,
        )
        if out is not None:
            _check_out(out, tuple(quant_state.shape), dtype, weight.device)
            result = out.copy_(result)
        return result.t() if weight.shape[0] == 1 else result
    # Params4bit overrides __torch_function__: without this every attribute read below costs 2 us.
    with torch._C.DisableTorchFunctionSubclass():
        transposed = weight.shape[0] == 1
        if not weight.is_contiguous():
            weight = weight.contiguous()
        if weight.is_cuda and weight.device.index != torch.cuda.current_device():
            with torch.cuda.device(weight.device):
                result = _dequantize_eager(weight, quant_state, out, dtype)
        else:
            result = _dequantize_eager(weight, quant_state, out, dtype)
        return result.t() if transposed else result
