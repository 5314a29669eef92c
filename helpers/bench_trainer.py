"""The composed trainer beside stock transformers + TRL and beside Unsloth, one process each, on one GPU.

    python3 -m helpers.bench_trainer --out runs/bench

Each contender runs in a process of its own (Unsloth patches TRL when it is imported), on the same random rows of token
ids, the same batches, sequence lengths, LoRA and optimizer, over published shapes with RANDOM weights: this measures
speed and memory, and that the losses agree. Rows go to `trainer_bench.csv`.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CONTENDERS = ("stock", "unsloth", "ours")
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
    steps: int = 14
    optimizer: str = "adamw_torch_fused"


CASES = (
    Case("1B padded", "llama-3.2-1b", "200-1024x600", 1024, False),
    Case("1B padded, checkpointing", "llama-3.2-1b", "200-1024x600", 1024, True),
    Case("1B packed", "llama-3.2-1b", "200-1024x600", 2048, False, packing=True),
    Case("1B packed, checkpointing", "llama-3.2-1b", "200-1024x600", 2048, True, packing=True),
    Case("8B, checkpointing", "llama-3.1-8b", "2048-2048x600", 2048, True, lora_rank=64, steps=9),
)


def ours(case: Case, stock: bool, folder: str) -> dict[str, Any]:
    """Our trainer with everything on, or (``stock``) with every part of ours off."""
    from .train import TrainArguments, train

    parts = {"nf4": "bitsandbytes", "loss": "trl", "attention": "stock"} if stock else {"compile": True}
    result = train(TrainArguments(
        model=folder, dataset=_rows(case), output_dir=tempfile.mkdtemp(), steps=case.steps, optimizer=case.optimizer,
        batch_size=case.batch_size, accumulation=case.accumulation, max_length=case.max_length,
        packing=case.packing, checkpointing=case.checkpointing, lora_rank=case.lora_rank, deterministic=False,
        prompt="", **parts,
    ))  # fmt: skip
    return {
        "seconds": [row["step_s"] for row in result.rows],
        "losses": result.losses,
        "allocated_gib": result.peak_allocated_gib,
        "reserved_gib": result.peak_reserved_gib,
        "trainable_dtype": "float32",
    }


def unsloth(case: Case, folder: str, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Unsloth's own loading, LoRA and checkpointing under the same SFTConfig. AGPL: run, not copied."""
    import unsloth  # noqa: F401, I001  before everything that it patches
    import torch
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    from .checkpoints import LORA_TARGETS
    from .instruction_data import load_instructions
    from .memory import peak_gib
    from .train import StepLog

    model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=case.max_length, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(
        model, r=case.lora_rank, lora_alpha=2 * case.lora_rank, target_modules=list(LORA_TARGETS), lora_dropout=0,
        bias="none", use_gradient_checkpointing="unsloth" if case.checkpointing else False, random_state=3407,
    )  # fmt: skip
    output = Path(tempfile.mkdtemp())
    log = StepLog(output / "train_log.csv", keep_up_to=0)
    trainer = SFTTrainer(
        model=model,
        train_dataset=load_instructions(_rows(case), vocab_size=model.config.vocab_size),
        processing_class=tokenizer,
        args=SFTConfig(
            output_dir=str(output), per_device_train_batch_size=case.batch_size, max_steps=case.steps,
            gradient_accumulation_steps=case.accumulation, max_length=case.max_length, packing=case.packing,
            padding_free=case.packing, learning_rate=2e-4, lr_scheduler_type="linear", warmup_steps=1, logging_steps=1,
            optim=case.optimizer, bf16=True, seed=3407, data_seed=3407, report_to="none", save_strategy="no",
        ),
        callbacks=[log, *callbacks],
    )  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    allocated, reserved = peak_gib()
    return {
        "seconds": [row["step_s"] for row in log.rows],
        "losses": [row["loss"] for row in log.rows],
        "allocated_gib": allocated,
        "reserved_gib": reserved,
        "trainable_dtype": str(next(p.dtype for p in model.parameters() if p.requires_grad))[6:],
    }


def _rows(case: Case) -> str:
    return f"random:{case.rows}"


def save_shape(shape: str, folder: Path) -> None:
    """The random weights of a shape as a 4-bit checkpoint, so that every contender loads the same ones."""
    from .checkpoints import load_base

    made = load_base(f"shape:{shape}")
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)


def measure(case: Case, contender: str, folder: Path, limit_s: int) -> dict[str, Any]:
    """Run one contender in its own process; what it measured, or ``error``."""
    request = json.dumps({"case": asdict(case), "contender": contender, "folder": str(folder)})
    command = [sys.executable, "-m", "helpers.bench_trainer", "--one", request]
    environment = os.environ | {"UNSLOTH_DISABLE_AUTO_PADDING_FREE": "1"}  # the padding is part of the case
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=environment)
    except subprocess.TimeoutExpired as late:
        return {"error": f"not done after {limit_s} s", "log": (late.stderr or b"").decode(errors="replace")[-3000:]}
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300], "log": done.stderr[-3000:]}
    return json.loads(found[0].removeprefix("RESULT "))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m helpers.bench_trainer", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of trainer_bench.csv")
    parser.add_argument("--cases", nargs="*", default=[case.name for case in CASES], help="names of cases, as listed")
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--limit", type=int, default=180, help="seconds a contender may take")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        request = json.loads(args.one)
        case, folder = Case(**request["case"]), request["folder"]
        run = unsloth(case, folder) if request["contender"] == "unsloth" else None
        print("RESULT " + json.dumps(run or ours(case, request["contender"] == "stock", folder)))
        return 0
    unknown = set(args.cases) - {case.name for case in CASES}
    if unknown:
        parser.error(f"unknown case {sorted(unknown)}; there are {[case.name for case in CASES]}")
    from .host import machine, versions

    args.out.mkdir(parents=True, exist_ok=True)
    rows, folders = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            if case.name not in args.cases:
                continue
            if case.shape not in folders:
                folders[case.shape] = Path(scratch) / case.shape
                subprocess.run(
                    [sys.executable, "-c", "import sys; from pathlib import Path; from helpers.bench_trainer import "
                     "save_shape; save_shape(sys.argv[1], Path(sys.argv[2]))", case.shape, folders[case.shape]],
                    check=True, stderr=subprocess.DEVNULL,
                )  # fmt: skip
            for contender in args.contenders:
                if contender == "unsloth" and not importlib.util.find_spec("unsloth"):
                    continue
                started = time.perf_counter()
                got = measure(case, contender, folders[case.shape], args.limit)
                row = {"case": case.name, "contender": contender, "wall_s": round(time.perf_counter() - started, 1)}
                if "error" in got:
                    print(f"{case.name:26s} {contender:8s} FAILED: {got['error']}\n{got.get('log', '')}", flush=True)
                    continue
                step = statistics.median(got["seconds"][WARMUP:])
                row |= {"step_s": round(step, 4), "first_step_s": round(got["seconds"][0], 2)}
                row |= {key: round(got[key], 3) for key in ("allocated_gib", "reserved_gib")}
                row |= {"first_losses": " ".join(f"{x:.5f}" for x in got["losses"][:5])}
                row |= {"trainable_dtype": got["trainable_dtype"], "machine": machine(), **versions()}
                rows.append(row)
                print(f"{case.name:26s} {contender:8s} {step:7.3f} s  {row['allocated_gib']:6.2f} GiB  first step "
                      f"{row['first_step_s']:6.1f} s  losses {row['first_losses']}", flush=True)  # fmt: skip
    if not rows:
        return 1
    with open(args.out / "trainer_bench.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
