"""QLoRA sharded by FSDP2: tokens a second and GiB a GPU of this trainer on N GPUs and on one, beside Unsloth's FSDP2.

    python3 -m helpers.bench_fsdp2 --out runs/bench_fsdp2

Published shapes with RANDOM weights and rows of random token ids: this measures speed and memory, not learning. Every
contender trains the same rows in the same batches, in processes of its own, each GPU's memory capped. They come in
waves of as many as the free memory holds under that cap: a wave loads and compiles side by side, then each in turn
takes its timed steps while the others wait and use neither GPU nor processor. Rows go to ``fsdp2_bench.csv`` as soon as
they are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import bench_trainer
from .clocks import watched
from .memory import GIB
from .ranks import Job, places, visible_gpus, wait_for
from .results import write_rows
from .turns import take_turn, turn, warm

WARMUP = 2  # steps that compile and fill the allocator
CONTEXT_GIB = 1.0  # of a process beside what is capped: CUDA's context, NCCL's buffers
RUNS = (
    "2:ours, 8-bit Adam", "2:unsloth", "1:ours, 8-bit Adam", "1:ours, on the other GPU", "2:ours, all gathered by NCCL",
    "2:ours, bitsandbytes' linear",  # which NCCL gathers for too
)  # fmt: skip
FURTHER_RUNS = ("2:ours, launched one by one", "2:ours, float32 AdamW", "2:torch AO's NF4 in ours")
# Flags of helpers.train that a contender has besides Case's.
CONTENDERS: dict[str, dict[str, Any]] = {
    "ours, 8-bit Adam": {"cuda_graphs": True},
    "ours, on the other GPU": {"cuda_graphs": True},  # two cards of a kind differ by some percent
    "ours, all gathered by NCCL": {"cuda_graphs": True, "fsdp2_options": "no-peer-reads"},
    "ours, launched one by one": {},
    "ours, float32 AdamW": {"optimizer": "adamw_torch", "cuda_graphs": True},
    "ours, bitsandbytes' linear": {"nf4": "bitsandbytes", "cuda_graphs": True},
    "ours, eager": {"compile": False},
    "torch AO's NF4 in ours": {"nf4": "bitsandbytes"},
    "unsloth": {},
}
PACKAGES = {"torch AO's NF4 in ours": "torchao", "unsloth": "unsloth"}  # that a contender needs


@dataclass(frozen=True)
class Case:
    """One training set-up: rows of exactly ``max_length`` tokens, ``cap_gib`` GiB of each GPU."""

    model: str = "shape:llama-3.1-8b"
    max_length: int = 2048
    batch_size: int = 2
    accumulation: int = 4
    lora_rank: int = 64
    steps: int = 7
    cap_gib: float = 14.7

    @property
    def rows(self) -> str:
        return f"random:{self.max_length}-{self.max_length}x300"


# In a contender's processes


def ours(case: Case, name: str, ranks: int, output_dir: Path, callbacks: list) -> None:
    """One run of helpers.train in this process, a rank of ``ranks`` or alone."""
    from .torchao_nf4 import torchao_weights
    from .train import TrainArguments, train

    arguments = {"compile": True, "nf4": "triton", "optimizer": "adamw_8bit"} | CONTENDERS[name]
    with torchao_weights() if PACKAGES.get(name) == "torchao" else contextlib.nullcontext():
        train(TrainArguments(
            model=case.model, dataset=case.rows, output_dir=str(output_dir), steps=case.steps,
            batch_size=case.batch_size, accumulation=case.accumulation, max_length=case.max_length,
            lora_rank=case.lora_rank, deterministic=False, prompt="", fsdp2=ranks > 1, **arguments,
        ), callbacks)  # fmt: skip


def unsloth(case: Case, folder: Path, callbacks: list) -> None:
    """Unsloth's own loading, LoRA, checkpointing and, by UNSLOTH_FSDP2=1, sharding. AGPL: run, not copied."""
    bench_trainer.unsloth(bench_trainer.Case(
        "FSDP2", "", case.rows.removeprefix("random:"), case.max_length, True, batch_size=case.batch_size,
        accumulation=case.accumulation, lora_rank=case.lora_rank, steps=case.steps, optimizer="adamw_8bit",
    ), str(folder), callbacks)  # fmt: skip


def _in_rank(request: dict[str, Any]) -> None:
    """What each process of a contender does."""
    import torch

    case, name, folder = Case(**request["case"]), request["contender"], Path(request["folder"])
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, case.cap_gib * GIB / total))
    if name == "unsloth":  # before everything that it patches
        importlib.import_module("unsloth")
    times = [turn(folder, request["limit_s"], WARMUP)]
    if name == "unsloth":
        unsloth(case, Path(request["saved"]), times)
    else:
        ours(case, name, request["ranks"], folder / "run", times)


# In the process that starts them


class Bench:
    """Contenders in processes of their own, a wave of them at a time.

    Args:
        runs: ``GPUS:CONTENDER`` each; the order is that of their turns.
        out: folder of ``fsdp2_bench.csv``, of each contender's memory over time and of logs.
        limit_s: seconds from its start within which a contender must have warmed up; a third of it for its turn.
        further: runs after those, left out from ``until`` on, a ``time.monotonic()``.
        at_once: contenders of a wave; 0: as many as the free memory of a GPU holds under the case's cap.

    Raises:
        ValueError: a run that is not of that form.
    """

    entry = ["-m", "helpers.bench_fsdp2", "--in-rank"]

    def __init__(
        self, case: Case, runs: Iterable[str], out: Path, limit_s: float = 180, further: Iterable[str] = (),
        until: float = math.inf, at_once: int = 0,
    ):  # fmt: skip
        self.case, self.out, self.limit_s, self.until, self.at_once = case, out, limit_s, until, at_once
        self.waiting, self.further = list(runs), list(further)
        everyone = self.waiting + self.further
        for run in everyone:
            gpus, _, name = run.partition(":")
            if not gpus.isdigit() or name not in CONTENDERS:
                raise ValueError(f"run {run!r} is not GPUS:CONTENDER, with a contender of {', '.join(CONTENDERS)}")
        self.all_s = limit_s * (1 + len(everyone))  # more than anything waits for
        self.last_gpu = max(int(run.split(":")[0]) for run in everyone) - 1
        self.running: dict[str, tuple[Job, Path, float]] = {}  # with the folder it writes to, and when it is late
        self.saving: Job | None = None
        self.scratch: tempfile.TemporaryDirectory | None = None
        self.rows: list[dict[str, Any]] = []

    def start(self) -> Bench:
        """Begin to save the weights for whoever loads a checkpoint, in one process; returns at once."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.scratch = tempfile.TemporaryDirectory(prefix="fsdp2-bench-", ignore_cleanup_errors=True)
        self.saved = Path(self.scratch.name, "model") if self.case.model.startswith("shape:") else Path(self.case.model)
        if not self.saved.exists() and any(run.endswith(":unsloth") for run in self.waiting + self.further):
            arguments = ["-c", bench_trainer.SAVE, self.case.model.removeprefix("shape:"), str(self.saved)]
            self.saving = self._job("model", arguments, 0, [self.last_gpu]).start()
        return self

    def finish(self) -> list[dict[str, Any]]:
        """Give every contender its turn, wave by wave; a row each, with ``error`` for those that failed."""
        if not self.scratch:
            self.start()
        try:
            wait_for(self.saving)  # its memory is a contender's
            while self._next_wave():
                warm(self.running.values(), self.limit_s)
                for run in list(self.running):
                    self._take_turn(run)
        finally:
            for job in [*(job for job, _, _ in self.running.values()), *filter(None, [self.saving])]:
                job.stop("was interrupted")
            self.scratch.cleanup()
        return self.rows

    def _next_wave(self) -> bool:
        """Start as many as there are places for; whether there were any left to start."""
        at_once = self.at_once or places(self.case.cap_gib + CONTEXT_GIB, cores=6)
        room, wave = Counter(dict.fromkeys(range(self.last_gpu + 1), at_once)), []
        for runs in (self.waiting, self.further if time.monotonic() < self.until else []):
            while runs and all(room[gpu] for gpu in self._gpus(runs[0])):
                room.subtract(self._gpus(runs[0]))
                wave.append(runs.pop(0))
            if runs:
                break  # in their order
        for run in wave:
            self._start(run)
        if self.further and not wave:
            print(f"left out, for want of time: {', '.join(self.further)}")
        return bool(wave)

    def _gpus(self, run: str) -> list[int]:
        if run.endswith(", on the other GPU"):
            return [self.last_gpu]
        return list(range(int(run.split(":")[0])))

    def _named(self, gpus: list[int]) -> list[str]:
        names = visible_gpus()
        return [names[gpu] for gpu in gpus if gpu < len(names)]

    def _job(self, name: str, arguments: list[str], ranks: int, gpus: list[int], **environment: str) -> Job:
        # Each process would start a compile worker a processor, of which few would ever have work.
        environment = {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "2"} | environment
        environment |= {"CUDA_VISIBLE_DEVICES": ",".join(self._named(gpus))}
        return Job(name, arguments, self.out / "logs", ranks, self.all_s, environment)

    def _start(self, run: str) -> None:
        gpus, name = run.split(":", 1)
        ranks = int(gpus) if int(gpus) > 1 else 0
        folder = Path(self.scratch.name, run.replace(":", " "))
        folder.mkdir()
        request = {"case": asdict(self.case), "contender": name, "ranks": int(gpus), "folder": str(folder),
                   "saved": str(self.saved), "limit_s": self.all_s}  # fmt: skip
        environment = {}
        if name == "unsloth":  # the padding is part of the case
            environment = {"UNSLOTH_DISABLE_AUTO_PADDING_FREE": "1"} | ({"UNSLOTH_FSDP2": "1"} if ranks else {})
        arguments = [*self.entry, json.dumps(request)]
        job = self._job(run.replace(":", " "), arguments, ranks, self._gpus(run), **environment).start()
        if name == "unsloth" and self.saving and self.saving.failure:
            job.stop(f"its weights could not be saved: {self.saving.failure}")
        self.running[run] = job, folder, time.monotonic() + self.limit_s

    def _take_turn(self, run: str) -> None:
        job, folder, _ = self.running[run]
        with watched(self._named(self._gpus(run))) as clocks:
            found = take_turn(job, folder, self.limit_s / 3)
        del self.running[run]
        gpus, name = run.split(":", 1)
        row: dict[str, Any] = {"gpus": int(gpus), "contender": name, "error": job.failure}
        if not job.failure:
            for rank, each in enumerate(found):
                write_rows(each.pop("memory"), self.out / f"{job.name}, memory of GPU {rank}.csv")
            row |= _row(self.case, int(gpus), found) | clocks
        self.rows.append(row)
        write_rows(self.rows, self.out / "fsdp2_bench.csv")
        print(_line(row), flush=True)


def possible(runs: Iterable[str]) -> list[str]:
    """Those of ``runs`` whose packages are installed here."""
    needed = {run: PACKAGES.get(run.split(":", 1)[1]) for run in runs}
    return [run for run, package in needed.items() if package is None or importlib.util.find_spec(package)]


def _row(case: Case, gpus: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks of a contender measured: tokens a second of all GPUs, the first rank's losses, the most memory."""
    step = statistics.median(found[0]["seconds"])
    return {
        "tokens_per_s": round(case.max_length * case.batch_size * case.accumulation * gpus / step),
        "step_s": round(step, 4),
        "allocated_gib": round(max(each["allocated_gib"] for each in found), 2),
        "reserved_gib": round(max(each["reserved_gib"] for each in found), 2),
        "losses": " ".join(f"{loss:.5f}" for loss in found[0]["losses"]),
        "seconds": " ".join(f"{s:.3f}" for s in found[0]["seconds"]),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m helpers.bench_fsdp2", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench_fsdp2"), help="folder of fsdp2_bench.csv")
    parser.add_argument("--runs", nargs="*", default=possible(RUNS + FURTHER_RUNS), help="GPUS:CONTENDER")
    parser.add_argument("--model", default=Case.model)
    parser.add_argument("--steps", type=int, default=Case.steps)
    parser.add_argument("--limit", type=int, default=180, help="seconds within which a contender must have warmed up")
    parser.add_argument("--at-once", type=int, default=0, help="contenders of a wave; 0: what the memory holds")
    parser.add_argument("--in-rank", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.in_rank:
        _in_rank(json.loads(args.in_rank))
        return 0
    case = replace(Case(), model=args.model, steps=args.steps)
    rows = Bench(case, args.runs, args.out, args.limit, at_once=args.at_once).finish()
    return 1 if any(row["error"] for row in rows) else 0


def _line(row: dict[str, Any]) -> str:
    what = f"{row['gpus']} GPU(s), {row['contender']:28s}"
    if row["error"]:
        return f"{what} FAILED: {row['error'][:300]}"
    return (f"{what} {row['tokens_per_s']:7,d} tokens/s  step {row['step_s']:.3f} s  {row['allocated_gib']:5.2f} GiB "
            f"allocated, {row['reserved_gib']:5.2f} reserved")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
