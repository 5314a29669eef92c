"""Tensors that wait in host memory between forward and backward, while the GPU computes.

What is put last is needed first, so each fetch starts the next one. Copies run on a stream of their own, to and from
pinned memory that is used again. Nothing here asks the GPU anything, so that a CUDA graph can record it. On a device
without such streams (the CPU) a tensor waits where it is.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Kept:
    """One tensor: where it waits, and once it is on its way back its copy and the event of its arrival."""

    waiting: Tensor
    device: torch.device
    fetched: Tensor | None = None
    arrived: torch.cuda.Event | None = None


class HostStore:
    """``kept = store.put(x)`` in forward, ``x = store.get(kept)`` once in backward; last in, first out, or at least
    mostly: another order is right and waits for its copy. What is dropped without being fetched is forgotten."""

    def __init__(self):
        self.order: list[weakref.ref[Kept]] = []
        self.free: list[Tensor] = []  # pinned, bytes; never given back, since recordings write there
        self.leaving: list[tuple[Tensor, torch.cuda.Event]] = []  # until they are copied

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        """Of all copies, there and back."""
        return torch.cuda.Stream()

    def reserve(self, count: int, size: int) -> None:
        """Have pinned memory for ``count`` tensors of ``size`` bytes: a recording may not ask for more."""
        missing = count - sum(len(buffer) >= size for buffer in self.free)
        self.free += [_pinned(size) for _ in range(missing)]

    def put(self, x: Tensor) -> Kept:
        """Begin to copy ``x`` into pinned host memory; its own memory is free when the one after next is put."""
        x = x.detach()
        kept = Kept(x, x.device)
        if x.is_cuda:
            while len(self.leaving) > 1:
                self._left()
            buffer = self._buffer(x.nbytes)
            kept.waiting = buffer[: x.nbytes].view(x.dtype).view(x.shape)
            weakref.finalize(kept, self.free.append, buffer)  # the next copy to it is on the same stream, after
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                kept.waiting.copy_(x, non_blocking=True)
                self.leaving.append((x, self.stream.record_event()))
        self.order.append(weakref.ref(kept))
        return kept

    def settle(self) -> None:
        """Let the current stream wait for the copies of all that was put."""
        while self.leaving:
            self._left()

    def get(self, kept: Kept) -> Tensor:
        """What was put, on its device; the one put before it is now on its way."""
        self._fetch(kept)
        while self.order and self.order[-1]() in (None, kept):
            self.order.pop()
        if self.order:
            self._fetch(self.order[-1]())
        if kept.arrived is not None:
            torch.cuda.current_stream().wait_event(kept.arrived)
        return kept.fetched

    def _fetch(self, kept: Kept) -> None:
        if kept.fetched is not None:
            return
        if kept.device.type != "cuda":
            kept.fetched = kept.waiting
            return
        kept.fetched = torch.empty(kept.waiting.shape, dtype=kept.waiting.dtype, device=kept.device)
        self.stream.wait_stream(torch.cuda.current_stream())  # whose memory that was
        with torch.cuda.stream(self.stream):
            kept.fetched.copy_(kept.waiting, non_blocking=True)
            kept.arrived = self.stream.record_event()

    def _buffer(self, size: int) -> Tensor:
        found = next((i for i, buffer in enumerate(self.free) if len(buffer) >= size), None)
        return _pinned(size) if found is None else self.free.pop(found)

    def _left(self) -> None:
        """Give the oldest tensor's memory back to the current stream, once that may write to it again."""
        _, copied = self.leaving.pop(0)
        torch.cuda.current_stream().wait_event(copied)


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
