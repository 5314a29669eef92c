"""QLoRA training on TRL's ``SFTTrainer``: one function for notebooks, one command for a shell.

    python3 -m helpers.train --model auto --dataset auto --steps 60

Stock transformers, PEFT, TRL and bitsandbytes do the training; each part of this project plugs in by a flag and comes
out again when the run ends. Every run logs one line a step, writes it as CSV, and saves the adapter in PEFT's format.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from . import attention, attention_transformers, checkpoints, fsdp2, host, plan, t4
from .chunked_head import chunked_loss
from .compiled_loss import CompiledModel
from .expected_memory import expected, row_lengths
from .host_checked import HostChecked
from .instruction_data import load_instructions
from .memory import GIB, grow_segments, peak_gib, reset_peak
from .nf4_tensor import NF4Linear
from .qlora_trainer import QLoRATrainer, StepLog
from .train_arguments import DTYPES, TrainArguments, advice, decided, quickest, sft_config


@dataclass
class TrainResult:
    """What a run leaves: ``rows`` as logged (qlora_trainer.COLUMNS), peaks in GiB, answers, the adapter's folder."""

    rows: list[dict[str, float]]
    label: str
    output_dir: Path
    peak_allocated_gib: float
    peak_reserved_gib: float
    expected_gib: float  # allocated, by helpers/expected_memory.py; NaN for layers that it does not know
    answer_before: str = ""
    answer_after: str = ""

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [row["loss"] for row in self.rows]

    @property
    def median_step_s(self) -> float:
        """Median seconds a step, the first left out (it compiles and warms up)."""
        return float(np.median([row["step_s"] for row in self.rows[1:] or self.rows]))


def train(args: TrainArguments, callbacks: list[TrainerCallback] | None = None) -> TrainResult:
    """Fine-tune with QLoRA and return what was measured; the adapter is in ``args.output_dir``.

    Raises:
        ValueError: an argument that cannot be honoured, before anything is loaded or written.
    """
    host.quiet()  # before transformers warns, of a checkpointed sharded model, against what FSDP2 does not do
    args = decided(args)
    resume_from = _checked_output(args)
    sharding = _sharding(args)
    config = sft_config(args)
    gc.collect()  # an earlier run's model, which would go in the middle of this one
    held = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    grow_segments()
    random.seed(args.seed), np.random.seed(args.seed), torch.manual_seed(args.seed)
    read = not args.model.startswith("shape:")  # random weights are made on the device
    in_turn = fsdp2.one_rank_at_a_time if sharding and read else contextlib.nullcontext
    with in_turn():
        vocabulary = plan.config_of(args.model)[0].get_text_config().vocab_size
    rows = load_instructions(args.dataset, vocab_size=vocabulary, seed=args.seed)
    with in_turn():
        base = checkpoints.load_base(args.model, DTYPES[args.dtype])
    model = checkpoints.attach_lora(base.model, args.lora_rank)
    if args.attention != "stock":
        attention_transformers.register()
        model.set_attn_implementation(f"qlora_{args.attention}")
    prompt = "" if base.random_weights else args.prompt
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    log = StepLog(output_dir / "train_log.csv", keep_up_to=_step_of(resume_from))

    before = answer(model, base.tokenizer, prompt) if fsdp2.main_process() else ""
    with (
        _deterministic(args.deterministic),
        contextlib.nullcontext() if args.attention == "stock" or args.compile else attention.without_cudnn(),
        nf4_decoder(model, "bitsandbytes" if sharding else args.nf4),  # sharded layers have their own switches
        chunked_loss(model) if args.loss == "chunked" else contextlib.nullcontext(),
        compiled_regions(model, args) as compiled,
    ):
        trainer = QLoRATrainer(
            model,
            loss=args.loss,
            args=config,
            train_dataset=rows,
            processing_class=base.tokenizer,
            callbacks=[log, *(callbacks or [])],
        )
        if args.compile:
            trainer.data_collator = HostChecked(trainer.data_collator)
        if sharding:
            fsdp2.shard_trainer(trainer, sharding, compiled.store)
        _say(f"{base.label} on {host.machine()}: " + ", ".join(active_parts(trainer, args, compiled.parts)))
        if torch.cuda.is_available():
            reset_peak()
        trainer.train(resume_from_checkpoint=resume_from)
        allocated, reserved = peak_gib()
        trainer.save_whole_model()
    planned = (_expected_bytes(trainer, args) + held) / GIB
    after = answer(model, base.tokenizer, prompt)  # of a sharded model all ranks together
    _say(f"peak memory: {allocated:.2f} GiB allocated (--plan expects {planned:.2f} on a GPU), {reserved:.2f} GiB "
         f"reserved; adapter in {args.output_dir}")  # fmt: skip
    return TrainResult(log.rows, base.label, output_dir, allocated, reserved, planned, before, after)


def _expected_bytes(trainer: QLoRATrainer, args: TrainArguments) -> float:
    try:
        return expected(trainer.model.config, args, row_lengths(trainer.train_dataset)).total
    except Exception:  # layers that the formulas do not know: an estimate must not end a run that has trained
        return float("nan")


def _say(line: str) -> None:
    if fsdp2.main_process():
        print(line, flush=True)


def _sharding(args: TrainArguments) -> fsdp2.FSDP2Config | None:
    """With ``--fsdp2``: its options, once this process has joined the others."""
    if not args.fsdp2:
        return None
    dtype = None if args.dtype == "float32" else DTYPES[args.dtype]
    config = fsdp2.FSDP2Config.parse(
        args.fsdp2_options, param_dtype=dtype, compile_blocks=args.compile,
        checkpoint_blocks=args.compile and args.checkpointing, decoder=args.nf4,
    )  # fmt: skip
    fsdp2.start_ranks("cuda" if torch.cuda.is_available() else "cpu")
    return config


@contextlib.contextmanager
def nf4_decoder(model: torch.nn.Module, choice: str) -> Iterator[None]:
    """Decode the 4-bit weights of ``model`` by ``triton`` (helpers/nf4_linear.py) or by ``bitsandbytes``' own path."""
    if choice == "bitsandbytes":
        yield
        return
    from .nf4_linear import triton_nf4

    with triton_nf4(model):
        yield


@contextlib.contextmanager
def compiled_regions(model: torch.nn.Module, args: TrainArguments) -> Iterator[CompiledModel]:
    """``torch.compile`` the regions of ``model`` (helpers/compiling.py) where that is asked for; yields what became
    of each region. A sharded model's layers are compiled by helpers/fsdp2.py, under the same settings."""
    if not args.compile:
        yield CompiledModel()
        return
    from .compiling import compile_model

    backend = "eager" if args.fsdp2 and not torch.cuda.is_available() else "inductor"  # as FSDP2's blocks
    offload = args.checkpointing and args.offload
    with compile_model(
        model, sharded=args.fsdp2, backend=backend, cuda_graphs=args.cuda_graphs, offload=offload
    ) as compiled:
        yield compiled


def active_parts(trainer: QLoRATrainer, args: TrainArguments, regions: dict[str, str]) -> list[str]:
    """What is switched on, read off the model and the trainer themselves, for the first line of a run."""
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trainable)
    layers = [module for module in trainer.model.modules() if isinstance(module, Linear4bit | NF4Linear)]
    ours = sum(
        getattr(layer, "decoder", "") == "triton" or layer.forward.__module__ == f"{__package__}.nf4_linear"
        for layer in layers
    )
    rows = trainer.args.per_device_train_batch_size
    return [
        f"NF4 decoded by {'the Triton kernel' if ours else 'bitsandbytes'} in {ours or len(layers)} layers",
        f"{args.dtype} compute",
        f"LoRA {trainable[0].dtype}".replace("torch.", "") + f" {count / 1e6:.1f} M parameters",
        "checkpointing" if trainer.model.is_gradient_checkpointing or trainer.args.gradient_checkpointing
        or (args.fsdp2 and args.compile and args.checkpointing) else "no checkpointing",
        f"{trainer.loss_path} loss",
        f"attention {trainer.model.config._attn_implementation}",
        "packed rows" if trainer.args.packing else "padded rows",
        "compiled: " + ", ".join(f"{name} ({what})" if what != "compiled" else name for name, what in regions.items())
        if regions else "eager",
        f"batch {rows} x {trainer.args.gradient_accumulation_steps}",
        *fsdp2.active_parts(trainer.model),
    ]  # fmt: skip


@torch.no_grad()
def answer(model: torch.nn.Module, tokenizer: Any, prompt: str, new_tokens: int = 48) -> str:
    """The model's greedy answer to ``prompt`` in its chat template; leaves random state and mode as they were."""
    if not prompt:
        return ""
    training = model.training
    model.eval()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    autocast = torch.autocast(model.device.type, dtype=model.dtype, enabled=model.dtype != torch.float32)
    with autocast:
        output = model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    model.train(training)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _checked_output(args: TrainArguments) -> str | None:
    """The checkpoint to resume from, if any; refuses to write over a run's checkpoints."""
    folder = Path(args.output_dir)
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    if args.resume and last is None:
        raise ValueError(f"--resume: there is no checkpoint in {folder}; train with --save_steps first")
    if last and not args.resume:
        raise ValueError(f"{folder} holds checkpoints of an earlier run; add --resume, or give another --output_dir")
    return last


def _step_of(checkpoint: str | None) -> int:
    return int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Deterministic kernels where PyTorch has them (SDPA's backward adds atomically otherwise); undone on exit."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it would write every new tensor twice
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def main(argv: list[str] | None = None) -> int:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(TrainArguments, prog="python3 -m helpers.train", description=__doc__.split("\n")[0])
    args = TrainArguments(**vars(parser.parse_args(argv)))
    try:
        with t4.rehearsal_if_asked(args.rehearse_t4):
            args = quickest(args)
            if args.plan:
                print(plan.describe(args, decided(args)))
                return 0
            result = train(args)
            if host.rehearsing_t4():
                print(t4.proof())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: {advice(decided(args))}\n({str(error).splitlines()[0]})", file=sys.stderr)
        return 1
    if args.fsdp2:
        fsdp2.stop_ranks()
    if fsdp2.main_process() and result.answer_before:
        print(f"asked:  {args.prompt}\nbefore: {result.answer_before}\nafter:  {result.answer_after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
