"""Processes, one a GPU: joining them, starting them from a notebook, and naming the one that failed in one line."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

RAISED = re.compile(r"(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception)\b.*|error: .*)")  # the last line of a traceback


def start_ranks(device: str = "cuda") -> torch.device:
    """Join the process group that torchrun (or ``accelerate launch``) set up; returns this rank's device.

    NCCL moves GPU tensors and gloo CPU ones, which offloading and checkpoints need beside it.

    Raises:
        ValueError: not started by torchrun, or more processes than GPUs on this machine.
    """
    if "RANK" not in os.environ:
        raise ValueError(
            "FSDP2 runs one process a GPU: start with torchrun --nproc_per_node=N -m helpers.train --fsdp2"
        )
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "cuda" and torch.cuda.device_count() < here:
        raise ValueError(
            f"{here} processes were started on a machine with {torch.cuda.device_count()} GPU(s): "
            f"use --nproc_per_node={max(torch.cuda.device_count(), 1)}"
        )
    place = torch.device("cuda", local) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        dist.init_process_group("cuda:nccl,cpu:gloo" if device == "cuda" else "gloo")
    return place


def stop_ranks() -> None:
    """Leave the process group once the work is done; after an error torchrun ends the other ranks instead."""
    if dist.is_initialized():
        dist.destroy_process_group()


def main_process() -> bool:
    """True in the one process that prints, logs and writes the adapter."""
    return os.environ.get("RANK", "0") == "0"


def launch(ranks: int, arguments: list[str], log_dir: str | os.PathLike) -> None:
    """Run ``python3 arguments...`` once a rank, as ``torchrun --nproc_per_node=ranks`` would, for notebooks.

    Rank 0's output is shown as it comes; everything each rank says is kept under ``log_dir``.

    Raises:
        RuntimeError: a rank failed; the rest were stopped. One message names it, how it ended and its last words.
    """
    log_dir = Path(log_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    logs = DefaultLogsSpecs(str(log_dir), redirects=Std.ALL, tee={0: Std.OUT})
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, max_restarts=0, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", run_id="none", logs_specs=logs, log_line_prefix_template=" ",
    )  # fmt: skip
    quiet = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)  # it would tell the same failure again, at length
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        raise RuntimeError(_first_failure(error.failures, log_dir)) from None
    finally:
        quiet.setLevel(level)


def _first_failure(failures: dict[int, Any], log_dir: Path) -> str:
    """One line on the rank that failed of its own accord; those it took along only lost it or were stopped."""

    def last_words(rank: int) -> str:
        written = max(log_dir.glob(f"*/attempt_0/{rank}/stderr.log"), key=os.path.getmtime, default=None)
        lines = written.read_text(errors="replace").splitlines() if written else []
        raised = [found[1] for line in lines if (found := RAISED.match(line))]
        return raised[-1] if raised else ""

    def order(rank: int) -> tuple:
        stopped = failures[rank].exitcode == -signal.SIGTERM  # by torchrun's agent, after the first failure
        lost_peer = failures[rank].exitcode != -signal.SIGKILL and any(
            w in last_words(rank) for w in ("peer", "DistBackendError")
        )
        return stopped, lost_peer, failures[rank].timestamp

    rank = min(failures, key=order)
    code = failures[rank].exitcode
    how = f"was killed by {failures[rank].signal_name()}" if code < 0 else f"ended with code {code}"
    why = f": {words}" if (words := last_words(rank)) else ""
    return (
        f"rank {rank} {how}{why} (logs in {log_dir}); the other ranks were stopped, --resume goes on from a checkpoint"
    )


@contextlib.contextmanager
def one_rank_at_a_time() -> Iterator[None]:
    """Run the block rank after rank, so that host memory holds one copy of a checkpoint and not one a rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for _ in range(rank):
        dist.barrier()
    yield
    for _ in range(ranks - rank):
        dist.barrier()
