"""Time the NF4 decoders side by side on one GPU: `python -m helpers.bench_nf4 --out runs/bench`.

Correctness comes first: whatever is not bit-exact with bitsandbytes is not timed. Everything is timed in one process,
the contenders taking turns, on random weights (their values do not change the work). GPU time is that of calls queued
behind a sleeping GPU, over weights and outputs that together exceed the L2 cache; medians of the rounds. Rows are added
to `nf4_bench.csv`, one a measurement, with machine and versions; `Rows.get` finds them again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import functools
import importlib.metadata
import importlib.util
import io
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit, Params4bit

from . import host, nf4_linear
from .checkpoints import default_dtype
from .nf4 import dequantize_nf4, empty_strided, statistics_of
from .nf4_baselines import (
    Decoder,
    bare_launch,
    ceiling,
    ceiling_kernel,
    null_kernel,
    ours,
    plain,
    public_decoders,
)

SHAPES = ((4096, 1024), (8192, 2048), (14336, 4096), (4096, 14336))
DTYPES = (torch.float16, torch.bfloat16)
# (words a step, steps, warps) of the ceiling kernel, of which the fastest counts.
CEILING_CONFIGS = (
    (32, 4, 1), (64, 4, 2), (128, 1, 4), (128, 2, 4), (128, 4, 4), (256, 1, 4), (256, 1, 8), (256, 2, 8), (512, 1, 4),
    (512, 1, 8), (512, 2, 8), (1024, 1, 8),
)  # fmt: skip
TOKENS = (64, 512, 2048, 8192)
COLUMNS = ("measurement", "case", "dtype", "contender", "value", "unit")


class Rows:
    """Measurements of this run, and the machine they hold for."""

    def __init__(self):
        self.rows: list[dict] = []
        self.machine = {"date": datetime.date.today().isoformat(), "machine": host.machine()}
        for package in ("torch", "triton", "bitsandbytes", "peft", "unsloth", "torchao"):
            try:
                self.machine[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                self.machine[package] = ""

    def add(self, measurement: str, case: str, dtype: torch.dtype | None, contender: str, value: float, unit: str):
        """Keep one measured value, with the machine and versions."""
        values = (measurement, case, str(dtype or "both").removeprefix("torch."), contender, round(value, 4), unit)
        self.rows.append({**dict(zip(COLUMNS, values, strict=True)), **self.machine})

    def append_to(self, path: Path) -> None:
        """Write the rows after those that ``path`` has."""
        if not self.rows:
            return
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.rows[0], lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(self.rows)


def read(path: Path) -> dict[str, dict[tuple[str, str], dict[str, float]]]:
    """The last run in the CSV: measurement -> (case, dtype) -> contender -> value."""
    found: dict = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            cases = found.setdefault(row["measurement"], {})
            cases.setdefault((row["case"], row["dtype"]), {})[row["contender"]] = float(row["value"])
    return found


def random_weight(rows: int, columns: int, dtype: torch.dtype) -> tuple[Params4bit, bnb.QuantState]:
    """A packed NF4 weight [rows, columns] of doubly quantised random numbers, and its state."""
    weight = torch.randn(rows, columns, dtype=dtype, device="cuda") * 0.02
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return Params4bit(packed, quant_state=state, quant_type="nf4", bnb_quantized=True), state


def gpu_times(contenders: dict[str, Callable], inputs: list[tuple], rounds: int) -> dict[str, float]:
    """Median microseconds of GPU time per call, over all `inputs`, the contenders taking turns."""
    clock: dict[str, list[float]] = {name: [] for name in contenders}
    slowest = 0.0
    for function in contenders.values():  # compiled, warm
        function(*inputs[0])
        torch.cuda.synchronize()
        start = time.perf_counter()
        function(*inputs[0])
        slowest = max(slowest, time.perf_counter() - start)
    # The GPU sleeps while the CPU queues: longer than the slowest contender needs to queue its calls.
    cycles = int((2 * slowest * len(inputs) + 1e-4) * 2e9)
    order = list(contenders.items())
    draw = random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)  # who follows whom matters by a few percent: the cache is as the one before left it
        for name, function in order:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(cycles)
            start.record()
            outputs = [function(*arguments) for arguments in inputs]  # all kept: each call writes to memory of its own
            end.record()
            end.synchronize()
            del outputs
            clock[name].append(start.elapsed_time(end) * 1e3 / len(inputs))
    return {name: statistics.median(values) for name, values in clock.items()}


def wall_times(contenders: dict[str, Callable[[], object]], rounds: int, calls: int) -> dict[str, float]:
    """Median microseconds of wall time a call, over rounds of `calls`, the contenders taking turns."""
    clock: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, function in contenders.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            torch.cuda.synchronize()
            if turn >= 2:
                clock[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: statistics.median(values) for name, values in clock.items()}


def check(contenders: dict[str, Decoder]) -> None:
    """Every decoder against bitsandbytes' CUDA kernels, bit for bit."""
    for dtype in DTYPES:
        weight, state = random_weight(1024, 1024, dtype)
        expected = bnb.dequantize_4bit(weight, state).view(torch.int16)
        for name, decode in contenders.items():
            wrong = (decode(weight, state).view(torch.int16) != expected).sum().item()
            if wrong:
                raise AssertionError(f"{name} differs from bitsandbytes in {wrong} of 2**20 {dtype} weights")


def decode_grid(rows: Rows, rounds: int) -> None:
    """GPU time of one decode: the ceiling at its best tile, ours with inline PTX and without, everyone else."""
    variants = {"ours, Triton only": ours(asm=False), "ours, no eviction hints": ours(hints=False), "plain": plain}
    contenders = public_decoders() | variants
    check(contenders)
    tiles = {f"ceiling {s} x {n} x {w}": ceiling(s, n, w) for s, n, w in CEILING_CONFIGS}
    for shape in SHAPES:
        for dtype in DTYPES:
            bytes_ = math.prod(shape) * 2.516
            inputs = [random_weight(*shape, dtype) for _ in range(max(3, math.ceil(200e6 / bytes_)))]
            tried = gpu_times(tiles, inputs, rounds)
            best = {"ceiling": tiles[min(tried, key=tried.get)]}  # timed anew: the least of several medians is too low
            times = gpu_times(contenders | best, inputs, 3 * rounds)
            for name, value in times.items():
                rows.add("decode, GPU time", f"{shape[0]}x{shape[1]}", dtype, name, value, "us")
                rows.add("decode, bandwidth", f"{shape[0]}x{shape[1]}", dtype, name, bytes_ / value / 1e3, "GB/s")


def torch_ao(rows: Rows, rounds: int) -> None:
    """torch AO's NF4 tensor beside ours at one size, where it is installed: its own format (int8 scales of another
    formula), made here of the same weights, and PyTorch's operators as its decoder, which it asks to have compiled."""
    if not importlib.util.find_spec("torchao"):
        return
    from torchao.quantization import NF4Tensor

    shape, dtype = SHAPES[2], torch.bfloat16
    weight, state = random_weight(*shape, dtype)
    theirs = NF4Tensor.from_tensor(dequantize_nf4(weight, state), 64, 256)
    decode = torch.compile(lambda tensor: tensor.get_original_weight())
    contenders = {"ours": lambda: dequantize_nf4(weight, state), "torch AO": lambda: decode(theirs)}
    for name, value in gpu_times(contenders, [()] * 3, rounds).items():
        rows.add("decode beside torch AO's format", f"{shape[0]}x{shape[1]}", dtype, name, value, "us")


class MLP(torch.nn.Module):
    """The challenge's MLP."""

    def __init__(self, hd: int, m: int, dtype: torch.dtype):
        super().__init__()

        def linear(inputs, outputs):
            with torch.device("cuda"):
                layer = Linear4bit(inputs, outputs, bias=None, compute_dtype=dtype, quant_type="nf4")
            return layer.to(dtype).to("cuda")

        self.gate_proj, self.up_proj, self.down_proj = linear(hd, m), linear(hd, m), linear(m, hd)

    def decode_all(self, decode: Decoder) -> None:
        for layer in (self.up_proj, self.gate_proj, self.down_proj):
            decode(layer.weight, layer.weight.quant_state).t()
            torch.cuda.synchronize()

    def forward_with(self, x: torch.Tensor, decode: Decoder) -> torch.Tensor:
        up, gate, down = (
            decode(layer.weight, layer.weight.quant_state).t()
            for layer in (self.up_proj, self.gate_proj, self.down_proj)
        )
        return (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down


def bare_ceiling(mlp: MLP) -> Decoder:
    """The floor of the challenge's loop: the ceiling kernel, at its best tile, launched bare into a new output."""
    launches = {}
    for layer in (mlp.up_proj, mlp.gate_proj, mlp.down_proj):
        weight, state = layer.weight, layer.weight.quant_state
        out = torch.empty(state.shape, dtype=state.dtype, device="cuda")
        pointers = weight.data_ptr(), state.absmax.data_ptr()
        tiles = {}
        for step, steps, num_warps in CEILING_CONFIGS:
            grid = out.numel() // (8 * step * steps)
            compiled = ceiling_kernel[(grid,)](weight, state.absmax, out, STEP=step, STEPS=steps, num_warps=num_warps)
            tiles[step, steps, num_warps] = functools.partial(bare_launch(compiled, grid, step, steps), *pointers)
        times = gpu_times(tiles, [(out.data_ptr(),)] * 20, 3)
        launches[id(state)] = tiles[min(times, key=times.get)]

    def copy(weight, state):
        out = empty_strided(tuple(state.shape), (state.shape[1], 1), state.dtype)
        launches[id(state)](out.data_ptr())
        return out

    return copy


def challenge_loop(rows: Rows, trials: int) -> None:
    """The challenge's `test_dequantize`, synchronizing after each decode; turns of 5 trials share the clock."""
    total: dict[str, float] = {}
    x = torch.zeros(1, device="cuda")
    null = bare_launch(null_kernel[(1,)](x), 1)
    for hd, m, dtype in ((1024, 4096, torch.bfloat16), (4096, 14336, torch.bfloat16), (2048, 8192, torch.float16)):
        mlp = MLP(hd, m, dtype)
        decoders = public_decoders() | {
            "floor": bare_ceiling(mlp),
            "null kernel": lambda weight, state: null(x.data_ptr()) or x,
        }
        contenders = {name: functools.partial(mlp.decode_all, decode) for name, decode in decoders.items()}
        for name, value in wall_times(contenders, trials // 5, 5).items():
            total[name] = total.get(name, 0.0) + value * trials * 1e-6
            rows.add("challenge loop, wall time of a decode", f"{hd}x{m}", dtype, name, value / 3, "us")
    for name, value in total.items():
        rows.add("challenge loop", f"{trials} trials", None, name, value, "s")


def launch_cost(rows: Rows) -> None:
    """CPU time of a call whose kernel is short."""
    weight, state = random_weight(256, 64, torch.float16)
    for name, decode in public_decoders().items():
        for _ in range(100):
            decode(weight, state)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(1000):
            decode(weight, state)
        rows.add("CPU time of a call", "256x64", torch.float16, name, (time.perf_counter() - start) * 1e3, "us")
        torch.cuda.synchronize()


def compiled_mlp(rows: Rows, rounds: int) -> None:
    """The MLP with our decoder, eager, compiled and as a CUDA graph: wall time a call, GPU time of its decodes."""
    for bsz, qlen, hd, m, dtype in ((5, 777, 1024, 4096, default_dtype()), (2, 3333, 2048, 8192, torch.float16)):
        mlp, x = MLP(hd, m, dtype), torch.randn(bsz, qlen, hd, dtype=dtype, device="cuda")

        def eager(x, mlp=mlp):
            return mlp.forward_with(x, dequantize_nf4)

        for dimension in (0, 1):  # dynamic=True would make a symbol of each number in a quant state
            torch._dynamo.mark_dynamic(x, dimension)
        for layer in mlp.children():
            for tensor in statistics_of(layer.weight.quant_state):
                torch._dynamo.mark_static_address(tensor)  # no parameter, so a graph would copy it before each replay
        functions = {
            "eager": eager,
            "compiled": torch.compile(eager, fullgraph=True),
            "compiled, CUDA graph": torch.compile(eager, fullgraph=True, mode="reduce-overhead"),
        }
        for function in functions.values():
            torch.testing.assert_close(function(x), eager(x), rtol=2e-2, atol=2e-2)
        contenders = {name: functools.partial(function, x) for name, function in functions.items()}
        for name, value in wall_times(contenders, rounds, 20).items():  # so many that waiting for the last is little
            rows.add("MLP, wall time", f"{bsz}x{qlen}x{hd}", dtype, name, value, "us")
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for _ in range(10):
                    contenders[name]()
                torch.cuda.synchronize()
            decode = sum(e.self_device_time_total for e in profile.key_averages() if "dequantize_kernel" in e.key) / 10
            rows.add("MLP, GPU time of the decodes", f"{bsz}x{qlen}x{hd}", dtype, name, decode, "us")


def peak_memory(rows: Rows) -> None:
    """Bytes a call allocates beyond its output."""
    weight, state = random_weight(14336, 4096, torch.bfloat16)
    for name, decode in public_decoders().items():
        decode(weight, state)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = decode(weight, state)
        extra = torch.cuda.max_memory_allocated() - before - out.numel() * out.itemsize
        rows.add("decode, peak memory beyond the output", "14336x4096", torch.bfloat16, name, extra / 2**20, "MiB")


def linear_layers(rows: Rows, rounds: int) -> None:
    """Forward and backward of a frozen 4-bit layer: decoded by us, bitsandbytes' own, and what the trainer takes."""
    inputs, outputs, dtype = 4096, 14336, default_dtype()
    mlp = MLP(inputs, outputs, dtype)
    layer = mlp.up_proj
    layers = {
        "ours": lambda x: nf4_linear.nf4_linear(x, layer.weight, layer.weight.quant_state),
        "bitsandbytes": functools.partial(type(layer).forward, layer),
        "default": layer,
    }
    with nf4_linear.triton_nf4(mlp):
        for tokens in TOKENS:
            x = torch.randn(tokens, inputs, dtype=dtype, device="cuda", requires_grad=True)
            grad = torch.randn(tokens, outputs, dtype=dtype, device="cuda")
            contenders = {name: lambda f=f, x=x, g=grad: torch.autograd.grad(f(x), x, g) for name, f in layers.items()}
            for name, value in wall_times(contenders, rounds, 5).items():
                rows.add("linear, forward and backward", f"{tokens} tokens", dtype, name, value, "us")


def training_steps(rows: Rows, model: str = "shape:llama-3.2-1b-4-layers", tokens: tuple[int, ...] = TOKENS) -> None:
    """A step of the trainer, launched one by one, with bitsandbytes' own linear layers and with its default.

    Not for a process that has imported Unsloth, which changes the trainer.
    """
    from .train import TrainArguments, TrainResult, train

    contenders = {"bitsandbytes": "bitsandbytes", "default": "auto"}
    for count in tokens:
        runs: dict[str, list[TrainResult]] = {name: [] for name in contenders}
        for name in [*contenders, *reversed(contenders)]:  # in turn, and the faster of two: a busy host only adds
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                runs[name].append(train(TrainArguments(
                    model=model, dataset=f"random:{count}-{count}x64", output_dir=folder, steps=15, batch_size=1,
                    accumulation=1, max_length=count, nf4=contenders[name], compile=False, checkpointing=False,
                    deterministic=False, prompt="",
                )))  # fmt: skip
        for name, twice in runs.items():
            dtype, peak = default_dtype(), max(run.peak_allocated_gib for run in twice)
            rows.add("training step", f"{count} tokens", dtype, name, 1e3 * min(r.median_step_s for r in twice), "ms")
            rows.add("training step, peak memory", f"{count} tokens", dtype, name, peak, "GiB")


def table(rows: list[dict]) -> str:
    """One line a case."""
    cases: dict[tuple, list[str]] = {}
    for row in rows:
        key = f"{row['measurement']} | {row['case']} {row['dtype']} | {row['unit']}"
        cases.setdefault(key, []).append(f"{row['contender']} {row['value']:.4g}")
    return "\n".join(f"{case}: {', '.join(values)}" for case, values in cases.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of nf4_bench.csv")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each GPU timing")
    parser.add_argument("--trials", type=int, default=300, help="trials of the challenge's loop (it has 1000)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_nf4 times CUDA kernels, and this machine has no CUDA device")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = Rows()
    parts = (
        lambda: decode_grid(rows, args.rounds),
        lambda: challenge_loop(rows, args.trials),
        lambda: launch_cost(rows),
        lambda: peak_memory(rows),
        lambda: linear_layers(rows, args.rounds),
        lambda: compiled_mlp(rows, args.rounds),
        lambda: torch_ao(rows, args.rounds),
    )
    try:
        for part in parts:
            seen, start = len(rows.rows), time.time()
            part()
            print(table(rows.rows[seen:]), f"[{time.time() - start:.0f} s]\n", sep="\n", flush=True)
    finally:
        rows.append_to(args.out / "nf4_bench.csv")


if __name__ == "__main__":
    main()
