"""The composed trainer beside stock transformers + TRL and beside Unsloth, one process each, on one GPU.

    python3 -m helpers.bench_trainer --out runs/bench

Each contender runs in a process of its own (Unsloth patches TRL when it is imported), on the same random rows of token
ids, the same batches, sequence lengths, LoRA and optimizer, over published shapes with RANDOM weights: this measures
speed and memory, and that the losses agree. They warm up side by side and are timed in turn (helpers/turns.py). Rows
go to `trainer_bench.csv` as soon as they are measured.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .ranks import Job, places
from .results import write_rows
from .turns import take_turn, turn, wait_for_file, warm

GIB_EACH = 10.0  # of a GPU, at most, for a contender that shares it with others while they warm up
SAVE = ("import os, sys, pathlib; from helpers.bench_trainer import save_shape; part = sys.argv[2] + '.partial'; "
        "save_shape(sys.argv[1], pathlib.Path(part)); os.rename(part, sys.argv[2])")  # fmt: skip
ENTRY = ["-m", "helpers.bench_trainer", "--one"]
CONTENDERS = ("stock", "unsloth", "ours", "graphs")  # the last is ours with --cuda_graphs
WARMUP = 4  # steps that compile and fill the allocator


@dataclass(frozen=True)
class Case:
    """One training set-up; ``rows`` as LOW-HIGHxROWS, lengths in tokens, batches in rows."""

    name: str
    shape: str
    rows: str
    max_length: int
    checkpointing: bool
    packing: bool = False
    batch_size: int = 2
    accumulation: int = 4
    lora_rank: int = 32
    steps: int = 12
    optimizer: str = "adamw_torch_fused"
    dtype: str = "auto"  # of the compute


CASES = (
    Case("1B padded", "llama-3.2-1b", "200-1024x600", 1024, False),
    Case("1B padded, checkpointing", "llama-3.2-1b", "200-1024x600", 1024, True),
    Case("1B packed", "llama-3.2-1b", "200-1024x600", 2048, False, packing=True),
    Case("1B packed, checkpointing", "llama-3.2-1b", "200-1024x600", 2048, True, packing=True),
    Case("8B, checkpointing", "llama-3.1-8b", "2048-2048x600", 2048, True, lora_rank=64, steps=9),
)


def ours(case: Case, contender: str, folder: str, callbacks: Sequence[Any] = ()) -> None:
    """Our trainer with everything on, with CUDA graphs too (``graphs``), or with every part of ours off (``stock``)."""
    from .train import TrainArguments, train

    if contender == "stock":
        parts = {"nf4": "bitsandbytes", "loss": "trl", "attention": "stock"}
    else:
        # Layers' inputs wait in host memory in Unsloth's checkpointing too.
        parts = {"compile": True, "cuda_graphs": contender == "graphs", "offload": case.checkpointing}
    train(TrainArguments(
        model=folder, dataset=_rows(case), output_dir=tempfile.mkdtemp(), steps=case.steps, optimizer=case.optimizer,
        batch_size=case.batch_size, accumulation=case.accumulation, max_length=case.max_length,
        packing=case.packing, checkpointing=case.checkpointing, lora_rank=case.lora_rank, deterministic=False,
        dtype=case.dtype, prompt="", **parts,
    ), list(callbacks))  # fmt: skip


def unsloth(case: Case, folder: str, callbacks: Sequence[Any] = ()) -> None:
    """Unsloth's own loading, LoRA and checkpointing under the same SFTConfig. AGPL: run, not copied."""
    import unsloth  # noqa: F401, I001  before everything that it patches
    import torch
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    from .checkpoints import LORA_TARGETS
    from .instruction_data import load_instructions

    half = case.dtype == "float16"
    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length=case.max_length, load_in_4bit=True, dtype=torch.float16 if half else None
    )
    model = FastLanguageModel.get_peft_model(
        model, r=case.lora_rank, lora_alpha=2 * case.lora_rank, target_modules=list(LORA_TARGETS), lora_dropout=0,
        bias="none", use_gradient_checkpointing="unsloth" if case.checkpointing else False, random_state=3407,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        train_dataset=load_instructions(_rows(case), vocab_size=model.config.vocab_size),
        processing_class=tokenizer,
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=case.batch_size, max_steps=case.steps,
            gradient_accumulation_steps=case.accumulation, max_length=case.max_length, packing=case.packing,
            padding_free=case.packing, learning_rate=2e-4, lr_scheduler_type="linear", warmup_steps=1, logging_steps=1,
            optim=case.optimizer, bf16=not half, fp16=half, seed=3407, data_seed=3407, report_to="none",
            save_strategy="no",
        ),
        callbacks=list(callbacks),
    )  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    trainer.train()


def _rows(case: Case) -> str:
    return f"random:{case.rows}"


def save_shape(shape: str, folder: Path) -> None:
    """The random weights of a shape as a 4-bit checkpoint, so that every contender loads the same ones."""
    from .checkpoints import load_base

    made = load_base(f"shape:{shape}")
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)


def one(case: Case, contender: str, saved: Path, folder: Path, limit_s: float) -> None:
    """What a contender's process does: import, wait for the weights, train; ``folder`` is for its turn."""
    importlib.import_module("unsloth" if contender == "unsloth" else "helpers.train")
    wait_for_file(saved, limit_s, "saved weights")
    callbacks = [turn(folder, limit_s, WARMUP)]
    if contender == "unsloth":
        unsloth(case, str(saved), callbacks)
    else:
        ours(case, contender, str(saved), callbacks)


def bench(cases: Sequence[Case], contenders: Sequence[str], out: Path, limit_s: float) -> list[dict[str, Any]]:
    """A row a case and contender that did not fail; ``limit_s``: seconds to warm up, a third of them for a turn."""
    out.mkdir(parents=True, exist_ok=True)
    waiting = [(case, name) for case in cases for name in contenders]
    everything_s, rows = limit_s * (1 + len(waiting)), []
    with tempfile.TemporaryDirectory(prefix="trainer-bench-", ignore_cleanup_errors=True) as scratch:

        def job(name: str, arguments: list[str]) -> Job:
            # The padding is part of the case; few of a compile worker a processor would ever have work.
            environment = {"UNSLOTH_DISABLE_AUTO_PADDING_FREE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
            return Job(name, arguments, out / "logs", 0, everything_s, environment)

        shapes = {case.shape for case in cases}
        saving = [job(f"saving {s}", ["-c", SAVE, s, str(Path(scratch, s))]).start() for s in sorted(shapes)]
        running: dict[tuple[Case, str], tuple[Job, Path, float]] = {}
        try:
            while waiting or running:
                at_once = places(GIB_EACH, cores=2)
                while waiting and len(running) < at_once:
                    case, name = waiting.pop(0)
                    folder = Path(scratch, f"{case.name}, {name}")
                    folder.mkdir()
                    request = {"case": asdict(case), "contender": name, "folder": str(folder),
                               "saved": str(Path(scratch, case.shape)), "limit_s": everything_s}  # fmt: skip
                    started = job(folder.name, [*ENTRY, json.dumps(request)]).start()
                    running[case, name] = started, folder, time.monotonic() + limit_s
                warm(running.values(), limit_s)
                for (case, name), (contender, folder, _) in running.items():
                    found = take_turn(contender, folder, limit_s / 3)
                    if not found:
                        print(f"{case.name:26s} {name:8s} FAILED: {contender.failure}", flush=True)
                        continue
                    rows.append(_row(case, name, found[0]))
                    write_rows(rows, out / "trainer_bench.csv")
                running.clear()
        finally:
            for started in [*saving, *(contender for contender, _, _ in running.values())]:
                started.stop("was interrupted")
    return rows


def _row(case: Case, contender: str, found: dict[str, Any]) -> dict[str, Any]:
    from .host import machine, versions

    row = {"case": case.name, "contender": contender, "step_s": round(statistics.median(found["seconds"]), 4)}
    row |= {key: round(found[key], 3) for key in ("allocated_gib", "reserved_gib")}
    row |= {"first_losses": " ".join(f"{x:.5f}" for x in found["losses"][:5])}
    print(f"{case.name:26s} {contender:8s} {row['step_s']:7.3f} s  {row['allocated_gib']:6.2f} GiB  losses "
          f"{row['first_losses']}", flush=True)  # fmt: skip
    return row | {"trainable_dtype": found["trainable_dtype"], "machine": machine(), **versions()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m helpers.bench_trainer", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of trainer_bench.csv and of logs")
    parser.add_argument("--cases", nargs="*", default=[case.name for case in CASES], help="names of cases, as listed")
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--limit", type=int, default=240, help="seconds within which a contender must have warmed up")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        asked = json.loads(args.one)
        one(Case(**asked["case"]), asked["contender"], Path(asked["saved"]), Path(asked["folder"]), asked["limit_s"])
        return 0
    unknown = set(args.cases) - {case.name for case in CASES}
    if unknown:
        parser.error(f"unknown case {sorted(unknown)}; there are {[case.name for case in CASES]}")
    contenders = [name for name in args.contenders if name != "unsloth" or importlib.util.find_spec("unsloth")]
    cases = [case for case in CASES if case.name in args.cases]
    return 0 if bench(cases, contenders, args.out, args.limit) else 1


if __name__ == "__main__":
    sys.exit(main())
