"""Memory in GiB (1024 ** 3 bytes): peaks of PyTorch's allocator."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch

GIB = 1024**3
T = TypeVar("T")


def grow_segments() -> None:
    """Have the CUDA allocator's segments grow with what is asked for, so that less lies unused between its blocks; for
    what is allocated from now on. Nothing where the user has set the allocator up, or without a GPU under Linux."""
    chosen = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    if sys.platform == "linux" and torch.cuda.is_available() and not chosen:
        if hasattr(torch._C, "_accelerator_setAllocatorSettings"):  # since torch 2.10
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
        else:
            torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def measure_peak(function: Callable[[], T]) -> tuple[T, int]:
    """Run ``function`` and return its result and the peak of allocated bytes above those held at its start.

    Raises:
        RuntimeError: without CUDA, where PyTorch counts no bytes.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("peak memory is counted by the CUDA allocator; this machine has no GPU")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - start


_replayed = 0  # bytes at the worst moment of a CUDA graph's replay
_recorded = 0  # bytes that the recordings hold
_outside = 0  # bytes that PyTorch's allocator does not count


def note_outside(size: int, owner: Any) -> None:
    """Count ``size`` bytes that ``owner`` holds beside what PyTorch allocates, until it is gone."""
    _count_outside(size)
    weakref.finalize(owner, _count_outside, -size)


def _count_outside(size: int) -> None:
    global _outside
    _outside += size


def note_replay(recorded: int) -> None:
    """Count a replay: what is allocated, and the ``recorded`` bytes of the graph's memory, which is held, in use now,
    and allocated to nobody in PyTorch's books."""
    global _replayed, _recorded
    _recorded = recorded
    _replayed = max(_replayed, torch.cuda.memory_allocated() + recorded)


def uncounted() -> int:
    """Bytes that are held and in use, but allocated to nobody in PyTorch's books: of CUDA graphs and of others."""
    return _recorded + _outside


def reset_peak() -> None:
    """Begin to count peaks anew."""
    global _replayed, _recorded
    _replayed = _recorded = 0
    torch.cuda.reset_peak_memory_stats()


def peak_gib() -> tuple[float, float]:
    """Peak of allocated and of reserved GiB on this process's GPU since the last reset; zeros without a GPU.

    Allocated counts the memory of CUDA graphs that were replayed as in use, all of it.
    """
    if not torch.cuda.is_available():
        return 0.0, 0.0
    allocated = max(torch.cuda.max_memory_allocated(), _replayed)
    return (allocated + _outside) / GIB, (torch.cuda.max_memory_reserved() + _outside) / GIB
