"""What a batch's masks say is found out on the host, and changes nothing else."""

from __future__ import annotations

import pytest
import torch

from helpers import compiled_loss, compiling
from helpers.host_checked import HostChecked, padded_on_the_right
from helpers.train import TrainArguments, train


def test_padding_on_the_right_needs_no_mask():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    ids = torch.arange(8).view(2, 4)
    batch = HostChecked(lambda rows: {"input_ids": ids, "attention_mask": mask})([])
    assert batch.keys() == {"input_ids", "num_tokens"} and batch["num_tokens"] == 7
    left = mask.flip(1)
    batch = HostChecked(lambda rows: {"input_ids": ids, "attention_mask": left})([])
    assert batch.keys() == {"input_ids", "attention_mask"} and batch["attention_mask"] is left
    assert not padded_on_the_right(torch.tensor([[1, 0, 1]]))


def test_documents_are_counted():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    batch = HostChecked(lambda rows: {"input_ids": positions, "position_ids": positions})([])
    assert batch["documents"] == 4 and "num_tokens" not in batch


@pytest.mark.parametrize("packing", [False, True])
def test_compiled_losses_are_as_without_and_nothing_is_asked_of_the_device(tmp_path, monkeypatch, packing):
    def run(name):
        return train(TrainArguments(
            model="shape:tiny", dataset="random:8-40x64", max_length=40, lora_rank=4, learning_rate=1e-2, steps=3,
            compile=True, packing=packing, prompt="", output_dir=str(tmp_path / name),
        ))  # fmt: skip

    def asked(mask):
        raise AssertionError("the device was asked")

    real = compiling.compile_model
    monkeypatch.setattr(compiling, "compile_model", lambda *args, **how: real(*args, **how | {"backend": "eager"}))
    with monkeypatch.context() as patch:
        patch.setattr(compiled_loss, "padded_on_the_right", asked)
        checked = run("checked")
    monkeypatch.setattr("helpers.train.HostChecked", lambda collator: collator)
    unchecked = run("unchecked")
    assert checked.losses == unchecked.losses
    counted, before = (
        [(row["tokens_per_s"] > 0, row["grad_norm"]) for row in result.rows] for result in (checked, unchecked)
    )
    assert counted == before
