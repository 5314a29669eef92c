"""The truth that the NF4 kernel is compared with: the formula in plain PyTorch, and random weights to try it on."""

from __future__ import annotations

import random

import torch
from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type

from .nf4 import FP4_TABLE, NF4_TABLE


def dequantize_reference(weight: torch.Tensor, state: QuantState, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The formula, one rounding at a time: what ``dequantize_nf4`` must equal bit for bit.

    Args:
        weight: packed codes, two a byte and the high nibble first, stored as any dtype.
        state: bitsandbytes' quantisation state, nested or not, of type ``nf4`` or ``fp4``.

        dtype: of the result, ``state.dtype`` where not given.

    Returns: ``state.shape`` of that dtype; transposed, as bitsandbytes does it, for a weight of shape [1, ...].
    """
    packed = weight.contiguous().view(torch.uint8).flatten()
    n = torch.Size(state.shape).numel()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:n].long()
    scale = state.absmax
    if state.nested:
        outer = state.state2.absmax.float().repeat_interleave(state.state2.blocksize)[: scale.numel()]
        scale = state.state2.code.float()[scale.long()] * outer  # rounded to float32 ...
        scale = scale + state.offset.float()  # ... and again: no fused multiply-add
    # Not state.code: a changed default dtype, as in the challenge's harness, makes that bfloat16.
    values = NF4_TABLE if state.quant_type == "nf4" else FP4_TABLE
    table = torch.tensor(values, dtype=torch.float32, device=packed.device)
    per_weight = scale.float().repeat_interleave(state.blocksize)[:n]
    result = (table[codes] * per_weight).to(dtype or state.dtype).reshape(state.shape)
    return result.t() if weight.shape[0] == 1 else result


def random_quantised(
    draw: random.Random, device: str, dtypes: tuple[torch.dtype, ...]
) -> tuple[torch.Tensor, QuantState]:
    """A packed weight and state drawn at random: every nibble, scale code, block size and storage dtype may occur.

    The bytes are made here and not by quantising, because bitsandbytes' CPU quantiser is wrong where a row is not a
    multiple of the block size.
    """
    generator = torch.Generator().manual_seed(draw.getrandbits(31))
    rows, columns = draw.randint(1, 40), draw.choice([1, 7, 32, 64, 96, 192, 257])
    n, blocksize, nested = rows * columns, draw.choice([32, 64, 128, 256, 512, 1024, 2048, 4096]), draw.random() < 0.7
    storage = draw.choice([torch.uint8, torch.bfloat16, torch.float16, torch.float32])
    n_bytes = -(-((n + 1) // 2) // storage.itemsize) * storage.itemsize
    packed = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, generator=generator)
    blocks = -(-n // blocksize)
    kind = draw.choice(["nf4", "nf4", "fp4"])
    common = {"shape": torch.Size((rows, columns)), "dtype": draw.choice(dtypes), "blocksize": blocksize,
              "quant_type": kind, "code": get_4bit_type(kind, device=device)}  # fmt: skip
    if nested:
        blocksize2 = 256
        outer = QuantState(
            absmax=torch.rand(-(-blocks // blocksize2), generator=generator).mul(3).to(device),
            code=create_dynamic_map().to(device), blocksize=blocksize2, dtype=torch.float32,
        )  # fmt: skip
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator).to(device)
        offset = torch.rand((), generator=generator).to(device)
        state = QuantState(absmax=absmax, offset=offset, state2=outer, **common)
    else:
        state = QuantState(absmax=torch.rand(blocks, generator=generator).mul(3).to(device), **common)
    return packed.view(storage).reshape(-1, 1).to(device), state
