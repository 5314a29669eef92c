"""The trainer: same losses again, exact resume, whole checkpoints, adapters that stock PEFT loads."""

from __future__ import annotations

import csv
import os

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from helpers import checkpoints, fsdp2, merge
from helpers.sharded_steps import LEAST_TORCH
from helpers.train import QLoRATrainer, TrainArguments, main, train
from helpers.train_arguments import quickest

TINY = {"model": "shape:tiny", "dataset": "random:8-40x64", "max_length": 40, "lora_rank": 4, "learning_rate": 1e-2}


def run(folder, **more):
    return train(TrainArguments(output_dir=str(folder), **(TINY | {"steps": 4} | more)))


def test_two_runs_give_the_same_losses(tmp_path):
    first, second = run(tmp_path / "a"), run(tmp_path / "b")
    assert first.losses == second.losses and len(first.losses) == 4
    assert first.losses[-1] != first.losses[0]


def test_every_layer_of_a_loaded_model_is_in_training_mode(tmp_path):
    class Modes(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.evaluating = [name for name, module in model.named_modules() if not module.training]

    base = checkpoints.load_base("shape:tiny")
    base.model.save_pretrained(tmp_path / "model"), base.tokenizer.save_pretrained(tmp_path / "model")
    modes = Modes()
    train(TrainArguments(
        model=str(tmp_path / "model"), dataset="random:8-40x64", steps=1, output_dir=str(tmp_path / "run"), prompt="",
    ), [modes])  # fmt: skip
    assert modes.evaluating == []


def test_gradients_are_clipped_as_pytorch_clips_them():
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 7)) for _ in range(2)]
    gradients = [torch.randn_like(p) for p in models[0].parameters()]
    for model in models:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
    wanted = torch.nn.utils.clip_grad_norm_(models[0].parameters(), 2.0)
    torch.testing.assert_close(fsdp2.clip_grad_norm(models[1], 2.0), wanted)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    exact = torch.cat([g.flatten().double() for g in gradients]).norm()
    assert wanted == pytest.approx(exact.item())
    assert fsdp2.clip_grad_norm(models[0], 1e9) == pytest.approx(2.0, rel=1e-6)


def test_resume_equals_no_interruption(tmp_path):
    whole = run(tmp_path / "whole", save_steps=2)

    class Killed(BaseException):
        pass

    from transformers import TrainerCallback

    class KillAtStep3(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise Killed

    arguments = TrainArguments(output_dir=str(tmp_path / "cut"), **(TINY | {"steps": 4, "save_steps": 2}))
    with pytest.raises(Killed):
        train(arguments, callbacks=[KillAtStep3()])
    resumed = run(tmp_path / "cut", save_steps=2, resume=True)
    assert resumed.losses == whole.losses
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    with open(tmp_path / "cut" / "train_log.csv", newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [1, 2, 3, 4]


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    """Fails while the optimizer is being saved: the half-written checkpoint is not taken for one on resume."""
    real = QLoRATrainer._save_optimizer_and_scheduler

    def full_disk(self, output_dir):
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        real(self, output_dir)

    monkeypatch.setattr(QLoRATrainer, "_save_optimizer_and_scheduler", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, save_steps=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    monkeypatch.undo()
    assert len(run(tmp_path, save_steps=2, resume=True).losses) == 4


def test_adapter_loads_in_plain_peft_and_merges_to_plain_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path / "base"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**checkpoints.SHAPES["tiny"])).save_pretrained(folder)
    checkpoints.byte_tokenizer().save_pretrained(folder)
    train(TrainArguments(model=str(folder), dataset="random:20-30x40", steps=8, max_length=32, learning_rate=3e-2,
                         output_dir=str(tmp_path / "run"), prompt=""))  # fmt: skip
    base = checkpoints.load_base(str(folder))
    tuned = PeftModel.from_pretrained(base.model, tmp_path / "run").eval()
    assert all(p.dtype == torch.float32 for name, p in tuned.named_parameters() if "lora_" in name)
    merged = AutoModelForCausalLM.from_pretrained(
        merge.merge(str(tmp_path / "run"), str(tmp_path / "merged"), torch.float32)
    )
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    ids = torch.randint(5, 500, (1, 12))
    with torch.no_grad():
        wanted, got = tuned(ids).logits, merged(ids).logits
        with tuned.disable_adapter():
            untuned = tuned(ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)
    assert (wanted - untuned).abs().max() > 0.1, "the adapter must matter for this test to mean anything"


def test_smollm2_trains_through_our_kernel_as_through_bitsandbytes(tmp_path):
    """The pretrained model, its 210 weights decoded by the Triton kernel itself: in the interpreter without a GPU."""
    losses = {
        decoder: train(TrainArguments(
            model="embedded", dataset="python-docs", steps=3, batch_size=1, accumulation=1, max_length=32, prompt="",
            checkpointing=False, dtype="float32", nf4=decoder, output_dir=str(tmp_path / decoder),
        )).losses
        for decoder in ("bitsandbytes", "triton")
    }  # fmt: skip
    assert losses["triton"] == pytest.approx(losses["bitsandbytes"], rel=1e-5)
    assert len(set(losses["triton"])) == 3


def test_log_line_and_csv(tmp_path, capsys):
    result = run(tmp_path, steps=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step:")]
    assert len(lines) == 2 and all(word in lines[0] for word in ("loss:", "grad_norm:", "memory:", "tps:"))
    with open(tmp_path / "train_log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == result.losses
    assert np.isfinite([float(row["grad_norm"]) for row in rows]).all()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"lora_rank": -1}, "--lora_rank is -1"),
        ({"dtype": "int8"}, "--dtype 'int8' is not one of"),
        ({"nf4": "cuda"}, "--nf4 'cuda' is not one of"),
        ({"loss": "magic"}, "--loss 'magic' is not one of"),
        ({"resume": True}, "there is no checkpoint in"),
        ({"model": "shape:none"}, "unknown shape"),
        ({"offload": True, "checkpointing": False}, "--offload needs --compile, --checkpointing"),
        ({"cuda_graphs": True}, "--cuda_graphs needs a GPU, --compile"),
        ({"cuda_graphs": True, "compile": True, "fsdp2": True, "fsdp2_options": "offload"},
         "--cuda_graphs needs a GPU, no --fsdp2_options offload"),
    ],
)  # fmt: skip
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, flags, said):
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("capability", "flags", "compiled", "replayed"),
    [
        ((9, 0), {}, True, True),
        ((7, 5), {}, True, False),
        ((9, 0), {"steps": 10}, False, False),
        ((9, 0), {"steps": 10, "cuda_graphs": True}, True, True),
        ((9, 0), {"loss": "full"}, False, False),
        ((9, 0), {"offload": True}, True, True),
        ((9, 0), {"fsdp2": True}, True, torch.__version__ >= LEAST_TORCH),
        ((9, 0), {"fsdp2": True, "fsdp2_options": "offload"}, True, False),
        ((9, 0), {"packing": True, "attention": "flex"}, True, False),
        ((9, 0), {"compile": False}, False, False),
        (None, {}, False, False),
    ],
)
def test_the_command_compiles_where_that_is_quickest(monkeypatch, capability, flags, compiled, replayed):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setattr(checkpoints, "default_dtype", lambda: torch.bfloat16)
    found = quickest(TrainArguments(**flags))
    assert (found.compile, found.cuda_graphs) == (compiled, replayed)


def test_checkpoints_of_another_run_are_not_overwritten(tmp_path):
    run(tmp_path, steps=2, save_steps=2)
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        run(tmp_path, steps=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="refusals of a machine without a GPU")
@pytest.mark.parametrize("flags", [{"dtype": "float16"}, {"loss": "trl"}, {"rehearse_t4": True}])
def test_what_needs_a_gpu_says_so(tmp_path, capsys, flags):
    arguments = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    assert main(["--model", "shape:tiny", "--output_dir", str(tmp_path / "out"), *arguments]) == 2
    assert "GPU" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "out")
