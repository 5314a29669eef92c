"""QLoRA as a pipeline under ``ScheduleInterleavedZeroBubble``: the other way over several GPUs, beside FSDP2.

    torchrun --nproc_per_node=2 -m helpers.zero_bubble --model shape:tiny --steps 6

Each rank holds two stages of the decoder. The schedule splits a backward pass in two: B makes the gradient that the
stage before waits for, W the gradients of the weights, which nobody waits for and which fill the gaps. Where weights
are frozen W is LoRA's alone, a few percent of B: little to fill the gaps with. FSDP2 is the main path here.

Traps: reentrant checkpointing hides the inputs from the split and can give wrong gradients; torch.compile in place
passes the schedule's own check and then does too, so both are refused. A stage's input must require grad, and so must
the embedding's output. The schedule divides gradients by the number of micro-batches: the loss of one is a mean.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble

from . import checkpoints, fsdp2, host, t4
from .memory import peak_gib
from .train import nf4_decoder

STAGES_A_RANK = 2


class DecoderStage(nn.Module):
    """A run of a Llama-like decoder's layers, the first stage with the embedding, the last with norm and head.

    Takes ids [rows, length] or hidden states [rows, length, hidden]; returns hidden states or logits.
    """

    def __init__(self, model: nn.Module, index: int, stages: int):
        super().__init__()
        base = model.get_base_model()
        decoder = base.get_decoder()
        cut = [round(i * len(decoder.layers) / stages) for i in range(stages + 1)]
        self.layers = nn.ModuleDict({str(i): decoder.layers[i] for i in range(cut[index], cut[index + 1])})
        self.embedding = base.get_input_embeddings() if index == 0 else None
        self.norm = decoder.norm if index == stages - 1 else None
        self.head = base.get_output_embeddings() if index == stages - 1 else None
        self.rotary = decoder.rotary_emb

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x).requires_grad_(torch.is_grad_enabled())
        positions = torch.arange(x.shape[1], device=x.device)[None]
        rotary = self.rotary(x, positions)
        for layer in self.layers.values():
            x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return x if self.head is None else self.head(self.norm(x))


def mean_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross entropy of the next token over rows of equal length, in float32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def schedule(model: nn.Module, rank: int, ranks: int, micro_batches: int, device: torch.device):
    """The schedule over this rank's stages of ``model``, a PEFT model that every rank loaded whole.

    Layers of other stages are not touched, and can be freed by the caller. Stages alternate: rank, rank + ranks.

    Raises:
        ValueError: fewer layers than stages, micro-batches that do not divide, layers compiled, checkpoints reentrant,
            a torch that cannot start a pipeline on CPUs.
    """
    stages = STAGES_A_RANK * ranks
    layers = model.get_base_model().get_decoder().layers
    if device.type == "cpu" and torch.__version__ < (2, 13):  # sends 8 bytes where it receives 4, and gloo minds
        raise ValueError(f"torch {torch.__version__} cannot start a pipeline over gloo: use GPUs, or torch 2.13")
    if len(layers) < stages:
        raise ValueError(f"{len(layers)} layers cannot be cut into {stages} stages: use fewer processes")
    if micro_batches % ranks:
        raise ValueError(f"{micro_batches} micro-batches do not divide by {ranks} ranks, as the schedule's rounds need")
    if any("forward" in vars(layer) or layer._compiled_call_impl is not None for layer in layers):
        raise ValueError("the zero-bubble schedule splits backward passes, which a compiled layer does not survive")
    if any(layer.gradient_checkpointing and _reentrant(layer._gradient_checkpointing_func) for layer in layers):
        raise ValueError("the zero-bubble schedule needs gradient_checkpointing_kwargs={'use_reentrant': False}")
    mine = [
        PipelineStage(DecoderStage(model, index, stages), index, stages, device) for index in range(rank, stages, ranks)
    ]
    return ScheduleInterleavedZeroBubble(mine, micro_batches, loss_fn=mean_loss)


def _reentrant(checkpoint: Callable) -> bool:
    return getattr(checkpoint, "keywords", {}).get("use_reentrant", True)


def train(
    model: nn.Module, batches: list[Tensor], micro_batches: int, learning_rate: float, device: torch.device
) -> dict[str, list[float]]:
    """Train on ``batches`` of ids [rows, length], a step each; ``losses``, gradient ``norms``, ``seconds`` of each.

    Alone (no process group) the same micro-batches run one after another: what the pipeline must equal.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if ranks > 1 else 0
    if ranks > 1:
        pipeline = schedule(model, rank, ranks, micro_batches, device)
        modules = nn.ModuleList(stage.submod for stage in pipeline._stages)
    else:
        modules = DecoderStage(model, 0, 1)
    modules.train()
    optimizer = torch.optim.AdamW([p for p in modules.parameters() if p.requires_grad], learning_rate)
    losses, norms, seconds = [], [], []
    for ids in batches:
        ids, started = ids.to(device), time.perf_counter()
        parts: list[Tensor] = []
        if ranks > 1:
            last = rank == ranks - 1  # holds the last stage
            pipeline.step(*([ids] if rank == 0 else []), target=ids if last else None, losses=parts if last else None)
        else:
            for rows in ids.chunk(micro_batches):
                loss = mean_loss(modules(rows), rows)
                (loss / micro_batches).backward()
                parts.append(loss.detach())
        norm = torch.stack([p.grad.norm() for group in optimizer.param_groups for p in group["params"]]).square().sum()
        optimizer.step()
        optimizer.zero_grad()
        loss = torch.stack(parts).mean().detach() if parts else torch.zeros((), device=device)
        if ranks > 1:
            dist.broadcast(loss, src=ranks - 1)
            dist.all_reduce(norm)
        losses.append(loss.item())
        norms.append(norm.sqrt().item())
        seconds.append(time.perf_counter() - started)
    return {"losses": losses, "norms": norms, "seconds": seconds}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m helpers.zero_bubble", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="auto", help="as --model of helpers.train")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--micro-batches", type=int, default=8, help="of one row each, an optimizer step")
    parser.add_argument("--length", type=int, default=64, help="tokens a row")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--out", help="a .json file for losses, seconds and peak GiB of the first rank")
    args = parser.parse_args(argv)
    try:
        with t4.rehearsal_if_asked():
            return run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    """Train as one rank of those that were started, or alone; the first rank prints and writes what came out."""
    sharded, gpu = "RANK" in os.environ, torch.cuda.is_available()
    device = fsdp2.start_ranks("cuda" if gpu else "cpu") if sharded else torch.device("cuda" if gpu else "cpu")
    host.quiet()
    torch.manual_seed(3407)
    base = checkpoints.load_base(args.model)
    model = checkpoints.attach_lora(base.model, args.lora_rank)
    draw = torch.Generator().manual_seed(3407)
    shape = (args.micro_batches, args.length)
    batches = [torch.randint(3, base.model.config.vocab_size, shape, generator=draw) for _ in range(args.steps)]
    autocast = torch.autocast(device.type, base.model.dtype, enabled=base.model.dtype != torch.float32)
    with autocast, nf4_decoder(model, "triton" if gpu else "bitsandbytes"):
        result = train(model, batches, args.micro_batches, 2e-4, device)
    if fsdp2.main_process():
        for step, (loss, seconds) in enumerate(zip(result["losses"], result["seconds"], strict=True), 1):
            print(f"step: {step:3d}  loss: {loss:8.5f}  step_s: {seconds:.3f}", flush=True)
        if args.out:
            Path(args.out).write_text(json.dumps(result | {"allocated_gib": peak_gib()[0]}), encoding="utf-8")
    if sharded:
        fsdp2.stop_ranks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
