"""The longest sequence that trains at batch 1 within a GPU's memory: ours, stock transformers + TRL, and Unsloth.

    python3 -m helpers.bench_context --out runs/context

For each shape (RANDOM weights), contender and memory a search over lengths a quarter of an octave apart; each probe is
two optimizer steps (the second has the optimizer's state) with gradient checkpointing in a process of its own, whose
allocator stops at the memory. Searches go side by side where there is room. Every probe goes to `context_probes.csv` as
soon as it is measured, each search's end to `context_bench.csv`, and `context_bench.png` is drawn from that. Rows that
lie in that table already and are not searched for again stay: each memory may be measured on a GPU of its own.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .bench_fsdp2 import CONTEXT_GIB
from .bench_trainer import SAVE, Case, ours, unsloth
from .memory import GIB
from .ranks import places, visible_gpus
from .results import read_rows, write_rows

CONTENDERS = ("stock", "unsloth", "ours")
POSITIONS = 131072  # that the shapes' models have
# GiB (at most the card's own), compute dtype, and tokens of the first probe.
CAPS = {"T4": (14.7, "float16", 2048), "H100": (80.0, "bfloat16", POSITIONS)}
GRID = sorted({round(512 * 2 ** (step / 4) / 256) * 256 for step in range(49)})  # tokens, 512 to 2 M
PROBE = ["-m", "helpers.bench_context", "--probe"]


@dataclass(frozen=True)
class Probe:
    """One attempt: does ``contender`` train rows of ``length`` tokens within ``cap_gib``?"""

    shape: str
    contender: str
    cap_gib: float
    dtype: str
    length: int
    lora_rank: int = 16


def run_probe(probe: Probe, folder: str) -> dict[str, Any]:
    """Train two steps in this process, its memory capped; peak GiB, seconds of the second step and both losses."""
    import torch

    from .memory import peak_gib

    if torch.cuda.is_available():
        fraction = probe.cap_gib * GIB / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, fraction))
    case = Case(
        "", probe.shape, f"{probe.length}-{probe.length}x4", probe.length, checkpointing=True, batch_size=1,
        accumulation=1, lora_rank=probe.lora_rank, steps=2, dtype=probe.dtype,
    )  # fmt: skip
    seen = _losses()
    if probe.contender == "unsloth":
        unsloth(case, folder, [seen])
    else:
        ours(case, probe.contender, folder, [seen])
    allocated, reserved = peak_gib()
    return {"fits": True, "allocated_gib": round(allocated, 3), "reserved_gib": round(reserved, 3),
            "step_s": round(seen.times[-1] - seen.times[-2], 3), "losses": seen.losses}  # fmt: skip


def _losses() -> Any:
    from transformers import TrainerCallback  # Unsloth wants to be imported first

    class Losses(TrainerCallback):
        def __init__(self):
            self.losses: list[float] = []
            self.times: list[float] = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in (logs or {}):
                self.losses.append(round(logs["loss"], 5))
                self.times.append(time.perf_counter())

    return Losses()


def start_probe(probe: Probe, folder: Path, limit_s: float, gpu: str = "0") -> dict[str, Any]:
    """`run_probe` in a process of its own: its answer, ``fits`` False for lack of memory, or ``error``.

    Args:
        gpu: which it has, as CUDA_VISIBLE_DEVICES names it.
    """
    command = [sys.executable, *PROBE, json.dumps(asdict(probe)), "--weights", str(folder)]
    environment = os.environ | {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "UNSLOTH_DISABLE_AUTO_PADDING_FREE": "1",
        "CUDA_VISIBLE_DEVICES": gpu, "TORCHINDUCTOR_COMPILE_THREADS": "4",
    }  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=environment)
    except subprocess.TimeoutExpired:
        return {"fits": False, "error": f"not done after {limit_s:.0f} s"}
    return answer_of(done.stdout, done.stderr)


def answer_of(out: str, err: str) -> dict[str, Any]:
    """What a probe's process said."""
    if found := [line for line in out.splitlines() if line.startswith("RESULT ")]:
        return json.loads(found[-1].removeprefix("RESULT "))
    if "OutOfMemoryError" in err or "CUDA out of memory" in err or "CUBLAS_STATUS_ALLOC_FAILED" in err:
        return {"fits": False}
    return {"fits": False, "error": (err.strip().splitlines() or ["no output"])[-1][:300]}


def longest(
    attempt: Callable[[int], dict[str, Any]], cap_gib: float, grid: Sequence[int] = GRID, start: int = CAPS["T4"][2]
) -> tuple[int, bool, str]:
    """Search ``grid`` for the longest length that fits.

    From two successes on, their peaks say where the memory ends (it is linear in the length, nearly); before that the
    length is doubled, or halved until one fits, and where the guess is used up, what is left is halved.

    Args:
        attempt: of a length: ``fits``, ``allocated_gib`` where it does, ``error`` where that was not for memory;
            ``{}`` where there is no more time.

    Returns: the longest length that fitted (0: none); whether the next one is known not to; and an error, if any.
    """
    low, high = -1, len(grid)
    peaks: list[tuple[int, float]] = []
    at = min(range(len(grid)), key=lambda i: abs(grid[i] - start))
    while high - low > 1:
        found = attempt(grid[at])
        if not found or found.get("error"):
            return (grid[low] if low >= 0 else 0), False, found.get("error", "")
        if found["fits"]:
            low = at
            peaks.append((grid[at], found["allocated_gib"]))
        else:
            high = at
        if len(peaks) >= 2 and peaks[-1][1] > peaks[-2][1]:
            (a, lower), (b, upper) = peaks[-2:]
            end = b + (cap_gib - upper) * (b - a) / (upper - lower)
            at = sum(length <= end for length in grid) - 1
        elif high == len(grid):
            at = low + 4  # an octave
        elif low < 0:
            at = high - 4
        else:
            at = (low + high) // 2
        at = min(max(at, low + 1), high - 1)
    return (grid[low] if low >= 0 else 0), high < len(grid), ""


def bench(
    shapes: Sequence[str], contenders: Sequence[str], caps: Sequence[str], out: Path, limit_s: float, budget_s: float,
    grid: Sequence[int] = GRID,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row a search; ``limit_s``: seconds a probe may take, ``budget_s``: after which no more is begun.

    As many searches go side by side as the free memory of all GPUs holds under their cap.
    """
    out.mkdir(parents=True, exist_ok=True)
    until, lock = time.monotonic() + budget_s, threading.Lock()
    probes: list[dict[str, Any]] = []
    order = [(cap, shape, contender) for cap in caps for shape in shapes for contender in contenders]
    earlier = _read(out / "context_bench.csv")
    rows = {key: row for key, row in earlier.items() if key not in order}
    keys = [*rows, *order]

    def attempt(probe: Probe, scratch: str, gpu: str) -> dict[str, Any]:
        if time.monotonic() > until:
            return {}
        found = start_probe(probe, Path(scratch, probe.shape), limit_s, gpu)
        with lock:
            probes.append(asdict(probe) | found)
            write_rows(probes, out / "context_probes.csv")
            print(f"{probe.shape:14s} {probe.contender:8s} {probe.cap_gib:5.1f} GiB {probe.length:8,d} tokens: {found}",
                  flush=True)  # fmt: skip
        return found

    def search(cap: str, shape: str, contender: str, scratch: str, gpus: queue.Queue[str]) -> None:
        gib, dtype, start = CAPS[cap]
        before = earlier.get((cap, shape, contender), {})
        peaks: dict[int, float] = {}  # of the lengths that fitted

        def attempted(length: int) -> dict[str, Any]:
            found = attempt(Probe(shape, contender, gib, dtype, length), scratch, gpu)
            if found.get("fits"):
                peaks[length] = found["allocated_gib"]
            return found

        with lock:  # the next contender's end is not far from this one's, nor from where it was before
            ends = [row["tokens"] for (*case, _), row in rows.items() if case == [cap, shape]] + [before.get("tokens")]
            ends = [tokens for tokens in ends if tokens]
        gpu = gpus.get()
        try:
            tokens, known, error = longest(attempted, gib, grid, ends[-1] if ends else start)
        finally:
            gpus.put(gpu)
        with lock:
            if not (tokens or known or error) and before:  # no time for a single probe
                rows[cap, shape, contender] = before
                return
            rows[cap, shape, contender] = {
                "shape": shape, "contender": contender, "memory": cap, "cap_gib": gib, "dtype": dtype,
                "tokens": tokens, "allocated_gib": peaks.get(tokens, ""), "next_does_not_fit": known,
                "error": error,
            }  # fmt: skip
            write_rows([rows[key] for key in keys if key in rows], out / "context_bench.csv")

    with tempfile.TemporaryDirectory(prefix="context-", ignore_cleanup_errors=True) as scratch:
        for shape in shapes:
            command = [sys.executable, "-c", SAVE, shape, str(Path(scratch, shape))]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for cap in caps:
            gpus: queue.Queue[str] = queue.Queue()
            for gpu in visible_gpus() * places(CAPS[cap][0] + CONTEXT_GIB, cores=4):
                gpus.put(gpu)
            with ThreadPoolExecutor(gpus.qsize()) as pool:
                searches = [pool.submit(search, *key, scratch, gpus) for key in order if key[0] == cap]
            for done in searches:
                done.result()  # raises what it raised
    draw([rows[key] for key in keys], out / "context_bench.png")
    return [rows[key] for key in order]


def _read(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The rows of an earlier run, by memory, shape and contender."""
    rows: list[dict[str, Any]] = [*read_rows(path)]
    for row in rows:
        row["tokens"], row["next_does_not_fit"] = int(row["tokens"]), row["next_does_not_fit"] == "True"
    return {(row["memory"], row["shape"], row["contender"]): row for row in rows}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel a memory, a group of bars a shape; an end that was not found is marked with a plus."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    caps, shapes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("memory", "shape"))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    fig, axes = plt.subplots(1, len(caps), figsize=(6 * len(caps), 4), squeeze=False, layout="constrained")
    for axis, cap in zip(axes[0], caps, strict=True):
        for i, contender in enumerate(contenders):
            mine = [row for row in rows if (row["memory"], row["contender"]) == (cap, contender)]
            places = [shapes.index(row["shape"]) + (i - (len(contenders) - 1) / 2) * 0.25 for row in mine]
            bars = axis.bar(places, [row["tokens"] for row in mine], 0.23, label=contender)
            axis.bar_label(bars, map(_said, mine), fontsize=8)
        axis.set(xticks=range(len(shapes)), xticklabels=shapes, ylabel="tokens",
                 title=f"RANDOM weights, batch 1: longest sequence\nin {CAPS[cap][0]} GiB, {CAPS[cap][1]}")  # fmt: skip
        axis.margins(y=0.15)
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(contenders))
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _said(row: dict[str, Any]) -> str:
    peak = f"\n{float(row['allocated_gib']):.1f} GiB" if row.get("allocated_gib") else ""
    return f"{row['tokens']:,}{'' if row['next_does_not_fit'] else '+'}{peak}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m helpers.bench_context", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/context"), help="folder of the tables and the figure")
    parser.add_argument("--shapes", nargs="*", default=["llama-3.2-1b", "llama-3.1-8b"])
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--caps", nargs="*", default=list(CAPS), choices=list(CAPS), help="memories")
    parser.add_argument("--limit", type=float, default=300, help="seconds a probe may take")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no probe is begun")
    parser.add_argument("--most", type=int, default=POSITIONS, help="tokens of the longest probe")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.probe:
        probe = Probe(**json.loads(args.probe))
        if probe.contender == "unsloth":
            importlib.import_module("unsloth")  # before everything that it patches
        print("RESULT " + json.dumps(run_probe(probe, args.weights)))
        return 0
    contenders = [name for name in args.contenders if name != "unsloth" or importlib.util.find_spec("unsloth")]
    grid = [length for length in GRID if length <= args.most]
    if not grid:
        parser.error(f"--most is {args.most}; the shortest probe has {GRID[0]} tokens")
    rows = bench(args.shapes, contenders, args.caps, args.out, args.limit, args.budget, grid)
    return 1 if any(row["error"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
