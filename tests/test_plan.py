"""The plan: its formulas against what autograd keeps, its sums against what an H100 took, and its text."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from unittest import mock

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch._dynamo.backends import debugging
from transformers import TrainerCallback

from helpers import attention_transformers, checkpoints, expected_memory, plan
from helpers.chunked_head import chunked_loss
from helpers.compiling import Recomputed, compile_model
from helpers.memory import GIB
from helpers.nf4 import statistics_of
from helpers.train import main, train
from helpers.train_arguments import TrainArguments, decided, sft_config

TOKENS = (2, 48)


def partition_as_inductor_does():
    """Inductor's pass over the joint graph before it is partitioned, in a backend that compiles nothing."""
    partition = debugging.min_cut_rematerialization_partition

    def changed(joint, *args, **kwargs):
        Recomputed()(joint.graph)
        return partition(joint, *args, **kwargs)

    return mock.patch.object(debugging, "min_cut_rematerialization_partition", changed)


def kept_bytes(shape: str, compiled: bool) -> int:
    """Bytes that one forward pass of the bfloat16 model keeps for its backward pass, what is the model's own aside."""
    base = checkpoints.load_base(f"shape:{shape}", torch.bfloat16).model
    model = checkpoints.attach_lora(base, 8)
    attention_transformers.register()
    model.set_attn_implementation("qlora_sdpa")
    model.train()
    model.enable_input_require_grads()
    states = [module.weight.quant_state for module in model.modules() if isinstance(module, Linear4bit)]
    scales = [scale for state in states for scale in statistics_of(state)]
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *scales)}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(3, 500, TOKENS)
    region = compile_model(model, backend="aot_eager_decomp_partition", pad_to=1) if compiled else chunked_loss(model)
    with region, partition_as_inductor_does(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()  # compiles
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    del loss
    return sum(found.values())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_keeps_what_the_formula_says(compiled, monkeypatch):
    if not compiled:  # PEFT asks for CUDA's autocast only, and where that is off makes a copy of each input
        asked = torch.is_autocast_enabled
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: asked(*device or ("cpu",)))
    shape = checkpoints.SHAPES["tiny"] | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 16}
    monkeypatch.setitem(checkpoints.SHAPES, "wide", shape)
    s = expected_memory.shapes_of(plan.config_of("shape:wide")[0], torch.bfloat16, 8)
    tokens = TOKENS[0] * TOKENS[1]
    expected = s.layers * tokens * expected_memory.saved_bytes(s, 2, 8, compiled=compiled, shared_heads=False)
    expected += 2 * tokens * s.hidden + 4 * TOKENS[1] * s.head_dim  # the loss's gradient, cosines and sines
    if not compiled:  # the adapters as autocast casts them, and the final norm
        expected += 2 * s.adapters + 4 * tokens * s.hidden
    assert kept_bytes("wide", compiled) == pytest.approx(expected, rel=0.01)


class StepPeak(TrainerCallback):
    """Bytes that the second step's allocations had reached at most, above those before it."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            gc.collect()
            self.profile = torch.autograd.profiler.profile(profile_memory=True).__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.profile.__exit__(None, None, None)
            sizes = [event.nbytes() for event in self.profile.kineto_results.events() if event.name() == "[memory]"]
            self.bytes = max(itertools.accumulate(sizes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's allocator is watched; a GPU's run has a test below")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("vocab_size", [512, 8192])  # the layers or the loss needs more
def test_a_step_takes_what_the_plan_says(checkpointing, vocab_size, tmp_path, monkeypatch):
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: asked(*device or ("cpu",)))  # as above
    monkeypatch.setattr(expected_memory, "capability", lambda: (7, 5))  # whose attention has no shared heads either
    monkeypatch.setattr(expected_memory, "CUBLAS_BYTES", {False: 0})
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 16, "vocab_size": vocab_size}
    monkeypatch.setitem(checkpoints.SHAPES, "wide", checkpoints.SHAPES["tiny"] | shape)
    arguments = decided(TrainArguments(
        model="shape:wide", dataset="random:128-128x8", dtype="bfloat16", steps=2, batch_size=2, accumulation=2,
        max_length=128, checkpointing=checkpointing, output_dir=str(tmp_path),
    ))  # fmt: skip
    peak = StepPeak()
    train(arguments, [peak])
    memory = expected_memory.expected(plan.config_of("shape:wide")[0], arguments, [128] * 8)
    found = memory.trained[1] + memory.saved + max(memory.work, memory.loss)  # the rest was there before
    assert found == pytest.approx(peak.bytes, rel=0.1)


@pytest.mark.parametrize("shape", ["tiny", "tiny-untied"])
def test_weights_are_counted_exactly(shape):
    model = checkpoints.load_base(f"shape:{shape}", torch.bfloat16).model
    layers = [module.weight for module in model.modules() if isinstance(module, Linear4bit)]
    packed = sum(weight.nbytes for weight in layers)
    absmax = sum(w.quant_state.absmax.nbytes + w.quant_state.state2.absmax.nbytes for w in layers)
    config, _, _ = plan.config_of(f"shape:{shape}")
    arguments = TrainArguments(dtype="bfloat16", steps=1, batch_size=1, accumulation=2, max_length=64, lora_rank=8)
    memory = expected_memory.expected(config, arguments, [40])
    plain = sum(p.nbytes for p in model.parameters()) - packed
    assert memory.weights == (packed, pytest.approx(absmax, rel=0.02), plain)
    trained = sum(p.nbytes for p in checkpoints.attach_lora(model, 8).parameters() if p.requires_grad)
    assert memory.trained == (trained, trained, 2 * trained)


ONE, EIGHT = ("shape:llama-3.2-1b", range(200, 1025), 1024, 32), ("shape:llama-3.1-8b", [2048] * 8, 2048, 64)


OURS = {"loss": "chunked", "compile": True, "checkpointing": True}
RANK = OURS | {"fsdp2": True, "optimizer": "adamw_8bit"}  # one of two


# Peaks of PyTorch's allocator on H100s, in GiB, bfloat16, batch 2 x 4 (figures/trainer_bench.csv, B_bench.csv).
@pytest.mark.parametrize(
    ("case", "settings", "measured"),
    [
        (ONE, {"loss": "trl", "attention": "stock", "checkpointing": False}, 4.864),
        (ONE, {"loss": "trl", "attention": "stock", "checkpointing": True}, 1.762),
        (ONE, OURS | {"checkpointing": False}, 3.164),
        (ONE, OURS | {"offload": False}, 1.715),
        (ONE, OURS | {"cuda_graphs": True}, 1.596),
        (EIGHT, {"loss": "trl", "attention": "stock", "checkpointing": True}, 9.885),
        (EIGHT, OURS, 8.81),
        (EIGHT, OURS | {"cuda_graphs": True}, 8.80),
        (EIGHT, RANK, 5.70),
        (EIGHT, RANK | {"cuda_graphs": True}, 6.32),
        (EIGHT, RANK | {"cuda_graphs": True, "optimizer": "adamw_torch"}, 6.79),
        (EIGHT, RANK | {"cuda_graphs": True, "nf4": "bitsandbytes"}, 6.45),
        (EIGHT, RANK | {"cuda_graphs": True, "fsdp2_options": "no-peer-reads"}, 6.67),
    ],
)
def test_sums_are_within_a_tenth_of_an_h100s(case, settings, measured, monkeypatch):
    monkeypatch.setattr(expected_memory, "capability", lambda: (9, 0))
    monkeypatch.setenv("WORLD_SIZE", "2")  # which counts under FSDP2 alone
    model, lengths, max_length, rank = case
    config, _, _ = plan.config_of(model)
    arguments = TrainArguments(**{
        "dtype": "bfloat16", "optimizer": "adamw_torch", "steps": 14, "batch_size": 2, "accumulation": 4,
        "max_length": max_length, "lora_rank": rank, **settings,
    })  # fmt: skip
    memory = expected_memory.expected(config, arguments, lengths)
    assert memory.total / GIB == pytest.approx(measured, rel=0.1)


def test_ranks_share_what_is_sharded(monkeypatch):
    config, _, _ = plan.config_of("shape:llama-3.1-8b")
    alone = TrainArguments(
        dtype="bfloat16", optimizer="adamw_8bit", steps=9, batch_size=2, accumulation=4, max_length=2048, lora_rank=64,
        loss="chunked", compile=True, offload=False,
    )  # fmt: skip
    whole = expected_memory.expected(config, alone, [2048])
    monkeypatch.setenv("WORLD_SIZE", "2")
    half = expected_memory.expected(config, dataclasses.replace(alone, fsdp2=True), [2048])
    assert [2 * part for part in half.weights + half.trained] == list(whole.weights + whole.trained)
    assert half.saved == whole.saved and half.work > whole.work and half.loss > whole.loss
    offloaded = dataclasses.replace(alone, fsdp2=True, fsdp2_options="offload")
    assert sum(expected_memory.expected(config, offloaded, [2048]).weights) == 0

    def work(options: str) -> int:
        args = dataclasses.replace(alone, fsdp2=True, fsdp2_options=options)
        return expected_memory.expected(config, args, [2048]).work

    layer = sum(whole.weights[:2]) // 32
    assert work("keep-gathered,no-peer-reads") - work("no-peer-reads") == 30 * layer  # all layers, not two
    assert work("no-peer-reads") - half.work == 2 * layer + layer  # of NCCL's; read where they lie, two halves
    assert work("prefetch=3") - half.work == layer and work("keep-gathered") - half.work == 15 * layer


def test_the_longest_batch_of_a_run_is_expected():
    lengths = list(range(1, 101))
    arguments = TrainArguments(steps=2, batch_size=2, accumulation=1, max_length=90)
    assert expected_memory.tokens_of(lengths, arguments) == (2, 81)  # of 4 draws from 100, the largest
    arguments.steps = 1000
    assert expected_memory.tokens_of(lengths, arguments) == (2, 90)  # cut
    arguments.compile = True
    assert expected_memory.tokens_of(lengths, arguments) == (2, 128)  # padded
    arguments.packing = True
    assert expected_memory.tokens_of(lengths, arguments) == (2, 90)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]},
        {"text": "Hello, good day."},
        {"prompt": "Hello, ", "completion": "good day."},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Good day."}]},
        {"input_ids": [5] * 17},
    ],
    ids=lambda row: "-".join(row),
)
def test_rows_are_as_long_as_the_trainer_makes_them(row, tmp_path):
    from datasets import Dataset

    from helpers.train import QLoRATrainer

    rows = Dataset.from_list([row] * 3)
    tokenizer = checkpoints.byte_tokenizer()
    arguments = decided(TrainArguments(output_dir=str(tmp_path), max_length=200))
    model = checkpoints.attach_lora(checkpoints.load_base("shape:tiny").model, 4)
    trainer = QLoRATrainer(
        model, loss="full", args=sft_config(arguments), train_dataset=rows, processing_class=tokenizer
    )
    assert expected_memory.row_lengths(rows, tokenizer) == expected_memory.row_lengths(trainer.train_dataset)


def test_plan_loads_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoints, "load_base", lambda *more: pytest.fail("a model was loaded"))
    out = tmp_path / "out"
    given = ["--plan", "--model", "shape:llama-3.1-8b", "--dataset", "random:8-40x64", "--attention", "eager"]
    assert main([*given, "--output_dir", str(out)]) == 0
    said = capsys.readouterr().out
    assert not out.exists() and "RANDOM weights" in said
    for part in ["device", "dtype", "NF4", "loss", "attention", "compile", "checkpointing", "optimizer", "FSDP2"]:
        assert any(line.startswith(part) for line in said.splitlines())
    assert "eager                --attention asks for it" in said
    numbers = {line[:44].strip(): float(line[44:]) for line in said.splitlines() if line[44:].strip()[:1].isdigit()}
    assert numbers["weights, packed NF4"] == pytest.approx(3.25, abs=0.01)
    assert numbers["compiled, checkpointing"] < numbers["compiled"]
    assert main(["--plan", "--model", "shape:none"]) == 2 and "unknown shape" in capsys.readouterr().err
    assert main(["--plan", "--dataset", str(out / "none.jsonl"), "--model", "shape:tiny"]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "dropout", "on"), [({}, 0.0, True), ({}, 0.1, False), ({"offload": False}, 0.0, False)]
)
def test_a_gpu_has_layers_inputs_wait_where_the_layers_are_known(more, dropout, on, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(plan, "capability", lambda: (9, 0))
    config, _, _ = plan.config_of("shape:tiny")
    config.attention_dropout = dropout
    args = TrainArguments(dtype="bfloat16", nf4="triton", loss="chunked", compile=True, cuda_graphs=False, **more)
    assert {name: what for name, what, _ in plan.parts(args, args, config)}["offload"] == ("on" if on else "off")


def test_a_model_of_another_kind_is_named(tmp_path):
    from transformers import GPT2Config

    with pytest.raises(ValueError, match="Llama-like layers; those of gpt2"):
        expected_memory.shapes_of(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64), torch.float32, 4)


def test_a_run_tells_what_was_expected_of_it(tmp_path, capsys):
    result = train(TrainArguments(model="shape:tiny", dataset="random:8-40x64", steps=1, output_dir=str(tmp_path)))
    assert 0 < result.expected_gib < 0.1
    assert f"--plan expects {result.expected_gib:.2f} on a GPU" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [
        {"checkpointing": False, "compile": False},
        {"checkpointing": True, "compile": False},
        {"checkpointing": False, "compile": True},
        {"checkpointing": True, "compile": True, "packing": True},
        {"checkpointing": False, "compile": False, "loss": "full"},
    ],
    ids=lambda settings: "-".join(f"{key}={value}" for key, value in settings.items()),
)
def test_a_run_takes_within_a_tenth_of_the_plan(settings, tmp_path):
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    result = train(TrainArguments(
        model="shape:llama-3.2-1b", dataset="random:200-512x64", steps=3, batch_size=2, accumulation=2, max_length=512,
        deterministic=False, output_dir=str(tmp_path), **settings,
    ))  # fmt: skip
    assert result.peak_allocated_gib == pytest.approx(result.expected_gib, rel=0.1)
