"""The challenge's own torch.compile script on the stock stack: its options, its logging, its counts as one JSON line.

    python3 -m helpers.compile_stock mlp    # as it was set: LlamaMLP.forward compiled, Inductor, max_autotune
    python3 -m helpers.compile_stock model  # the whole model, traced only, to see every graph break

A process of its own: caches off and one compile thread, as set, would slow everything else. The logs go to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile

os.environ["TORCHDYNAMO_VERBOSE"] = "1"
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import logging

import torch
import transformers.models.llama.modeling_llama

from . import checkpoints, host
from .compile_counter import CompileCounter
from .instruction_data import load_instructions
from .qlora_trainer import QLoRATrainer, StepLog
from .train_arguments import DTYPES, TrainArguments, decided, sft_config

TORCH_COMPILE_OPTIONS = {
    "epilogue_fusion": True,
    "max_autotune": True,
    "shape_padding": True,
    "trace.enabled": True,
    "triton.cudagraphs": False,
}


def set_logging() -> None:
    """The challenge's, word for word; the traces that it asks for go to a scratch folder."""
    torch._inductor.config.debug = True
    torch._logging.set_logs(
        dynamo=logging.WARN,
        inductor=logging.WARN,
        graph_breaks=True,
        recompiles=True,
        recompiles_verbose=True,
        compiled_autograd_verbose=True,
    )
    torch._dynamo.config.verbose = True
    torch._dynamo.config.suppress_errors = False
    torch._dynamo.config.debug_dir_root = tempfile.mkdtemp()


@torch.compile(fullgraph=False, dynamic=True, options=TORCH_COMPILE_OPTIONS)
def compiled_llama_mlp(self, x):
    """Llama's MLP, compiled as the challenge's own example does."""
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("mlp", "model"))
    parser.add_argument("--model", default="auto")
    parser.add_argument("--dataset", default="auto")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    host.prepare()
    arguments = decided(TrainArguments(
        model=args.model, dataset=args.dataset, steps=args.steps, batch_size=1, accumulation=2, max_length=1024,
        lora_rank=32, checkpointing=False, loss="trl" if torch.cuda.is_available() else "full",
        output_dir=tempfile.mkdtemp(),
    ))  # fmt: skip
    base = checkpoints.load_base(arguments.model, DTYPES[arguments.dtype])
    rows = load_instructions(arguments.dataset, vocab_size=base.model.config.vocab_size)
    model = checkpoints.attach_lora(base.model, arguments.lora_rank)
    model.enable_input_require_grads()
    config = sft_config(arguments)
    log = StepLog(os.path.join(arguments.output_dir, "log.csv"), keep_up_to=0)
    trainer = QLoRATrainer(
        model, loss=arguments.loss, args=config, train_dataset=rows, processing_class=base.tokenizer, callbacks=[log]
    )
    set_logging()
    if args.what == "mlp":
        transformers.models.llama.modeling_llama.LlamaMLP.forward = compiled_llama_mlp
    else:
        model.get_base_model().compile(dynamic=True, backend="eager")
    error = ""
    with CompileCounter() as counter:
        try:
            trainer.train()
        except Exception as raised:  # a finding too: what is printed says so
            error = f"{type(raised).__name__}: {str(raised).strip().splitlines()[0]}"
    print(json.dumps({
        "compiles": counter.compiles, "graph_breaks": counter.graph_breaks, "recompiles": counter.recompiles,
        "reasons": counter.reasons, "error": error, "losses": [row["loss"] for row in log.rows],
        "steps_s": [row["step_s"] for row in log.rows],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
