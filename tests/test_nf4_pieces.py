"""A weight in pieces decodes, computes and compiles as the whole weight does, however it is cut."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from helpers import fsdp2
from helpers.nf4 import dequantize_nf4
from helpers.nf4_pieces import NF4Pieces, decode_pieces, places_of
from helpers.nf4_tensor import SHARDED, NF4Linear, unpack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def whole_linear(shape: tuple[int, int], shards: int, nested: bool = True, bias: bool = False) -> NF4Linear:
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(
        shape[1], shape[0], bias=bias, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4"
    ).to(DEVICE)
    return NF4Linear(linear, shards, "triton")


def in_pieces(linear: NF4Linear, shards: int) -> NF4Pieces:
    """``linear`` with its pieces side by side in this process's memory."""

    def take(numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=DEVICE)

    pieces = [linear.weight.shard(rank, shards, take) for rank in range(shards)]
    found = {name: [getattr(piece, name) for piece in pieces] for name in SHARDED}
    layer = NF4Pieces.__new__(NF4Pieces)
    nn.Module.__init__(layer)
    layer.compute_dtype, layer.bias, layer.encoding = linear.compute_dtype, linear.bias, linear.weight.encoding
    layer.code2, layer.offset, layer.piece = pieces[0].code2, pieces[0].offset, 2 * pieces[0].packed.numel()
    layer.decoded, layer.held = None, pieces
    layer.places = places_of(found["packed"], found["absmax"], found["absmax2"] if layer.code2 is not None else None)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("shape", "shards"), [((192, 256), 2), ((128, 128), 3), ((320, 512), 3), ((512, 512), 1)])
def test_pieces_decode_to_the_whole_weights_bits(shape, shards, nested, dtype):
    linear = whole_linear(shape, shards, nested)  # 128 x 128 is one block: two of three pieces hold nothing
    layer = in_pieces(linear, shards)
    got = decode_pieces(*layer._whole_weight()[:3], list(shape), 64, layer.piece, dtype)
    assert torch.equal(got, dequantize_nf4(*unpack(linear.weight), dtype=dtype))


def test_blocks_with_other_frozen_matrices_are_left_to_fsdp2():
    quantised = nn.ModuleList([whole_linear((128, 128), 2), nn.LayerNorm(128).requires_grad_(False)])
    assert fsdp2._all_in_4_bits([quantised])
    plain = nn.Linear(4, 4)
    assert fsdp2._all_in_4_bits([quantised, plain]), "it is trained"
    assert not fsdp2._all_in_4_bits([quantised, plain.requires_grad_(False)])
    assert not fsdp2._all_in_4_bits([nn.LayerNorm(128).requires_grad_(False)])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_in_pieces_is_the_whole_layer(bias, compiled):
    linear = whole_linear((192, 256), 2, bias=bias)
    layer = in_pieces(linear, 2)
    x = torch.randn(3, 7, 256, device=DEVICE, requires_grad=True)
    upstream = torch.randn(3, 7, 192, device=DEVICE)
    call = torch.compile(layer, fullgraph=True, dynamic=True) if compiled else layer
    y, wanted = call(x), linear(x)
    wrt = [x, linear.bias] if bias else [x]
    found = zip(*([out, *torch.autograd.grad(out, wrt, upstream)] for out in (y, wanted)), strict=True)
    for a, b in found:
        torch.testing.assert_close(a, b, rtol=1e-5 if compiled else 0, atol=1e-5 if compiled else 0)
    layer.decoded = layer.decode(torch.float32)
    assert torch.equal(layer(x), wanted)
