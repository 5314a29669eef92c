"""Replayed steps under FSDP2: the losses of steps that are not, all ranks recording together, and FSDP2 as it was.

On the CPU 2 ranks of gloo, a replay played by doing the step again; on GPUs 1 and 2 ranks of NCCL.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import gc
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from played_streams import played
from test_compiling import OnTheCPU
from test_fsdp2 import LIMIT_S, STEPS, arguments, clipped_at, copy_without_the_end, in_ranks
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from helpers import checkpoints, compiled_loss, compiling
from helpers import train as trainer_module
from helpers.compile_counter import CompileCounter
from helpers.ranks import free_port
from helpers.sharded_steps import agreed
from helpers.step_graphs import StepGraphs
from helpers.train import train

ON_A_GPU = torch.cuda.is_available()
# Untied, so that the loss gathers the head; four layers, so that a warm-up of two prefetches one that it does not run.
checkpoints.SHAPES["deep-untied"] = checkpoints.SHAPES["tiny-deep"] | {"tie_word_embeddings": False}


class Evaluates(TrainerCallback):
    """The loss of a batch between replayed steps."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == STEPS - 1:
            ids = torch.arange(2, 2 + 2 * 20, device=model.device).view(2, 20)
            model.eval()
            with torch.no_grad():
                self.loss = float(model(input_ids=ids, labels=ids).loss)
            model.train()


class Recorded(OnTheCPU):
    """A recording as on a GPU, on played streams, whose collectives hang where another rank does not record as well."""

    def _recorded(self, inputs, mode):
        before = [buffer.clone() for buffer in self.buffers]
        StepGraphs._recorded(self, inputs, mode)
        for buffer, kept in zip(self.buffers, before, strict=True):  # a recording adds nothing
            buffer.copy_(kept)
        return super()._recorded(inputs, mode)


class Counted(StepGraphs if ON_A_GPU else Recorded):
    """Remembers the inputs' shapes of each recording and how many steps were replayed."""

    made: list[Counted] = []

    def __init__(self, *args):
        super().__init__(*args)
        self.recorded, self.replayed, self.whole, self.root = [], 0, 0, args[-1].args[0]
        self.made.append(self)

    def __call__(self, *args):
        self.replayed += 1
        self.whole += sum(p.requires_grad and not isinstance(p, DTensor) for p in self.root.parameters())
        return super().__call__(*args)

    def _recorded(self, inputs, mode):
        self.recorded.append([tuple(x.shape) for x in inputs])
        return super()._recorded(inputs, mode)


def rank_replays(folder, ranks: int, replayed: bool, pad_to: int = 8, resume: bool = False, **more) -> dict:
    """Train with ``replayed`` steps, or the same steps otherwise."""
    if ranks == 1:
        here = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": free_port()}
        os.environ.update({k: str(v) for k, v in here.items()} | {"MASTER_ADDR": "127.0.0.1"})
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)  # of each run
    torch._dynamo.reset()
    Counted.made.clear()
    evaluates, decided = Evaluates(), trainer_module.decided
    args = arguments(folder, ranks, compile=True, resume=resume, **more)
    changes = [
        (trainer_module, "decided", lambda args: dataclasses.replace(decided(args), cuda_graphs=replayed)),
        (compiled_loss, "StepGraphs", Counted),
        (compiling, "compile_model", functools.partial(compiling.compile_model, pad_to=pad_to)),
    ]
    if not ON_A_GPU:
        changes.append((compiled_loss, "_on_a_gpu", lambda ids: True))
    with clipped_at(0.1), CompileCounter() as counter, contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(mock.patch.object(*change))
        if not ON_A_GPU:  # other tests trace the regions
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(played())
        result = train(dataclasses.replace(args, fsdp2=True), callbacks=[evaluates])
    made = Counted.made[0] if Counted.made else SimpleNamespace(recorded=[], replayed=0, whole=0, steps={})
    found = {
        "losses": result.losses, "norms": [row["grad_norm"] for row in result.rows], "evaluated": [evaluates.loss],
        "recorded": made.recorded, "replayed": made.replayed, "whole": made.whole, "left": len(made.steps),
        "breaks": counter.graph_breaks, "compiles": counter.compiles, "recompiles": counter.recompiles,
        "reasons": counter.reasons,
    }  # fmt: skip
    Counted.made.clear()
    del made
    gc.collect()
    return found | {"alive": sum(isinstance(x, PeftModel) for x in gc.get_objects())}


def rank_resumes(folder, **more) -> dict:
    return rank_replays(copy_without_the_end(folder, "resumed"), resume=True, **more)


def rank_agrees(batches: list) -> list:
    return [agreed(*of_ranks[dist.get_rank()]) for of_ranks in batches]


AGREED = {  # rows, length and documents on each rank
    ((2, 64, 0), (2, 128, 0)): (128, 0),
    ((1, 64, 16), (1, 64, 32)): (64, 32),
    ((2, 64, 0), (1, 64, 0)): None,  # of other rows
    ((1, 64, 16), (1, 64, 0)): None,  # packed and not
    ((1, 64, None), (1, 64, 16)): None,  # with a mask that it cannot do without
}


def close(got: dict, wanted: dict, tolerance: float, keys: tuple[str, ...] = ("losses", "norms", "evaluated")) -> None:
    for key in keys:
        assert got[key] == pytest.approx(wanted[key], rel=tolerance), key


# On the CPU


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replayed")
    more = {"ranks": 2, "model": "shape:deep-untied", "accumulation": 2}
    calls = {"agrees": (rank_agrees, {"batches": list(AGREED)})}
    for name, replayed in (("replayed", True), ("not", False)):
        calls[name] = (rank_replays, {"folder": folder / name, "replayed": replayed, "save_steps": 4, **more})
    calls["resumed"] = (rank_resumes, {"folder": folder / "replayed", "replayed": True, "save_steps": 4, **more})
    more |= {"model": "shape:tiny-deep", "checkpointing": True}
    calls["tied"] = (rank_replays, {"folder": folder / "tied", "replayed": True, "offload": True, **more})
    calls["tied, not"] = (rank_replays, {"folder": folder / "tied, not", "replayed": False, "offload": False, **more})
    return in_ranks(2, calls)


def test_ranks_agree_on_what_all_can_replay(two):
    for rank in two:
        assert dict(zip(AGREED, rank["agrees"], strict=True)) == AGREED


def test_replayed_steps_train_evaluate_and_resume_as_others(two):
    for name, other in (("replayed", "not"), ("resumed", "replayed"), ("tied", "tied, not")):
        close(two[0][name], two[0][other], 1e-5)
    assert two[0]["replayed"]["replayed"] == STEPS * 2 and two[0]["not"]["replayed"] == 0  # micro-steps of a rank
    assert two[0]["replayed"]["whole"] == 0, "a replay reads shards alone"
    assert two[0]["replayed"]["left"] == 0, "NCCL could not be left before graphs that it is part of"
    assert two[0]["replayed"]["alive"] == 0, "FSDP2 keeps the classes that it makes, and they the model"


def test_ranks_record_the_same_lengths_together(two):
    recorded = two[0]["replayed"]["recorded"]
    assert recorded == two[1]["replayed"]["recorded"]
    assert len({shape for shapes in recorded for shape in shapes}) > 2, "lengths of one bucket would prove nothing"


# On GPUs

GPU = {"dtype": "bfloat16", "nf4": "triton", "model": "shape:deep-untied", "save_steps": 4}


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2])
def test_gpus_replay_the_losses_of_eager_steps(tmp_path, ranks):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    calls = {}
    for name, more in ((128, {}), (16, {}), ("packed", {"packing": True})):
        for replayed in (True, False):
            more |= {"ranks": ranks, "replayed": replayed, "pad_to": 16 if name == 16 else 128, **GPU}
            calls[name, replayed] = (rank_replays, {"folder": tmp_path / f"{name} {replayed}", **more})
    calls["resumed"] = (rank_resumes, {**calls[128, True][1]})
    found = in_ranks(ranks, calls)
    close(found[0][128, True], found[0][128, False], 1e-4)  # all of one length; 1e-5 after five steps on H200s
    close(found[0]["resumed"], found[0][128, True], 1e-4)
    for name in (16, "packed"):  # of other lengths, where another rank's are longer
        close(found[0][name, True], found[0][name, False], 2e-3, ("losses", "evaluated"))
    assert all(len(shapes) == 3 for shapes in found[0]["packed", True]["recorded"])  # positions too
    assert len(found[0][128, True]["recorded"]) == 1 and len(found[0][16, True]["recorded"]) > 2
    assert all(rank[16, True]["recorded"] == found[0][16, True]["recorded"] for rank in found)
    for pad_to in (128, 16):  # compiling is nothing that a graph could hold
        assert found[0][pad_to, True]["compiles"] == found[0][pad_to, False]["compiles"]
        assert found[0][pad_to, True]["breaks"] == 0, found[0][pad_to, True]["reasons"]
