"""Memory in GiB (1024 ** 3 bytes): peaks of PyTorch's allocator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

GIB = 1024**3
T = TypeVar("T")


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


def peak_gib() -> tuple[float, float]:
    """Peak of allocated and of reserved GiB on this process's GPU since the last reset; zeros without a GPU."""
    if not torch.cuda.is_available():
        return 0.0, 0.0
    return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
