"""TRL's ``SFTTrainer`` with what QLoRA wants of it, and the line that a run prints of each step."""

from __future__ import annotations

import contextlib
import csv
import logging
import os
import shutil
import time
from pathlib import Path
from unittest import mock

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import rotate_checkpoints
from trl import SFTTrainer

from . import fsdp2
from .memory import peak_gib
from .results import read_rows

COLUMNS = ["step", "loss", "grad_norm", "memory_gib", "tokens_per_s", "step_s"]
# PyTorch's own, 65536, overflows in the first steps, and a skipped step parts two runs that differ by a rounding.
FIRST_SCALE = 4096.0


class StepLog(TrainerCallback):
    """Prints and keeps one line a step, in torchtitan's order: step, loss, grad_norm, memory, tokens a second."""

    def __init__(self, path: Path, keep_up_to: int):
        self.path = path
        self.rows: list[dict[str, float]] = []
        self.started = 0.0
        self.tokens = 0
        if keep_up_to:
            rows = [{key: float(value) for key, value in row.items()} for row in read_rows(path)]
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
