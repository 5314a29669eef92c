"""What the trainer can be told, what the device decides of it, and the same in TRL's terms."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from trl import SFTConfig

from . import attention, attention_transformers, checkpoints, fsdp2
from .sharded_steps import LEAST_TORCH

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTIONS = [name.removeprefix("qlora_") for name in attention_transformers.REGISTERED] + ["stock"]
WORTH_COMPILING = 30  # steps: from there on they save more time than compiling takes, at 1 B parameters on an H100
PROMPT = "In Python's standard library, what does `textwrap.wrap` do?"


def _flag(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class TrainArguments:
    """Everything a run can be told. ``None`` and ``auto`` are decided by the device, and the run says how.

    ``compile`` and ``cuda_graphs``, whose losses are eager's up to rounding, are decided on the command line alone
    (`quickest`); elsewhere ``None`` is no.
    """

    model: str = _flag("auto", "auto, embedded, shape:llama-3.2-1b, shape:llama-3.1-8b, a Hub id or a folder")
    dataset: str = _flag("auto", "auto, python-docs, oig, random:LOW-HIGH, a .jsonl file or a Hub id")
    output_dir: str = _flag("runs/train", "adapter, checkpoints and train_log.csv go here")
    steps: int | None = _flag(None, "optimizer steps (60 on a GPU, 6 without)")
    batch_size: int | None = _flag(None, "rows a device and micro-step (2 on a GPU, 1 without)")
    accumulation: int | None = _flag(None, "micro-steps an optimizer step (4 on a GPU, 1 without)")
    max_length: int | None = _flag(None, "tokens a row is cut at (2048 on a GPU, 256 without)")
    learning_rate: float = _flag(2e-4, "peak of the linear schedule, after one step of warm-up")
    lora_rank: int = _flag(16, "rank of LoRA on the seven projections; alpha is twice the rank")
    dtype: str = _flag("auto", "compute in float32, bfloat16 or float16; auto goes by the GPU's capability")
    nf4: str = _flag("auto", "who decodes 4-bit weights: triton (one kernel), bitsandbytes; auto: triton on a GPU")
    loss: str = _flag("auto", "chunked (helpers/linear_loss.py), trl (its fused head, GPU only), full (all logits)")
    attention: str = _flag("auto", "auto, sdpa, flex, varlen, xformers, eager (helpers/attention.py), or stock")
    packing: bool = _flag(False, "join rows into rows of max_length tokens; each attends to itself alone")
    compile: bool | None = _flag(None, "torch.compile the decoder layers, norm and loss (helpers/compiling.py)")
    cuda_graphs: bool | None = _flag(None, "with --compile: record a step of each length, replay it in two launches")
    checkpointing: bool = _flag(True, "recompute activations in backward (non-reentrant gradient checkpointing)")
    offload: bool | None = _flag(None, "layers' inputs wait in host memory (compiled and checkpointed, on a GPU: yes)")
    optimizer: str = _flag("auto", "a name of TrainingArguments.optim, as adamw_8bit; auto: AdamW, fused on a GPU")
    save_steps: int = _flag(0, "write a checkpoint every so many steps; 0: only the adapter, at the end")
    resume: bool = _flag(False, "go on from the last whole checkpoint in output_dir")
    deterministic: bool = _flag(True, "the same losses again on the same machine, at a few percent of speed")
    prompt: str = _flag(PROMPT, "answered before and after training; empty: not asked")
    fsdp2: bool = _flag(False, "shard the model over the processes that torchrun started (helpers/fsdp2.py)")
    fsdp2_options: str = _flag("", "any of offload, keep-gathered, prefetch=N, full-checkpoints, no-peer-reads")
    rehearse_t4: bool = _flag(False, "run a Tesla T4's code on the NVIDIA card at hand (helpers/t4.py)")
    seed: int = _flag(3407, "of weights, data order and everything random")
    plan: bool = _flag(False, "print what would run and why, and the memory expected; load and train nothing")


def quickest(args: TrainArguments) -> TrainArguments:
    """``args``, compiled and replayed on a GPU wherever nothing else in them speaks against it."""
    gpu, compile, cuda_graphs = torch.cuda.is_available(), args.compile, args.cuda_graphs
    if compile is None:
        asked = args.cuda_graphs or args.offload or args.steps is None or args.steps >= WORTH_COMPILING
        compile = bool(gpu and asked and args.loss != "full" and args.attention != "stock")
    if cuda_graphs is None:
        dtype = checkpoints.default_dtype() if args.dtype == "auto" else DTYPES.get(args.dtype, torch.float32)
        cuda_graphs = (
            compile and gpu and torch.cuda.get_device_capability() >= (8, 0)
            and all(_replays_shards(args).values())
            and not (args.packing and _no_packed_graphs(args.attention, dtype))
        )  # fmt: skip
    return replace(args, compile=compile, cuda_graphs=cuda_graphs)


def decided(args: TrainArguments) -> TrainArguments:
    """``args`` with what the device decides filled in.

    Raises:
        ValueError: what cannot be honoured.
    """
    gpu = torch.cuda.is_available()
    values = dict(vars(args)) | {name: bool(getattr(args, name)) for name in ("compile", "cuda_graphs")}
    for name, on_gpu, on_cpu in (
        ("steps", 60, 6), ("batch_size", 2, 1), ("accumulation", 4, 1), ("max_length", 2048, 256)
    ):  # fmt: skip
        if values[name] is None:
            values[name] = on_gpu if gpu else on_cpu
    least = {"steps": 1, "batch_size": 1, "accumulation": 1, "max_length": 2, "lora_rank": 1, "save_steps": 0}
    for name, number in least.items():
        if values[name] < number:
            raise ValueError(f"--{name} is {values[name]}; it must be at least {number}")
    if not 0 < args.learning_rate < float("inf"):
        raise ValueError(f"--learning_rate is {args.learning_rate}; it must be above 0")
    if values["optimizer"] == "auto":
        values["optimizer"] = "adamw_torch_fused" if gpu and not args.fsdp2 else "adamw_torch"
    if values["dtype"] == "auto":
        values["dtype"] = str(checkpoints.default_dtype()).removeprefix("torch.")
    if values["dtype"] not in DTYPES:
        raise ValueError(f"--dtype {args.dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if values["dtype"] == "float16" and not gpu:
        raise ValueError("--dtype float16 trains on a GPU only (GradScaler); use float32 or bfloat16 here")
    # TRL launches its Triton loss kernel on CPU tensors too wherever triton can be imported.
    if values["attention"] not in ATTENTIONS:
        raise ValueError(f"--attention {args.attention!r} is not one of {', '.join(ATTENTIONS)}")
    if args.fsdp2 and args.loss == "trl":
        raise ValueError("--loss trl reads the head past FSDP2, which shards it; use --loss chunked with --fsdp2")
    values["loss"] = _choice("loss", values["loss"], {"chunked": True, "trl": gpu and not args.fsdp2, "full": True})
    against = {"a GPU": gpu, "--compile": args.compile} | _replays_shards(args)
    if args.cuda_graphs and (missing := [need for need, there in against.items() if not there]):
        raise ValueError(f"--cuda_graphs needs {', '.join(missing)}")
    if args.cuda_graphs and args.packing and (why := _no_packed_graphs(args.attention, DTYPES[values["dtype"]])):
        raise ValueError(f"--cuda_graphs with --packing needs --attention varlen: {why}")
    against = {"--compile": args.compile, "--checkpointing": args.checkpointing}
    if args.offload and (missing := [need for need, there in against.items() if not there]):
        raise ValueError(f"--offload needs {', '.join(missing)}")
    if values["compile"] and values["loss"] == "full":
        raise ValueError("--compile never makes all logits, as --loss full asks: give --loss chunked, or leave one out")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if values["nf4"] == "auto" and not gpu:
        values["nf4"] = "bitsandbytes"  # the interpreter is right, and slow
    values["nf4"] = _choice("nf4", values["nf4"], {"triton": gpu or interpreted, "bitsandbytes": True})
    return TrainArguments(**values)


def _replays_shards(args: TrainArguments) -> dict[str, bool]:
    """What CUDA graphs of a sharded step need, and whether it is there; nothing if none is sharded."""
    if not args.fsdp2:
        return {}
    offloads = fsdp2.FSDP2Config.parse(args.fsdp2_options).cpu_offload  # the CPU adds gradients up
    return {"no --fsdp2_options offload": not offloads, "torch 2.11": torch.__version__ >= LEAST_TORCH}


def _no_packed_graphs(name: str, dtype: torch.dtype) -> str | None:
    """Why steps of packed rows cannot be recorded with this --attention, or None."""
    if name not in ("auto", "varlen"):
        return f"--attention is {name}"
    case = {"device": "cuda", "capability": torch.cuda.get_device_capability(), "dtype": dtype, "head_dim": 64}
    return attention.unsupported("flash", attention.Case(**case, segments=True, gradient=True))


def _choice(flag: str, value: str, possible: dict[str, bool]) -> str:
    """``value``, or the first that is possible here for ``auto``; an error names what else can be asked for."""
    if value == "auto":
        return next(name for name, here in possible.items() if here)
    if value not in possible:
        raise ValueError(f"--{flag} {value!r} is not one of auto, {', '.join(possible)}")
    if not possible[value]:
        raise ValueError(f"--{flag} {value} needs a GPU; here: {', '.join(n for n, here in possible.items() if here)}")
    return value


def sft_config(args: TrainArguments) -> SFTConfig:
    """TRL's configuration of a run with decided ``args``."""
    config = SFTConfig(
        output_dir=args.output_dir,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        max_steps=args.steps,
        max_length=args.max_length,
        packing=args.packing,
        learning_rate=args.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=1,
        logging_steps=1,
        optim=args.optimizer,
        gradient_checkpointing=args.checkpointing and not (args.fsdp2 and args.compile),  # there it is in the graph
        gradient_checkpointing_kwargs={"use_reentrant": False} if args.checkpointing else None,
        bf16=args.dtype == "bfloat16",
        fp16=args.dtype == "float16",
        use_cpu=not torch.cuda.is_available(),  # else bfloat16 is refused there
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or 500,
        save_total_limit=2,
        seed=args.seed,
        data_seed=args.seed,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_nan_inf_filter=False,
        **(fsdp2.training_arguments(fsdp2.FSDP2Config.parse(args.fsdp2_options)) if args.fsdp2 else {}),
    )
    if not args.fsdp2:
        config._n_gpu = 1  # on a second card Trainer would double batch and loss, though a 4-bit model stays on one
    return config


def advice(args: TrainArguments) -> str:
    """What to say of a run whose memory did not suffice: the flags that it can still change, what helps most first."""
    flags = {
        "--checkpointing True": not args.checkpointing,
        "--loss chunked": args.loss == "full",
        f"--batch_size 1 --accumulation {args.accumulation * args.batch_size}": args.batch_size > 1,
        "--offload True": args.compile and args.checkpointing and args.offload is False,
        f"--max_length {args.max_length // 2}": True,
        "--compile": not args.compile and args.loss != "full",
        "--optimizer adamw_8bit": "8bit" not in args.optimizer,
        "--fsdp2 over more GPUs": not args.fsdp2,
    }
    able = ", ".join(flag for flag, helps in flags.items() if helps)
    return (
        f"the GPU's memory did not suffice; checkpoints written so far are whole. Try, in this order: {able}, or a "
        "smaller --model. --plan tells what each needs"
    )
