"""Tensors that wait in host memory between forward and backward, while the GPU computes.

What is put last is needed first, so each fetch starts the next one. Copies run on a stream of their own. On a device
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

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        """Of all copies, there and back."""
        return torch.cuda.Stream()

    def put(self, x: Tensor) -> Kept:
        """Begin to copy ``x`` into pinned host memory; its own memory is free once that is done."""
        x = x.detach()
        kept = Kept(x, x.device)
        if x.is_cuda:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                kept.waiting = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
            x.record_stream(self.stream)
        self.order.append(weakref.ref(kept))
        return kept

    def get(self, kept: Kept) -> Tensor:
        """What was put, on its device; the one put before it is now on its way."""
        self._fetch(kept)
        while self.order and self.order[-1]() in (None, kept):
            self.order.pop()
        if self.order:
            self._fetch(self.order[-1]())
        if kept.arrived is not None:
            torch.cuda.current_stream().wait_event(kept.arrived)
            kept.fetched.record_stream(torch.cuda.current_stream())
        return kept.fetched

    def _fetch(self, kept: Kept) -> None:
        if kept.fetched is not None:
            return
        if kept.device.type != "cuda":
            kept.fetched = kept.waiting
            return
        with torch.cuda.stream(self.stream):
            kept.fetched = kept.waiting.to(kept.device, non_blocking=True)
            kept.arrived = self.stream.record_event()
