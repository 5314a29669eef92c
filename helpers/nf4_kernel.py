"""The kernel behind `helpers.nf4`: bitsandbytes' 4-bit weights (NF4 and FP4) decoded in one Triton launch.

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

import torch
import triton
import triton.language as tl

NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_MAGNITUDES = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
FP4_TABLE = _FP4_MAGNITUDES + tuple(-x for x in _FP4_MAGNITUDES)  # code 8 is -0.0, as in bitsandbytes' CUDA kernels

_NF4 = tl.constexpr(NF4_TABLE)
_FP4 = tl.constexpr(_FP4_MAGNITUDES)


def _ptx(text: str) -> tl.constexpr:
    """One line: Inductor writes a kernel's constants into a source of its own, where a line break ends the string."""
    return tl.constexpr(" ".join(text.split()))


# Four 16-bit products -> their low bytes and their high bytes, one register each.
_SPLIT_16 = _ptx("""{
    .reg .b32 ab, cd;
    mov.b32 ab, {$2, $3};
    mov.b32 cd, {$4, $5};
    prmt.b32 $0, ab, cd, 0x6420;
    prmt.b32 $1, ab, cd, 0x7531;
}""")
# The same for products that sit in the upper half of 32-bit words.
_SPLIT_32 = _ptx("""{
    .reg .b32 ab, cd;
    prmt.b32 ab, $2, $3, 0x7632;
    prmt.b32 cd, $4, $5, 0x7632;
    prmt.b32 $0, ab, cd, 0x6420;
    prmt.b32 $1, ab, cd, 0x7531;
}""")
# Eight nibbles ($4) -> eight 16-bit outputs ($0..$3), from low-byte planes $5..$8 and high-byte planes $9..$12.
# A prmt selector has 3 bits a nibble, so codes 0-7 and 8-15 are looked up apart and blended by bit 3 of the code, which
# prmt's sign-replicating mode spreads over a byte. Memory order is high nibble first: element 0 is bits 4-7.
_LOOKUP = _ptx("""{
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
    if FP4:
        signed = scale * (-1.0 if i >= 8 else 1.0)  # Triton has no constant -0.0
        product = signed * _FP4[i % 8]
    else:
        product = scale * _NF4[i]
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
    do_not_specialize=["n_elements", "block_shift"],
    do_not_specialize_on_alignment=["absmax_ptr", "code2_ptr", "absmax2_ptr", "offset_ptr"],
)
def dequantize_kernel(
    packed_ptr,  # uint8: two 4-bit codes a byte, high nibble first
    absmax_ptr,  # uint8 codes of the scales if NESTED, else the fp32 scales
    code2_ptr,  # [256] what a scale's code stands for
    absmax2_ptr,  # fp32 scale of the scales, one for BLOCKSIZE2 of them
    offset_ptr,  # [] added to every scale
    out_ptr,
    n_elements,
    block_shift,  # a block is GROUP << block_shift elements
    GROUP: tl.constexpr,  # 64, or 32 for blocks of 32
    BLOCKSIZE2: tl.constexpr,
    NESTED: tl.constexpr,
    FP4: tl.constexpr,
    GROUPS: tl.constexpr,  # runs of GROUP elements that a program makes; a lane has the table of one
    UNIT: tl.constexpr,  # bytes read at once: 4, or 1 where size or alignment forbids
    EVEN: tl.constexpr,  # the programs divide the weight: no masks
    ASM: tl.constexpr,
    ROUND_BF16: tl.constexpr,
    HINTS: tl.constexpr,  # a cache eviction hint: the two small tables are read by every program
):
    OFTEN: tl.constexpr = "evict_last" if HINTS else ""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * GROUPS
    packed_ptr += first * (GROUP // 2)
    out_ptr += first * GROUP
    n_left = n_elements - first * GROUP
    group = tl.arange(0, GROUPS)
    block = (first + group) >> block_shift
    inside = None if EVEN else group * GROUP < n_left
    # The codes are asked for first: the scales are three loads deep, and a lane's two halves share cache sectors.
    if ASM:
        word = packed_ptr.to(tl.pointer_type(tl.int32)) + group[:, None] * (GROUP // 8) + tl.arange(0, 4)[None, :]
        word_mask = None if EVEN else inside[:, None]
        codes0 = tl.load(word, word_mask)
        codes1 = tl.load(word + 4, word_mask) if GROUP == 64 else codes0
    else:
        UNITS: tl.constexpr = GROUP // (2 * UNIT)
        unit = group[:, None] * UNITS + tl.arange(0, UNITS)[None, :]
        if UNIT == 4:
            packed_ptr = packed_ptr.to(tl.pointer_type(tl.int32))
        units = tl.load(packed_ptr + unit, None if EVEN else unit * (2 * UNIT) < n_left)
    absmax = tl.load(absmax_ptr + block, mask=inside)
    if NESTED:
        code2 = tl.load(code2_ptr + absmax.to(tl.int32), mask=inside, eviction_policy=OFTEN).to(tl.float32)
        absmax2 = tl.load(absmax2_ptr + block // BLOCKSIZE2, mask=inside, eviction_policy=OFTEN)
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
        # Four words, one 16-byte load, at a time: wider tiles make Triton spread a group over several lanes.
        for part in tl.static_range(GROUP // 32):
            codes = codes0 if part == 0 else codes1
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
            table = tl.where(code == i, _FP4[i % 8] if FP4 else _NF4[i], table)
        if FP4:
            table *= tl.where(code >= 8, -1.0, 1.0)
        products = scale[:, None] * table[None, :]
        if ROUND_BF16:
            products = (_round_bf16(products) >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        else:
            products = products.to(DTYPE)
        shifts = (tl.arange(0, 2 * UNIT) * 4) ^ 4
        codes = (units[:, :, None].to(tl.int32) >> shifts[None, None, :]) & 15
        weights = tl.gather(products, codes.reshape(GROUPS, GROUP), 1)
        element = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        tl.store(out_ptr + element, weights, None if EVEN else element < n_left)


INTERPRETED = not isinstance(dequantize_kernel, triton.JITFunction)  # TRITON_INTERPRET=1: the kernel runs on the CPU


def launch_options(
    n: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    blocksize: int = 64,
    blocksize2: int | None = 256,
    fp4: bool = False,
    words: bool = True,
    asm: bool = True,
    hints: bool = True,
) -> dict:
    """What `dequantize_kernel` takes after `n_elements`, in its order, and `num_warps`.

    Args:
        n: elements of the weight. dtype: of the output. capability: of the GPU.
        blocksize2: scales that share a second scale, or None without double quantization.
        words: the packed weight and the output are aligned to 4 bytes.
        asm: False leaves inline PTX out.
        hints: cache eviction hints; with them an H100 is up to 1% faster.
    """
    group = min(blocksize, 64)
    asm = asm and words and n % group == 0 and dtype != torch.float32 and not INTERPRETED
    if INTERPRETED:  # a program costs milliseconds there, whatever its size
        groups, num_warps = min(triton.next_power_of_2(triton.cdiv(n, group)), 16384), 1
    elif asm:
        # A lane a block; one warp needs no barriers on its way through shared memory. On an H100 that is at 1.00, 0.98
        # and 0.99 of the ceiling at 4, 17 and 59 M elements, 8 warps at 0.94, 0.97 and 1.00.
        groups, num_warps = (256, 8) if n >= 2**25 and capability >= (9, 0) else (32, 1)
    else:
        groups, num_warps = (64 if capability >= (8, 0) else 128), 4
    return {
        "block_shift": (blocksize // group).bit_length() - 1,
        "GROUP": group,
        "BLOCKSIZE2": blocksize2 or 1,
        "NESTED": blocksize2 is not None,
        "FP4": fp4,
        "GROUPS": groups,
        "UNIT": 4 if words and n % 8 == 0 else 1,
        "EVEN": n % (groups * group) == 0,
        "ASM": asm,
        "ROUND_BF16": dtype == torch.bfloat16 and capability < (8, 0),
        "HINTS": hints,
        "num_warps": num_warps,
    }


def launch_grid(n: int, options: dict) -> tuple[int, int, int]:
    """Programs for ``n`` elements under `launch_options`."""
    return triton.cdiv(n, options["GROUPS"] * options["GROUP"]), 1, 1
