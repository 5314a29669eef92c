"""What a training run would do and why, and the GPU memory it should take: two tables, and nothing is loaded.

    python3 -m helpers.train --plan --model shape:llama-3.2-1b --dataset random:200-1024 --compile

Only the model's configuration and tokenizer and the rows are read. The memory is `helpers.expected_memory`'s.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from typing import TYPE_CHECKING, Any

import torch

from . import checkpoints
from .attention import Case, choose
from .expected_memory import capability, expected, inputs_wait, row_lengths, shapes_of
from .instruction_data import load_instructions
from .memory import GIB

if TYPE_CHECKING:
    from .train_arguments import TrainArguments


def config_of(name: str) -> tuple[Any, Any, str]:
    """Configuration, tokenizer and label of a model by its name, without its weights.

    Raises:
        ValueError: unknown shape, or neither a folder nor reachable on the Hub.
    """
    from transformers import AutoConfig, AutoTokenizer, LlamaConfig

    name = checkpoints.resolve_model(name)
    if name.startswith("shape:"):
        shape = name.removeprefix("shape:")
        if shape not in checkpoints.SHAPES:
            raise ValueError(f"unknown shape {shape!r}; known: {', '.join(checkpoints.SHAPES)}")
        label = f"{shape} shape, RANDOM weights"
        return LlamaConfig(**checkpoints.SHAPES[shape]), checkpoints.byte_tokenizer(), label
    path = str(checkpoints.embedded_folder()) if name == "embedded" else name
    try:
        return AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path), name
    except OSError as error:
        raise ValueError(f"model {name!r} is neither a local folder nor reachable on the Hub") from error


def parts(asked: TrainArguments, args: TrainArguments, config: Any) -> list[tuple[str, str, str]]:
    """Each part that would run: its name, what it is, and why that."""
    gpu, (major, minor) = torch.cuda.is_available(), capability()
    text, attention = config.get_text_config(), args.attention
    if attention == "auto":
        case = Case(
            device="cuda" if gpu else "cpu", capability=(major, minor) if gpu else (0, 0), gradient=True,
            dtype=getattr(torch, args.dtype), segments=args.packing,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        )  # fmt: skip
        attention = f"auto: {choose('auto', case)}"

    def why(name: str, reason: str) -> str:
        return reason if getattr(asked, name) == "auto" else f"--{name} asks for it"

    def switched(name: str, on: str) -> tuple[str, str]:
        return ("on", on) if getattr(args, name) else ("off", f"--{name} turns it on")

    rows = "packed" if args.packing else "plain"
    waits = "layers' inputs wait in host memory"
    offload = switched("offload", waits)
    if args.offload is None and gpu and args.compile and args.checkpointing:
        able = inputs_wait(shapes_of(config, getattr(torch, args.dtype), args.lora_rank), args)
        offload = ("on", waits) if able else ("off", f"the layers of {text.model_type} are none that do so")
    return [
        ("device", torch.cuda.get_device_name() if gpu else "CPU", f"capability {major}.{minor}" if gpu else "no GPU"),
        ("dtype", args.dtype, why("dtype", "what this GPU computes in" if gpu else "rounding gains nothing on a CPU")),
        ("NF4 decoder", args.nf4, why("nf4", "one kernel a weight" if gpu else "Triton's interpreter is slow")),
        ("loss", args.loss, why("loss", "logits exist a chunk at a time")),
        ("attention", attention, why("attention", f"the fastest that can do {rows} rows")),
        ("compile", *switched("compile", "layers, norm and loss are a graph each")),
        ("CUDA graphs", *switched("cuda_graphs", "a step of each length is recorded once")),
        ("checkpointing", *switched("checkpointing", "activations are made again, layer by layer")),
        ("offload", *offload),
        ("optimizer", args.optimizer, why("optimizer", "one launch" if "fused" in args.optimizer else "PyTorch's own")),
        ("FSDP2", *switched("fsdp2", f"sharded over {os.environ.get('WORLD_SIZE', '1')} processes")),
    ]  # fmt: skip


def describe(asked: TrainArguments, args: TrainArguments) -> str:
    """The text of ``--plan``: a table of the parts, and one of the memory.

    Args:
        asked: as given.
        args: as decided for this device.

    Raises:
        ValueError: model or data set cannot be found, or the model's layers are of another kind.
    """
    config, tokenizer, label = config_of(args.model)
    rows = load_instructions(args.dataset, vocab_size=config.get_text_config().vocab_size, seed=args.seed)
    lengths = row_lengths(rows, tokenizer)
    lines = [f"{label}, batch {args.batch_size} x {args.accumulation}, {args.steps} steps; nothing was loaded", ""]
    lines += [f"{name:14s} {what:20s} {reason}" for name, what, reason in parts(asked, args, config)]
    lines += ["", f"{'memory expected on a GPU':44s} {'GiB':>7s}"]
    lines += [f"{name:44s} {size / GIB:7.3f}" for name, size in expected(config, args, lengths).rows()]
    lines += ["", "weights and adapters are counted, the other rows estimated; the sum in other settings:"]
    for compiled, checkpointing in itertools.product((False, True), repeat=2):
        other = dataclasses.replace(args, compile=compiled, checkpointing=checkpointing)
        if compiled and args.loss != "chunked":
            continue  # compiled, the loss is always in chunks
        name = ("compiled" if compiled else "eager") + (", checkpointing" if checkpointing else "")
        lines.append(f"{name:44s} {expected(config, other, lengths).total / GIB:7.3f}")
    return "\n".join(lines)
