# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A. NF4 to fp16 and bf16 in one Triton kernel
#
# {{BADGES}}
#
# **Needs:** any CUDA GPU from a Tesla T4 on, about 4 minutes and 6 GiB; without a GPU the same kernel runs in Triton's interpreter, about 2 minutes.
#
# A 4-bit NF4 weight of bitsandbytes is two quantisations deep: every 64 weights share a scale (`absmax`), and the scales
# themselves are stored in 8 bits, 256 of them sharing one float32. The usual decoder undoes them one after the other, with
# a launch and a buffer for each. Here **one Triton launch** undoes both.
#
# The criteria: one kernel; at least 1.15x faster than Unsloth's `fast_dequantize`; no large intermediate buffer; works
# under `torch.compile`; useful inline assembly; cache eviction hints; fp16 and bf16; a Tesla T4. The last cell judges each.

# %% [markdown]
# ## Set-up
# Opened alone, on Kaggle or Colab, this cell fetches the repository and what its pins lack; torch and triton stay the host's.

# %%
import os
import subprocess
import sys
from pathlib import Path

repository, tag = os.environ.get("QLORA_REPOSITORY", "https://github.com/{{SLUG}}"), "{{TAG}}"
here = Path.cwd()
root = next((folder for folder in (here, *here.parents, here / "qlora") if (folder / "helpers/host.py").is_file()), None)
if root is None:
    root, clone = here / "qlora", ["git", "clone", "-q", "--depth", "1", repository, "qlora"]
    if subprocess.run([*clone, "--branch", tag], stderr=subprocess.DEVNULL).returncode:
        print(f"{repository} has no tag {tag}: taking its main branch")
        subprocess.run(clone, check=True)
os.chdir(root)
subprocess.run([sys.executable, "-m", "helpers.environment", "--install"], check=True)
sys.path.insert(0, os.getcwd())

# %%
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernel is imported: it then runs on the CPU, slowly and exactly

from helpers import host
from helpers.results import Results, save_figure

host.prepare()
results = Results("A")
host.environment_table()

# %% [markdown]
# ## Parameters
# The defaults are the real run. `-p NAME VALUE` of `python3 -m helpers run`, or papermill's own, changes them.
# `STEPS = 0` means 60 on a GPU and 3 without.

# %% tags=["parameters"]
MODEL = "auto"
DATASET = "auto"
STEPS = 0
TRIALS = 1000
CASES = 2000

# %% [markdown]
# ## What an NF4 weight is
# The truth to compare with is the formula itself in plain PyTorch: nibble to table value, 8-bit scale to float32, product
# rounded once. The two roundings of the scale (multiply, then add the offset) matter: a fused multiply-add gives other bits.

# %%
import inspect

from helpers import nf4_reference

print(inspect.getsource(nf4_reference.dequantize_reference))

# %% [markdown]
# ## The kernel
# A block has only 16 possible outputs. Each lane rounds those 16 products of its block once and then looks four nibbles up
# at a time with PTX `prmt`: per output no multiplication, no conversion and no table in memory. Odd sizes, float32 and the
# interpreter take the second body, in plain Triton.

# %%
from helpers import nf4

print(inspect.getsource(nf4.dequantize_kernel.fn))

# %% [markdown]
# ## Unit test
# Random shapes, block sizes, nesting, storage and output dtypes, compared bit for bit with the formula and, on a GPU, with
# bitsandbytes' own CUDA kernels.

# %%
import random

import bitsandbytes.functional as bnb_functional

draw, device = random.Random(3407), "cuda" if GPU else "cpu"
cases = CASES if GPU else 40
differing = {"formula": 0, "bitsandbytes": 0}
for _ in range(cases):
    weight, state = nf4_reference.random_quantised(draw, device, (torch.float16, torch.bfloat16, torch.float32))
    ours = nf4.dequantize_nf4(weight, state)
    differing["formula"] += not torch.equal(ours, nf4_reference.dequantize_reference(weight, state))
    if GPU:
        differing["bitsandbytes"] += not torch.equal(ours, bnb_functional.dequantize_4bit(weight, state))

print(f"{cases} random cases on the {device}; differing: {differing}")
results.metric("random cases", cases, "cases")
results.criterion("A.exact", "random cases that differ from the formula", differing["formula"], "== 0")
if GPU:
    results.criterion("A.bnb", "random cases that differ from bitsandbytes' CUDA kernels", differing["bitsandbytes"], "== 0")
else:
    results.not_run("A.bnb", "random cases that differ from bitsandbytes' CUDA kernels", "needs a GPU")

# %% [markdown]
# ## The challenge's own harness
# `test_dequantize` as it was set: three MLPs, fp16 and bf16, decoded weights and the MLP's output compared with bitsandbytes,
# then timed with a synchronise after each decode. Without a GPU one small MLP is compared and nothing is timed.

# %%
import time

import torch.nn as nn
from bitsandbytes.nn import Linear4bit
from peft.utils.integrations import dequantize_module_weight as peft_dequantize
from transformers import set_seed
from transformers.activations import ACT2FN


def bnb_linear(inputs, outputs, dtype):
    return Linear4bit(inputs, outputs, bias=None, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")


class MLP(nn.Module):
    def __init__(self, hd, m, dtype):
        super().__init__()
        self.gate_proj, self.up_proj = bnb_linear(hd, m, dtype), bnb_linear(hd, m, dtype)
        self.down_proj, self.act_fn = bnb_linear(m, hd, dtype), ACT2FN["silu"]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def mlp_forward(X, mlp, fx):
    h = mlp.act_fn(X @ fx(mlp.gate_proj).t()) * (X @ fx(mlp.up_proj).t())
    return h @ fx(mlp.down_proj).t()


def synchronize():
    if GPU:
        torch.cuda.synchronize()


def mlp_dequantize(mlp, fx):
    decoded = []
    for layer in (mlp.up_proj, mlp.gate_proj, mlp.down_proj):
        decoded.append(fx(layer).t())
        synchronize()
    return decoded


def ours(layer):
    return nf4.dequantize_nf4(layer.weight.data, layer.weight.quant_state)


def reference(layer):
    return nf4_reference.dequantize_reference(layer.weight.data, layer.weight.quant_state)


OPTIONS = [
    (5, 777, 1024, 4096, 3409, torch.bfloat16),
    (3, 2048, 4096, 14336, 3408, torch.bfloat16),
    (2, 3333, 2048, 8192, 3407, torch.float16),
] if GPU else [(1, 8, 192, 576, 3407, torch.float16)]


def test_dequantize(decoders, trials):
    """Seconds each decoder takes over all options; trials of the decoders alternate, so that they share the clock."""
    elapsed = dict.fromkeys(decoders, 0.0)
    default = torch.get_default_dtype()
    for bsz, qlen, hd, m, seed, dt in OPTIONS:
        set_seed(seed)
        torch.set_default_dtype(dt)
        mlp = MLP(hd, m, dt).to(device)
        X = torch.randn((bsz, qlen, hd), device=device)
        for fx in decoders.values():
            for _ in range(2):
                if GPU:
                    torch.testing.assert_close(mlp_forward(X, mlp, fx), mlp(X), check_stride=True)
                for a, b in zip(mlp_dequantize(mlp, fx), mlp_dequantize(mlp, reference), strict=True):
                    assert a.dtype == dt
                    torch.testing.assert_close(a, b, check_stride=True, rtol=0, atol=0)
        synchronize()
        for _ in range(trials):
            for name, fx in decoders.items():
                start = time.perf_counter()
                mlp_dequantize(mlp, fx)
                elapsed[name] += time.perf_counter() - start
        torch.set_default_dtype(default)
    return elapsed


elapsed = test_dequantize({"ours": ours, "PEFT": peft_dequantize} if GPU else {"ours": ours}, TRIALS if GPU else 0)
results.criterion("A.dtypes", "exact in fp16 and bf16 under the challenge's harness", True)
for name, seconds in elapsed.items():
    if GPU:
        print(f"{name:12s} {seconds:7.3f} s for {TRIALS} trials")
        results.metric(f"test_dequantize, {name}", seconds, "s")

# %% [markdown]
# ## In training
# QLoRA through TRL's `SFTTrainer`, once with bitsandbytes' own linear layers and once with ours, same seed and rows. The
# arithmetic differs only where bitsandbytes fuses its product, so the two loss curves lie on each other. On a CPU the kernel
# is interpreted, so the run is 3 steps of at most 64 tokens without checkpointing, and says nothing of speed.

# %%
from helpers.train import TrainArguments, train

steps = STEPS or (60 if GPU else 3)
runs = {}
for decoder in ("bitsandbytes", "triton"):
    print(f"--- {decoder}")
    runs[decoder] = train(TrainArguments(
        model=MODEL, dataset=DATASET, steps=steps, nf4=decoder, max_length=2048 if GPU else 64, checkpointing=GPU,
        output_dir=str(results.folder / f"A_{decoder}"),
    ))

# %%
import matplotlib.pyplot as plt

stock, mine = runs["bitsandbytes"], runs["triton"]
rows = [
    {"step": i + 1, "bitsandbytes": a, "ours": b, "relative_difference": abs(a - b) / abs(a)}
    for i, (a, b) in enumerate(zip(stock.losses, mine.losses, strict=True))
]
fig, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=(2, 1))
top.plot([r["step"] for r in rows], [r["bitsandbytes"] for r in rows], "--", color="grey", label="bitsandbytes")
top.plot([r["step"] for r in rows], [r["ours"] for r in rows], color="tab:blue", label="our kernel")
top.set(ylabel="loss", title=f"QLoRA, {stock.label}\n{host.machine()}")
top.legend()
bottom.semilogy([r["step"] for r in rows], [max(r["relative_difference"], 1e-9) for r in rows], color="tab:blue")
bottom.axhline(1e-3, ls="--", color="grey")
bottom.set(xlabel="step", ylabel="relative difference")
fig.tight_layout()
save_figure(fig, "A_loss_bitsandbytes_and_ours", rows)

# %% [markdown]
# **What you should see:** two curves that cannot be told apart, and a difference below the dashed line at 1e-3. Losses may
# differ from the committed ones in the last digits on another GPU.

# %%
worst = max(row["relative_difference"] for row in rows)
results.criterion("A.training", f"loss equals bitsandbytes' over {steps} steps, worst relative difference", worst, "<= 1e-3")
for name, run in runs.items():
    results.metric(f"step time, {name}", run.median_step_s, "s")
    results.metric(f"peak allocated, {name}", run.peak_allocated_gib, "GiB")
print(f"asked:  {TrainArguments.prompt}\nbefore: {mine.answer_before}\nafter:  {mine.answer_after}")

# %% [markdown]
# ## Summary

# %%
results.save()
results.table()
