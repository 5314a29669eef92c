"""Where the time of a training step goes: its ten largest costs, and what each would gain if it cost nothing.

    python3 -m helpers.step_costs --out runs/costs            # on a GPU, of the trainer with its defaults compiled

One step is profiled after others have warmed up. Rows go to `step_costs.csv`; README's table is made from it.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .results import write_rows

FILE = "step_costs.csv"
# What a GPU operation does, by the first pattern that its name has.
KINDS = (
    (r"dequantize", "NF4 decoding"),
    (r"flash|fmha|flex|attention", "attention"),
    (r"gemm|cutlass|nvjet|cublas|xmma|splitK|mm_", "matrix products"),
    (r"cross_entropy|log_softmax|_softmax|nll", "softmax and loss"),
    (r"[aA]dam", "optimizer"),
    (r"LpNorm|lpnorm|foreach_norm|multi_tensor_apply", "gradient norm and clipping"),
    (r"^Memcpy|^Memset", "copies and fills"),
    (r"^triton_", "fused elementwise kernels, norms"),
)
IDLE = "GPU idle: Python, launches, waiting"
MOST = 10


def kind_of(name: str) -> str:
    """What a GPU operation of this name does."""
    return next((kind for pattern, kind in KINDS if re.search(pattern, name)), "other kernels")


def costs(operations: Iterable[tuple[str, float, float]], wall_ms: float) -> list[dict[str, Any]]:
    """The largest costs of a step, largest first.

    Args:
        operations: name, start and end in ms of each kernel and copy on the GPU.
        wall_ms: of the whole step.

    Returns: rows of cost, operations, ms, share (of the step), and speedup_without: the step over what is left of it.
        A kernel that another one hides would gain less than that.
    """
    operations = sorted(operations, key=lambda operation: operation[1])
    rows: dict[str, dict[str, Any]] = {}
    busy, until = 0.0, float("-inf")
    for name, start, end in operations:
        row = rows.setdefault(kind_of(name), {"operations": 0, "ms": 0.0})
        row["operations"] += 1
        row["ms"] += end - start
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    rows[IDLE] = {"operations": 0, "ms": max(0.0, wall_ms - busy)}
    ordered = sorted(rows.items(), key=lambda item: -item[1]["ms"])[:MOST]
    return [
        {"cost": kind, "operations": row["operations"], "ms": round(row["ms"], 2),
         "share": round(row["ms"] / wall_ms, 3),
         "speedup_without": round(wall_ms / max(wall_ms - row["ms"], 1e-3), 2)}
        for kind, row in ordered
    ]  # fmt: skip


def profiled(arguments: Any, step: int) -> list[dict[str, Any]]:
    """Train with ``arguments`` (`TrainArguments`) and profile ``step``; the wall time is the median of the others."""
    import statistics

    from .bench_compile import WARM, Clock, gpu_events
    from .train import train

    clock = Clock(profile=step)
    train(arguments, [clock])
    times = [(e.name, e.time_range.start / 1e3, e.time_range.end / 1e3) for e in gpu_events(clock)]
    wall = statistics.median(s for i, s in enumerate(clock.seconds, 1) if i > WARM and i != step)
    return costs(times, 1e3 * wall)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| cost | operations | ms | of the step | the step, if it cost nothing |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['cost']} | {row['operations'] or ''} | {float(row['ms']):.1f} | {float(row['share']):.0%} | "
        f"{float(row['speedup_without']):.2f}x as fast |"
        for row in rows
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    from .train_arguments import TrainArguments

    parser = argparse.ArgumentParser(prog="python3 -m helpers.step_costs", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="shape:llama-3.2-1b")
    parser.add_argument("--dataset", default="random:200-1024x160")
    parser.add_argument("--steps", type=int, default=14, help="the last one is profiled")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--lora_rank", type=int, default=32)
    parser.add_argument("--cuda_graphs", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/costs"), help="folder of the table")
    args = parser.parse_args(argv)
    from .host import machine, prepare, versions

    prepare()
    rows = profiled(TrainArguments(
        model=args.model, dataset=args.dataset, steps=args.steps, batch_size=2, accumulation=4,
        max_length=args.max_length, lora_rank=args.lora_rank, compile=True, cuda_graphs=args.cuda_graphs,
        checkpointing=args.checkpointing, deterministic=False, prompt="", output_dir=tempfile.mkdtemp(),
    ), args.steps)  # fmt: skip
    what = {"model": args.model, "cuda_graphs": args.cuda_graphs, "checkpointing": args.checkpointing}
    args.out.mkdir(parents=True, exist_ok=True)
    write_rows([row | what | {"machine": machine(), **versions()} for row in rows], args.out / FILE)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
