"""Contenders of a bench side by side: they start, load and compile together, then each takes its timed steps alone.

A contender is a :class:`~helpers.ranks.Job` with a folder, and the callback of :func:`turn` in its trainer. Warmed up,
it waits, using neither GPU nor processor, for a file named ``go``; after its last step it leaves what it measured.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .memory import GIB, peak_gib, uncounted
from .ranks import Job

# In a contender's processes


def wait_for_file(path: Path, limit_s: float, what: str) -> None:
    """Wait until ``path`` exists.

    Raises:
        TimeoutError: not within ``limit_s`` seconds, or whoever started this process is gone.
    """
    until, parent = time.monotonic() + limit_s, os.getppid()
    while not path.exists():
        if time.monotonic() > until or os.getppid() != parent:
            raise TimeoutError(f"{what} did not come within {limit_s:.0f} s")
        time.sleep(0.02)


def turn(folder: Path, limit_s: float, warm_up: int):
    """The trainer callback that times a contender: after ``warm_up`` steps it waits, then each step counts.

    When the last step is done it writes what it found and ends the process: to save an adapter of 0.7 GB that nobody
    wants would take longer than the steps, at the cost of the contender that is next.
    """
    import torch
    from transformers import TrainerCallback

    rank = os.environ.get("RANK", "0")

    class Turn(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            if state.global_step == warm_up:
                self.seconds: list[float] = []
                (folder / f"ready {rank}").touch()
                wait_for_file(folder / "go", limit_s, "a turn")
            elif state.global_step > warm_up:
                self.seconds.append(time.perf_counter() - self.began)
            self.began = time.perf_counter()

        def on_train_end(self, args, state, control, model=None, **kwargs):
            allocated, reserved = peak_gib()
            found = {
                "seconds": self.seconds, "losses": [row["loss"] for row in state.log_history if "loss" in row],
                "allocated_gib": allocated, "reserved_gib": reserved, "memory": timeline.rows,
                "trainable_dtype": str(next(p.dtype for p in model.parameters() if p.requires_grad))[6:],
            }  # fmt: skip
            scratch = folder / f"scratch {rank}"
            scratch.write_text(json.dumps(found), encoding="utf-8")
            os.replace(scratch, folder / f"measured {rank}")
            os._exit(0)

    timeline = _Timeline()
    return Turn()


class _Timeline:
    """``rows``: this process's GPU memory, five times a second from now on: as PyTorch's allocator counts it, and what
    CUDA graphs hold."""

    def __init__(self):
        import torch

        self.rows: list[dict[str, float]] = []
        device = torch.cuda.current_device() if torch.cuda.is_available() else None  # another thread's is GPU 0
        read = functools.partial(torch.cuda.memory_stats, device)
        threading.Thread(target=self._sample, args=[read], daemon=True).start()

    def _sample(self, read: Callable[[], dict[str, int]]) -> None:
        started = time.perf_counter()
        while True:
            held = read()
            self.rows.append({
                "seconds": round(time.perf_counter() - started, 1),
                "allocated_gib": round((held.get("allocated_bytes.all.current", 0) + uncounted()) / GIB, 3),
                "reserved_gib": round(held.get("reserved_bytes.all.current", 0) / GIB, 3),
            })  # fmt: skip
            time.sleep(0.2)


# In the process that starts them


def warm(running: Iterable[tuple[Job, Path, float]], limit_s: float) -> None:
    """Wait until every contender that runs is ready for its turn, has ended, or is late.

    Args:
        running: job, its folder, and the ``time.monotonic()`` at which it is late: ``limit_s`` after its start.
    """
    for job, folder, late in running:
        while not job.ended() and len(list(folder.glob("ready *"))) < len(job.processes):
            if time.monotonic() > late:
                job.stop(f"had not warmed up after {limit_s:.0f} s")
            time.sleep(0.05)


def take_turn(job: Job, folder: Path, limit_s: float) -> list[dict[str, Any]]:
    """Let a warm contender go on alone; what each rank measured, none where it failed (``job.failure`` says how)."""
    late = time.monotonic() + limit_s
    (folder / "go").touch()
    while not job.ended():
        if time.monotonic() > late:
            job.stop(f"timed steps were not done after {limit_s:.0f} s")
        time.sleep(0.05)
    if job.failure:
        return []
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("measured *"))]
