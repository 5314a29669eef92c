"""FSDP2's features one by one, each a short run on the same rows: losses, what was held where, GiB and tokens a second.

    torchrun --nproc_per_node=2 -m helpers.fsdp2_features --model shape:tiny-untied --out runs/features

One start of the ranks does all runs; the first rank writes ``fsdp2_features.json``. Gathered weights are compared with
the loaded ones first: see :func:`changed_bytes`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import TrainerCallback

from . import checkpoints, fsdp2, t4
from .compile_counter import CompileCounter
from .gathered import gathered
from .nf4_pieces import NF4Pieces
from .nf4_tensor import NF4Linear, unpack
from .results import write_atomically
from .sharded_steps import sharded_modules
from .train import TrainArguments, train

# What is switched, as flags of helpers.train; the first run is what the others must equal.
FIRST = "sharded, resharded after forward, prefetch 1, checkpointing"
FEATURES: dict[str, dict[str, Any]] = {
    FIRST: {"save_steps": 2},
    "weights kept gathered after forward": {"fsdp2_options": "keep-gathered"},
    "prefetch 2": {"fsdp2_options": "prefetch=2"},
    "all gathered by collectives": {"fsdp2_options": "no-peer-reads"},
    "no checkpointing": {"checkpointing": False},
    "CPU offload": {"fsdp2_options": "offload"},
    "full instead of sharded checkpoints": {"fsdp2_options": "full-checkpoints", "save_steps": 2},
    "8-bit Adam on shards": {"optimizer": "adamw_8bit"},
    "each block compiled whole": {"compile": True},
}
RESUMED = "resumed from a sharded checkpoint"


class Shares(TrainerCallback):
    """Reads, in the middle of a run, what this rank holds of each frozen weight and where parameters live."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == state.max_steps - 1:
            self.held = fsdp2.frozen_bytes(model)
            self.devices = sorted({p.device.type for p in model.parameters()})


def changed_bytes(model: nn.Module, config: fsdp2.FSDP2Config) -> dict[str, tuple[int, int]]:
    """Shard ``model`` (whole, on this rank) and gather it again: bytes that differ and bytes compared, of every weight.

    Of a 4-bit weight the packed bytes and each statistic are compared; of others the values, cast to
    ``config.param_dtype`` if that is asked for. A forward pass comes first, so that storage is used a second time.
    """
    device = next(model.parameters()).device
    expected = {name: _parts(module) for name, module in model.named_modules() if "weight" in module._parameters}
    fsdp2.prepare_fsdp2(model, config)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 19, device=device)[None])
    for module in sharded_modules(model):
        module.unshard()
    found = {}
    for name, module in model.named_modules():
        for part, wanted in expected.get(name, {}).items():
            with gathered(module, device):
                got = _parts(module)[part]
            if part == "weight" and config.param_dtype:
                wanted = wanted.to(config.param_dtype)
            a, b = (x.contiguous().view(-1).view(torch.uint8) for x in (got, wanted.to(got.device)))
            found[f"{name}.{part}"] = int((a != b).sum()) if len(a) == len(b) else len(b), len(b)
    return found


def _parts(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a module's weight is made of, as plain tensors of their own."""
    if not isinstance(module, NF4Linear | Linear4bit):
        return {"weight": module.weight.detach().clone()}
    if isinstance(module, NF4Linear):
        packed, state = unpack(module.whole() if isinstance(module, NF4Pieces) else module.weight)
    else:
        packed, state = module.weight.data, module.weight.quant_state
    parts = {"packed": packed, "absmax": state.absmax, "code": state.code}
    if state.nested:
        parts |= {"absmax2": state.state2.absmax, "code2": state.state2.code, "offset": state.offset}
    return {name: part.detach().clone() for name, part in parts.items()}


def loaded_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of each frozen weight of a model that is whole, its scales included, under the parameter's name."""
    counted = ("weight", "packed", "absmax", "absmax2")
    return {
        f"{name}.weight": sum(part.nbytes for key, part in _parts(module).items() if key in counted)
        for name, module in model.named_modules()
        if "weight" in module._parameters and not module.weight.requires_grad
    }


def shares_of(held: dict[str, int], loaded: dict[str, int], ranks: int) -> dict[str, float]:
    """Of the bytes that a rank holds of each frozen weight at most: those beyond its equal part, and both sums in GiB.

    ``loaded`` may name a tied weight twice, ``held`` does not.
    """
    return {
        "beyond_share_bytes": max(held[weight] - loaded[weight] / ranks for weight in held),
        "frozen_gib": sum(held.values()) / 1024**3,
        "frozen_gib_loaded": sum(loaded[weight] for weight in held) / 1024**3,
    }


def run(
    name: str, flags: dict[str, Any], arguments: dict[str, Any], folder: Path, loaded: dict[str, int]
) -> dict[str, Any]:
    """One row of the table, the same on every rank but for the losses, which the first rank has; or its ``error``."""
    torch._dynamo.reset()
    try:
        return _measured(name, flags, arguments, folder, loaded)
    except Exception as error:  # its line says so, and the next is run
        traceback.print_exc()
        return {"feature": name, "error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def _measured(
    name: str, flags: dict[str, Any], arguments: dict[str, Any], folder: Path, loaded: dict[str, int]
) -> dict[str, Any]:
    shares = Shares()
    settings = TrainArguments(output_dir=str(folder), fsdp2=True, prompt="", **arguments | flags)
    with CompileCounter() as counter:
        result = train(settings, callbacks=[shares])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, shares.held)
    most = {weight: max(held[weight] for held in everyone) for weight in shares.held}
    return {
        "feature": name, "error": "", "losses": result.losses, "norms": [row["grad_norm"] for row in result.rows],
        **shares_of(most, loaded, len(everyone)),
        "parameters_on": "+".join(shares.devices), "allocated_gib": result.peak_allocated_gib,
        "tokens_per_s": sorted(row["tokens_per_s"] for row in result.rows)[len(result.rows) // 2] if result.rows else 0,
        "graph_breaks": counter.graph_breaks, "graphs": counter.compiles,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m helpers.fsdp2_features", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="auto")
    parser.add_argument("--dataset", default="auto")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--dtype", default="auto", help="that all compute in but one, which shows another")
    parser.add_argument("--out", type=Path, required=True, help="folder of fsdp2_features.json and of the runs")
    args = parser.parse_args(argv)
    try:
        with t4.rehearsal_if_asked():
            return show(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def show(args: argparse.Namespace) -> int:
    """Gather the weights once, run every feature, and write the table down after each."""
    fsdp2.start_ranks("cuda" if torch.cuda.is_available() else "cpu")
    dtype = checkpoints.default_dtype() if args.dtype == "auto" else getattr(torch, args.dtype)
    arguments = {
        "model": args.model, "dataset": args.dataset, "steps": args.steps, "max_length": args.max_length,
        "accumulation": args.accumulation, "lora_rank": args.lora_rank, "learning_rate": args.learning_rate,
        "dtype": str(dtype).removeprefix("torch."), "batch_size": 1,
    }  # fmt: skip
    other = "bfloat16" if dtype == torch.float32 else "float32"
    # Of the weights that the first run has: random ones may come out otherwise in another dtype.
    weights = str(args.out / "base") if args.model.startswith("shape:") else args.model
    features = FEATURES | {f"computed in {other} instead": {"dtype": other, "model": weights}}
    rows, first = [], args.out / "run 0"
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # a table says it all
        torch.manual_seed(3407)
        base = checkpoints.load_base(args.model, dtype)
        if weights != args.model and fsdp2.main_process():
            base.model.save_pretrained(weights)
            base.tokenizer.save_pretrained(weights)
        model = checkpoints.attach_lora(base.model, args.lora_rank)
        loaded = loaded_bytes(model)
        config = fsdp2.FSDP2Config(param_dtype=None if dtype == torch.float32 else dtype)
        differences = changed_bytes(model, config).values()
        gathered = {"changed": sum(d for d, _ in differences), "compared": sum(n for _, n in differences)}
        del model, base
        dist.barrier()
        for i, (name, flags) in enumerate(features.items()):
            itemsize = getattr(torch, flags.get("dtype", arguments["dtype"])).itemsize
            whole = {
                weight: n if "base_layer" in weight else n * itemsize // dtype.itemsize for weight, n in loaded.items()
            }
            rows.append(run(name, flags, arguments, args.out / f"run {i}", whole))
            _write(gathered, rows, args.out)
        last = first / f"checkpoint-{args.steps}"
        if fsdp2.main_process() and last.exists():
            last.rename(first / "later")  # so that the run goes on from the checkpoint before
        dist.barrier()
        rows.append(run(RESUMED, {"save_steps": 2, "resume": True}, arguments, first, loaded))
        _write(gathered, rows, args.out)
    if fsdp2.main_process():
        print(f"{gathered['changed']} of {gathered['compared']:,} gathered bytes changed; {len(rows)} runs done")
    fsdp2.stop_ranks()
    return 0


def _write(gathered: dict[str, int], rows: list[dict[str, Any]], folder: Path) -> None:
    if fsdp2.main_process():
        document = {"ranks": dist.get_world_size(), "gathered": gathered, "features": rows}
        write_atomically(folder / "fsdp2_features.json", json.dumps(document))


if __name__ == "__main__":
    sys.exit(main())
