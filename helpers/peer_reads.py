"""Memory of each rank that the others read where it lies: what never changes needs no collective.

NCCL's kernels hold multiprocessors, which a matrix product that counts on all of them then waits for, and no rank gets
ahead of another. Where the GPUs of one machine reach each other's memory, copy engines move frozen shards instead
(helpers/nf4_pieces.py), and an embedding is not moved at all: its kernel reads the rows that it needs
(helpers/gathered.py). What trains is still FSDP2's and NCCL's.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .memory import note_outside

ALIGNED = 128  # bytes


def possible() -> bool:
    """Whether all ranks are on this machine and each GPU reaches the memory of every other (a Kaggle T4 does not).
    Every rank must ask."""
    ranks = dist.get_world_size()
    if ranks == 1 or not torch.cuda.is_available() or os.environ.get("LOCAL_WORLD_SIZE") != str(ranks):
        return False
    if os.environ.get("NCCL_P2P_DISABLE") == "1" or torch.cuda.device_count() < ranks:
        return False
    mine = torch.cuda.current_device()
    if not _all(all(torch.cuda.can_device_access_peer(mine, other) for other in range(ranks) if other != mine)):
        return False
    try:
        able = bool(_symmetric(ALIGNED, torch.device("cuda", mine)))
    except RuntimeError:  # a container may forbid that processes hand each other memory
        able = False
    return _all(able)


def _all(mine: bool) -> bool:
    """Whether it is so on every rank."""
    agreed = torch.tensor(int(mine))
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return bool(agreed)


class Lender:
    """Memory of this rank that the others see, and theirs. Every rank must make it, `take` and `lend` alike.

    Args:
        pieces: bytes of each that will be taken.
    """

    def __init__(self, pieces: Iterable[int], device: torch.device):
        self.rank, self.ranks, self.device, self.taken = dist.get_rank(), dist.get_world_size(), device, 0
        size, before = sum(map(_aligned, pieces)), torch.cuda.memory_allocated()
        self.memory, self.everyones = _symmetric(size, device)
        note_outside(max(size - (torch.cuda.memory_allocated() - before), 0), self)  # PyTorch's books, in some versions

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """The next piece of this rank's memory, [numel]; all ranks take pieces of the same sizes in the same order."""
        size = numel * dtype.itemsize
        piece = self.memory[self.taken : self.taken + size].view(dtype)
        self.taken += _aligned(size)
        return piece

    def place(self, mine: Tensor) -> int:
        """The byte of this rank's memory at which ``mine``, a piece or a part of one, begins."""
        return mine.storage_offset() * mine.itemsize - self.memory.storage_offset()

    def parts(self, mine: Tensor) -> list[Tensor]:
        """What each rank has where this rank has ``mine``, a piece or a part of one."""
        start = self.place(mine)
        return [memory[start : start + mine.nbytes].view(mine.dtype) for memory in self.everyones]

    def others(self, start: int, end: int) -> list[Tensor]:
        """Those bytes of every other rank's memory."""
        return [memory[start:end] for rank, memory in enumerate(self.everyones) if rank != self.rank]

    def lend(self) -> None:
        """All pieces are filled and stay as they are: from now on ranks may read each other's.

        Raises:
            RuntimeError: what a rank reads is not what the other one wrote.
        """
        mine = _sum(self.memory)
        theirs = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(theirs, mine)  # nobody reads before all have written
        for rank, (wanted, memory) in enumerate(zip(theirs, self.everyones, strict=True)):
            if not torch.equal(_sum(memory), wanted):
                raise RuntimeError(
                    f"rank {self.rank} does not read what rank {rank} wrote: give --fsdp2_options no-peer-reads"
                )

    def copy_aside(self, to: Sequence[Tensor], parts: Sequence[Tensor]) -> Callable[[], None]:
        """Begin to copy ``parts`` beside what the current stream computes; returns how it waits for them."""
        if not self.copies_aside:
            for a, b in zip(to, parts, strict=True):
                a.copy_(b)
            return lambda: None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for a, b in zip(to, parts, strict=True):
                a.copy_(b)
            arrived = self.stream.record_event()
        return lambda: torch.cuda.current_stream().wait_event(arrived)

    @property
    def copies_aside(self) -> bool:
        """Whether there are streams to copy on."""
        return self.device.type == "cuda"

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        """Of all copies."""
        return torch.cuda.Stream()


def _sum(memory: Tensor) -> Tensor:
    """Of its bytes, each times its place, in pieces: as int64 they are eight times as large."""
    places = torch.arange(1, 2**20 + 1, device=memory.device)
    return torch.stack([(piece * places[: len(piece)]).sum() for piece in memory.split(2**20)]).sum()


def rows_of(rows: int, ranks: int) -> int:
    """Of how many rows a rank's piece is: the same on each, though the last may have fewer of its own."""
    return -(-rows // ranks)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _symmetric(size: int, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """``size`` bytes of this rank, and those of each rank as this one sees them."""
    from torch.distributed import _symmetric_memory as symmetric  # has no public name yet

    memory = symmetric.empty(size, dtype=torch.uint8, device=device)
    handle = symmetric.rendezvous(memory, dist.group.WORLD)
    everyones = [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(dist.get_world_size())]
    memory.handle = handle  # lives as long
    return memory, everyones
