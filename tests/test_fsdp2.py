"""FSDP2 over real process groups: bytes, shards, losses, checkpoints and faults.

On the CPU 2 and 3 ranks of gloo, forked from a server that has everything imported; on GPUs 2 ranks of NCCL.
"""

from __future__ import annotations

import contextlib
import csv
import faulthandler
import functools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from queue import Empty
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import TrainerCallback

from helpers import checkpoints, fsdp2, zero_bubble
from helpers import train as trainer_module
from helpers.compile_counter import CompileCounter
from helpers.fsdp2_features import changed_bytes, shares_of
from helpers.nf4_tensor import NF4Tensor
from helpers.ranks import free_port
from helpers.results import read_rows
from helpers.train import TrainArguments, train

STEPS = 6
MICRO_STEPS = 6  # an optimizer step, over all ranks: 2 and 3 divide it
ROWS = {"dataset": "random:8-40x64", "max_length": 40, "lora_rank": 6, "learning_rate": 1e-2, "steps": STEPS}
PIPELINES = torch.__version__ >= (2, 13)
REDUCE = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
TOLERANCE = {"float32": 5e-4, "bfloat16": 2e-3, "float16": 2e-3, "8-bit states": 2e-3}


def arguments(folder, ranks: int, **more) -> TrainArguments:
    more = {"accumulation": MICRO_STEPS // ranks, "dtype": "float32"} | more
    more = {"model": "shape:tiny-untied", "fsdp2": ranks > 1} | more
    return TrainArguments(output_dir=str(folder), batch_size=1, **ROWS | more)


@contextlib.contextmanager
def clipped_at(norm: float):
    """Train with gradients clipped at ``norm``, low enough that every step of these runs is clipped."""
    real = trainer_module.sft_config

    def config(args):
        made = real(args)
        made.max_grad_norm = norm
        return made

    trainer_module.sft_config = config
    try:
        yield
    finally:
        trainer_module.sft_config = real


# What runs in the ranks. Each check returns what it found; the test judges.


class InTheMiddle(TrainerCallback):
    """Bytes this rank holds of each frozen weight, and where, in the middle of a run; weights gathered after it."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == STEPS - 1:
            self.held = fsdp2.frozen_bytes(model)
            self.devices = {p.device.type for p in model.parameters()}

    def on_train_end(self, args, state, control, **kwargs):
        self.gathered_while_saving = 0

    @contextlib.contextmanager
    def gathering(self):
        real = NF4Tensor.fsdp_pre_all_gather
        self.gathered_while_saving = 0

        @functools.wraps(real)  # FSDP2 counts its parameters
        def counted(tensor, *args):
            self.gathered_while_saving += 1
            return real(tensor, *args)

        NF4Tensor.fsdp_pre_all_gather = counted
        try:
            yield
        finally:
            NF4Tensor.fsdp_pre_all_gather = real


class Dies(TrainerCallback):
    """Kills this process, as a machine would, while it writes its part of the checkpoint of step 4."""

    def on_train_begin(self, args, state, control, **kwargs):
        if dist.get_rank() == 1:
            writing("checkpoint-4/optimizer", lambda: os.kill(os.getpid(), signal.SIGKILL))


class Starves(TrainerCallback):
    """Leaves the GPU of rank 1 no memory to go on with at step 3."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and dist.get_rank() == 1:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1e-6)


def rank_trains(folder, ranks: int | None = None, **more) -> dict:
    torch._dynamo.reset()
    watch = InTheMiddle()
    reduced = mock.patch.object(dist, REDUCE, wraps=getattr(dist, REDUCE))
    with clipped_at(0.1), CompileCounter() as counter, watch.gathering(), reduced as reduces:
        result = train(arguments(folder, ranks or dist.get_world_size(), **more), callbacks=[watch])
    return {
        "losses": result.losses, "norms": [row["grad_norm"] for row in result.rows], "held": watch.held,
        "devices": watch.devices, "gathered_while_saving": watch.gathered_while_saving,
        "breaks": counter.graph_breaks, "compiles": counter.compiles, "recompiles": counter.recompiles,
        "reasons": counter.reasons, "reductions": reduces.call_count,
    }  # fmt: skip


def writing(what: str, act):
    """Do ``act`` instead of writing this rank's part of ``what``; returns the function that undoes it."""
    from torch.distributed.checkpoint import FileSystemWriter

    real = FileSystemWriter.write_data

    def write(self, plan, planner):
        return act() if what in str(self.path) else real(self, plan, planner)

    FileSystemWriter.write_data = write
    return lambda: setattr(FileSystemWriter, "write_data", real)


def rank_loads(folder, checkpoint) -> dict:
    """Train from a 4-bit checkpoint on disk; also when this rank began and ended to read it."""
    real, read = checkpoints.load_base, []

    def load_base(*args, **kwargs):
        read.append(time.monotonic())
        time.sleep(0.2)  # or the other rank might be late enough by chance
        loaded = real(*args, **kwargs)
        read.append(time.monotonic())
        return loaded

    checkpoints.load_base = load_base
    try:
        return rank_trains(folder, model=str(checkpoint)) | {"read": read}
    finally:
        checkpoints.load_base = real


def copy_without_the_end(folder, name: str) -> Path:
    """A copy of a run's folder, whose last checkpoint is the one before that of the end; the same on every rank."""
    copy = Path(f"{folder} {name}")
    if dist.get_rank() == 0:
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(f"checkpoint-{STEPS}"))
    dist.barrier()
    return copy


def rank_resumes(folder, **more) -> dict:
    copy = copy_without_the_end(folder, f"resumed on {dist.get_world_size()}")
    return rank_trains(copy, resume=True, **more)


def rank_gathers(storage: str, payload: str, shape: str, nested: bool = True, **options) -> dict[str, tuple[int, int]]:
    options = {name: getattr(torch, value) if name == "param_dtype" and value else value
               for name, value in options.items()}  # fmt: skip
    return changed_bytes(_model(shape, storage, payload, nested), fsdp2.FSDP2Config(**options))


def rank_reads_ends(shape: str) -> dict:
    """Logits of a sharded model, which reads its embedding and its head, beside the whole model's."""
    model = _model(shape, "uint8", "random", True).eval()
    ids = torch.arange(3, 19, device=model.device)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        fsdp2.prepare_fsdp2(model, fsdp2.FSDP2Config())
        got = model(input_ids=ids).logits
    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    rows = [end.to_local().shape[0] for end in ends]
    return {"difference": float((got - wanted).abs().max()), "rows": rows, "tied": ends[0] is ends[1]}


def rank_evaluates(decoder: str = "bitsandbytes") -> dict:
    """Logits before and after the adapters change, with a generation between, and the adapters gathered after that."""
    model = _model("tiny-untied", "uint8", "random", True).eval()
    ids = torch.arange(3, 19, device=model.device)[None]
    fsdp2.prepare_fsdp2(model, fsdp2.FSDP2Config(param_dtype=torch.bfloat16, decoder=decoder))
    register_fsdp_forward_method(model, "generate")
    with torch.no_grad():
        first = model(input_ids=ids).logits
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.to_local().add_(0.1)
        second = model(input_ids=ids).logits
        model.generate(input_ids=ids, max_new_tokens=2)
    return {
        "moved": float((second - first).abs().max()),
        "parts": fsdp2.active_parts(model),
        "saved": {str(tensor.dtype) for tensor in fsdp2.gather_trainable(model).values()},
    }


def rank_refuses_unequal_weights() -> str:
    model = _model("tiny", "uint8", "random", True)
    if dist.get_rank() == 1:
        layer = next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp.up_proj.base_layer"))
        layer.weight.data.view(-1)[7] ^= 1
    with pytest.raises(ValueError) as error:
        fsdp2.prepare_fsdp2(model, fsdp2.FSDP2Config())
    return str(error.value)


def rank_pipelines(ranks: int) -> dict[str, list[float]]:
    model = _model("tiny-deep", "uint8", None, True)
    if ranks > 1:
        model.gradient_checkpointing_enable()
        model.get_base_model().model.layers[0]._gradient_checkpointing_func = torch.utils.checkpoint.checkpoint
        with pytest.raises(ValueError, match="use_reentrant"):
            zero_bubble.schedule(model, 0, ranks, 4, torch.device("cpu"))
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = torch.randint(3, 512, (3, 4, 16), generator=torch.Generator().manual_seed(2)).unbind()
    return zero_bubble.train(model, batches, 4, 1e-2, torch.device("cpu"))


def rank_runs_out_of_disk(folder) -> tuple[str, list[str]]:
    """The last rank cannot write its part of the optimizer at step 4."""

    def full():
        raise OSError(28, "No space left on device")

    last = dist.get_rank() == dist.get_world_size() - 1
    undo = writing("checkpoint-4/optimizer", full) if last else lambda: None
    said = "nothing was raised"
    try:
        with clipped_at(0.1):
            train(arguments(folder, dist.get_world_size(), save_steps=2))
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    finally:
        undo()
    left = sorted(path.name for path in Path(folder).glob("checkpoint-*"))
    dist.barrier()  # before another call resumes from what is left
    return said, left


def _model(shape: str, storage: str, payload: str, nested: bool):
    """A tiny model with LoRA whose 4-bit bytes are ``payload``, stored as ``storage``."""
    torch.manual_seed(0)
    model = checkpoints.attach_lora(checkpoints.load_base(f"shape:{shape}", torch.float32).model, 6)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight = module.weight
            if payload is None:
                continue
            if payload == "random":
                data = torch.randint(0, 256, (weight.numel(),), dtype=torch.uint8, generator=generator)
            else:  # every 16-bit pattern, the NaNs of float16 and bfloat16 among them
                data = torch.arange(weight.numel() // 2, dtype=torch.int32).to(torch.int16).view(torch.uint8)
            weight.data = data.to(weight.device).view(getattr(torch, storage)).view(-1, 1)
            if not nested:
                state = weight.quant_state
                state.absmax, state.nested, state.state2, state.offset = state.absmax.float(), False, None, None
    return model


# Starting ranks


LIMIT_S = 200  # until ranks that hang say where and end


def in_ranks(ranks: int, calls: dict[str, tuple]) -> list[dict]:
    """Run ``calls`` (name: (function, kwargs)) in order in each of ``ranks`` processes; each rank's results by name."""
    port = free_port()
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")  # CUDA cannot fork
    context.set_forkserver_preload(["helpers.train", "helpers.compiling", "peft", "datasets"])
    queue = context.Queue()
    processes = [context.Process(target=_rank, args=(r, ranks, port, calls, queue), daemon=True) for r in range(ranks)]
    for process in processes:
        process.start()
    found: dict[int, dict] = {}
    try:
        while len(found) < ranks:
            with contextlib.suppress(Empty):
                rank, result = queue.get(timeout=1)
                if isinstance(result, str):
                    raise AssertionError(f"rank {rank}:\n{result}")
                found[rank] = result
            assert not any(process.exitcode for process in processes), "a rank ended early; see its standard error"
    finally:
        for process in processes:
            process.join(timeout=5 if len(found) == ranks else 0.1)
            process.kill()
    return [found[rank] for rank in range(ranks)]


def _rank(rank: int, ranks: int, port: int, calls: dict, queue) -> None:
    if ranks == 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    else:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in here.items()} | {"MASTER_ADDR": "127.0.0.1"})
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(1)
        if ranks > 1:
            fsdp2.start_ranks("cuda" if torch.cuda.is_available() else "cpu")
        queue.put((rank, {name: function(**kwargs) for name, (function, kwargs) in calls.items()}))
        fsdp2.stop_ranks()
    except BaseException:
        queue.put((rank, traceback.format_exc()))


# On the CPU

VARIANTS = {
    "plain": {},
    "compiled": {"compile": True},
    "offloaded": {"fsdp2_options": "offload,full-checkpoints", "save_steps": 4},
    "kept": {"fsdp2_options": "keep-gathered,prefetch=2", "checkpointing": False, "loss": "full"},
    "8-bit": {"optimizer": "adamw_8bit", "lora_rank": 64, "save_steps": 4},
}
# Adam forgives a gradient of another scale; SGD does not.
VARIANTS["kept"] |= {"optimizer": "sgd", "learning_rate": 3.0}
TIED = {"model": "shape:tiny"}
ALONE = {name: VARIANTS[name] for name in ("plain", "kept", "8-bit")} | {"tied": TIED}
WITHOUT = {"fsdp2_options": "", "save_steps": 0}  # what one process leaves out
PAYLOADS = [
    {"storage": "uint8", "payload": "random", "shape": "tiny-untied"},
    {"storage": "float16", "payload": "patterns", "shape": "tiny"},
    {"storage": "bfloat16", "payload": "patterns", "shape": "tiny-untied", "param_dtype": "float16"},
    {"storage": "float32", "payload": "random", "shape": "tiny", "nested": False, "cpu_offload": True},
]


def test_a_scaler_lets_an_optimizer_be_resumed():
    class Loads:
        def _load_optimizer_and_scheduler(self, checkpoint):
            self.loaded = get_optimizer_state_dict(self.model, self.optimizer)

    class Trains(fsdp2.TrainsSharded, Loads):
        model = torch.nn.Linear(2, 2)

    Accelerator(cpu=True)
    trainer, scaler = Trains(), torch.amp.GradScaler("cpu")
    trainer.optimizer = AcceleratedOptimizer(torch.optim.AdamW(trainer.model.parameters()), scaler=scaler)
    with pytest.raises(AssertionError, match="_scale is None"):
        Loads._load_optimizer_and_scheduler(trainer, "checkpoint-1")
    trainer.model.zero_grad()
    trainer._load_optimizer_and_scheduler("checkpoint-1")
    assert set(trainer.loaded["state"]) == {"weight", "bias"} and trainer.optimizer.scaler is scaler


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp2")


@pytest.fixture(scope="module")
def alone(folder):
    """The runs of one process that sharded runs must equal."""
    runs = ALONE | {"bfloat16": {"dtype": "bfloat16", "accumulation": 2}}
    return {name: rank_trains(folder / f"alone {name}", ranks=1, **more | WITHOUT) for name, more in runs.items()}


@pytest.fixture(scope="module")
def checkpoint(folder):
    """The tiny model as a checkpoint quantised already, with its tokenizer."""
    made = checkpoints.load_base("shape:tiny-untied", torch.float32)
    made.model.save_pretrained(folder / "checkpoint")
    made.tokenizer.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def killed(folder):
    """What the launcher says of a run whose rank 1 was killed while it saved."""
    with pytest.raises(RuntimeError) as error:
        fsdp2.launch(2, ["-m", "tests.test_fsdp2", "dies", str(folder / "killed")], folder / "logs")
    return str(error.value)


@pytest.fixture(scope="module")
def two(folder, killed, checkpoint):
    """Everything that 2 ranks do, in one start of them."""
    calls = {name: (rank_trains, {"folder": folder / name, **more}) for name, more in VARIANTS.items()}
    calls |= {f"bytes {i}": (rank_gathers, more) for i, more in enumerate(PAYLOADS)}
    calls["bfloat16"] = (rank_trains, {"folder": folder / "bfloat16", "dtype": "bfloat16", "accumulation": 1})
    calls["evaluated"] = (rank_evaluates, {})
    calls["unequal"] = (rank_refuses_unequal_weights, {})
    if PIPELINES:
        calls["pipeline"] = (rank_pipelines, {"ranks": 2})
    calls["8-bit resumed"] = (rank_resumes, {"folder": folder / "8-bit", **VARIANTS["8-bit"]})
    calls["loaded"] = (rank_loads, {"folder": folder / "loaded", "checkpoint": checkpoint})
    calls["disk"] = (rank_runs_out_of_disk, {"folder": folder / "disk"})
    calls["disk resumed"] = (rank_trains, {"folder": folder / "disk", "save_steps": 2, "resume": True})
    return in_ranks(2, calls)


@pytest.fixture(scope="module")
def three(folder, two):
    calls = {"tied": (rank_trains, {"folder": folder / "tied", **TIED}), "bytes": (rank_gathers, PAYLOADS[0])}
    calls |= {f"ends {shape}": (rank_reads_ends, {"shape": shape}) for shape in ("tiny", "tiny-untied")}
    calls["full resumed"] = (rank_resumes, {"folder": folder / "offloaded", **VARIANTS["offloaded"]})
    calls["killed resumed"] = (rank_resumes, {"folder": folder / "killed", "save_steps": 2})
    calls["8-bit resumed"] = (rank_resumes, {"folder": folder / "8-bit", **VARIANTS["8-bit"]})
    return in_ranks(3, calls)


def check_losses(got: dict, wanted: dict, dtype: str = "float32") -> None:
    for key in ("losses", "norms"):
        pairs = list(zip(got[key], wanted[key], strict=True))
        assert len(pairs) == STEPS
        assert max(abs(a - b) / abs(b) for a, b in pairs) <= TOLERANCE[dtype], (key, pairs)


def check_shards(ranks: list[dict], block: int = 16384 // 2 + 256 + 4) -> None:
    """In the middle of training every frozen weight lies on the ranks in equal parts, within one 4-bit block or row."""
    for name in ranks[0]["held"]:
        parts = [rank["held"][name] for rank in ranks]
        slack = block if "base_layer" in name else 128 * 4
        assert sum(parts) and max(parts) <= sum(parts) / len(ranks) + slack, (name, parts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_equal_one_process(alone, two, variant):
    kind = "8-bit states" if variant == "8-bit" else "float32"
    check_losses(two[0][variant], alone[variant if variant in alone else "plain"], kind)
    assert min(two[0][variant]["norms"]) > 0.1, "gradients must be clipped for this test to mean that clipping is equal"
    assert not two[1][variant]["losses"], "one rank logs"
    check_shards([rank[variant] for rank in two])


def test_two_ranks_equal_one_process_to_the_bit_in_16_bits(alone, two):
    for key in ("losses", "norms"):  # a sum of two micro-batches has no order; one bit would grow to 4e-3 of the loss
        assert two[0]["bfloat16"][key] == alone["bfloat16"][key]
    assert len(set(two[0]["bfloat16"]["losses"])) == STEPS


def test_three_ranks_with_tied_embeddings_equal_one_process(alone, three):
    check_losses(three[0]["tied"], alone["tied"])
    check_shards([rank["tied"] for rank in three])


def test_gathered_weights_are_the_loaded_bytes(two, three):
    found = [rank[f"bytes {i}"] for rank in two for i in range(len(PAYLOADS))] + [rank["bytes"] for rank in three]
    for changed in found:
        assert len(changed) > 60 and sum(n for _, n in changed.values()) > 400_000
        assert not any(n for n, _ in changed.values()), {k: v for k, v in changed.items() if v[0]}


def test_a_tied_weight_counts_once_among_those_loaded():
    loaded = {"embed_tokens.weight": 6 * 1024**3, "lm_head.weight": 6 * 1024**3, "q_proj.weight": 2 * 1024**3}
    held = {"embed_tokens.weight": 3 * 1024**3, "q_proj.weight": 1024**3 + 10}
    found = shares_of(held, loaded, 2)
    assert found["beyond_share_bytes"] == 10 and found["frozen_gib_loaded"] == 8
    assert found["frozen_gib"] == pytest.approx(4)


def test_embedding_and_head_are_whole_only_while_they_are_read(three):
    for shape, tied in (("tiny", True), ("tiny-untied", False)):
        found = [rank[f"ends {shape}"] for rank in three]
        assert [end["rows"] for end in found] == [[171, 171], [171, 171], [170, 170]]  # of 512: not in equal parts
        assert all(end["difference"] < 1e-5 and end["tied"] is tied for end in found)


def test_blocks_compile_to_one_graph_without_breaks(two):
    for rank in two:
        found = rank["compiled"]
        assert (found["breaks"], found["recompiles"]) == (0, 0), found["reasons"]
        assert found["compiles"] == 5  # all blocks whole, their two halves, the rotary frequencies, norm and loss


def test_an_evaluation_leaves_nothing_gathered(two):
    assert min(rank["evaluated"]["moved"] for rank in two) > 0.1, "evaluated with adapters of before"
    assert two[0]["evaluated"]["parts"][0].endswith("on each, gathered by collectives")
    assert two[0]["evaluated"]["saved"] == {"torch.float32"}, "saved what was gathered"


def test_adapters_are_reduced_together_once_a_micro_step(two):
    assert two[0]["plain"]["reductions"] == STEPS * MICRO_STEPS // 2


def test_adapter_is_the_one_that_one_process_saves(folder, alone, two):
    wanted = load_file(folder / "alone plain" / "adapter_model.safetensors")
    for name in ("plain", "offloaded"):
        got = load_file(folder / name / "adapter_model.safetensors")
        assert got.keys() == wanted.keys()
        for key in wanted:
            torch.testing.assert_close(got[key], wanted[key], rtol=1e-3, atol=1e-5)


def test_saving_gathers_nothing_of_the_base(two):
    assert all(rank["plain"]["gathered_while_saving"] == 0 for rank in two)


def test_resumes_on_the_same_and_on_another_number_of_ranks(alone, two, three):
    for ranks in (two, three):
        check_losses(ranks[0]["8-bit resumed"], two[0]["8-bit"])
    check_losses(three[0]["full resumed"], alone["plain"])
    check_losses(three[0]["killed resumed"], alone["plain"])


def test_a_killed_rank_is_named_and_resume_reaches_the_same_losses(folder, alone, killed, three):
    assert killed.startswith("rank 1 was killed by SIGKILL") and killed.count("\n") == 0
    assert [path.name for path in (folder / "killed").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list((folder / "killed resumed on 3").glob("partial*"))
    check_losses(three[0]["killed resumed"], alone["plain"])
    with open(folder / "killed resumed on 3" / "train_log.csv", newline="") as file:  # each step once
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, STEPS + 1))


def test_a_full_disk_loses_no_checkpoint(folder, alone, two):
    assert all("No space left on device" in rank["disk"][0] for rank in two)
    assert all(rank["disk"][1] == ["checkpoint-2"] for rank in two)
    check_losses(two[0]["disk resumed"], alone["plain"])


def test_ranks_read_a_checkpoint_one_after_the_other(alone, two):
    """Host memory then holds one copy of it at a time, and not one a rank."""
    check_losses(two[0]["loaded"], alone["plain"])
    (_, first_ends), (second_begins, _) = (rank["loaded"]["read"] for rank in two)
    assert first_ends <= second_begins


def test_ranks_with_other_weights_are_refused_by_name(two):
    for rank in two:
        assert "rank 1 loaded other weights than rank 0, first in" in rank["unequal"]
        assert "layers.1.mlp.up_proj" in rank["unequal"]


@pytest.mark.skipif(not PIPELINES, reason="before torch 2.13 pipelines do not start over gloo")
def test_zero_bubble_pipeline_equals_one_process(two):
    wanted = rank_pipelines(1)
    for rank in two:
        for key in ("losses", "norms"):
            torch.testing.assert_close(rank["pipeline"][key], wanted[key], rtol=5e-4, atol=0)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("class OutOfMemoryError(RuntimeError): pass\nif rank == 1: raise OutOfMemoryError('CUDA out of memory.')",
         "rank 1 ended with code 1: OutOfMemoryError: CUDA out of memory."),
        ("if rank == 0: print('error: --steps is 0', file=sys.stderr); sys.exit(2)",
         "rank 0 ended with code 2: error: --steps is 0"),
    ],
)  # fmt: skip
def test_launcher_tells_which_rank_failed_and_why(tmp_path, script, said):
    waits = f"import os, sys, time\nrank = int(os.environ['RANK'])\n{script}\ntime.sleep(60)"
    with pytest.raises(RuntimeError) as error:
        fsdp2.launch(2, ["-c", waits], tmp_path)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_torchrun_and_accelerate_launch_start_the_same_run(tmp_path):
    root, found = Path(__file__).parents[1], {}
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    for name, launcher in (
        ("torchrun", ["torch.distributed.run", "--nproc_per_node=2", "--master_port"]),
        ("accelerate", ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
                        "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port"]),
    ):  # fmt: skip
        flags = {"model": "shape:tiny", "fsdp2": True, "output_dir": tmp_path / name, "prompt": "", **ROWS}
        command = [sys.executable, "-m", *launcher, str(free_port()), "-m", "helpers.train"]
        command += [f"--{flag}={value}" for flag, value in flags.items()]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
        assert ran.returncode == 0, ran.stderr[-2000:]
        assert "FSDP2 over 2 ranks" in ran.stdout and ran.stdout.count("step:") == STEPS
        assert "prefer `activation_checkpointing`" not in ran.stderr  # FSDP2 gathers a block once for both
        assert load_file(tmp_path / name / "adapter_model.safetensors")
        rows = read_rows(tmp_path / name / "train_log.csv")
        found[name] = [(row["loss"], row["grad_norm"]) for row in rows]
    assert found["torchrun"] == found["accelerate"] and len(found["torchrun"]) == STEPS


def test_refusals_before_anything_starts(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="cpu_offload keeps shards in host memory"):
        fsdp2.FSDP2Config(cpu_offload=True, peer_reads=True)
    with pytest.raises(ValueError, match="start with torchrun --nproc_per_node"):
        train(arguments(tmp_path / "out", 2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"2 processes were started on a machine with 1 GPU\(s\)"):
        fsdp2.start_ranks("cuda")
    with pytest.raises(ValueError, match="'offlaod' is not one of offload, keep-gathered"):
        train(arguments(tmp_path / "out", 2, fsdp2_options="offlaod"))
    with pytest.raises(ValueError, match="--loss trl reads the head past FSDP2"):
        train(arguments(tmp_path / "out", 2, loss="trl"))
    assert not (tmp_path / "out").exists()


# On 2 GPUs, the same over NCCL

GPU_VARIANTS = {
    "float32": {"nf4": "bitsandbytes"},
    "bfloat16": {"dtype": "bfloat16", "nf4": "triton"},
    "float16": {"dtype": "float16", "nf4": "triton", "save_steps": 4},
    "bfloat16 compiled": {"dtype": "bfloat16", "nf4": "triton", "compile": True},
    "bfloat16 offloaded": {"dtype": "bfloat16", "nf4": "triton", "fsdp2_options": "offload", "save_steps": 4},
    "bfloat16 8-bit": {"dtype": "bfloat16", **VARIANTS["8-bit"]},
    # The default optimizer of one GPU is fused, and rounds otherwise.
    "bfloat16 exact": {"dtype": "bfloat16", "nf4": "triton", "accumulation": 1, "optimizer": "adamw_torch"},
    "float16 exact": {"dtype": "float16", "nf4": "triton", "accumulation": 1, "optimizer": "adamw_torch"},
}
GPU_PAYLOADS = [{**payload, "param_dtype": d} for payload in PAYLOADS for d in ("bfloat16", "float16", None)]


@pytest.fixture(scope="module")
def two_gpus(folder):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    calls = {name: (rank_trains, {"folder": folder / name, **more}) for name, more in GPU_VARIANTS.items()}
    calls |= {f"bytes {i}": (rank_gathers, more) for i, more in enumerate(GPU_PAYLOADS)}
    for name in ("bfloat16 8-bit", "float16"):
        calls[f"{name} resumed"] = (rank_resumes, {"folder": folder / name, **GPU_VARIANTS[name]})
    return in_ranks(2, calls)


@pytest.fixture(scope="module")
def one_gpu(folder, two_gpus):
    runs = {name: {"folder": folder / f"1 {name}", "ranks": 1, **m | WITHOUT} for name, m in GPU_VARIANTS.items()}
    for name in ("bfloat16 exact", "float16 exact"):
        runs[name]["accumulation"] = 2
    return in_ranks(1, {name: (rank_trains, kwargs) for name, kwargs in runs.items()})[0]


@pytest.mark.gpu
@pytest.mark.parametrize("variant", GPU_VARIANTS)
def test_two_gpus_equal_one(one_gpu, two_gpus, variant):
    dtype = GPU_VARIANTS[variant].get("dtype", "float32")
    if dtype == "float32":
        check_losses(two_gpus[0][variant], one_gpu[variant])
    pairs = zip(two_gpus[0][variant]["losses"], one_gpu[variant]["losses"], strict=True)
    assert max(abs(a - b) / abs(b) for a, b in pairs) <= TOLERANCE[dtype]
    if "exact" in variant:
        assert two_gpus[0][variant]["losses"] == one_gpu[variant]["losses"]
    check_shards([rank[variant] for rank in two_gpus])
    assert two_gpus[0][variant]["breaks"] == 0, two_gpus[0][variant]["reasons"]
    if "offload" in GPU_VARIANTS[variant].get("fsdp2_options", ""):
        assert two_gpus[0][variant]["devices"] == {"cpu"}


@pytest.mark.gpu
def test_gpus_gather_the_loaded_bytes(two_gpus):
    for i, payload in enumerate(GPU_PAYLOADS):
        for rank in two_gpus:
            changed = rank[f"bytes {i}"]
            assert len(changed) > 60
            assert not any(n for n, _ in changed.values()), (payload, {k: v for k, v in changed.items() if v[0]})


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["bfloat16 8-bit", "float16"])
def test_gpus_resume(two_gpus, variant):
    pairs = zip(two_gpus[0][f"{variant} resumed"]["losses"], two_gpus[0][variant]["losses"], strict=True)
    assert max(abs(a - b) / abs(b) for a, b in pairs) <= TOLERANCE["float32"]


@pytest.mark.gpu
def test_a_gpu_out_of_memory_is_named(two_gpus, folder):
    with pytest.raises(RuntimeError) as error:
        fsdp2.launch(2, ["-m", "tests.test_fsdp2", "starves", str(folder / "starved")], folder / "starved logs")
    assert str(error.value).startswith("rank 1 ended with code 1: torch.OutOfMemoryError")
    assert [path.name for path in (folder / "starved").glob("checkpoint-*")] == ["checkpoint-2"]


if __name__ == "__main__":
    callback = {"dies": Dies, "starves": Starves}[sys.argv[1]]()
    with clipped_at(0.1):
        train(arguments(sys.argv[2], 2, save_steps=2), callbacks=[callback])
