"""Time the NF4 decoders side by side on one GPU: `python -m helpers.bench_nf4 --out runs/bench`.

Correctness comes first: whatever is not bit-exact with bitsandbytes is not timed. Everything is timed in one process,
the contenders taking turns, on random weights (their values do not change the work). GPU time is that of calls queued
behind a sleeping GPU, over weights and outputs that together exceed the L2 cache; medians of the rounds. Rows go to
`nf4_bench.csv`, one a measurement, with machine and versions; `short_table` is what a reader wants of them.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import importlib.metadata
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
import triton
import triton.language as tl
from bitsandbytes.nn import Linear4bit, Params4bit

from .nf4 import NF4_TABLE, dequantize_kernel, dequantize_nf4, launch_options

SHAPES = ((4096, 1024), (8192, 2048), (14336, 4096), (4096, 14336))
DTYPES = (torch.float16, torch.bfloat16)
# (GROUPS, num_warps) of `dequantize_kernel` to choose from; a group is 64 elements and one lane's work.
CONFIGS = ((32, 1), (64, 1), (64, 2), (128, 2), (128, 4), (256, 4), (256, 8))
TRITON_ONLY_CONFIGS = ((64, 2), (128, 4), (256, 8))
CEILING_CONFIGS = ((32, 4, 1), (64, 4, 2), (128, 2, 4), (128, 4, 4), (128, 8, 4), (256, 4, 8), (512, 4, 16))
TOKENS = (8, 16, 32, 64, 512, 2048, 8192)


@triton.jit
def plain_kernel(
    packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, table_ptr, out_ptr, n_elements,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The decoder one would write first: a word a lane, and for each nibble a table load and a multiplication."""
    shifts = (tl.arange(0, 8) * 4) ^ 4
    offset = tl.load(offset_ptr)
    for step in tl.static_range(STEPS):
        word = (tl.program_id(0) * STEPS + step) * STEP + tl.arange(0, STEP)
        inside = word * 8 < n_elements
        block = word * 8 // BLOCKSIZE
        code2 = tl.load(code2_ptr + tl.load(absmax_ptr + block, inside, 0).to(tl.int32))
        scale = tl.fma(code2, tl.load(absmax2_ptr + block // BLOCKSIZE2, inside, 0), 0.0) + offset
        codes = (tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + word, inside, 0)[:, None] >> shifts[None, :]) & 15
        weights = tl.load(table_ptr + codes) * scale[:, None]
        out = out_ptr + word[:, None] * 8 + tl.arange(0, 8)[None, :]
        tl.store(out, weights.to(out_ptr.dtype.element_ty), inside[:, None])


@triton.jit
def ceiling_kernel(packed_ptr, absmax_ptr, out_ptr, STEP: tl.constexpr, STEPS: tl.constexpr):
    """Reads and writes the bytes of a 16-bit decoder with blocks of 64, and decodes nothing."""
    for step in tl.static_range(STEPS):
        word = (tl.program_id(0).to(tl.int64) * STEPS + step) * STEP + tl.arange(0, STEP)
        absmax = tl.load(absmax_ptr + word // 8).to(tl.int32)
        value = tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + word, eviction_policy="evict_first") ^ absmax
        out = out_ptr.to(tl.pointer_type(tl.int32)) + word[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(out, tl.broadcast_to(value[:, None], [STEP, 4]))


@triton.jit
def null_kernel(x_ptr):
    tl.load(x_ptr)


Decoder = Callable[[Params4bit, bnb.QuantState], torch.Tensor]


def ours(groups: int, num_warps: int, asm: bool) -> Decoder:
    """`dequantize_kernel` with the given tile, and with inline PTX or without."""

    def decode(weight, state):
        out = torch.empty(state.shape, dtype=state.dtype, device=weight.device)
        options = launch_options(out.numel(), state.dtype, torch.cuda.get_device_capability())
        options |= {"GROUPS": groups, "num_warps": num_warps, "ASM": asm, "EVEN": out.numel() % (groups * 64) == 0}
        dequantize_kernel[(triton.cdiv(out.numel(), groups * 64),)](
            weight, state.absmax, state.state2.code, state.state2.absmax, state.offset, out, out.numel(), **options
        )
        return out

    return decode


def plain(weight: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    out = torch.empty(state.shape, dtype=state.dtype, device=weight.device)
    table = _table(weight.device)
    plain_kernel[(triton.cdiv(out.numel(), 8192),)](
        weight, state.absmax, state.state2.code, state.state2.absmax, state.offset, table, out, out.numel(),
        BLOCKSIZE=64, BLOCKSIZE2=256, STEP=128, STEPS=8, num_warps=4,
    )  # fmt: skip
    return out


_tables: dict[torch.device, torch.Tensor] = {}


def _table(device: torch.device) -> torch.Tensor:
    if device not in _tables:
        _tables[device] = torch.tensor(NF4_TABLE, dtype=torch.float32, device=device)
    return _tables[device]


def ceiling(step: int, steps: int, num_warps: int) -> Decoder:
    def copy(weight, state):
        out = torch.empty(state.shape, dtype=state.dtype, device=weight.device)
        ceiling_kernel[(out.numel() // (8 * step * steps),)](
            weight, state.absmax, out, STEP=step, STEPS=steps, num_warps=num_warps
        )
        return out

    return copy


def three_launches(weight: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """How decoders of early 2025 did it: scales by one CUDA kernel, `+= offset`, weights by another, through ctypes."""
    library, pointer = bnb.lib, bnb.get_ptr
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    absmax = torch.empty(state.absmax.shape, dtype=torch.float32, device=weight.device)
    out = torch.empty(state.shape, dtype=state.dtype, device=weight.device)
    library.cdequantize_blockwise_fp32(
        pointer(state.state2.code), pointer(state.absmax), pointer(state.state2.absmax), pointer(absmax),
        ctypes.c_int(state.state2.blocksize), ctypes.c_int(absmax.numel()), stream,
    )  # fmt: skip
    absmax += state.offset
    fp16 = state.dtype == torch.float16
    decode = library.cdequantize_blockwise_fp16_nf4 if fp16 else library.cdequantize_blockwise_bf16_nf4
    decode(
        pointer(None), pointer(weight), pointer(absmax), pointer(out),
        ctypes.c_int(state.blocksize), ctypes.c_int(out.numel()), stream,
    )  # fmt: skip
    return out


def decoders() -> dict[str, Decoder]:
    """The public ways to decode a weight on this machine, ours first."""
    from peft.utils.integrations import dequantize_bnb_weight

    found = {
        "ours": dequantize_nf4,
        "bitsandbytes": bnb.dequantize_4bit,
        "three launches": three_launches,
        "PEFT": lambda weight, state: dequantize_bnb_weight(weight),
    }
    if importlib.util.find_spec("unsloth"):
        from unsloth.kernels.utils import fast_dequantize

        found["Unsloth"] = fast_dequantize
    return found


def random_weight(rows: int, columns: int, dtype: torch.dtype) -> tuple[Params4bit, bnb.QuantState]:
    weight = torch.randn(rows, columns, dtype=dtype, device="cuda") * 0.02
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return Params4bit(packed, quant_state=state, quant_type="nf4", bnb_quantized=True), state


def gpu_times(contenders: dict[str, Callable], inputs: list[tuple], rounds: int) -> dict[str, float]:
    """Median microseconds of GPU time per call, over all `inputs`, the contenders taking turns."""
    clock = {name: [] for name in contenders}
    for function in contenders.values():  # compiled, warm
        for arguments in inputs[:2]:
            function(*arguments)
    # The GPU sleeps while the CPU queues: longer than the slowest contender needs to queue its calls.
    cycles = int(len(inputs) * 300e-6 * 2e9)
    for _ in range(rounds):
        for name, function in contenders.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(cycles)
            start.record()
            outputs = [function(*arguments) for arguments in inputs]  # all kept: each call writes to memory of its own
            end.record()
            end.synchronize()
            del outputs
            clock[name].append(start.elapsed_time(end) * 1e3 / len(inputs))
    return {name: statistics.median(values) for name, values in clock.items()}


class Rows:
    """The CSV, one row a measurement."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        self.machine = {"date": datetime.date.today().isoformat(), "gpu": torch.cuda.get_device_name()}
        for package in ("torch", "triton", "bitsandbytes", "peft", "unsloth"):
            self.machine[package] = importlib.metadata.version(package) if importlib.util.find_spec(package) else ""

    def add(self, measurement: str, case: str, dtype: str, contender: str, value: float, unit: str) -> None:
        self.rows.append({
            "measurement": measurement, "case": case, "dtype": dtype, "contender": contender,
            "value": round(value, 4), "unit": unit, **self.machine,
        })  # fmt: skip

    def save(self) -> None:
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.rows[0])
            if new:
                writer.writeheader()
            writer.writerows(self.rows)


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
    """GPU time of one decode: ceiling, our variants and tiles, everyone else."""
    public = decoders()
    variants = {f"ours {g}x{w}": ours(g, w, True) for g, w in CONFIGS}
    variants |= {f"ours Triton only {g}x{w}": ours(g, w, False) for g, w in TRITON_ONLY_CONFIGS}
    contenders = {**public, "plain": plain, **variants}
    check(contenders)
    contenders |= {f"ceiling {s}x{n}x{w}": ceiling(s, n, w) for s, n, w in CEILING_CONFIGS}
    for shape in SHAPES:
        for dtype in DTYPES:
            count = max(2, math.ceil(150e6 / (math.prod(shape) * 2.5)))
            inputs = [random_weight(*shape, dtype) for _ in range(count)]
            times = gpu_times(contenders, inputs, rounds)
            times["ceiling"] = min(value for name, value in times.items() if name.startswith("ceiling"))
            for name, value in times.items():
                rows.add("decode, GPU time", f"{shape[0]}x{shape[1]}", str(dtype)[6:], name, value, "us")


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


def challenge_loop(rows: Rows, trials: int) -> None:
    """The challenge's `test_dequantize`, synchronizing after each decode; turns of 10 trials share the clock."""
    contenders = {name: (lambda mlp, f=f: mlp.decode_all(f)) for name, f in decoders().items()}
    x = torch.zeros(1, device="cuda")
    launch = null_kernel[(1,)](x)[(1, 1, 1)]

    def floor(mlp):
        for _ in range(3):
            launch(x)
            torch.cuda.synchronize()

    contenders["null kernel"] = floor
    total = dict.fromkeys(contenders, 0.0)
    for hd, m, dtype in ((1024, 4096, torch.bfloat16), (4096, 14336, torch.bfloat16), (2048, 8192, torch.float16)):
        mlp = MLP(hd, m, dtype)
        clock = {name: [] for name in contenders}
        for turn in range(trials // 10 + 2):
            for name, function in contenders.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(10):
                    function(mlp)
                if turn >= 2:
                    clock[name].append((time.perf_counter() - start) / 30 * 1e6)
        for name, values in clock.items():
            total[name] += sum(values) * 30e-6
            rows.add(
                "challenge loop, wall time per decode",
                f"{hd}x{m}",
                str(dtype)[6:],
                name,
                statistics.median(values),
                "us",
            )
    for name, value in total.items():
        rows.add(f"challenge loop, {trials} trials", "all", "both", name, value, "s")


def compiled_mlp(rows: Rows, rounds: int) -> None:
    """The MLP with our decoder, eager and under torch.compile: wall time per call, GPU time of its three decodes."""
    for bsz, qlen, hd, m, dtype in ((5, 777, 1024, 4096, torch.bfloat16), (2, 3333, 2048, 8192, torch.float16)):
        mlp, x = MLP(hd, m, dtype), torch.randn(bsz, qlen, hd, dtype=dtype, device="cuda")

        def eager(x, mlp=mlp):
            return mlp.forward_with(x, dequantize_nf4)

        contenders = {"eager": eager, "compiled": torch.compile(eager, fullgraph=True)}
        torch.testing.assert_close(contenders["compiled"](x), eager(x), rtol=2e-2, atol=2e-2)
        clock = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, function in contenders.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                function(x)
                torch.cuda.synchronize()
                clock[name].append((time.perf_counter() - start) * 1e6)
        for name, function in contenders.items():
            rows.add("MLP, wall time", f"{bsz}x{qlen}x{hd}", str(dtype)[6:], name, statistics.median(clock[name]), "us")
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for _ in range(10):
                    function(x)
                torch.cuda.synchronize()
            decode = sum(e.self_device_time_total for e in profile.key_averages() if "dequantize_kernel" in e.key) / 10
            rows.add("MLP, GPU time of the decodes", f"{bsz}x{qlen}x{hd}", str(dtype)[6:], name, decode, "us")


def peak_memory(rows: Rows) -> None:
    """Bytes a call allocates beyond its output."""
    weight, state = random_weight(14336, 4096, torch.bfloat16)
    for name, decode in decoders().items():
        decode(weight, state)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = decode(weight, state)
        extra = torch.cuda.max_memory_allocated() - before - out.numel() * out.itemsize
        rows.add("decode, peak memory beyond the output", "14336x4096", "bfloat16", name, extra / 2**20, "MiB")


def linear_layers(rows: Rows, rounds: int) -> None:
    """Forward and backward of a frozen 4-bit linear layer, ours and bitsandbytes', GPU time."""
    from . import nf4_linear

    for inputs, outputs in ((2048, 8192), (4096, 14336)):
        layer = MLP(inputs, outputs, torch.bfloat16).up_proj

        def forward_ours(x, layer=layer):
            return nf4_linear.nf4_linear(x, layer.weight, layer.weight.quant_state)

        for tokens in TOKENS:
            x = torch.randn(tokens, inputs, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            grad = torch.randn(tokens, outputs, dtype=torch.bfloat16, device="cuda")
            for direction in ("forward", "forward and backward"):
                backward = direction != "forward"

                def step(function, x=x, grad=grad, backward=backward):
                    y = function(x)
                    return torch.autograd.grad(y, x, grad) if backward else y

                contenders = {"ours": lambda s=step: s(forward_ours), "bitsandbytes": lambda s=step, f=layer: s(f)}
                for name, value in gpu_times(contenders, [()] * 10, rounds).items():
                    rows.add(
                        f"linear, {direction}, GPU time",
                        f"{tokens} x {inputs} x {outputs}",
                        "bfloat16",
                        name,
                        value,
                        "us",
                    )


def short_table(rows: list[dict]) -> str:
    """One line a case: the best ceiling, ours, our best tile, and the others."""
    cases: dict[tuple, dict] = {}
    for row in rows:
        cases.setdefault((row["measurement"], row["case"], row["dtype"], row["unit"]), {})[row["contender"]] = row[
            "value"
        ]
    lines = []
    for (measurement, case, dtype, unit), values in cases.items():
        if "ceiling" in values:
            best = min((v, k) for k, v in values.items() if k.startswith("ours "))
            only = min((v, k) for k, v in values.items() if k.startswith("ours Triton only"))
            tiles = min((v, k) for k, v in values.items() if k.startswith("ceiling "))
            ratio = values["ceiling"] / values["ours"]
            shown = {k: v for k, v in values.items() if not k.startswith(("ours ", "ceiling "))}
            shown |= {f"best tile [{best[1]}]": best[0], f"[{only[1]}]": only[0], f"[{tiles[1]}]": tiles[0]}
            shown["ceiling / ours"] = round(ratio, 3)
        else:
            shown = values
        text = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        lines.append(f"{measurement} | {case} {dtype} | {unit}: {text}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of nf4_bench.csv")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each GPU timing")
    parser.add_argument("--trials", type=int, default=300, help="trials of the challenge's loop (it has 1000)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_nf4 times CUDA kernels, and this machine has no CUDA device")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.out / "nf4_bench.csv")
    for part in (
        lambda: decode_grid(rows, args.rounds),
        lambda: challenge_loop(rows, args.trials),
        lambda: peak_memory(rows),
        lambda: linear_layers(rows, args.rounds),
        lambda: compiled_mlp(rows, args.rounds),
    ):
        seen, start = len(rows.rows), time.time()
        part()
        print(short_table(rows.rows[seen:]), f"[{time.time() - start:.0f} s]\n", sep="\n", flush=True)
    rows.save()


if __name__ == "__main__":
    main()
