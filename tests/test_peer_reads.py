"""Frozen shards read where they lie: the bytes and the losses of shards that a collective gathers.

On the CPU a rank's memory is a file that all ranks map; on GPUs it is symmetric memory.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from test_fsdp2 import (
    GPU_PAYLOADS,
    PAYLOADS,
    check_shards,
    in_ranks,
    rank_evaluates,
    rank_gathers,
    rank_reads_ends,
    rank_trains,
)
from test_sharded_steps import close, rank_replays
from torch import Tensor

from helpers import checkpoints
from helpers.nf4_pieces import BlocksAhead
from helpers.peer_reads import Lender

TRAINED = {
    "compiled": {"compile": True, "checkpointing": True},
    "kept": {"fsdp2_options": "keep-gathered,prefetch=2", "checkpointing": False, "loss": "full"},
    "deep": {"model": "shape:tiny-deep"},
    "tied": {"model": "shape:tiny", "fsdp2_options": "prefetch=0"},
}
TRAINED = {name: {"nf4": "triton", "accumulation": 1, **more} for name, more in TRAINED.items()}  # slow on the CPU
DEEP = list(range(checkpoints.SHAPES["tiny-deep"]["num_hidden_layers"]))
NOT_OFFLOADED = [payload for payload in PAYLOADS if not payload.get("cpu_offload")]


def mapped(folder: Path) -> Callable:
    """`peer_reads._symmetric` without GPUs."""

    def symmetric(size: int, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        paths = [str(folder / f"memory of rank {rank}") for rank in range(dist.get_world_size())]
        mine = torch.from_file(paths[dist.get_rank()], shared=True, size=size, dtype=torch.uint8)
        dist.barrier()
        return mine, [torch.from_file(path, shared=True, size=size, dtype=torch.uint8) for path in paths]

    return symmetric


@contextlib.contextmanager
def lent(folder: Path) -> Iterator[list[int]]:
    """Within, shards are read where they lie; which blocks' were, one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    fetch, read = BlocksAhead._fetch, []

    def counted(self: BlocksAhead, block: int) -> None:
        held = dict(self.held)
        fetch(self, block)
        if self.held != held:
            read.append(block)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(BlocksAhead, "_fetch", counted))
        if not torch.cuda.is_available():
            stack.enter_context(mock.patch("helpers.peer_reads.possible", lambda: True))
            stack.enter_context(mock.patch("helpers.peer_reads._symmetric", mapped(folder)))
        yield read


def rank_reads(act: Callable, memory: Path, **more) -> dict:
    dist.barrier()  # nobody still has the last run's files
    with lent(memory) as read:
        found = act(**more)
    gc.collect()
    return {"found": found, "read": read, "lent": sum(isinstance(x, Lender) for x in gc.get_objects())}


def rank_misreads(memory: Path) -> str:
    """The first rank is given its own memory for the second's."""
    memory.mkdir(exist_ok=True)
    symmetric = mapped(memory)

    def wrong(size: int, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        mine, everyones = symmetric(size, device)
        return mine, [mine, mine] if dist.get_rank() == 0 else everyones

    with mock.patch("helpers.peer_reads._symmetric", wrong), pytest.raises(RuntimeError) as error:
        lender = Lender([100], torch.device("cpu"))
        lender.take(100, torch.uint8).fill_(1 + dist.get_rank())
        lender.lend()
        raise RuntimeError("nothing was found out")
    return str(error.value)


def calls_of(folder: Path, trained: dict[str, dict], payloads: list[dict]) -> dict[str, tuple]:
    calls = {}
    for name, more in trained.items():
        calls[f"{name}, lent"] = (
            rank_reads,
            {"act": rank_trains, "memory": folder / name, "folder": folder / f"{name} 1", **more},
        )
        options = f"{more.get('fsdp2_options', '')} no-peer-reads"
        calls[name] = (rank_trains, {"folder": folder / f"{name} 2", **more, "fsdp2_options": options})
    for i, more in enumerate(payloads):
        more = {"act": rank_gathers, "memory": folder / f"bytes {i}", "decoder": "triton", **more}
        calls[f"bytes {i}"] = (rank_reads, more)
    calls["evaluated"] = (rank_reads, {"act": rank_evaluates, "memory": folder / "evaluated", "decoder": "triton"})
    for shape in ("tiny", "tiny-untied"):
        calls[f"ends {shape}"] = (rank_reads, {"act": rank_reads_ends, "memory": folder / shape, "shape": shape})
    return calls


def check(ranks: list[dict], trained: dict[str, dict], payloads: list[dict]) -> None:
    for name in trained:
        for key in ("losses", "norms"):
            assert ranks[0][f"{name}, lent"]["found"][key] == ranks[0][name][key], (name, key)
        check_shards([rank[f"{name}, lent"]["found"] for rank in ranks])
        blocks = DEEP if name == "deep" else [0, 1]
        assert not any(rank[f"{name}, lent"]["lent"] for rank in ranks), "memory is held that nobody reads any more"
        assert all(set(rank[f"{name}, lent"]["read"]) == set(blocks) for rank in ranks)
        for key in ("breaks", "compiles", "recompiles"):  # one graph for all blocks, read or gathered
            assert ranks[0][f"{name}, lent"]["found"][key] == ranks[0][name][key], (name, key)
        assert ranks[0][name]["breaks"] == ranks[0][name]["recompiles"] == 0
    for rank in ranks:
        for i in range(len(payloads)):
            changed = rank[f"bytes {i}"]["found"]
            assert len(changed) > 60 and not any(n for n, _ in changed.values())
            assert rank[f"bytes {i}"]["read"]
        assert rank["evaluated"]["read"] == [0, 1] * 4  # two forward passes, and two tokens
        assert rank["evaluated"]["found"]["moved"] > 0.1
        assert rank["evaluated"]["found"]["parts"][0].endswith("on each, 4-bit pieces read where they lie")
        for shape in ("tiny", "tiny-untied"):
            assert rank[f"ends {shape}"]["found"]["difference"] < 1e-5


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_read_where_they_lie_are_the_gathered_ones(tmp_path, ranks):
    trained = TRAINED if ranks == 2 else {"tied": TRAINED["tied"]}
    check(in_ranks(ranks, calls_of(tmp_path, trained, NOT_OFFLOADED)), trained, NOT_OFFLOADED)


def test_memory_that_is_not_the_other_ranks_is_found_out_before_training(tmp_path):
    first, second = in_ranks(2, {"wrong": (rank_misreads, {"memory": tmp_path})})
    assert "rank 0 does not read what rank 1 wrote: give --fsdp2_options no-peer-reads" in first["wrong"]
    assert second["wrong"] == "nothing was found out"


def rank_replays_reading(folder: Path, **more) -> dict:
    """Replayed steps, whose copies are on a stream of their own and must fork and join by CUDA's rules."""
    with mock.patch.object(Lender, "copies_aside", True):
        return rank_reads(rank_replays, folder / "memory", folder=folder, ranks=2, replayed=True, **more)


def test_replayed_steps_read_as_others_do(tmp_path):
    more = {"model": "shape:deep-untied", "checkpointing": True, "accumulation": 1, "nf4": "triton"}
    first, _ = in_ranks(2, {
        "lent": (rank_replays_reading, {"folder": tmp_path / "lent", **more}),
        "not": (rank_replays, {"folder": tmp_path / "not", "ranks": 2, "replayed": False, **more}),
    })  # fmt: skip
    assert first["lent"]["read"] and first["lent"]["found"]["replayed"]
    close(first["lent"]["found"], first["not"], 1e-5)


# On GPUs

GPU_TRAINED = {name: {"dtype": "bfloat16", "nf4": "triton", **more} for name, more in TRAINED.items()}


@pytest.mark.gpu
def test_gpus_read_each_others_shards(tmp_path):
    if torch.cuda.device_count() < 2 or not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("needs 2 GPUs that reach each other's memory")
    payloads = [payload for payload in GPU_PAYLOADS if not payload.get("cpu_offload")]
    check(in_ranks(2, calls_of(tmp_path, GPU_TRAINED, payloads)), GPU_TRAINED, payloads)
