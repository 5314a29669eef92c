"""What a recording of FSDP2's micro-step (helpers/step_graphs.py) needs besides: one length on all ranks, its streams.

A step is recorded as a call of FSDP2's root, hooks and collectives included, so that a replay runs none of them and
leaves FSDP2 as an ordinary step does: sharded, idle, no event pending. What a graph cannot hold, and who sees to it:

- A rank that records warms up first, with collectives of its own. So all ranks record in the same micro-step:
  `agreed` makes their batches equally long, and what is recorded depends on nothing else that differs.
- FSDP2 copies and gathers on streams of its own. Each graph, of the forward and of the backward pass, must have them
  fork from its stream and join it (`streams_of`). No event is waited for across the two: after forward FSDP2 has
  waited for all that it gathered, and it reduces in backward alone.
- Its copies into and out of collectives read a table of addresses in the host's memory, which torch keeps for a
  graph from 2.11 on (pytorch#164264).
- NCCL registers the memory of recorded collectives, taking it for one piece; segments that grow are not
  (pytorch#158029). `start_ranks` sets NCCL_GRAPH_REGISTER=0.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

LEAST_TORCH = (2, 11)


def agreed(rows: int, length: int, documents: int | None) -> tuple[int, int] | None:
    """The longest ``length`` and the most ``documents`` of all ranks' batches; None where they cannot all replay.

    Every rank must call it, for every micro-step of training. Processes wait for each other there, never for a GPU.

    Args:
        documents: that a packed batch needs room for, 0 of one that is not, None of one that cannot be recorded.
    """
    mine = torch.tensor([rows, length, -1 if documents is None else documents])  # on the CPU: gloo's
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    all_rows, lengths, packed = torch.stack(theirs).T.tolist()
    alike = len(set(all_rows)) == 1 and len({count > 0 for count in packed}) == 1 and min(packed) >= 0
    return (max(lengths), max(packed)) if alike else None


def streams_of(root: nn.Module) -> list[torch.cuda.Stream]:
    """The streams that FSDP2 launches on beside the current one, once ``root``, which it shards, has run."""
    context = root._get_fsdp_state()._comm_ctx  # there is no public name for them
    return [stream for stream in vars(context).values() if isinstance(stream, torch.cuda.Stream)]


def sharded_modules(root: nn.Module) -> list[FSDPModule]:
    """The modules of ``root`` that FSDP2 shards: a walk of milliseconds over a large model with adapters."""
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def put_away(sharded: Iterable[FSDPModule]) -> None:
    """Shard again all that ``sharded`` have gathered. FSDP2 leaves its root, which holds the adapters, whole for a
    backward pass: after an evaluation none comes, and a replay calls none of the hooks that would gather them anew."""
    for module in sharded:
        module.reshard()
