# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # E. Any function of the logits, without the logits
#
# {{BADGES}}
#
# **Needs:** any CUDA GPU from a Tesla T4 on, about 4 minutes; without a GPU it runs at small sizes in about 2 minutes.
#
# The last layer of a language model multiplies hidden states $X$ by a vocabulary of 128,000 rows, and a loss then shrinks the
# product to a number a token. In between stand the logits: 4 GiB in bfloat16 for 16,384 tokens, 8 GiB in float32, and more
# for their gradient. Specialised kernels avoid them for cross entropy. Here they are avoided for **any function**: the
# function is given as it is, `torch.autograd` differentiates it, and only a chunk of its logits exists at a time.
#
# The criteria: at least 50% less memory; the float32 upcast stays; cross entropy works; other functions work; no derivative
# is written by hand; chunk sizes are dynamic; training a Llama-3.2-1B gives the same losses; GRPO works. The last cell
# judges each.

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
import gc
import inspect

import torch
import torch.nn.functional as F
from torch import nn

from helpers import checkpoints, host
from helpers.results import Results, save_figure, worst

host.prepare()
GPU = torch.cuda.is_available()
device, dtype = "cuda" if GPU else "cpu", checkpoints.default_dtype()
results = Results("E")
host.environment_table()

# %% [markdown]
# ## Parameters
# The defaults are the real run. `STEPS = 0` means 60 on a GPU and 6 without; `GRPO_STEPS = 0` means 4 on a GPU and 3 without.

# %% tags=["parameters"]
MODEL = "auto"
DATASET = "auto"
STEPS = 0
GRPO_STEPS = 0

# %% [markdown]
# ## Why chunks are enough
# For a function $f$ that treats rows apart, $y = f(XW^T)$, and a later loss $L(y)$, the chain rule splits over chunks $c$ of rows:
#
# $$\frac{dL}{dX_c} = \frac{dL}{dy_c}\,\frac{\partial y_c}{\partial X_c} \qquad
# \frac{dL}{dW} = \sum_c \frac{dL}{dy_c}\,\frac{\partial y_c}{\partial W}$$
#
# `torch.utils.checkpoint`, the challenge's hint, would run a chunk again in the backward pass: four matrix products where full
# logits take three. Two things make that unnecessary, and both follow from linearity in the upstream gradient $dL/dy$:
#
# * **A sum** $y = \sum_c f(X_c)$ has one upstream gradient for all chunks. So each chunk is differentiated in the *forward* pass,
#   while its logits are there, and the result is multiplied by $dL/dy$ in the backward pass: three products, or two for a
#   frozen $W$.
# * **An output a row** has an upstream gradient a row, known only later. With a frozen $W$ (LoRA), $\partial y_i/\partial x_i$ is
#   no bigger than $x_i$ and can be kept: two products again. Only a trained $W$ needs the chunk once more.
#
# The function below is all there is to the `torch.autograd.Function`; what it calls runs $f$ on a chunk and asks
# `torch.autograd.grad` for the rest. There is no formula of a derivative anywhere.

# %%
from helpers import linear_loss
from helpers.linear_loss import MemoryEfficientLinear, linear_forward

print(inspect.getsource(MemoryEfficientLinear))
print(inspect.getsource(linear_loss._sum))

# %% [markdown]
# Two details keep it fast. A chunk's $dW$ is a matrix as large as $W$, so adding it up costs more than making it; autograd's own
# product is therefore made to add to the float32 sum itself. And $f$ is compiled once for all chunks and lengths.

# %%
from helpers import linear_chunk

print(inspect.getsource(linear_chunk._AddingProduct))

# %% [markdown]
# ## The challenge's test, and an error in its reference
# `transformation_function` is the challenge's, unchanged. Its `NaiveLinear` calls `loss.backward` on the leaf `X`, which fills
# `X.grad`, and returns `X.grad` too, which autograd adds to it: **dX is doubled**. The draft's `* 2` was tuned to match. Plain
# autograd is the reference here.


# %%
def transformation_function(batch, linear, labels):
    x = linear(batch).float()  # Up projection to large space
    from torch.nn import CrossEntropyLoss

    down_projection_function = CrossEntropyLoss(reduction="sum")
    # Down projection to small space
    loss = down_projection_function(x.view(-1, x.shape[-1]), labels.view(-1))
    return loss  # noqa: RET504


class NaiveLinear(torch.autograd.Function):  # the challenge's
    @staticmethod
    def forward(ctx, X, linear, labels, forward_function):
        with torch.no_grad():
            loss = forward_function(X, linear, labels)
        ctx.save_for_backward(X, labels)
        ctx.linear, ctx.forward_function = linear, forward_function
        return loss

    @staticmethod
    def backward(ctx, dY):
        X, labels = ctx.saved_tensors
        with torch.enable_grad():
            X.requires_grad = True
            ctx.linear.weight.requires_grad = True
            loss = ctx.forward_function(X, ctx.linear, labels)
        loss.backward(dY)
        return X.grad, None, None, None


def test_comparison(batch_size=4, seq_length=512, hidden_dim=1024, vocab_size=32_000):
    """Loss, dX and dW of ours and of `NaiveLinear` against plain autograd; peak memory of plain autograd and ours."""
    torch.manual_seed(42)
    X = torch.randn(batch_size, seq_length, hidden_dim, device=device, requires_grad=True)
    labels = torch.randint(0, vocab_size, (batch_size, seq_length), device=device)
    linear = nn.Linear(hidden_dim, vocab_size, bias=False, device=device)

    def run(function):
        X.grad = linear.weight.grad = None
        loss = function(X, linear, labels)
        loss.backward()
        return loss.detach(), X.grad.clone(), linear.weight.grad.clone()

    def efficient(X, linear, labels):
        return linear_forward(X, linear, labels, forward_function=transformation_function, chunk_size=256)

    truth, ours = run(transformation_function), run(efficient)
    naive = run(lambda *args: NaiveLinear.apply(*args, transformation_function))
    close = [torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(ours, truth, strict=True)]
    print(f"loss {truth[0]:.4f}, ours {ours[0]:.4f}; loss, dX and dW close to plain autograd: {close}")
    print(f"the naive reference's dX over plain autograd's: {(naive[1].norm() / truth[1].norm()).item():.3f}")
    return all(close), (naive[1].norm() / truth[1].norm()).item()


size = {} if GPU else {"batch_size": 2, "seq_length": 256, "hidden_dim": 128, "vocab_size": 4000}
same, naive_ratio = test_comparison(**size)
results.metric("dX of the challenge's NaiveLinear over plain autograd's", naive_ratio, "")
results.criterion("E.cross_entropy", "the challenge's function, unchanged: loss, dX and dW close by its own allclose", same)

# %% [markdown]
# ## Functions
# Each is a few lines of plain PyTorch, with its float32 upcast, and is handed over as it is. Sums:

# %%
from helpers.loss_functions import cross_entropy, log_probs, log_probs_and_entropy


def smoothed_z_loss_softcap(x, linear, labels):
    logits = 30.0 * torch.tanh(linear(x).float() / 30.0)
    loss = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")
    return loss + 1e-4 * logits.logsumexp(1).square().sum()


def focal(x, linear, labels, gamma=2.0):
    logp = F.log_softmax(linear(x).float(), dim=1).gather(1, labels[:, None])
    return -((1 - logp.exp()) ** gamma * logp).sum()


def distillation(x, linear, labels, teacher_x, teacher=None):
    """KL divergence from a teacher's head over the teacher's own hidden states."""
    p = F.log_softmax(teacher(teacher_x).float() / 2, dim=1)
    return F.kl_div(F.log_softmax(linear(x).float() / 2, dim=1), p, log_target=True, reduction="sum")


def grpo(x, linear, labels, advantages, old, reference, beta=0.04):
    """GRPO in one piece: the sum over tokens, and its KL as a metric."""
    logp = log_probs(x, linear, labels)
    ratio, gap = torch.exp(logp - old), reference - logp
    kl = gap.exp() - gap - 1
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return (beta * kl - gain).sum(), kl.detach().sum()


# %% [markdown]
# And functions that return numbers a row, whose loss comes later, outside: DPO from the log-probabilities of chosen and rejected
# answers, and log-probabilities with an entropy bonus.


# %%
def dpo(score):
    """`score` gives log-probabilities [4 answers, length]: two chosen, two rejected. The reference's are random here."""
    chosen, rejected = score.sum(1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def with_entropy_bonus(scores):
    logp, entropy = scores
    return -(logp * torch.linspace(-1, 1, logp.shape[1], device=logp.device)).mean() - 0.01 * entropy.mean()


# %% [markdown]
# All against plain autograd on full logits, in float32, with an upstream gradient that is not one, for a trained and a frozen
# weight, with three chunk sizes that do not divide the rows:

# %%
import functools

torch.manual_seed(0)
batch, length, hidden, vocabulary = (4, 96, 256, 8000) if GPU else (4, 24, 64, 1000)
linear = nn.Linear(hidden, vocabulary, device=device)
teacher = nn.Linear(hidden, vocabulary, device=device).requires_grad_(False)
x = torch.randn(batch, length, hidden, device=device, requires_grad=True)
labels = torch.randint(vocabulary, (batch, length), device=device)
advantages = torch.randn(batch, 1, device=device).expand(batch, length)
with torch.no_grad():
    reached = log_probs(x.view(-1, hidden), linear, labels.view(-1)).view(batch, length)
old, reference = reached + 0.1 * torch.randn_like(reached), reached + 0.1 * torch.randn_like(reached)


def first(output):
    return output[0] if isinstance(output, tuple) else output


FUNCTIONS = {
    "cross entropy": (cross_entropy, (), first),
    "cross entropy, smoothing, z-loss, softcap": (smoothed_z_loss_softcap, (), first),
    "focal": (focal, (), first),
    "KL distillation": (functools.partial(distillation, teacher=teacher), (torch.randn_like(x.detach()),), first),
    "GRPO": (grpo, (advantages, old, reference), first),
    "DPO": (log_probs, (), dpo),
    "log-probabilities and entropy": (log_probs_and_entropy, (), with_entropy_bonus),
}
plain, rows = nn.ModuleList([linear]), []
for name, (function, more, finish) in FUNCTIONS.items():
    for trained in (True, False):
        linear.requires_grad_(trained)
        inputs = [x, *(linear.parameters() if trained else ())]
        flat = [t.reshape(batch * length, *t.shape[2:]) for t in (x, labels, *more)]
        whole = function(flat[0], linear, *flat[1:])
        if finish is not first:
            whole = tuple(t.view(batch, length) for t in whole) if isinstance(whole, tuple) else whole.view(batch, length)
        wanted = [t.detach() for t in (finish(whole), *torch.autograd.grad(finish(whole) * -1.7, inputs))]
        for chunk in (7, 50, "auto"):
            loss = finish(linear_forward(x, linear, labels, *more, forward_function=function, chunk_size=chunk))
            got = [t.detach() for t in (loss, *torch.autograd.grad(loss * -1.7, inputs))]
            errors = [((a - b).norm() / b.norm()).item() for a, b in zip(got, wanted, strict=True)]
            rows.append({"function": name, "weight": "trained" if trained else "frozen", "chunk": chunk, "loss": errors[0],
                         "dx": errors[1], "weight_and_bias": worst(errors[2:]) if trained else 0.0})
for name in FUNCTIONS:
    mine = [r for r in rows if r["function"] == name]
    print(f"{name:42s} relative error: loss {worst(r['loss'] for r in mine):.1e}, dX {worst(r['dx'] for r in mine):.1e}, "
          f"dW, db {worst(r['weight_and_bias'] for r in mine):.1e}")
results.criterion("E.others", "six other functions: worst relative error of loss and gradients",
                  worst(r[key] for r in rows for key in ("loss", "dx", "weight_and_bias") if r["function"] != "cross entropy"),
                  "<= 1e-4")

# %% [markdown]
# The upcast is at work, and not only written: on bfloat16 hidden states, the loss is that of float32 logits and not that of
# bfloat16 ones.

# %%
half_x, half_linear = x.detach().bfloat16(), nn.Linear(hidden, vocabulary, device=device).bfloat16()
with torch.no_grad():
    logits = half_linear(half_x).view(-1, vocabulary)
    in_float32, in_bfloat16 = (F.cross_entropy(z, labels.view(-1), reduction="sum").item() for z in (logits.float(), logits))
    ours = linear_forward(half_x, half_linear, labels, forward_function=cross_entropy, chunk_size=50).item()
print(f"summed loss: ours {ours:.4f}, full logits upcast {in_float32:.4f}, full logits in bfloat16 {in_bfloat16:.4f}")
results.criterion("E.upcast", "difference from full logits with the float32 upcast, over what leaving it out would make",
                  abs(ours - in_float32) / abs(in_bfloat16 - in_float32), "<= 0.01")

# %% [markdown]
# ## No derivative by hand
# A function nobody thought of cannot have one. Functions composed at random, of random shapes, chunk sizes, upstream gradients and
# frozen parts, against autograd in float64:

# %%
import random

STEPS_ON_LOGITS = [lambda z: 3 * torch.tanh(z / 3), lambda z: z * torch.sigmoid(z), lambda z: z + z.roll(1, 1) / 4,
                   lambda z: F.layer_norm(z, z.shape[-1:]), lambda z: z - z.mean(1, keepdim=True)]
OF_A_ROW = [lambda z, y: z.log_softmax(1).gather(1, y[:, None])[:, 0], lambda z, y: z.logsumexp(1) ** 2, lambda z, y: z.var(1),
            lambda z, y: -(z.softmax(1) * z.log_softmax(1)).sum(1), lambda z, y: z[:, :3].exp().sum(1)]


def composed(draw):
    steps, of_row, summed = draw.sample(STEPS_ON_LOGITS, draw.randint(0, 3)), draw.choice(OF_A_ROW), draw.random() < 0.5

    def function(x, linear, labels):
        z = linear(x)
        for step in steps:
            z = step(z)
        return of_row(z, labels).sum() if summed else of_row(z, labels)

    return function


draw, differing, cases = random.Random(3407), 0, 100 if GPU else 40
for _ in range(cases):
    n, head = draw.randint(1, 30), nn.Linear(8, 23, bias=draw.random() < 0.5, dtype=torch.float64)
    head.requires_grad_(draw.random() < 0.6)
    states, targets, function = torch.randn(n, 8, dtype=torch.float64, requires_grad=True), torch.randint(23, (n,)), composed(draw)
    inputs = [states, *(p for p in head.parameters() if p.requires_grad)]
    wanted = function(states, head, targets)
    upstream = torch.randn_like(wanted)
    got = linear_forward(states, head, targets, forward_function=function, chunk_size=draw.randint(1, n + 1))
    pairs = zip(torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(wanted, inputs, upstream), strict=True)
    differing += not all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in pairs)
print(f"{cases} functions composed at random; gradients that differ from autograd's: {differing}")
results.criterion("E.autograd", "functions composed at random whose gradients differ from autograd's (float64)", differing, "== 0")

# %% [markdown]
# ## The spike vanishes
# What the allocator holds above x, weight and labels, from the first operation of the forward pass to the last of the backward
# pass, with the gradients of x and of the weight. On a GPU this is the allocator's own history, at the size the challenge
# names (4 x 4096 tokens, 4096 wide, 128K words) where it fits; without one the living tensors are counted at each
# operation, at a small size.

# %%
import matplotlib.pyplot as plt

from helpers import bench_linear_loss as bench

total_gib = torch.cuda.get_device_properties(0).total_memory / 1024**3 if GPU else 0
SHAPE = (16384, 4096, 131072) if total_gib > 60 else (4096, 2048, 131072) if GPU else (512, 64, 4000)
options = {} if GPU else {"chunk_size": 64}
curves, reductions = {}, {}
for trained in (True, False):
    case = bench.make_case(*SHAPE, trained=trained, dtype=dtype)
    for name, function in (("full logits", bench.full_logits), ("ours", functools.partial(bench.ours, **options))):
        def step(function=function, case=case):
            function(case).backward()

        step()  # compiles, where it pays
        case.clear()
        curves[name, trained] = bench.memory_curve(step)
        case.clear()
    full, ours = (max(row["gib"] for row in curves[name, trained]) for name in ("full logits", "ours"))
    reductions[trained] = 100 * (1 - ours / full)
    print(f"{'trained' if trained else 'frozen'} weight: peak {full:.3f} GiB with full logits, {ours:.3f} GiB in chunks, "
          f"{reductions[trained]:.1f}% less")
    del case
rows = [{"path": name, "weight": "trained" if trained else "frozen", **row} for (name, trained), c in curves.items() for row in c]
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
for axis, trained in zip(axes, (True, False), strict=True):
    for name, color in (("full logits", "tab:red"), ("ours", "tab:blue")):
        curve = curves[name, trained]
        axis.fill_between([r["event"] / len(curve) for r in curve], [r["gib"] for r in curve], step="post", alpha=0.5,
                          color=color, label=name)
    axis.set(title=f"{'trained' if trained else 'frozen'} weight", xlabel="part of the step")
axes[0].set(ylabel="GiB above the inputs")
axes[0].legend()
fig.suptitle(f"{SHAPE[0]} rows x {SHAPE[1]} x {SHAPE[2]}, {str(dtype)[6:]}, {host.machine()}")
fig.tight_layout()
save_figure(fig, "E_memory_of_a_step", rows)

# %% [markdown]
# **What you should see:** a red mountain of logits, their float32 copy and their gradient; in blue a low line of chunks, on top of
# the float32 sum of the weight's gradient where the weight is trained.

# %%
for trained, reduction in reductions.items():
    name = "trained" if trained else "frozen"
    results.criterion(f"E.memory_{name}", f"less peak memory than full logits, gradients included, {name} weight", reduction,
                      ">= 50", "%")

# %% [markdown]
# ## Against the specialised kernels
# Forward and backward, one label in seven ignored. Our path does not know that the function is cross entropy. The others do.

# %%
HOPPER = total_gib > 60 and not host.rehearsing_t4() and torch.cuda.get_device_capability() == (9, 0)
NOT_A_T4S = " (not a T4's)" if host.rehearsing_t4() else ""
if host.rehearsing_t4():
    print("times, here and below, are those of the card that rehearses: a rehearsal says nothing of a T4's speed")
benchmarks = {}
if GPU:
    for trained in (False, True):
        case = bench.make_case(*SHAPE, trained=trained, dtype=dtype)
        benchmarks[trained] = bench.measure(bench.paths(trained), case, 5)
        print(f"{'trained' if trained else 'frozen'} weight, {' x '.join(map(str, SHAPE))}, {dtype}")
        print(bench.table(benchmarks[trained]) + "\n", flush=True)
        for row in benchmarks[trained]:
            results.metric(f"{row['path']}, {'trained' if trained else 'frozen'}, time", row["ms"], "ms")
            results.metric(f"{row['path']}, {'trained' if trained else 'frozen'}, peak", row["peak_gib"], "GiB")
        del case
else:
    print("no GPU: nothing is timed here")

# %%
BOUNDS = [("E.frozen", "frozen weight", False, "ours", 52, 0.4),
          ("E.trained", "trained weight, its gradient summed in float32", True, "ours", 85, 3.5),
          ("E.bf16_sum", "trained weight, its gradient summed in bfloat16", True, "ours, bf16 sum", None, 1.5)]
for id, text, trained, path, ms, gib in BOUNDS:
    if not HOPPER:
        results.not_run(id, f"time and peak at 16384 x 4096 x 131072, {text}", "the bound is for an H100 or H200")
        continue
    row = next(r for r in benchmarks[trained] if r["path"] == path)
    if ms:
        results.criterion(f"{id}_time", f"forward and backward, {text}", row["ms"], f"<= {ms}", "ms")
    results.criterion(f"{id}_peak", f"peak above the inputs, {text}", row["peak_gib"], f"<= {gib}", "GiB")
for trained in (False, True):
    weight = "trained" if trained else "frozen"
    id, text = f"E.fastest_{weight}", f"time of the fastest other path over ours, {weight} weight"
    if not GPU or host.rehearsing_t4():
        results.not_run(id, text, "a rehearsal says nothing of speed" if GPU else "needs a GPU")
        continue
    others = [r["ms"] for r in benchmarks[trained] if not r["path"].startswith("ours") and r["ms"] == r["ms"]]
    ratio = min(others) / next(r["ms"] for r in benchmarks[trained] if r["path"] == "ours")
    results.criterion(id, text, ratio, ">= 1.0", "x")

# %% [markdown]
# ## Dynamic chunk sizes
# Any number of rows, or `auto`: what keeps the device busy, as far as memory is free; halved when memory runs out. Small chunks cost
# time, because the sum of the weight's gradient is read and written once a chunk. They save memory only down to where the float32
# sum, with the gradient rounded from it at the end, sets the peak: up to about 2048 rows at 4096 x 131072.

# %%
case, sweep = bench.make_case(*SHAPE, trained=True, dtype=dtype), []
sizes = [128, 256, 512, 1024, 2048, 4096] if GPU else [16, 64, 256]
for chunk in [*sizes, "auto"]:
    function = functools.partial(bench.ours, chunk_size=chunk)
    if GPU:
        (row,) = bench.measure({"ours": function}, case, 3)
    else:
        row = {"ms": float("nan"), "loss": function(case).item(),
               "peak_gib": max(r["gib"] for r in bench.memory_curve(lambda function=function: function(case).backward()))}
        case.clear()
    sweep.append({"chunk": chunk, **{k: row[k] for k in ("ms", "peak_gib", "loss")}})
    print(f"{chunk!s:>5} rows a chunk: {row['ms']:7.1f} ms{NOT_A_T4S}, peak {row['peak_gib']:6.3f} GiB, loss {row['loss']:.6f}")
spread = worst(r["loss"] for r in sweep) - min(r["loss"] for r in sweep)
results.criterion("E.chunks", "largest difference of the loss between chunk sizes, relative", spread / sweep[0]["loss"], "<= 1e-5")
fig, memory = plt.subplots(figsize=(6, 3.2))
memory.plot(range(len(sizes)), [r["peak_gib"] for r in sweep[:-1]], "o-", color="tab:blue")
memory.axhline(sweep[-1]["peak_gib"], ls=":", color="tab:blue", label="auto")
memory.set(xticks=range(len(sizes)), xticklabels=sizes, xlabel="rows of a chunk")
memory.set_ylabel("peak, GiB", color="tab:blue")
memory.tick_params(axis="y", colors="tab:blue")
if GPU:
    time_axis = memory.twinx()
    time_axis.plot(range(len(sizes)), [r["ms"] for r in sweep[:-1]], "s-", color="tab:orange")
    time_axis.axhline(sweep[-1]["ms"], ls=":", color="tab:orange")
    time_axis.set_ylabel(f"forward + backward, ms{NOT_A_T4S}", color="tab:orange")
    time_axis.tick_params(axis="y", colors="tab:orange")
memory.legend(loc="upper center")
memory.set_title(f"trained weight, {' x '.join(map(str, SHAPE))}\n{host.machine()}")
fig.tight_layout()
del case
save_figure(fig, "E_chunk_sizes", sweep)

# %% [markdown]
# ## More tokens than full logits can hold
# 65,536 rows of the same size. Their float32 logits alone would be 32 GiB, their gradient as much again.

# %%
if total_gib > 60:
    torch.cuda.empty_cache()
    case = bench.make_case(65536, 4096, 131072, trained=True, dtype=dtype)
    long = bench.measure({"full logits": bench.full_logits, "ours": bench.ours}, case, 2)
    print(bench.table(long))
    results.metric("65,536 rows, ours, peak", long[1]["peak_gib"], "GiB")
    results.metric("65,536 rows, ours, time", long[1]["ms"], "ms")
    results.criterion("E.long", "65,536 rows: ours runs, and in less than a tenth of this GPU", long[1]["peak_gib"] < total_gib / 10)
    del case
else:
    results.not_run("E.long", "65,536 rows at 4096 x 131072", "needs a GPU of 60 GiB")
gc.collect()
if GPU:
    torch.cuda.empty_cache()

# %% [markdown]
# ## Training loss
# QLoRA through TRL's trainer, once with all logits and once in chunks (`--loss chunked`), same seed and rows. `auto` is the
# challenge's Llama-3.2-1B where the Hub answers. Elsewhere the real weights are SmolLM2-135M's, and on a GPU the 1B shape is
# trained too, with random weights: its memory and arithmetic are real, its loss is that of noise. Real weights train in fp16, as
# on a T4, with GradScaler: in bfloat16 SmolLM2's loss moves by up to 0.7% when any product is rounded another way, and by less
# than 0.1% in fp16. The learning rate is a tenth of the usual one: Adam's first steps turn mere roundings into whole updates.
#
# What is saved here is memory, and a step may even take longer: the logits of a sum are made once either way, but chunks take
# more calls from Python, for which steps this small wait, and finding the rows that have labels waits for the GPU.

# %%
from helpers.train import TrainArguments, train

steps = STEPS or (60 if GPU else 6)
names = [checkpoints.resolve_model(MODEL)]
if GPU and names == ["embedded"]:
    names.append("shape:llama-3.2-1b")
runs = {}
for name in names:
    for loss in ("full", "chunked"):
        print(f"--- {name}, {loss}")
        data = f"random:200-512x{4 * steps}" if name.startswith("shape:") else DATASET
        runs[name, loss] = train(TrainArguments(
            model=name, dataset=data, steps=steps, loss=loss, batch_size=1 if not GPU else 4 if name.startswith("shape:") else 16, accumulation=1, learning_rate=2e-5,
            dtype="float16" if GPU and name != "shape:llama-3.2-1b" else "auto", max_length=512 if GPU else 128, checkpointing=False, prompt="", output_dir=str(results.folder / f"E_{loss}_{len(runs)}"),
        ))
        gc.collect()

# %% [markdown]
# In those models the head is tied to the embedding, and QLoRA freezes both. Here the tied weight is trained, so that its gradient
# comes from both ends, in float32 by a plain loop: SmolLM2 on a GPU, a tiny Llama without.

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from helpers.loss_functions import causal_lm_loss


def tied_losses(chunked):
    """Losses of full fine-tuning on this project's own source text."""
    torch.manual_seed(3407)
    if GPU:
        model = AutoModelForCausalLM.from_pretrained(checkpoints.embedded_folder(), dtype=torch.float32).to(device)
        tokenizer = AutoTokenizer.from_pretrained(checkpoints.embedded_folder())
    else:
        model = LlamaForCausalLM(LlamaConfig(**checkpoints.SHAPES["tiny"]))
        tokenizer = checkpoints.byte_tokenizer()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4 if GPU else 1e-2)
    ids = torch.tensor(tokenizer(inspect.getsource(linear_loss) + inspect.getsource(linear_chunk))["input_ids"], device=device)
    ids = ids.repeat(4)[: 4 * 128 * 12].view(12, 4, 128)  # [batches, rows, length]
    losses = []
    for i in range(steps):
        batch = ids[i % len(ids)]
        if chunked:
            loss = causal_lm_loss(model.model(batch).last_hidden_state, model.lm_head, batch, chunk_size=100)
        else:
            loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


curves = {f"{runs[name, 'full'].label}": (runs[name, "full"].losses, runs[name, "chunked"].losses) for name in names}
curves["tied head trained, " + ("SmolLM2-135M" if GPU else "tiny, RANDOM weights")] = tied_losses(False), tied_losses(True)

# %%
rows = [
    {"model": name, "step": i + 1, "full": a, "chunked": b, "relative_difference": abs(a - b) / abs(a)}
    for name, pair in curves.items() for i, (a, b) in enumerate(zip(*pair, strict=True))
]
fig, axes = plt.subplots(2, len(curves), figsize=(4.2 * len(curves), 5), sharex=True, height_ratios=(2, 1), squeeze=False)
for (top, bottom), name in zip(axes.T, curves, strict=True):
    mine = [r for r in rows if r["model"] == name]
    top.plot([r["step"] for r in mine], [r["full"] for r in mine], "--", color="grey", label="full logits")
    top.plot([r["step"] for r in mine], [r["chunked"] for r in mine], color="tab:blue", label="chunks")
    top.set_title(name, fontsize=9)
    bottom.semilogy([r["step"] for r in mine], [max(r["relative_difference"], 1e-9) for r in mine], color="tab:blue")
    bottom.axhline(1e-3, ls="--", color="grey")
    bottom.set(xlabel="step")
axes[0, 0].set(ylabel="loss")
axes[0, 0].legend()
axes[1, 0].set(ylabel="relative difference")
fig.suptitle(host.machine())
fig.tight_layout()
save_figure(fig, "E_training_loss", rows)

# %% [markdown]
# **What you should see:** two curves that cannot be told apart, and differences below the dashed line at 1e-3.

# %%
largest = {name: worst(r["relative_difference"] for r in rows if r["model"] == name) for name in curves}
for name, value in largest.items():
    print(f"{name}: worst relative difference of {steps} steps {value:.1e}")
real = [name for name in names if name not in ("embedded", "shape:llama-3.2-1b")]
if real:
    results.criterion("E.llama_1b", f"Llama-3.2-1B, real weights: loss of {steps} steps, worst relative difference",
                      largest[runs[real[0], "full"].label], "<= 1e-3")
else:
    results.not_run("E.llama_1b", "Llama-3.2-1B, real weights: loss per step", "the Hub does not answer here; rehearsed by the "
                    + ("rows below" if GPU else "row below"))
for name in names:
    label = runs[name, "full"].label
    if label not in real:
        id = "E.loss_1b_shape" if name.startswith("shape:") else "E.loss_real"
        results.criterion(id, f"{label}: loss of {steps} steps, worst relative difference", largest[label], "<= 1e-3")
    for loss in ("full", "chunked"):
        results.metric(f"{label}, {loss}, step time", runs[name, loss].median_step_s, "s")
        results.metric(f"{label}, {loss}, peak allocated", runs[name, loss].peak_allocated_gib, "GiB")
results.criterion("E.loss_tied", f"tied head trained: loss of {steps} steps, worst relative difference", list(largest.values())[-1],
                  "<= 1e-3")

# %% [markdown]
# ## GRPO
# TRL's `GRPOTrainer` learns sums with a reward that can be verified: right answer or not, and a little for brevity. Completions end
# where the model ends them, so their lengths differ; gradients are accumulated over two micro-batches, and KL is on. `ChunkedGRPOTrainer`
# overrides the one method in which TRL scores completions, and TRL's loss stays TRL's. Completions are recorded
# once and replayed, because one token sampled differently would part the runs. Without a GPU the model is a tiny Llama of
# random weights.

# %%
from datasets import Dataset
from trl import GRPOConfig

from helpers.grpo import ChunkedGRPOTrainer
from helpers.memory import GIB

grpo_steps = GRPO_STEPS or (4 if GPU else 3)
draw = random.Random(3407)
sums = [(draw.randint(2, 60), draw.randint(2, 60)) for _ in range(64)]
questions = Dataset.from_list([
    {"prompt": [{"role": "user", "content": f"What is {a} + {b}? Answer with the number."}], "answer": str(a + b)} for a, b in sums
])


def verified(completions, answer, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    return [float(right in text) - len(text) / 500 for text, right in zip(texts, answer, strict=True)]


def grpo_run(head, recorded=None):
    torch.manual_seed(3407)
    base = checkpoints.load_base("embedded" if GPU else "shape:tiny", torch.float32)  # so that equal can be asked for
    if base.random_weights:
        base.model.generation_config.eos_token_id = list(range(1, 60))  # so that noise ends its sentences at all
    model = checkpoints.attach_lora(base.model)
    config = GRPOConfig(
        output_dir=str(results.folder / "E_grpo"), max_steps=grpo_steps, per_device_train_batch_size=8 if GPU else 4,
        gradient_accumulation_steps=2, num_generations=8 if GPU else 4, max_completion_length=64 if GPU else 24, beta=0.04,
        learning_rate=2e-4, logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, bf16=False, fp16=False,
        gradient_checkpointing=False, use_cpu=not GPU, seed=3407, log_level="error",
    )
    trainer = ChunkedGRPOTrainer(model, reward_funcs=verified, args=config, train_dataset=questions,
                                 processing_class=base.tokenizer, head=head, recorded=recorded)
    trainer.remove_callback(PrinterCallback)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    log = [row for row in trainer.state.log_history if "grad_norm" in row]
    peak = torch.cuda.max_memory_allocated() / GIB if GPU else 0.0
    return log, peak, trainer.recorded, base.label


from transformers import PrinterCallback

_, _, recorded, grpo_label = grpo_run("chunked")
grpo_logs = {}
for head in ("full", "chunked", *(("trl",) if GPU and not host.rehearsing_t4() else ())):
    log, peak, _, _ = grpo_run(head, recorded)
    grpo_logs[head] = log
    seconds = sorted(row["step_time"] for row in log)[len(log) // 2]
    print(f"{head:8s} median step {seconds:6.3f} s{NOT_A_T4S}, peak {peak:6.3f} GiB" if GPU else head)
    if GPU:
        results.metric(f"GRPO, {head}, step time", seconds, "s")
        results.metric(f"GRPO, {head}, peak allocated", peak, "GiB")
for a, b in zip(grpo_logs["full"], grpo_logs["chunked"], strict=True):
    print(f"lengths {a['completions/min_length']:.0f} to {a['completions/max_length']:.0f}, reward {a['reward']:6.3f} | "
          + ", ".join(f"{k} {a[k]:.6f} {b[k]:.6f}" for k in ("loss", "kl", "grad_norm")))

# %%
QUANTITIES = ("loss", "kl", "grad_norm")
rows = [{"step": i + 1, **{f"{k}, {head}": log[i][k] for head, log in grpo_logs.items() for k in QUANTITIES}}
        for i in range(grpo_steps)]
fig, axes = plt.subplots(1, 3, figsize=(10, 3))
for axis, key in zip(axes, QUANTITIES, strict=True):
    axis.plot([r["step"] for r in rows], [r[f"{key}, full"] for r in rows], "--", color="grey", label="full logits")
    axis.plot([r["step"] for r in rows], [r[f"{key}, chunked"] for r in rows], color="tab:blue", label="chunks")
    axis.set(title=key, xlabel="step")
fig.suptitle(f"GRPO, {grpo_label}, {host.machine()}")
fig.tight_layout()
fig.legend(*axes[0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2)
save_figure(fig, "E_grpo", rows)

# %% [markdown]
# **What you should see:** loss, KL and gradient norm of both runs on each other, step by step. At this size chunks save no memory:
# all completions of a micro-batch are fewer rows than `auto` puts into one chunk, so all their logits exist at once, as in full.

# %%
apart = {key: worst(abs(r[f"{key}, full"] - r[f"{key}, chunked"]) for r in rows) / worst(abs(r[f"{key}, full"]) for r in rows)
         for key in QUANTITIES}
print("largest difference over the largest value:", {k: f"{v:.1e}" for k, v in apart.items()})
uneven = any(row["completions/min_length"] < row["completions/max_length"] for row in grpo_logs["full"])
learnt = all(row["grad_norm"] == row["grad_norm"] for row in grpo_logs["full"]) and grpo_logs["full"][-1]["kl"] > 0
results.criterion("E.grpo", "GRPO on the same completions: loss, KL and gradient norm against full logits, worst difference",
                  worst(apart.values()), "<= 1e-3")
results.criterion("E.grpo_real", "the run had completions of uneven length, accumulation, KL, and learnt", uneven and learnt)

# %% [markdown]
# GRPO's loss alone, at the size of an 8B model: eight completions of 2048 tokens, forward and backward, beside TRL's chunked
# path and Liger's. These are rows for many chunks, and here memory is saved.

# %%
id, text = "E.grpo_memory", "GRPO's loss alone, less peak memory than full logits, the worse of frozen and trained weight"
if total_gib > 60:
    parts = []
    for trained in (False, True):
        case = bench.make_case(*SHAPE, trained=trained, dtype=dtype)
        table = bench.measure(bench.grpo_paths(case, 8), case, 3)
        print(f"GRPO, {'trained' if trained else 'frozen'} weight\n{bench.table(table)}\n")
        for row in table:
            results.metric(f"GRPO loss, {row['path']}, {'trained' if trained else 'frozen'}, time", row["ms"], "ms")
            results.metric(f"GRPO loss, {row['path']}, {'trained' if trained else 'frozen'}, peak", row["peak_gib"], "GiB")
        peaks = {row["path"]: row["peak_gib"] for row in table}
        parts.append(peaks["ours"] / peaks["full logits"])
        del case
    results.criterion(id, text, 100 * (1 - worst(parts)), ">= 80", "%")
else:
    results.not_run(id, text, "needs a GPU of 60 GiB")

# %% [markdown]
# ## Summary
# The challenge's marks, and where they are judged: 50% less VRAM `E.memory_*`; the float32 upcast `E.upcast`; cross entropy
# `E.cross_entropy`; other functions `E.others`; no derivative by hand `E.autograd`; dynamic chunk sizes `E.chunks`; the training
# loss of Llama-3.2-1B `E.llama_1b`, with `E.loss_*` beside it; GRPO `E.grpo`, `E.grpo_real` and `E.grpo_memory`.

# %%
results.save()
results.table()
