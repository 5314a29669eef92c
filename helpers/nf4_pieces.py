"""NF4 weights that are never gathered: a layer decodes each rank's piece where it lies, its own or a copy beside it.

Each rank keeps its pieces in memory that the others see (helpers/peer_reads.py), those of a block in one run. Copy
engines bring the other ranks' runs a block ahead of the one that computes, into buffers that are used again. So no rank
waits for another, no kernel of NCCL's takes multiprocessors from the products beside it, and what a rank has itself is
not copied at all. FSDP2 would gather by collectives, and copy from its buffer to each weight's place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.library import custom_op
from torch.utils.dlpack import from_dlpack, to_dlpack

from .nf4 import dequantize_nf4
from .nf4_tensor import NESTED_BLOCKSIZE, SHARDED, NF4Encoding, NF4Linear, NF4Tensor
from .peer_reads import Lender


@custom_op("qlora::decode_pieces", mutates_args=())
def decode_pieces(
    packed: list[Tensor],
    absmax: list[Tensor],
    absmax2: list[Tensor],
    code2: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight of ``shape``, decoded in one launch a piece: `dequantize_nf4` of their concatenation.

    Args:
        packed: of each rank, uint8 [bytes], all equally long; those of the last may go beyond the weight's end.
        absmax, absmax2, code2, offset: as in bitsandbytes' QuantState, the first two a piece; the others are empty or
            None without double quantisation.
    """
    weight = torch.empty(shape, dtype=dtype, device=packed[0].device)
    for i, part in enumerate(weight.view(-1).split(2 * packed[0].numel())):
        state2 = None
        if absmax2:
            state2 = QuantState(absmax2[i], code=code2, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32)
        state = QuantState(absmax[i], part.shape, None, blocksize, "nf4", dtype, offset, state2)
        dequantize_nf4(packed[i].unsqueeze(1), state, out=part)
    return weight


@decode_pieces.register_fake
def _(packed, absmax, absmax2, code2, offset, shape, blocksize, dtype):
    return torch.empty(shape, dtype=dtype, device=packed[0].device)


class _Linear(torch.autograd.Function):
    """As `helpers.nf4_linear`'s; ``pieces``: the lists that `decode_pieces` takes one after the other, and the rest."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, encoding: NF4Encoding, ranks: int, *pieces: Tensor) -> Tensor:
        ctx.save_for_backward(*pieces)
        ctx.encoding, ctx.ranks = encoding, ranks
        return F.linear(x, _decoded(encoding, ranks, pieces, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        pieces = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _decoded(ctx.encoding, ctx.ranks, pieces, grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_bias, None, None, *[None] * len(pieces)


def _decoded(encoding: NF4Encoding, ranks: int, pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    packed, absmax, absmax2 = (list(pieces[i * ranks : (i + 1) * ranks]) for i in range(3))
    code2, offset = pieces[3 * ranks :] or (None, None)  # absmax2 is empty then too
    return decode_pieces(packed, absmax, absmax2, code2, offset, list(encoding.shape), encoding.blocksize, dtype)


class NF4Pieces(NF4Linear):
    """An `NF4Linear` of whose weight this rank keeps a piece; same name, place and result.

    ``weight`` is a `DTensor` over this rank's piece: what the model says that it holds. The layer reads ``pieces``.
    """

    def __init__(self, linear: NF4Linear, lender: Lender, mesh: DeviceMesh):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype, self.decoder, self.bias = linear.compute_dtype, linear.decoder, linear.bias
        self.encoding, self.ranks = linear.weight.encoding, lender.ranks
        mine = linear.weight.shard(lender.rank, lender.ranks, lender.take)
        self.weight = nn.Parameter(DTensor.from_local(mine, mesh, [Shard(0)], run_check=False), requires_grad=False)
        self.pieces: tuple[Tensor, ...] = ()
        self.decoded: Tensor | None = None  # by `decode`, where a caller uses it over and over

    def find(self, places: Callable[[Tensor], list[Tensor]], need: Callable[[], None]) -> None:
        """Read the weight at ``places(part)``, of every rank, for each tensor that this rank's piece consists of; they
        are right after ``need()``."""
        self.need = need
        mine = self.weight.to_local()
        parts = [part for name in SHARDED if (part := getattr(mine, name)) is not None]
        found = [_apart(place) for part in parts for place in places(part)]
        self.pieces = *found, *(() if mine.absmax2 is None else (mine.code2, mine.offset))

    def forward(self, x: Tensor) -> Tensor:
        inner = x.to(self._dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(inner.dtype)
        if self.decoded is not None:
            return F.linear(inner, self.decoded, bias).to(x.dtype)
        return _Linear.apply(inner, bias, self.encoding, self.ranks, *self.pieces).to(x.dtype)

    def decode(self, dtype: torch.dtype) -> Tensor:
        return _decoded(self.encoding, self.ranks, self.pieces, self._dtype(self.pieces[0].device.type))

    def _dtype(self, kind: str) -> torch.dtype:
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.compute_dtype

    @torch.no_grad()
    def whole(self) -> NF4Tensor:
        """The weight put together, for whoever compares it with the loaded one."""
        self.need()
        mine, ranks = self.weight.to_local(), self.ranks
        names = [name for name in SHARDED if getattr(mine, name) is not None]
        whole = {name: torch.cat(self.pieces[i * ranks : (i + 1) * ranks]) for i, name in enumerate(names)}
        return mine.with_tensors(whole)


def _apart(x: Tensor) -> Tensor:
    """``x``'s own memory as a view of no other tensor: what is copied there later is no change to autograd, and
    torch.compile has nothing more to guard."""
    return from_dlpack(to_dlpack(x))


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


def lay_in_pieces(blocks: Sequence[nn.Module], lender: Lender, mesh: DeviceMesh, ahead: int, keep: bool) -> None:
    """Replace every `NF4Linear` of ``blocks`` by `NF4Pieces`, in place, a weight at a time. ``ahead``, ``keep``: as
    `BlocksAhead`'s."""
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
