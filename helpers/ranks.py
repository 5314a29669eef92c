"""Processes, one a GPU: joining them, starting them from a notebook or a bench, and naming the one that failed."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

RAISED = re.compile(r"(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception)\b.*|error: .*)")  # the last line of a traceback
LIMIT_S = 3600.0  # of a job that is given no other
GRACE_S = 2.0  # for the other ranks to end by themselves after one has failed, and then again after SIGTERM


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
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")  # else no CUDA graphs in segments that grow (pytorch#158029)
    if not dist.is_initialized():
        dist.init_process_group("cuda:nccl,cpu:gloo" if device == "cuda" else "gloo")
    return place


def stop_ranks() -> None:
    """Leave the process group once the work is done; after an error the launcher ends the other ranks instead."""
    if dist.is_initialized():
        dist.barrier()  # or a thread of gloo's may hold the last tensor when Python ends, and abort (pytorch#179291)
        dist.destroy_process_group()


def main_process() -> bool:
    """True in the one process that prints, logs and writes the adapter."""
    return os.environ.get("RANK", "0") == "0"


@dataclass
class Job:
    """``python3 arguments...`` once a rank, as ``torchrun`` would start it, or (``ranks=0``) alone and in no group.

    ``name``: of its folder under ``log_dir``, where each rank's output is kept. ``limit_s``: seconds until it is
    stopped. ``environment``: added to this process's. Its processes end with it, whichever way it ends, and a thread
    watches them: ranks that wait for one that has failed spin on their GPUs, at the cost of everyone else there.
    """

    name: str
    arguments: list[str]
    log_dir: Path
    ranks: int = 0
    limit_s: float = LIMIT_S
    environment: Mapping[str, str] = field(default_factory=dict)
    processes: list[subprocess.Popen] = field(default_factory=list, init=False)
    failure: str | None = field(default=None, init=False)  # one line; "" once it ended well
    _shown: int = field(default=0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def start(self) -> Job:
        """Start its processes and return at once."""
        folder = Path(self.log_dir) / self.name
        folder.mkdir(parents=True, exist_ok=True)
        count = max(self.ranks, 1)
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
        common = threads | os.environ | {"PYTHONUNBUFFERED": "1"} | dict(self.environment)
        if self.ranks:
            common |= {"WORLD_SIZE": f"{count}", "LOCAL_WORLD_SIZE": f"{count}", "TORCHELASTIC_RUN_ID": "none",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}"}  # fmt: skip
        self._until = time.monotonic() + self.limit_s
        atexit.register(self.stop, "was interrupted")
        for rank in range(count):
            mine = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} if self.ranks else {}
            with open(folder / f"{rank}.out", "wb") as out, open(folder / f"{rank}.err", "wb") as err:
                command = [sys.executable, *self.arguments]
                self.processes.append(
                    subprocess.Popen(command, env=common | mine, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
                )
        threading.Thread(target=self._watch, name=self.name, daemon=True).start()
        return self

    def ended(self) -> bool:
        """Whether it is over, and all its processes with it."""
        return self.failure is not None

    def stop(self, why: str) -> None:
        """End it now, for a reason that becomes its failure; nothing where it is over."""
        with self._lock:
            if not self._look():
                self._end()
                self.failure = why

    def _watch(self) -> None:
        ended = False
        while not ended:
            time.sleep(0.05)
            with self._lock:
                ended = self._look()

    def _look(self) -> bool:
        """Whether it is over; ends the other ranks where one has failed, and all of them where time is up."""
        if self.failure is not None:
            return True
        codes = [process.poll() for process in self.processes]
        if any(codes):
            at = time.monotonic()
            order = [rank for rank, code in enumerate(codes) if code]
            while time.monotonic() < at + GRACE_S and any(process.poll() is None for process in self.processes):
                time.sleep(0.05)
                order += [r for r, p in enumerate(self.processes) if p.poll() and r not in order]
            self._end()
            self.failure = self._first_failure(order)
        elif all(code == 0 for code in codes):
            self.failure = ""
        elif time.monotonic() > self._until:
            self._end()
            self.failure = f"was not done after {self.limit_s:.0f} s (logs in {self.log_dir})"
        return self.failure is not None

    def said(self) -> str:
        """What rank 0 has printed so far, errors last."""
        folder = Path(self.log_dir) / self.name
        return "".join((folder / f"0.{end}").read_text(encoding="utf-8", errors="replace") for end in ("out", "err"))

    def show(self) -> None:
        """Print what rank 0 has said since the last call."""
        with open(Path(self.log_dir) / self.name / "0.out", encoding="utf-8", errors="replace") as file:
            file.seek(self._shown)
            print(file.read(), end="", flush=True)
            self._shown = file.tell()

    def _end(self) -> None:
        running = [process for process in self.processes if process.poll() is None]
        for process in running:
            process.terminate()
        until = time.monotonic() + GRACE_S
        while time.monotonic() < until and any(process.poll() is None for process in running):
            time.sleep(0.05)
        for process in running:  # a rank in a collective that never ends does not answer
            process.kill()
            process.wait()

    def _first_failure(self, order: list[int]) -> str:
        """One line on the rank that failed of its own accord; ``order``: those that ended before we ended any."""

        def last_words(rank: int) -> str:
            text = (Path(self.log_dir) / self.name / f"{rank}.err").read_text(encoding="utf-8", errors="replace")
            raised = [found[1] for line in text.splitlines() if (found := RAISED.match(line))]
            return raised[-1] if raised else ""

        def lost_a_peer(rank: int) -> bool:
            killed = self.processes[rank].returncode == -signal.SIGKILL
            return not killed and any(word in last_words(rank) for word in ("peer", "DistBackendError"))

        rank = min(order, key=lambda rank: (lost_a_peer(rank), order.index(rank)))
        code = self.processes[rank].returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        why = f": {words}" if (words := last_words(rank)) else ""
        who = f"rank {rank} {how}{why} (logs in {self.log_dir})"
        return f"{who}; the other ranks were stopped, --resume goes on from a checkpoint" if self.ranks > 1 else who


def run_jobs(jobs: Iterable[Job], at_once: int = 1, shown: Job | None = None) -> dict[str, str]:
    """Run jobs in order, ``at_once`` of them side by side; what failed in one line by name, "" for the rest.

    Args:
        shown: the one whose rank 0 is printed as it comes.
    """
    waiting, running, done = list(jobs), [], {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(waiting.pop(0).start())
            time.sleep(0.1)
            if shown in running:
                shown.show()
            for job in [job for job in running if job.ended()]:
                running.remove(job)
                done[job.name] = job.failure
                if job is shown:
                    job.show()
    finally:
        for job in running:
            job.stop("was interrupted")
    return done


def wait_for(*jobs: Job | None) -> None:
    """Wait until jobs that were started have ended, well or not; None is no job."""
    for job in filter(None, jobs):
        while not job.ended():
            time.sleep(0.1)


def places(gib: float, cores: int = 3) -> int:
    """How many jobs of ``gib`` GiB on each GPU and ``cores`` processors fit into what is free now; at least 1."""
    if not torch.cuda.is_available():
        return 1
    free = min(torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count()))
    return max(1, min(int(free / 1024**3 / gib), (os.cpu_count() or 1) // cores))


def visible_gpus() -> list[str]:
    """What names each GPU of this process in CUDA_VISIBLE_DEVICES; one where there is none."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(gpu) for gpu in range(max(torch.cuda.device_count(), 1))]


def launch(ranks: int, arguments: list[str], log_dir: str | os.PathLike, limit_s: float = LIMIT_S) -> None:
    """Run ``python3 arguments...`` once a rank, as ``torchrun --nproc_per_node=ranks`` would, for notebooks.

    Rank 0's output is shown as it comes; what each rank says is kept under ``log_dir``.

    Raises:
        RuntimeError: a rank failed, or ``limit_s`` seconds passed; the rest were stopped. One message names it, how it
            ended and its last words.
    """
    job = Job("ranks", arguments, Path(log_dir), ranks, limit_s)
    if failure := run_jobs([job], shown=job)[job.name]:
        raise RuntimeError(failure)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def one_rank_at_a_time() -> Iterator[None]:
    """Run the block rank after rank, so that host memory holds one copy of a checkpoint and not one a rank.

    The ranks wait in gloo: in NCCL's barrier they would spin on their GPUs.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for _ in range(rank):
        dist.all_reduce(torch.zeros(()))
    yield
    for _ in range(ranks - rank):
        dist.all_reduce(torch.zeros(()))
