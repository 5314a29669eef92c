"""Memory in GiB (1024 ** 3 bytes): peaks that can be claimed, and a timeline per GPU that can be looked at."""

from __future__ import annotations

import threading
import time
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


_replayed = 0  # bytes at the worst moment of a CUDA graph's replay


def note_replay(recorded: int) -> None:
    """Count a replay: what is allocated, and the ``recorded`` bytes of the graph's memory, which is held, in use now,
    and allocated to nobody in PyTorch's books."""
    global _replayed
    _replayed = max(_replayed, torch.cuda.memory_allocated() + recorded)


def reset_peak() -> None:
    """Begin to count peaks anew."""
    global _replayed
    _replayed = 0
    torch.cuda.reset_peak_memory_stats()


def peak_gib() -> tuple[float, float]:
    """Peak of allocated and of reserved GiB on this process's GPU since the last reset; zeros without a GPU.

    Allocated counts the memory of CUDA graphs that were replayed as in use, all of it.
    """
    if not torch.cuda.is_available():
        return 0.0, 0.0
    return max(torch.cuda.max_memory_allocated(), _replayed) / GIB, torch.cuda.max_memory_reserved() / GIB


class MemoryTimeline:
    """Used memory of every GPU as the driver sees it, sampled ten times a second while the ``with`` block runs.

    ``rows`` holds ``{"seconds", "gpu0_gib", ...}``. It sees what the allocator does not (contexts, NCCL) and
    misses spikes shorter than a sample: read it beside :func:`peak_gib`. Without NVML it stays empty.
    """

    def __init__(self, seconds_between: float = 0.1):
        self.rows: list[dict[str, float]] = []
        self._seconds_between = seconds_between
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> MemoryTimeline:
        if torch.cuda.is_available():
            try:
                torch.cuda.device_memory_used(0)
            except Exception:  # NVML or its package is missing: a timeline is a picture, not a condition
                return self
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def _sample(self) -> None:
        start = time.perf_counter()
        while not self._stop.wait(self._seconds_between):
            row = {"seconds": round(time.perf_counter() - start, 2)}
            for i in range(torch.cuda.device_count()):
                row[f"gpu{i}_gib"] = round(torch.cuda.device_memory_used(i) / GIB, 3)
            self.rows.append(row)
