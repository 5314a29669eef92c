"""QLoRA under FSDP2: every weight of the model, 4-bit ones included, sharded over the ranks.

    start_ranks(device)                              # in every process that torchrun started
    with one_rank_at_a_time():
        model = ...                                  # 4-bit base + LoRA, whole, on this rank's GPU
    trainer = Trainer(model, TrainingArguments(..., **training_arguments(config)))
    shard_trainer(trainer, config)                   # in place: NF4 tensors, compiled blocks, fully_shard
    trainer.train()

accelerate could call ``fully_shard`` itself. We call it before ``train()``, and accelerate takes a model that is
sharded already as it is, for three reasons: its plugin has no field for prefetching, for compiling a block in place
before sharding it, or for a policy without ``cast_forward_inputs``, which rounds the loss's token count to 16 bits.
"""

from __future__ import annotations

import contextlib
import functools
import re
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.modeling_layers import GradientCheckpointingLayer

from . import peer_reads
from .compiling import compiled_layer
from .fsdp2_optimizer import step_on_shards, step_without_waiting
from .gathered import gather_ahead, shard_ends
from .host_store import HostStore
from .layer_checkpoint import can_be_halved
from .nf4_pieces import NF4Pieces, lay_in_pieces
from .nf4_tensor import NF4Tensor, use_nf4_tensors
from .ranks import launch, main_process, one_rank_at_a_time, start_ranks, stop_ranks
from .sharded_steps import put_away, sharded_modules

__all__ = [
    "FSDP2Config", "TrainsSharded", "active_parts", "clip_grad_norm", "frozen_bytes", "gather_trainable", "launch",
    "main_process", "one_rank_at_a_time", "prepare_fsdp2", "shard_trainer", "start_ranks", "stop_ranks",
    "training_arguments",
]  # fmt: skip


@dataclass(frozen=True)
class FSDP2Config:
    """FSDP2's features, each one flag.

    ``param_dtype``: what weights are gathered and computed in (None: as stored); gradients are reduced in float32.
    ``cpu_offload``: shards, their gradients and the optimizer live in host memory. ``reshard_after_forward``: free
    a block's weights between forward and backward, the last one's excepted. ``prefetch``: blocks gathered ahead of
    the one that computes. ``compile_blocks``: ``torch.compile`` each decoder block whole (``fullgraph``), with
    ``checkpoint_blocks`` so that its graph recomputes in backward. ``decoder``: ``triton`` or ``bitsandbytes``.
    ``full_checkpoints``: one file that any world size reads, gathered on rank 0, instead of one a rank (which any
    world size reads too). ``peer_reads``: frozen shards are read where they lie (helpers/peer_reads.py), 4-bit ones
    by the decoder ``triton`` alone (helpers/nf4_pieces.py); None: where that is possible.
    """

    param_dtype: torch.dtype | None = None
    cpu_offload: bool = False
    reshard_after_forward: bool = True
    prefetch: int = 1
    compile_blocks: bool = False
    checkpoint_blocks: bool = False
    decoder: str = "bitsandbytes"
    full_checkpoints: bool = False
    peer_reads: bool | None = None

    def __post_init__(self):
        if self.peer_reads and self.cpu_offload:
            raise ValueError("cpu_offload keeps shards in host memory, which peer_reads cannot read: leave one out")

    @classmethod
    def parse(cls, options: str, **fields: Any) -> FSDP2Config:
        """From words as in ``"offload,keep-gathered,prefetch=2,full-checkpoints"`` and further fields.

        Raises:
            ValueError: a word that is none of these.
        """
        known = {
            "offload": ("cpu_offload", True), "keep-gathered": ("reshard_after_forward", False),
            "full-checkpoints": ("full_checkpoints", True), "no-peer-reads": ("peer_reads", False),
        }  # fmt: skip
        for word in filter(None, re.split(r"[,\s]+", options)):
            if ahead := re.fullmatch(r"prefetch=(\d+)", word):
                fields["prefetch"] = int(ahead[1])
            elif word in known:
                fields[known[word][0]] = known[word][1]
            else:
                raise ValueError(f"--fsdp2_options {word!r} is not one of {', '.join(known)}, prefetch=N")
        return cls(**fields)


def training_arguments(config: FSDP2Config) -> dict[str, Any]:
    """Fields of ``TrainingArguments`` (or ``SFTConfig``) that go with ``config``."""
    kind = "FULL_STATE_DICT" if config.full_checkpoints else "SHARDED_STATE_DICT"
    return {
        "fsdp": True,
        # Wrapping and loading are ours: a sharded block's class has another name than the one accelerate looks for,
        # and a 4-bit base is loaded by each rank.
        "fsdp_config": {"state_dict_type": kind, "auto_wrap_policy": "NO_WRAP", "cpu_ram_efficient_loading": False},
        # Reduce at every micro-step: waiting would keep all gradients unsharded in float32.
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    }


def prepare_fsdp2(model: nn.Module, config: FSDP2Config, store: HostStore | None = None) -> nn.Module:
    """Shard a QLoRA model in place over all ranks: the frozen weights of each decoder block, embedding, head, the rest.

    ``model`` is whole and on this rank's device (transformers model, with or without PEFT). Trainable weights become
    float32, which GradScaler and the reduction want. A frozen embedding and head are sharded by helpers/gathered.py;
    where one trains and they are tied they stay with the root, gathered for the whole step, since both must find the
    weight. The optimizer is made after this. ``store``: where the inputs of compiled and checkpointed blocks wait for
    the backward pass; None: on the device.

    Raises:
        RuntimeError: no process group. ValueError: nothing that is a decoder block, ranks that loaded different
        weights, weights that cannot be sharded (named, with the way out).
    """
    if not dist.is_initialized():
        raise RuntimeError("prepare_fsdp2 needs a process group: call start_ranks() first, under torchrun")
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no decoder blocks (GradientCheckpointingLayer) to shard")
    ranks = dist.get_world_size()
    use_nf4_tensors(model, ranks, config.decoder)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _check(model)
    if config.compile_blocks:
        _compile(blocks, config.checkpoint_blocks, store)
        model.enable_input_require_grads()  # of the first block too, or it would be a graph of its own

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [module for module in (embedding, head) if module is not None]
    frozen_ends = not any(parameter.requires_grad for module in ends for parameter in module.parameters())
    lender, ignored = None, set()
    sharded = blocks  # by FSDP2
    if config.peer_reads or (config.peer_reads is None and not config.cpu_offload and peer_reads.possible()):
        pieced = blocks if config.decoder == "triton" and _all_in_4_bits(blocks) else []
        lender = _lender(pieced, ends if frozen_ends else [])
        if pieced:
            mesh = init_device_mesh(_device().type, (ranks,))
            ignored |= lay_in_pieces(pieced, lender, mesh, config.prefetch, not config.reshard_after_forward)
            sharded = []
    if frozen_ends:
        ignored |= shard_ends(ends, config.param_dtype, config.cpu_offload, lender)
        if head is not None and config.compile_blocks and config.prefetch:  # compiled, the loss reads it itself
            blocks[-1].register_forward_pre_hook(functools.partial(_gather_ahead, head))
    elif head is None or head.weight is not embedding.weight:
        for module in ends:
            fully_shard(module, **_policies(module, config))
    # The root takes what trains, also within blocks, and gathers and reduces it once a micro-step: adapters are small,
    # and their collectives, block by block, would take multiprocessors from the products beside them. With 4-bit
    # weights in pieces it takes the norms too, and blocks are not FSDP2's: its groups gather by collectives alone.
    frozen = {p for block in sharded for p in block.parameters() if not p.requires_grad}
    fully_shard(model, ignored_params=ignored | frozen, **_policies(model, config))
    for block in sharded:
        trained = {p for p in block.parameters() if p.requires_grad}
        again = config.reshard_after_forward and block is not blocks[-1]  # whose backward pass comes at once
        fully_shard(block, reshard_after_forward=again, ignored_params=trained, **_policies(block, config))
    _prefetch([model, *sharded], config.prefetch)
    model.register_forward_hook(_evaluated)
    if lender is not None:
        lender.lend()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the whole weights' memory, of which a shard will never need so much again
    return model


def shard_trainer(trainer: Any, config: FSDP2Config, store: HostStore | None = None) -> None:
    """`prepare_fsdp2` of ``trainer.model`` between the trainer's construction and its ``train()``; tells accelerate."""
    prepare_fsdp2(trainer.model, config, store)
    state = trainer.accelerator.state
    if not trainer.is_fsdp_enabled:
        # accelerate lists every accelerator as able to run FSDP and forgets the CPU (state.py, AcceleratorState).
        from accelerate import PartialState
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP  # the first copies the second
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
        trainer.is_fsdp_enabled = True


class TrainsSharded:
    """Mixin for a ``Trainer``; of a model that is not sharded it changes clipping and bitsandbytes' waits alone.

    ``save_model`` writes PEFT's adapter files and gathers nothing but the adapter: Trainer would gather the whole
    4-bit base first (full state dict), or write no adapter at all (sharded). bitsandbytes' optimizers step on shards,
    torch's on all of them at once.
    Gradients are clipped by `clip_grad_norm`.
    """

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        self.accelerator.unscale_gradients()
        return clip_grad_norm(self.model, self.args.max_grad_norm)

    def create_optimizer(self, *args: Any, **kwargs: Any):
        optimizer = super().create_optimizer(*args, **kwargs)
        sharded = isinstance(self.model, FSDPModule)
        if isinstance(optimizer, Optimizer8bit):
            (step_on_shards if sharded else step_without_waiting)(optimizer)
        elif sharded:
            # On a GPU torch steps on lists of plain tensors by itself, but on DTensors one by one.
            for group in optimizer.param_groups:
                if not group.get("fused") and "foreach" in group:
                    group["foreach"] = True
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # To load a sharded state torch first makes one by an empty step; a scaler that has scaled nothing refuses it.
        wrapped = isinstance(self.optimizer, AcceleratedOptimizer)
        with mock.patch.object(self.optimizer, "scaler", None) if wrapped else contextlib.nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not isinstance(self.model, FSDPModule):
            return super().save_model(output_dir, _internal_call)
        state = gather_trainable(self.model)
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=state)
        dist.barrier()
        return None


@torch.no_grad()
def clip_grad_norm(model: nn.Module, max_norm: float) -> torch.Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for gradients whole or sharded along dim 0; returns their norm over all ranks.

    Squares are summed in float64, so that the norm is the same to the last bit however the gradients are sharded: a
    norm that differs by one rounding scales every gradient, and in 16 bits two runs then part within a few steps.
    torch 2.9's own takes the norm of one rank's shards for the whole.
    """
    gradients = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                 for p in model.parameters() if p.grad is not None]  # fmt: skip
    total = torch.stack(torch._foreach_norm(gradients, 2, torch.float64)).square().sum()
    if isinstance(model, FSDPModule):
        dist.all_reduce(total)
    norm = total.sqrt().float()
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def gather_trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    """Trainable parameters, whole, on the CPU of rank 0 and under their names; every rank must call it."""
    put_away(sharded_modules(model))  # or they might be the rounded ones that a generation has left
    gathered = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.data
            if dist.get_rank() == 0:
                gathered[name] = whole.cpu()
    return gathered


def frozen_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes that this rank holds of each frozen weight: of its shard once sharded, of the whole before."""
    held = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            held[name] = _stored(parameter.to_local() if isinstance(parameter, DTensor) else parameter)
    return held


def _stored(tensor: torch.Tensor) -> int:
    """Bytes of what a tensor consists of: a subclass may look like a wider dtype than the one it is stored in."""
    if isinstance(tensor, NF4Tensor):
        return tensor.frozen_bytes
    if is_traceable_wrapper_subclass(tensor):
        return sum(_stored(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def active_parts(model: nn.Module) -> list[str]:
    """What is sharded, read off the model: for the first line of a run. Empty for a model that is not sharded."""
    if not isinstance(model, FSDPModule):
        return []
    held = sum(frozen_bytes(model).values())
    in_pieces = any(isinstance(module, NF4Pieces) for module in model.modules())
    how = "4-bit pieces read where they lie" if in_pieces else "gathered by collectives"
    return [f"FSDP2 over {dist.get_world_size()} ranks, {held / 1024**3:.2f} GiB of frozen weights on each, {how}"]


def _policies(module: nn.Module, config: FSDP2Config) -> dict[str, Any]:
    trains = any(p.requires_grad for p in module.parameters() if not isinstance(p, DTensor))
    # output_dtype None keeps the loss in float32. A group without gradients takes no reduce_dtype: FSDP2 looks for
    # accumulated gradients of one that has it, even if a fused loss never gathered the group (pytorch#194058).
    policy = MixedPrecisionPolicy(
        param_dtype=config.param_dtype, reduce_dtype=torch.float32 if trains else None, output_dtype=None,
        cast_forward_inputs=False,
    )  # fmt: skip
    pinned = torch.cuda.is_available()
    return {"mp_policy": policy, "offload_policy": CPUOffloadPolicy(pinned) if config.cpu_offload else OffloadPolicy()}


def _compile(blocks: list[nn.Module], checkpointed: bool, store: HostStore | None) -> None:
    """Compile the forward of each block, all to one graph. FSDP2's hooks run in the call around it and stay outside."""
    backend = "inductor" if torch.cuda.is_available() else "eager"  # there Inductor's C++ takes longer than a run
    compile = functools.partial(torch.compile, fullgraph=True, dynamic=True, backend=backend)
    call = compiled_layer(compile, _forward, can_be_halved(blocks[0]), store)
    for block in blocks:
        block.forward = functools.partial(call, block, checkpointed)


def _forward(block: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    return type(block).forward(block, *args, **kwargs)  # the class's, past the one that `_compile` gives the block


def _lender(blocks: list[nn.Module], ends: list[nn.Module]) -> peer_reads.Lender | None:
    """Memory for the shards of all 4-bit weights of ``blocks`` and of all weights of ``ends``; None: there are none."""
    ranks = dist.get_world_size()
    weights = [p for block in blocks for p in block.parameters() if isinstance(p, NF4Tensor)]
    pieces = [size for weight in weights for size in weight.shard_bytes(ranks)]
    pieces += [peer_reads.rows_of(p.shape[0], ranks) * p[:1].nbytes for p in {p for m in ends for p in m.parameters()}]
    return peer_reads.Lender(pieces, _device()) if pieces else None


def _all_in_4_bits(blocks: list[nn.Module]) -> bool:
    """Whether every frozen matrix of ``blocks`` is: others would stay with the root, whole for a step."""
    matrices = [p for block in blocks for p in block.parameters() if p.ndim > 1 and not p.requires_grad]
    return bool(matrices) and all(isinstance(p, NF4Tensor) for p in matrices)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _prefetch(modules: list[FSDPModule], ahead: int) -> None:
    for i, module in enumerate(modules):
        module.set_modules_to_forward_prefetch(modules[i + 1 : i + 1 + ahead])
        module.set_modules_to_backward_prefetch(modules[max(i - ahead, 0) : i][::-1])


def _evaluated(model: nn.Module, args: tuple, output: Any) -> None:
    if not torch.is_grad_enabled():
        put_away(sharded_modules(model))


def _gather_ahead(head: nn.Module, block: nn.Module, args: tuple) -> None:
    if block.training and torch.is_grad_enabled():
        gather_ahead(head, args[0].device)


def _byte_sum(tensor: torch.Tensor) -> torch.Tensor:
    # In pieces: they become int64 to be summed, and an embedding of 1 GiB would take 8 of a GPU's.
    return sum(piece.sum(dtype=torch.int64) for piece in tensor.contiguous().view(-1).view(torch.uint8).split(2**26))


def _check(model: nn.Module) -> None:
    """Refuse, on every rank alike and before anything is sharded, what would fail or go wrong later."""
    ranks = dist.get_world_size()
    sums = []
    for name, parameter in model.named_parameters():
        if not parameter.dtype.is_floating_point:
            raise ValueError(
                f"{name} is stored as {parameter.dtype}; of quantised weights only NF4 ones can be sharded"
            )
        if parameter.requires_grad and parameter.shape[0] < ranks:
            raise ValueError(f"{name} of shape {tuple(parameter.shape)} cannot give each of {ranks} ranks a row; "
                             "use a larger LoRA rank or fewer processes")  # fmt: skip
        tensors = [parameter.data]
        if isinstance(parameter, NF4Tensor):
            tensors = [getattr(parameter, n) for n in parameter.__tensor_flatten__()[0]]
        sums.append(sum(_byte_sum(t) for t in tensors))
    mine = torch.stack(sums)
    theirs = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(theirs, mine)
    names = [name for name, _ in model.named_parameters()]
    for rank, other in enumerate(theirs):
        if not torch.equal(other, theirs[0]):
            first = names[int((other != theirs[0]).nonzero()[0])]
            raise ValueError(
                f"rank {rank} loaded other weights than rank 0, first in {first}: give every rank the same checkpoint "
                "and, for random or LoRA weights, the same seed"
            )
