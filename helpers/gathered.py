"""Frozen weights of the embedding and the head, sharded over all ranks and whole only while they are read.

FSDP2 gathers the weights of a module into one buffer, rank by rank, and copies from there to where each weight lies: of
an 8B model's embedding two times a GiB at once, and a tied one, which both ends must find, it holds for the whole step.
But each end has one weight, split along dim 0, whose parts follow each other as they are gathered. So here they are
`DTensor` parameters that FSDP2 ignores; each module's forward gathers them in place and lets them go. Where ranks read
each other's shards (helpers/peer_reads.py), an embedding looks its rows up there, and is never whole.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from .peer_reads import Lender, rows_of


def shard_ends(
    modules: Iterable[nn.Module], dtype: torch.dtype | None, offload: bool, lender: Lender | None = None
) -> set[nn.Parameter]:
    """Shard the frozen parameters of ``modules`` in place, each once where several share it; what FSDP2 must ignore.

    Args:
        dtype: what they are gathered in; None: as stored.
        offload: shards lie in the host's memory.
        lender: of memory for the shards, which other ranks then read there.
    """
    sharded: dict[nn.Parameter, tuple[nn.Parameter, list[Tensor]]] = {}
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    for module in modules:
        module._gathered_in, module._lender, module._parts = dtype, lender, {}
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in sharded:
                shard, parts = _shard(parameter.data, mesh, offload, lender)
                sharded[parameter] = nn.Parameter(shard, requires_grad=False), parts
            mine, module._parts[name] = sharded[parameter]
            setattr(module, name, mine)
        looks_up = lender is not None and type(module) is nn.Embedding and module.max_norm is None
        forward = functools.partial(_forward, type(module).forward)
        module.forward = functools.partial(_look_up if looks_up else forward, module)
    return {parameter for parameter, _ in sharded.values()}


@torch.no_grad()
def _shard(whole: Tensor, mesh: DeviceMesh, offload: bool, lender: Lender | None) -> tuple[DTensor, list[Tensor]]:
    """This rank's rows, and every rank's where it may read them."""
    rows, rank, parts = rows_of(len(whole), mesh.size()), mesh.get_local_rank(), []
    mine = whole[rank * rows : (rank + 1) * rows]
    if lender is None:
        mine = mine.clone()
    else:
        piece = lender.take(rows * whole[:1].numel(), whole.dtype)
        parts = [part.view(rows, *whole.shape[1:]) for part in lender.parts(piece)]
        parts = [part[: max(len(whole) - other * rows, 0)] for other, part in enumerate(parts)]
        mine = parts[rank].copy_(mine)
    shard = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
    if offload and whole.is_cuda:  # later, since `from_local` moves what it gets to the mesh's kind of device
        shard = shard.cpu()
        shard.to_local().set_(mine.cpu().pin_memory())
    return shard, parts


def _forward(forward: Callable, module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    with gathered(module, x.device):
        return forward(module, x, *args, **kwargs)


def _look_up(module: nn.Embedding, ids: Tensor) -> Tensor:
    """The rows of ``ids``, each read where it lies."""
    first, *others = module._parts["weight"]
    found, before = F.embedding(ids.clamp(max=len(first) - 1), first), len(first)
    for part in filter(len, others):
        theirs = F.embedding((ids - before).clamp(0, len(part) - 1), part)
        found = torch.where((ids >= before)[..., None], theirs, found)
        before += len(part)
    return found.to(module._gathered_in or found.dtype)


@torch.no_grad()
def gather_ahead(module: nn.Module, device: torch.device) -> None:
    """Begin to gather the sharded parameters of ``module``; whoever reads them in `gathered` waits for them."""
    module._gathering = {
        name: _begin_copies(module, name, p) if module._lender else _begin_collective(module, p, device)
        for name, p in module.named_parameters(recurse=False)
        if isinstance(p, DTensor) and name in vars(module).get("_parts", ())  # not another's shard
    }


def _begin_collective(module: nn.Module, weight: DTensor, device: torch.device) -> Callable[[], Tensor]:
    begun = weight.to(device, module._gathered_in or weight.dtype).redistribute(placements=[Replicate()], async_op=True)

    def arrived() -> Tensor:
        local = begun.to_local()
        return local.wait() if isinstance(local, AsyncCollectiveTensor) else local

    return arrived


def _begin_copies(module: nn.Module, name: str, weight: DTensor) -> Callable[[], Tensor]:
    parts = module._parts[name]
    whole = parts[0].new_empty(weight.shape, dtype=module._gathered_in)
    wait = module._lender.copy_aside(whole.split([len(part) for part in parts]), parts)

    def arrived() -> Tensor:
        wait()
        return whole

    return arrived


@contextlib.contextmanager
def gathered(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, the parameters of ``module`` that `shard_ends` has sharded are whole. Others stay as they are."""
    if "_gathering" not in vars(module):
        gather_ahead(module, device)
    gathering = vars(module).pop("_gathering").items()
    whole = {name: nn.Parameter(arrived(), requires_grad=False) for name, arrived in gathering}
    del gathering
    sharded = {name: module._parameters[name] for name in whole}
    module._parameters.update(whole)
    try:
        yield
    finally:
        module._parameters.update(sharded)
