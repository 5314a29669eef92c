"""NF4 weights that are never gathered: a layer decodes each rank's piece where it lies, its own or a copy beside it.

Each rank keeps its pieces in memory that the others see (helpers/peer_reads.py), those of a block in one run. Copy
engines bring the other ranks' runs a block ahead of the one that computes, into buffers that are used again. So no rank
waits for another, no kernel of NCCL's takes multiprocessors from the products beside it, and what a rank has itself is
not copied at all. FSDP2 would gather by collectives, and copy from its buffer to each weight's place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.library import custom_op

from .nf4_kernel import dequantize_kernel, launch_grid, launch_options
from .nf4_linear import autocast_dtype
from .nf4_tensor import NESTED_BLOCKSIZE, SHARDED, NF4Encoding, NF4Linear, NF4Tensor
from .peer_reads import Lender


@triton.jit(do_not_specialize=["n_elements", "block_shift", "pieces", "programs"])
def pieces_kernel(
    places_ptr,  # [3 x pieces] int64: addresses of packed, absmax, absmax2, as if each piece were the whole weight
    code2_ptr,
    offset_ptr,
    out_ptr,
    n_elements,
    pieces,
    programs,  # that a piece takes
    block_shift,
    GROUP: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    NESTED: tl.constexpr,
    FP4: tl.constexpr,
    GROUPS: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
    ROUND_BF16: tl.constexpr,
    HINTS: tl.constexpr,
):
    """`dequantize_kernel`, each of whose programs finds its piece first."""
    place = places_ptr + tl.program_id(0) // programs
    packed = tl.multiple_of(tl.load(place).to(tl.pointer_type(tl.uint8)), 16)
    absmax = tl.load(place + pieces).to(tl.pointer_type(tl.uint8 if NESTED else tl.float32))
    absmax2 = tl.load(place + 2 * pieces).to(tl.pointer_type(tl.float32))
    dequantize_kernel(
        packed, absmax, code2_ptr, absmax2, offset_ptr, out_ptr, n_elements, block_shift, GROUP, BLOCKSIZE2, NESTED,
        FP4, GROUPS, UNIT, EVEN, ASM, ROUND_BF16, HINTS,
    )  # fmt: skip


def places_of(packed: Sequence[Tensor], absmax: Sequence[Tensor], absmax2: Sequence[Tensor] | None) -> Tensor:
    """What `decode_pieces` takes of pieces that follow each other: int64 [3 x pieces], addresses. It keeps nothing
    alive."""
    kinds = (packed, absmax, absmax2 or absmax)
    starts = [piece.data_ptr() - i * piece.nbytes for kind in kinds for i, piece in enumerate(kind)]
    return torch.tensor(starts, dtype=torch.int64, device=packed[0].device)


@custom_op("qlora::decode_pieces", mutates_args=())
def decode_pieces(
    places: Tensor,
    code2: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    blocksize: int,
    piece: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight of ``shape`` in one launch: `dequantize_nf4` of its pieces put together.

    Args:
        places: of the pieces, `places_of`.
        code2, offset: as in bitsandbytes' QuantState; None without double quantisation.
        piece: elements of each, whole double-quantisation blocks; the last may have fewer, or none.
    """
    weight = torch.empty(shape, dtype=dtype, device=places.device)
    nested = code2 is not None
    capability = torch.cuda.get_device_capability(places.device) if places.is_cuda else (0, 0)
    options = launch_options(n := weight.numel(), dtype, capability, blocksize, NESTED_BLOCKSIZE if nested else None)
    # No program has two pieces' elements; on a GPU none would in any case.
    options["GROUPS"] = math.gcd(options["GROUPS"], piece // options["GROUP"])
    options["EVEN"] = n % (options["GROUPS"] * options["GROUP"]) == 0
    programs = piece // (options["GROUPS"] * options["GROUP"])
    tables = (code2, offset) if nested else (places, places)  # not read
    pieces = places.numel() // 3
    pieces_kernel[launch_grid(n, options)](places, *tables, weight, n, pieces, programs, **options)
    return weight


@decode_pieces.register_fake
def _(places, code2, offset, shape, blocksize, piece, dtype):
    return torch.empty(shape, dtype=dtype, device=places.device)


class _Linear(torch.autograd.Function):
    """As `helpers.nf4_linear`'s; ``places``, ``code2``, ``offset`` and ``piece`` are `decode_pieces`'s."""

    @staticmethod
    def forward(ctx, x, bias, places, code2, offset, encoding: NF4Encoding, piece: int) -> Tensor:
        ctx.save_for_backward(places, code2, offset)
        ctx.encoding, ctx.piece = encoding, piece
        return F.linear(x, _decoded(places, code2, offset, encoding, piece, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _decoded(*ctx.saved_tensors, ctx.encoding, ctx.piece, grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_bias, *[None] * 5


def _decoded(places, code2, offset, encoding: NF4Encoding, piece: int, dtype: torch.dtype) -> Tensor:
    return decode_pieces(places, code2, offset, list(encoding.shape), encoding.blocksize, piece, dtype)


class NF4Pieces(NF4Linear):
    """An `NF4Linear` of whose weight this rank keeps a piece; same name, place and result.

    ``weight`` is a `DTensor` over this rank's piece: what the model says that it holds. The layer reads ``pieces``.
    """

    def __init__(self, linear: NF4Linear, lender: Lender, mesh: DeviceMesh):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype, self.decoder, self.bias = linear.compute_dtype, linear.decoder, linear.bias
        self.encoding = linear.weight.encoding
        mine = linear.weight.shard(lender.rank, lender.ranks, lender.take)
        self.weight = nn.Parameter(DTensor.from_local(mine, mesh, [Shard(0)], run_check=False), requires_grad=False)
        self.code2, self.offset, self.piece = mine.code2, mine.offset, 2 * mine.packed.numel()
        self.decoded: Tensor | None = None  # by `decode`, where a caller uses it over and over

    def find(self, places: Callable[[Tensor], list[Tensor]], need: Callable[[], None]) -> None:
        """Read the weight at ``places(part)``, of every rank, for each tensor that this rank's piece consists of; they
        are right after ``need()``."""
        mine = self.weight.to_local()
        self.pieces = {name: places(part) for name in SHARDED if (part := getattr(mine, name)) is not None}
        self.places, self.need = places_of(*(self.pieces.get(name) for name in SHARDED)), need

    def forward(self, x: Tensor) -> Tensor:
        inner = x.to(autocast_dtype(x.device.type, self.compute_dtype))
        bias = None if self.bias is None else self.bias.to(inner.dtype)
        if self.decoded is not None:
            return F.linear(inner, self.decoded, bias).to(x.dtype)
        return _Linear.apply(inner, bias, *self._whole_weight()).to(x.dtype)

    def decode(self, dtype: torch.dtype) -> Tensor:
        return _decoded(*self._whole_weight(), autocast_dtype(self.places.device.type, self.compute_dtype))

    def _whole_weight(self) -> tuple:
        return self.places, self.code2, self.offset, self.encoding, self.piece

    @torch.no_grad()
    def whole(self) -> NF4Tensor:
        """The weight put together, for whoever compares it with the loaded one."""
        self.need()
        return self.weight.to_local().with_tensors({name: torch.cat(pieces) for name, pieces in self.pieces.items()})


class BlocksAhead:
    """The other ranks' pieces of the blocks that compute next, copied here in time, in forward and in backward.

    Block i's copies always go to the same memory, a buffer that block i + ``ahead`` + 1 shares. Whatever a forward
    pass reads it fetches itself, so that a recorded one can be replayed after anything else.

    Args:
        runs: the bytes of every rank's memory that hold each block's pieces, first and end.
        ahead: blocks fetched before they compute.
        keep: each block has a buffer of its own, which its backward pass finds full.
    """

    def __init__(self, lender: Lender, runs: Sequence[tuple[int, int]], ahead: int, keep: bool):
        self.lender, self.runs, self.ahead = lender, runs, ahead
        self.slots = len(runs) if keep else min(ahead + 1, len(runs))
        longest = max(end - start for start, end in runs)
        size = self.slots, lender.ranks - 1, longest
        self.memory = torch.empty(size, dtype=torch.uint8, device=lender.device)
        self.held: dict[int, int] = {}  # which block each buffer is for
        self.arriving: dict[int, Callable[[], None]] = {}  # how to wait for a block's copies

    def places(self, block: int, mine: Tensor) -> list[Tensor]:
        """Where each rank's counterpart of ``mine``, a part of this rank's piece of ``block``, is read."""
        start = self.lender.place(mine) - self.runs[block][0]
        others = iter(self.memory[block % self.slots])
        return [
            mine if rank == self.lender.rank else next(others)[start : start + mine.nbytes].view(mine.dtype)
            for rank in range(self.lender.ranks)
        ]

    def attach(self, blocks: Sequence[nn.Module]) -> None:
        """Have each of ``blocks`` wait for its pieces, before it computes and before its backward pass."""
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(functools.partial(self._before_forward, i))
            block.register_forward_hook(functools.partial(self._before_backward, i))

    def _before_forward(self, block: int, module: nn.Module, args: tuple) -> None:
        self.need(block)

    def _before_backward(self, block: int, module: nn.Module, args: tuple, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self.need(block))

    def need(self, block: int) -> None:
        """Have the current stream wait for the pieces of ``block``, and fetch those of the blocks that come next."""
        backward = torch._C._current_graph_task_id() != -1  # recomputing too
        if block == 0 and not backward:
            self.held.clear()
        step = -1 if backward else 1
        for near in range(block, block + step * (self.ahead + 1), step):
            if 0 <= near < len(self.runs):
                self._fetch(near)
        if arrived := self.arriving.pop(block, None):
            arrived()

    def _fetch(self, block: int) -> None:
        slot = block % self.slots
        if self.held.get(slot) != block:
            self.held[slot] = block
            start, end = self.runs[block]
            others = self.lender.others(start, end)
            self.arriving[block] = self.lender.copy_aside([to[: end - start] for to in self.memory[slot]], others)


def lay_in_pieces(
    blocks: Sequence[nn.Module], lender: Lender, mesh: DeviceMesh, ahead: int, keep: bool
) -> set[nn.Parameter]:
    """Replace every `NF4Linear` of ``blocks`` by `NF4Pieces`, in place, a weight at a time; what FSDP2 must ignore.
    ``ahead``, ``keep``: as `BlocksAhead`'s."""
    runs, layers = [], []
    for i, block in enumerate(blocks):
        start = lender.taken
        for name, linear in [(n, m) for n, m in block.named_modules() if type(m) is NF4Linear]:
            layers.append((i, NF4Pieces(linear, lender, mesh)))
            block.set_submodule(name, layers[-1][1])
            del linear
        runs.append((start, lender.taken))
    brought = BlocksAhead(lender, runs, ahead, keep)
    for i, layer in layers:
        layer.find(functools.partial(brought.places, i), functools.partial(brought.need, i))
    brought.attach(blocks)
    return {layer.weight for _, layer in layers}
