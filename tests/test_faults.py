"""Faults on the whole trainer, its parts composed: killed anywhere, out of memory, bad data, bad flags."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import helpers.compiling
import helpers.train
from helpers.train import QLoRATrainer, TrainArguments, main, train

COMPOSED = {
    "model": "shape:tiny", "dataset": "random:5-30x48", "steps": 5, "batch_size": 2, "accumulation": 2,
    "max_length": 32, "learning_rate": 1e-2, "lora_rank": 4, "compile": True, "packing": True, "loss": "chunked",
    "save_steps": 2,
}  # fmt: skip
DIES = """
import os, signal, sys
import helpers.compiling
from helpers.train import QLoRATrainer, TrainArguments, train
plain = helpers.compiling.compile_model
helpers.compiling.compile_model = lambda model, **more: plain(model, **more | {{"backend": "eager"}})
save = QLoRATrainer._save_optimizer_and_scheduler
def killed(self, folder):
    save(self, folder)
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
QLoRATrainer._save_optimizer_and_scheduler = killed
train(TrainArguments(output_dir=sys.argv[1], **{arguments!r}))
"""


class Killed(BaseException):
    """No handler may take it for an error that can be mended."""


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """The graphs are traced, not compiled: Inductor has tests of its own."""
    plain = helpers.compiling.compile_model
    monkeypatch.setattr(
        helpers.compiling, "compile_model", lambda model, **more: plain(model, **more | {"backend": "eager"})
    )


def run(folder, **more):
    return train(TrainArguments(output_dir=str(folder), **(COMPOSED | more)))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        plain = helpers.compiling.compile_model
        patch.setattr(
            helpers.compiling, "compile_model", lambda model, **more: plain(model, **more | {"backend": "eager"})
        )
        losses = run(tmp_path_factory.mktemp("whole")).losses
    assert len(set(losses)) == 5
    return losses


def after(calls: int, owner, name: str):
    """``owner.name`` that dies when it has been called ``calls`` times, its work done."""
    real, count = getattr(owner, name), iter(range(1, 1000))

    def dies(*args, **kwargs):
        done = real(*args, **kwargs)
        if next(count) == calls:
            raise Killed
        return done

    return owner, name, dies


@pytest.mark.parametrize(
    ("where", "first"),
    [
        (lambda: after(1, QLoRATrainer, "compute_loss"), 0),
        (lambda: after(6, QLoRATrainer, "compute_loss"), 2),  # the second micro-step of step 3
        (lambda: after(3, QLoRATrainer, "save_model"), 4),  # the adapter, at the end
    ],
    ids=["first step", "step 3", "adapter"],
)
def test_killed_anywhere_a_run_ends_with_the_uninterrupted_losses(where, first, tmp_path, monkeypatch, uninterrupted):
    with monkeypatch.context() as patch:
        patch.setattr(*where())
        with pytest.raises(Killed):
            run(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    whole = sorted(int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
    assert (whole or [0])[-1] == first
    assert run(tmp_path, resume=first > 0).losses == uninterrupted
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "partial").exists()


def test_a_process_killed_while_it_saves_leaves_a_checkpoint_to_resume_from(tmp_path, uninterrupted):
    script = DIES.format(arguments=COMPOSED)
    died = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=300)
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["checkpoint-2", "partial"]
    assert run(tmp_path, resume=True).losses == uninterrupted
    assert not (tmp_path / "partial").exists()


def test_out_of_memory_ends_with_one_message_that_helps(tmp_path, monkeypatch, capsys):
    real = QLoRATrainer.compute_loss

    def full(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(QLoRATrainer, "compute_loss", full)
    flags = COMPOSED | {"checkpointing": False, "compile": False, "output_dir": tmp_path}
    assert main([f"--{key}={value}" for key, value in flags.items()]) == 1
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "Traceback" not in said and "Tried to allocate 2.00" in said
    for advice in ("--checkpointing True", "--batch_size 1 --accumulation 4", "--max_length 16", "--compile"):
        assert advice in said
    assert "--loss chunked" not in said  # it is
    left = {path.name for path in tmp_path.iterdir()}
    assert "checkpoint-2" in left and not left & {"partial", "adapter_model.safetensors", "adapter_config.json"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not exist"),
        ("", "holds no JSON rows"),
        (json.dumps({"question": "a", "answer": "b"}), r"has columns \['question', 'answer'\]; one of these is needed"),
        (json.dumps({"prompt": "a"}), "prompt and completion"),
    ],
    ids=["missing", "empty", "columns", "prompt alone"],
)
def test_bad_data_is_named_before_the_model_is_loaded(text, said, tmp_path, monkeypatch):
    monkeypatch.setattr(helpers.train.checkpoints, "load_base", lambda *more: pytest.fail("a model was loaded"))
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text + "\n")
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "out", dataset=str(path))
    assert not (tmp_path / "out").exists()


def test_rows_longer_than_max_length_are_cut(tmp_path, monkeypatch):
    seen, real = [], QLoRATrainer.compute_loss
    monkeypatch.setattr(QLoRATrainer, "compute_loss", lambda self, model, inputs, *args, **kwargs: seen.append(
        inputs["input_ids"].shape[1]) or real(self, model, inputs, *args, **kwargs))  # fmt: skip
    text = tmp_path / "rows.jsonl"
    text.write_text("".join(json.dumps({"text": "many letters " * n}) + "\n" for n in (1, 9, 40)))
    result = run(tmp_path / "out", dataset=str(text), packing=False, compile=False, steps=2, save_steps=0)
    assert max(seen) == COMPOSED["max_length"] and all(loss > 0 for loss in result.losses)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"max_length": 1}, "--max_length is 1; it must be at least 2"),
        ({"learning_rate": -1.0}, "--learning_rate is -1.0; it must be above 0"),
        ({"save_steps": -1}, "--save_steps is -1; it must be at least 0"),
        ({"optimizer": "adamm"}, "adamm"),
        ({"model": "no/such-model"}, "'no/such-model' is neither a local folder nor reachable"),
    ],
)
def test_bad_flags_are_named_before_the_model_is_loaded(flags, said, tmp_path, monkeypatch):
    monkeypatch.setattr(helpers.train.checkpoints, "load_base", lambda *more: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "out", **flags)
    assert not os.path.exists(tmp_path / "out")


@pytest.mark.parametrize("given", [["--bogus", "1"], ["--steps", "many"], ["--plan", "shape:tiny"]])
def test_a_flag_that_is_not_there_is_one_line(given, capsys):
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("python3 -m helpers.train: error:")
