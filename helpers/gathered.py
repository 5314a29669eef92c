"""Frozen weights of the embedding and the head, sharded over all ranks and whole only while they are read.

FSDP2 gathers the weights of a module into one buffer, rank by rank, and copies from there to where each weight lies: of
an 8B model's embedding two times a GiB at once, and a tied one, which both ends must find, it holds for the whole step.
But each end has one weight, split along dim 0, whose parts follow each other as they are gathered. So here they are
`DTensor` parameters that FSDP2 ignores; each module's forward gathers them in place and lets them go.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard


def shard_ends(modules: Iterable[nn.Module], dtype: torch.dtype | None, offload: bool) -> set[nn.Parameter]:
    """Shard the frozen parameters of ``modules`` in place, each once where several share it; what FSDP2 must ignore.

    Args:
        dtype: what they are gathered in; None: as stored.
        offload: shards lie in the host's memory.
    """
    sharded: dict[nn.Parameter, nn.Parameter] = {}
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    for module in modules:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in sharded:
                sharded[parameter] = nn.Parameter(_shard(parameter.data, mesh, offload), requires_grad=False)
            setattr(module, name, sharded[parameter])
        module._gathered_in = dtype
        module.forward = functools.partial(_forward, type(module).forward, module)
    return set(sharded.values())


@torch.no_grad()
def _shard(whole: Tensor, mesh: DeviceMesh, offload: bool) -> DTensor:
    parts = whole.chunk(mesh.size())
    mine = parts[mesh.get_local_rank()].clone() if mesh.get_local_rank() < len(parts) else whole[:0].clone()
    shard = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
    if offload and whole.is_cuda:  # later, since `from_local` moves what it gets to the mesh's kind of device
        shard = shard.cpu()
        shard.to_local().set_(mine.cpu().pin_memory())
    return shard


def _forward(forward: Callable, module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    with gathered(module, x.device):
        return forward(module, x, *args, **kwargs)


def _arrived(gathering: DTensor) -> Tensor:
    local = gathering.to_local()
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


@torch.no_grad()
def gather_ahead(module: nn.Module, device: torch.device) -> None:
    """Begin to gather the sharded parameters of ``module``; whoever reads them in `gathered` waits for them."""
    module._gathering = {
        name: p.to(device, module._gathered_in or p.dtype).redistribute(placements=[Replicate()], async_op=True)
        for name, p in module.named_parameters(recurse=False)
        if isinstance(p, DTensor)
    }


@contextlib.contextmanager
def gathered(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, the parameters of ``module`` that `shard_ends` has sharded are whole. Others stay as they are."""
    if "_gathering" not in vars(module):
        gather_ahead(module, device)
    gathering = vars(module).pop("_gathering").items()
    whole = {name: nn.Parameter(_arrived(p), requires_grad=False) for name, p in gathering}
    sharded = {name: module._parameters[name] for name in whole}
    module._parameters.update(whole)
    try:
        yield
    finally:
        module._parameters.update(sharded)
