"""QLoRA training on TRL's ``SFTTrainer``: one function for notebooks, one command for a shell.

    python3 -m helpers.train --model auto --dataset auto --steps 60

Stock transformers, PEFT, TRL and bitsandbytes do the training; each part of this project plugs in by a flag and comes
out again when the run ends. Every run logs one line a step, writes it as CSV, and saves the adapter in PEFT's format.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import logging
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import rotate_checkpoints
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer

from . import attention, attention_transformers, checkpoints, fsdp2, host, plan, t4
from .chunked_head import chunked_loss
from .expected_memory import expected, row_lengths
from .host_checked import HostChecked
from .instruction_data import load_instructions
from .memory import GIB, grow_segments, peak_gib, reset_peak
from .nf4_tensor import NF4Linear
from .train_arguments import DTYPES, TrainArguments, advice, decided, quickest, sft_config

COLUMNS = ["step", "loss", "grad_norm", "memory_gib", "tokens_per_s", "step_s"]
# PyTorch's own, 65536, overflows in the first steps, and a skipped step parts two runs that differ by a rounding.
FIRST_SCALE = 4096.0


@dataclass
class TrainResult:
    """What a run leaves: ``rows`` as logged (COLUMNS), peaks in GiB, answers, and the folder of the adapter."""

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


class StepLog(TrainerCallback):
    """Prints and keeps one line a step, in torchtitan's order: step, loss, grad_norm, memory, tokens a second."""

    def __init__(self, path: Path, keep_up_to: int):
        self.path = path
        self.rows: list[dict[str, float]] = []
        self.started = 0.0
        self.tokens = 0
        if keep_up_to and path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
            self.rows = [row | {"step": int(row["step"])} for row in rows if row["step"] <= keep_up_to]

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        with open(self.path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        seconds = time.perf_counter() - self.started  # the loss was just read off the device: work is done
        seen = int(logs.get("num_tokens", 0))
        row = dict(zip(COLUMNS, (
            state.global_step, logs["loss"], float(logs.get("grad_norm", float("nan"))), round(peak_gib()[0], 3),
            round((seen - self.tokens) / seconds, 1), round(seconds, 4),
        ), strict=True))  # fmt: skip
        self.tokens = seen
        self.rows.append(row)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
        print(
            f"step: {row['step']:3d}  loss: {row['loss']:8.5f}  grad_norm: {row['grad_norm']:7.4f}  "
            f"memory: {row['memory_gib']:6.2f} GiB  tps: {row['tokens_per_s']:,.0f}",
            flush=True,
        )


class QLoRATrainer(fsdp2.TrainsSharded, SFTTrainer):
    """``SFTTrainer`` with float32 adapters and checkpoints that appear whole or not at all."""

    def __init__(self, model, loss: str, **kwargs):
        self.loss_path = loss
        adapters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        # It warns of packing with any attention but flash-attn's; transformers masks packed rows for each of ours.
        logging.getLogger("trl").setLevel(logging.ERROR)
        super().__init__(model, **kwargs)
        self.remove_callback(PrinterCallback)  # StepLog prints
        # TRL rounds adapters of a quantised model to bfloat16 (peft#2889); GradScaler has no bfloat16 unscale.
        for name, parameter in self.model.named_parameters():
            if name in adapters:
                parameter.data = adapters[name]
        if (scaler := self.accelerator.scaler) is not None:
            # Ranks average gradients of a loss that Trainer multiplies by their number: so both round alike.
            scale = FIRST_SCALE / self.accelerator.num_processes
            scaler.load_state_dict(scaler.state_dict() | {"scale": scale})
        # from_pretrained leaves the base in evaluation mode under an adapter in training mode: `training_step` looks at
        # the latter alone, and a layer in evaluation mode is not checkpointed.
        self.model.train()
        self._saving_into: str | None = None
        self._tokens_since_log: torch.Tensor | int = 0
        self._flops_per_token: int | None = None

    def training_step(self, model, inputs, *args, **kwargs):
        # Trainer sets every module's mode at every micro-step, which for a thousand of them takes as long as a layer.
        already = mock.patch.object(model, "train", lambda: model) if model.training else contextlib.nullcontext()
        with already:
            return super().training_step(model, inputs, *args, **kwargs)

    def floating_point_ops(self, inputs):
        if self._flops_per_token is None:  # nor does the number of parameters change between micro-steps
            self._flops_per_token = 6 * self.model.num_parameters(exclude_embeddings=True)
        return self._flops_per_token * inputs["input_ids"].numel()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.loss_path == "trl":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"] = False
        counted = inputs.pop("num_tokens", None)
        if model.training:
            if counted is None:
                counted = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            self._tokens_since_log = self._tokens_since_log + counted
        # Trainer's own, past SFTTrainer's fused head: the loss that the model returns.
        return super(SFTTrainer, self).compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs, start_time=None):
        # SFTTrainer reads its token count off the device at every micro-step, which waits for the GPU each time.
        if self.loss_path != "trl" and self.model.training:
            counted = torch.as_tensor(self._tokens_since_log, device=self.accelerator.device)
            self._total_train_tokens += int(self.accelerator.reduce(counted))
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            self._tokens_since_log = 0
        super().log(logs, start_time)

    def _get_output_dir(self, trial):
        return self._saving_into or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        name = f"checkpoint-{self.state.global_step}"
        final = Path(self.args.output_dir) / name
        self._saving_into = str(final.parent / "partial")
        try:
            if self.args.should_save:
                shutil.rmtree(self._saving_into, ignore_errors=True)  # what a run that died while saving left
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                os.replace(Path(self._saving_into) / name, final)
                os.rmdir(self._saving_into)
                rotate_checkpoints(self.args.output_dir, save_total_limit=self.args.save_total_limit)
            self.accelerator.wait_for_everyone()
        finally:
            self._saving_into = None

    def save_whole_model(self) -> None:
        """The adapter and tokenizer into the output folder, where they replace others only once all are written."""
        folder, scratch = Path(self.args.output_dir), Path(self.args.output_dir) / "partial"
        if self.args.should_save:
            shutil.rmtree(scratch, ignore_errors=True)  # what a run that died while saving left
        self.accelerator.wait_for_everyone()
        self.save_model(str(scratch))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for path in sorted(scratch.iterdir(), key=lambda path: path.name == "adapter_config.json"):
                os.replace(path, folder / path.name)  # the file by which an adapter is known comes last
            scratch.rmdir()


def train(args: TrainArguments, callbacks: list[TrainerCallback] | None = None) -> TrainResult:
    """Fine-tune with QLoRA and return what was measured; the adapter is in ``args.output_dir``.

    Raises:
        ValueError: an argument that cannot be honoured, before anything is loaded or written.
    """
    args = decided(args)
    resume_from = _checked_output(args)
    sharding = _sharding(args)
    config = sft_config(args)
    gc.collect()  # an earlier run's model, which would go in the middle of this one
    held = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    host.quiet()
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
        compiled_regions(model, args) as regions,
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
            fsdp2.shard_trainer(trainer, sharding)
        _say(f"{base.label} on {host.machine()}: " + ", ".join(active_parts(trainer, args, regions)))
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
def compiled_regions(model: torch.nn.Module, args: TrainArguments) -> Iterator[dict[str, str]]:
    """``torch.compile`` the regions of ``model`` (helpers/compiling.py) where that is asked for; yields what became
    of each region. A sharded model's layers are compiled by helpers/fsdp2.py, under the same settings."""
    if not args.compile:
        yield {}
        return
    from .compiling import compile_model

    backend = "eager" if args.fsdp2 and not torch.cuda.is_available() else "inductor"  # as FSDP2's blocks
    with compile_model(
        model, sharded=args.fsdp2, backend=backend, cuda_graphs=args.cuda_graphs, offload=args.offload
    ) as compiled:
        yield compiled.parts


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
