"""QLoRA sharded by FSDP2: tokens a second and GiB a GPU of this trainer on N GPUs and on one, beside Unsloth's FSDP2.

    python3 -m helpers.bench_fsdp2 --out runs/bench_fsdp2

Published shapes with RANDOM weights and rows of random token ids: this measures speed and memory, not learning. Every
contender trains the same rows in the same batches, each GPU's memory capped. Rows go to ``fsdp2_bench.csv``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import bench_trainer
from .memory import GIB

WARMUP = 2  # steps that compile and fill the allocator
# Flags of helpers.train that a contender has besides Case's.
CONTENDERS: dict[str, dict[str, Any]] = {
    "ours, 8-bit Adam": {},
    "ours, float32 AdamW": {"optimizer": "adamw_torch"},
    "ours, bitsandbytes' linear": {"nf4": "bitsandbytes"},
    "ours, eager": {"compile": False},
    "unsloth": {},
}


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


def ours(case: Case, flags: dict[str, Any], ranks: int) -> dict[str, Any]:
    """One run of helpers.train in this process, a rank of ``ranks`` or alone."""
    import torch

    from .train import TrainArguments, train

    arguments = {"compile": True, "nf4": "triton", "optimizer": "adamw_8bit"} | flags
    result = train(TrainArguments(
        model=case.model, dataset=_rows(case), output_dir=tempfile.mkdtemp(), steps=case.steps,
        batch_size=case.batch_size, accumulation=case.accumulation, max_length=case.max_length,
        lora_rank=case.lora_rank, deterministic=False, prompt="", fsdp2=ranks > 1, **arguments,
    ))  # fmt: skip
    torch.cuda.empty_cache()
    return {
        "seconds": [row["step_s"] for row in result.rows],
        "losses": result.losses,
        "allocated_gib": result.peak_allocated_gib,
        "reserved_gib": result.peak_reserved_gib,
    }


def unsloth(case: Case) -> dict[str, Any]:
    """Unsloth's own loading, LoRA, checkpointing and, by UNSLOTH_FSDP2=1, sharding. AGPL: run, not copied."""
    return bench_trainer.unsloth(bench_trainer.Case(
        "FSDP2", "", f"{case.max_length}-{case.max_length}x300", case.max_length, True, batch_size=case.batch_size,
        accumulation=case.accumulation, lora_rank=case.lora_rank, steps=case.steps, optimizer="adamw_8bit",
    ), case.model)  # fmt: skip


def _rows(case: Case) -> str:
    return f"random:{case.max_length}-{case.max_length}x300"


def _in_rank(request: dict[str, Any]) -> None:
    """What each started process does: run its contenders, the first one writing what each measured to a file."""
    import torch

    case, ranks = Case(**request["case"]), request["ranks"]
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, case.cap_gib * GIB / total))
    for name in request["contenders"]:
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        measured = unsloth(case) if name == "unsloth" else ours(case, CONTENDERS[name], ranks)
        measured |= {"contender": name, "gpus": ranks, "total_s": time.perf_counter() - started}
        if os.environ.get("RANK", "0") == "0":
            with open(request["file"], "a", encoding="utf-8") as file:
                file.write(json.dumps(measured) + "\n")


def measure(case: Case, contenders: list[str], ranks: int, limit_s: int) -> list[dict[str, Any]]:
    """Run ``contenders`` one after another on ``ranks`` GPUs; a row each, with ``error`` for those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.jsonl"
        request = {"case": asdict(case), "contenders": contenders, "ranks": ranks, "file": str(file)}
        arguments = ["-m", "helpers.bench_fsdp2", "--in-rank", json.dumps(request)]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        start = [sys.executable, *torchrun, *arguments]
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(ranks)))}
        if "unsloth" in contenders:
            visible |= {"UNSLOTH_FSDP2": "1"} if ranks > 1 else {}
            visible["UNSLOTH_DISABLE_AUTO_PADDING_FREE"] = "1"
        process = subprocess.Popen(start, env=os.environ | visible, text=True, stderr=subprocess.PIPE)
        try:
            said = process.communicate(timeout=limit_s)[1]
            errors = [line for line in said.splitlines() if "Error" in line]
            error = (errors or ["no error was printed"])[0][-300:]
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then stops its ranks
            said = process.communicate()[1]
            error = f"not done after {limit_s} s"
        if process.returncode:
            print(said[-6000:], file=sys.stderr)
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    measured = {row["contender"] for row in rows}
    return rows + [{"contender": c, "gpus": ranks, "error": error} for c in contenders if c not in measured]


def tokens_per_second(case: Case, row: dict[str, Any]) -> float:
    """Of all GPUs together; the median step after the first `WARMUP`."""
    tokens = case.max_length * case.batch_size * case.accumulation * row["gpus"]
    return tokens / statistics.median(row["seconds"][WARMUP:])


def save_model(case: Case, folder: Path) -> Case:
    """The case with its random weights saved as a 4-bit checkpoint, which every contender can load."""
    bench_trainer.save_shape(case.model.removeprefix("shape:"), folder)
    return Case(**asdict(case) | {"model": str(folder)})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m helpers.bench_fsdp2", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench_fsdp2"), help="folder of fsdp2_bench.csv")
    parser.add_argument("--runs", nargs="*", default=["2:ours, 8-bit Adam", "2:ours, float32 AdamW",
        "2:ours, bitsandbytes' linear", "1:ours, 8-bit Adam", "2:unsloth"], help="GPUs:contender")  # fmt: skip
    parser.add_argument("--model", default=Case.model)
    parser.add_argument("--steps", type=int, default=Case.steps)
    parser.add_argument("--limit", type=int, default=600, help="seconds for the contenders of one start")
    parser.add_argument("--in-rank", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.in_rank:
        _in_rank(json.loads(args.in_rank))
        return 0
    case = Case(model=args.model, steps=args.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    starts: dict[tuple[int, bool], list[str]] = {}
    for run in args.runs:
        ranks, contender = run.split(":", 1)
        starts.setdefault((int(ranks), contender == "unsloth"), []).append(contender)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for (ranks, other), contenders in starts.items():
            shown = save_model(case, Path(folder)) if other and case.model.startswith("shape:") else case
            rows += measure(shown, contenders, ranks, args.limit)
            _write(case, rows, args.out / "fsdp2_bench.csv")
    return 0


def _write(case: Case, rows: list[dict[str, Any]], path: Path) -> None:
    shown = []
    for row in rows:
        line = {"gpus": row["gpus"], "contender": row["contender"], "error": row.get("error", "")}
        if "seconds" in row:
            line |= {
                "tokens_per_s": round(tokens_per_second(case, row)),
                "step_s": round(statistics.median(row["seconds"][WARMUP:]), 4),
                "allocated_gib": round(row["allocated_gib"], 2),
                "reserved_gib": round(row["reserved_gib"], 2),
                "losses": " ".join(f"{loss:.5f}" for loss in row["losses"]),
                "seconds": " ".join(f"{s:.3f}" for s in row["seconds"]),
                "total_s": round(row["total_s"], 1),
            }
        shown.append(line)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for line in shown for key in line)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(shown)
    for line in shown[-1:]:
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
