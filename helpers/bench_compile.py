"""Step time and memory of a QLoRA training step in its variants: eager or compiled, checkpointed or not, each alone.

    python3 -m helpers.bench_compile --variants eager,compiled,compiled+checkpointing --steps 14 --out bench.json

Each variant runs the same rows through the same trainer in one process; its adapters start from the same weights. Times
are medians over the steps after `WARM` ones, in s; memory is the peak that PyTorch's allocator gave out, in GiB.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from . import checkpoints, host
from .attention import without_cudnn
from .attention_transformers import register
from .compile_counter import CompileCounter
from .compiling import PAD_TO, compile_model
from .host_checked import HostChecked
from .instruction_data import load_instructions
from .memory import grow_segments, peak_gib, reset_peak
from .qlora_trainer import QLoRATrainer
from .train import nf4_decoder
from .train_arguments import DTYPES, TrainArguments, decided, sft_config

WARM = 4  # steps left out of the median: compiling, autotuning, the allocator's growth
WORDS = {
    "eager", "compiled", "checkpointing", "bitsandbytes", "flex", "autotune", "bf16-adapters", "flash", "pad1",
    "graphs", "offload",
}  # fmt: skip


class Clock(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next, data and logging included.

    Args:
        profile: the step (1 is the first) that torch.profiler records; 0: none.
    """

    def __init__(self, profile: int = 0):
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.profile = profile
        self.profiler: torch.profiler.profile | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.ended = time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.profile:
            self.profiler = torch.profiler.profile()
            self.profiler.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.ended)
        self.ended = now
        if state.global_step == self.profile:
            self.profiler.__exit__(None, None, None)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.losses.append(logs["loss"])


def run_variant(variant: str, arguments: TrainArguments, profile: int = 0) -> tuple[dict[str, Any], Clock]:
    """Train as ``variant`` says (words of `WORDS` joined by +) and return its row of the table.

    Raises:
        ValueError: a word that is not known.
    """
    words = set(variant.split("+"))
    if unknown := words - WORDS:
        raise ValueError(f"variant {variant!r}: {unknown.pop()!r} is not one of {', '.join(sorted(WORDS))}")
    arguments = decided(arguments)
    arguments.checkpointing = "checkpointing" in words
    arguments.nf4 = "bitsandbytes" if "bitsandbytes" in words else arguments.nf4
    arguments.loss = "chunked" if "compiled" in words else "trl" if torch.cuda.is_available() else "full"
    arguments.optimizer = "adamw_torch_fused" if "compiled" in words else arguments.optimizer
    torch.manual_seed(arguments.seed)
    base = checkpoints.load_base(arguments.model, DTYPES[arguments.dtype])
    rows = load_instructions(arguments.dataset, vocab_size=base.model.config.vocab_size, seed=arguments.seed)
    model = checkpoints.attach_lora(base.model, arguments.lora_rank)
    if "flex" in words:
        register()
        model.set_attn_implementation("qlora_flex")
    clock = Clock(profile)
    config = sft_config(arguments)
    with nf4_decoder(model, arguments.nf4), CompileCounter() as counter:
        trainer = QLoRATrainer(
            model, loss=arguments.loss, args=config, train_dataset=rows, processing_class=base.tokenizer,
            callbacks=[clock],
        )  # fmt: skip
        if "compiled" in words:
            trainer.data_collator = HostChecked(trainer.data_collator)
        if "bf16-adapters" in words:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
        with compiled_as(words, trainer.model):
            trainer.train()
    seconds = [s for i, s in enumerate(clock.seconds, 1) if i > WARM and i != profile] or clock.seconds
    allocated, reserved = peak_gib()
    row = {
        "variant": variant, "step_s": round(float(np.median(seconds)), 4), "first_step_s": round(clock.seconds[0], 1),
        "allocated_gib": round(allocated, 3), "reserved_gib": round(reserved, 3), "compiles": counter.compiles,
        "graph_breaks": counter.graph_breaks, "recompiles": counter.recompiles, "reasons": counter.reasons,
        "losses": clock.losses, "steps_s": [round(s, 3) for s in clock.seconds],
    }  # fmt: skip
    if clock.profiler is not None:
        row["gpu_busy_s"], row["gpu_operations"] = gpu_busy(clock)
    return row, clock


@contextlib.contextmanager
def compiled_as(words: set[str], model: torch.nn.Module) -> Iterator[None]:
    """Within, ``model`` is compiled as a variant's words say."""
    if "compiled" not in words:
        yield
        return
    with compile_model(
        model, max_autotune="autotune" in words, pad_to=1 if "pad1" in words else PAD_TO, cuda_graphs="graphs" in words,
        offload="offload" in words,
    ), without_cudnn() if "flash" in words else contextlib.nullcontext():  # fmt: skip
        yield


def gpu_events(clock: Clock) -> list[Any]:
    """Kernels and copies of the profiled step, as torch.profiler has them."""
    return [e for e in clock.profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def gpu_busy(clock: Clock) -> tuple[float, int]:
    """Seconds that the GPU worked during the profiled step, and its kernels and copies."""
    on_gpu = gpu_events(clock)
    return round(sum(e.time_range.elapsed_us() for e in on_gpu) / 1e6, 4), len(on_gpu)


def profile_table(clock: Clock, rows: int = 28) -> str:
    """Where the profiled step's time goes: GPU kernels by name, and operators by their own CPU time."""
    averages = clock.profiler.key_averages()
    return "\n".join(
        averages.table(sort_by=key, row_limit=rows, max_name_column_width=70)
        for key in ("self_cuda_time_total", "self_cpu_time_total")
    )


@contextlib.contextmanager
def autotuned() -> Iterator[list[dict[str, Any]]]:
    """Collects what max_autotune measured within: for each matrix product the best times, in ms, and the choice.

    For each product the first four of its Triton templates are tried, for 10 ms, not 100.
    """
    from torch._inductor import select_algorithm

    rows: list[dict[str, Any]] = []

    def save(timings: dict, name: str, inputs: list, *more: Any) -> None:
        found = {"Triton": float("inf"), "cuBLAS": float("inf")}
        for choice, ms in timings.items():
            kind = "Triton" if "triton" in choice.name else "cuBLAS"
            found[kind] = min(found[kind], ms)
        if float("inf") not in found.values():
            shapes = " x ".join("[" + ", ".join(str(n) for n in x.get_size()) + "]" for x in inputs)
            rows.append({"op": name, "shapes": shapes, "triton_ms": found["Triton"], "aten_ms": found["cuBLAS"],
                         "taken": min(found, key=found.get)})  # fmt: skip

    select_algorithm.add_feedback_saver(save)
    shorter = {
        "inductor_default_autotune_warmup": 2, "inductor_default_autotune_rep": 10, "test_configs.max_mm_configs": 4
    }  # fmt: skip
    try:
        with torch._inductor.config.patch(shorter):
            yield rows
    finally:
        select_algorithm.clear_feedback_savers()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variants", default="eager,compiled,compiled+checkpointing")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--model", default="shape:llama-3.2-1b")
    parser.add_argument("--dataset", default="random:200-1024x160")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--lora_rank", type=int, default=32)
    parser.add_argument("--profile", type=int, default=0, help="this step (1 is the first) is profiled")
    parser.add_argument("--out", default="runs/bench_compile", help="folder of the JSON rows and of the profiles")
    args = parser.parse_args()
    host.prepare()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    grow_segments()
    for variant in args.variants.split(","):
        with autotuned() if "autotune" in variant else contextlib.nullcontext() as choices:
            row, clock = run_variant(variant, TrainArguments(
                model=args.model, dataset=args.dataset, steps=args.steps, lora_rank=args.lora_rank, dtype=args.dtype,
                max_length=1024, prompt="", deterministic=False, output_dir=str(out / variant),
            ), args.profile)  # fmt: skip
        if choices is not None:
            row["autotuned"] = choices
        (out / f"{variant}.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        shown = {key: value for key, value in row.items() if key not in ("reasons", "autotuned")}
        print(shown, *row["reasons"], sep="\n", flush=True)
        if clock.profiler is not None:
            (out / f"{variant}.txt").write_text(profile_table(clock), encoding="utf-8")
            clock.profiler.export_chrome_trace(str(out / f"{variant}.trace.json.gz"))
        del clock
        torch._dynamo.reset()
        gc.collect()  # or the next variant's peak counts this one's adapters and optimizer
        if torch.cuda.is_available():
            torch._C._cuda_clearCublasWorkspaces()  # of its streams
            torch.cuda.empty_cache()
            reset_peak()


if __name__ == "__main__":
    main()
