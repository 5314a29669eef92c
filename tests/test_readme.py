"""Every Python example in README runs as it stands, on tiny models."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig
from trl import SFTConfig, SFTTrainer

from helpers import checkpoints, compiling, tiny_vision
from helpers.instruction_data import load_instructions

ROOT = Path(__file__).parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
# One rank, as torchrun starts it, around the example for several.
RANK = """
import sys
from helpers import fsdp2
sys.path.insert(0, "tests")
from test_readme import tiny_trainer
fsdp2.start_ranks("cpu")
model, trainer = tiny_trainer(sys.argv[1], **fsdp2.training_arguments(fsdp2.FSDP2Config()))
exec(sys.argv[2])
assert isinstance(model.get_base_model().model.layers[0], fsdp2.FSDPModule) and trainer.state.global_step == 1
fsdp2.stop_ranks()
"""


def tiny_trainer(folder, **settings):
    """A QLoRA model of two layers and TRL's trainer of one step around it."""
    base = checkpoints.load_base("shape:tiny", torch.float32)
    model = checkpoints.attach_lora(base.model, 4)
    arguments = SFTConfig(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, max_length=24, report_to="none",
        save_strategy="no", use_cpu=not torch.cuda.is_available(), bf16=False, loss_type="nll", **settings,
    )  # fmt: skip
    rows = load_instructions("random:8-20x16", vocab_size=model.config.vocab_size)
    return model, SFTTrainer(model, arguments, train_dataset=rows, processing_class=base.tokenizer)


def test_an_example_is_five_lines_and_there_is_one_for_each_part():
    assert all(len(example.splitlines()) <= 6 for example in EXAMPLES)  # the first line says what it is
    parts = [re.match(r"# ([A-E, ]+):", example)[1].split(", ") for example in EXAMPLES]
    assert set(sum(parts, [])) == set("ABCDE")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: re.search(r"helpers[.\w]*", example)[0])
def test_an_example_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "shard_trainer" in example:
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        command = [sys.executable, "-c", RANK, str(tmp_path), example]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | rank, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    if "compile_model" in example:  # traced, not compiled: Inductor has tests of its own
        monkeypatch.setitem(compiling.compile_model.__wrapped__.__kwdefaults__, "backend", "eager")
    names = everything(tmp_path)
    exec(example, names)
    result = {"loss": lambda loss: loss.isfinite(), "batch": lambda batch: (batch["labels"] != -100).any(),
              "text": lambda text: text.exists() and names["mmproj"].exists(),
              "conversation": lambda turns: turns[-1]["content"] == "5"}  # fmt: skip
    for name, right in result.items():
        assert name not in names or right(names[name])
    assert "trainer.train()" not in example or names["trainer"].state.global_step == 1


def everything(folder: Path) -> dict:
    """What the examples take for given."""
    model, trainer = tiny_trainer(folder)
    vision = tiny_vision.processor("qwen2_vl")
    image = Image.new("RGB", (56, 56))
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Black."}]
    AutoModelForCausalLM.from_config(LlamaConfig(**checkpoints.SHAPES["tiny"])).save_pretrained(folder / "plain")
    said = iter(['<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>', "5"])
    device = model.device
    return {
        "torch": torch, "model": model, "trainer": trainer, "head": torch.nn.Linear(16, 32, device=device),
        "hidden": torch.randn(9, 16, device=device), "labels": torch.arange(9, device=device),
        "AutoModelForSequenceClassification": AutoModelForSequenceClassification, "name": str(folder / "plain"),
        "processor": vision, "vision_model": tiny_vision.model("qwen2_vl", vision),
        "rows": [{"messages": turns, "images": [image]}, {"messages": turns, "images": []}],
        "say": lambda messages, schemas: next(said), "add": add,
    }  # fmt: skip


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b
