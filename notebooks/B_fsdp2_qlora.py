# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # B. QLoRA with FSDP2: exact to the byte, compiled, on two GPUs and more
#
# {{BADGES}}
#
# **Needs:** two CUDA GPUs from the Tesla T4 on, about 7 minutes on two H100; with one GPU it runs what one can show, and without any two CPU processes train SmolLM2, about 3 minutes.
#
# FSDP2 keeps a part of every weight on each GPU and gathers a layer just before it computes. A 4-bit weight is not a
# number but packed bytes with scales beside them, and the stock recipes either leave it whole on every GPU or gather its
# bytes as 16-bit floats, which rewrites some of them. Here every frozen weight is sharded and arrives as it was loaded.
#
# The criteria: FSDP2 works with QLoRA under `SFTTrainer`, with the same loss as one GPU; `torch.compile` works; part A's
# single kernel decodes, and faster; every feature of FSDP2 on and off; less memory and more speed than Unsloth's FSDP2;
# Kaggle's two T4s. The last cell judges each.

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
import time

import torch

from helpers import host

began = time.monotonic()
host.prepare()

from helpers import checkpoints, ranks
from helpers.results import Results, read_rows, save_figure, save_rows, worst
from helpers.sections import Sections

GPUS = torch.cuda.device_count()
results = Results("B")
sections = Sections(results)  # a section that fails is a FAIL in the table, and the next ones run
host.environment_table()

# %% [markdown]
# ## Parameters
# The defaults are the real run. `-p NAME VALUE` of `python3 -m helpers run`, or papermill's own, changes them.
# `MODEL = "auto"` is Llama 3.1 8B where a GPU and the Hub answer. `RANKS = 0` is one process a GPU, and two without any;
# `STEPS = 0` is 60 on a GPU and 4 without; `ACCUMULATION = 0` is the challenge's 4 for its own model, else 1.
# `DTYPES = "auto"` is float16 and, where the GPU computes in it, bfloat16; float32 without a GPU. `BENCH` runs the shape
# of Llama 3.1 8B beside Unsloth, on two GPUs.

# %% tags=["parameters"]
MODEL = "auto"
DATASET = "auto"
RANKS = 0
STEPS = 0
ACCUMULATION = 0
DTYPES = "auto"
BENCH = True

# %%
count = RANKS or GPUS or 2
steps = STEPS or (60 if GPUS else 4)
model = checkpoints.resolve_model(MODEL, checkpoints.CHALLENGE_8B)
large = model == checkpoints.CHALLENGE_8B
label = "SmolLM2-135M-Instruct" if model == "embedded" else model
accumulation = ACCUMULATION or (4 if large else 1)
bfloat16 = GPUS and torch.cuda.get_device_capability()[0] >= 8
dtypes = DTYPES.split(",") if DTYPES != "auto" else ["float32"] if not GPUS else ["float16", *["bfloat16"] * bool(bfloat16)]
at_once = ranks.places(15 if large else 3)  # what times nothing runs side by side where memory and processors allow it
if GPUS == 1 and count == 1:
    print("One GPU: FSDP2 runs over one rank. Sharding and scaling need a second one; all else is shown.")
print(f"{model} in {' and '.join(dtypes)}, {count} rank(s) on {host.machine()}, {at_once} run(s) at once")

# %% [markdown]
# ## Why bytes change
# FSDP2 copies weights into and out of its gathering buffer as numbers. CUDA's copy of a 16-bit float rewrites every NaN
# (pytorch#159333), and packed 4-bit bytes read as floats are full of NaNs. As uint8 nothing is rewritten.

# %%
patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).to("cuda" if GPUS else "cpu")
for dtype in (torch.float16, torch.bfloat16, torch.uint8):
    source = patterns.view(dtype)
    target = torch.zeros_like(source)
    torch._foreach_copy_([target], [source])
    changed = int((target.view(torch.int16) != patterns).sum())
    print(f"copied as {dtype}: {changed} of 65536 patterns changed")

# %% [markdown]
# ## The weight that FSDP2 sees
# `fully_shard` asks a tensor subclass for two functions: what to gather, and what to make of it. `NF4Tensor` hands over
# its bytes as uint8, and wraps what arrives without a copy. No private class of FSDP2 is touched.

# %%
import inspect

from helpers.nf4_tensor import NF4Tensor

print(inspect.getsource(NF4Tensor.fsdp_pre_all_gather))
print(inspect.getsource(NF4Tensor.fsdp_post_all_gather))

# %% [markdown]
# ## Where GPUs reach each other's memory
# A frozen weight never changes, so a rank need not ask for it: it can read the other ranks' pieces where they lie. Copy
# engines bring those of a block while the block before it computes, and each layer decodes its weight piece by piece, this
# rank's own from where it is. No kernel of NCCL's then holds multiprocessors beside a product, and no rank waits for another
# between the blocks; FSDP2 shards all the rest. Two T4s do not reach each other: there FSDP2 gathers as above.

# %%
from helpers.nf4_pieces import BlocksAhead

print(inspect.getsource(BlocksAhead.need))
print(inspect.getsource(BlocksAhead._fetch))

# %% [markdown]
# ## What is run
# One script, `helpers.train`, as `torchrun` would start it with `--fsdp2` and, alone, without. One process takes as many
# more micro-batches a step as there are ranks, so both see **the same rows in the same micro-batches**, cut and rounded
# alike, under the same optimizer. What is left to differ is what FSDP2 does: where weights come from, and the order in
# which gradients, their norm and the loss are summed. Batches cut in another way would round otherwise from the first
# layer on, and in 16 bits that alone moves a loss by more than what is looked for here.
#
# The challenge's settings on a GPU: LoRA of rank 64, rows of up to 2048 tokens, batch 2. In float16 gradients are scaled.

# %%
log_dir = results.folder / "B_logs"
common = [
    "-m", "helpers.train", "--model", model, "--dataset", DATASET, "--steps", str(steps), "--prompt=", "--optimizer", "adamw_torch",
    "--compile", "False",  # each process would compile for the lengths that it meets first, and so round otherwise
    *(["--batch_size", "2", "--max_length", "2048", "--lora_rank", "64"] if GPUS
      else ["--batch_size", "1", "--max_length", "128"]),
    *([] if large else ["--checkpointing", "False"]),
]  # fmt: skip


def job(name, arguments, processes=0, gpu=0):
    """A run: alone on one of the GPUs, or one process a rank; stopped where it takes far longer than it should."""
    environment = {} if processes else {"CUDA_VISIBLE_DEVICES": ranks.visible_gpus()[gpu]}
    if at_once > 1 or not GPUS:  # threads that wait for each other are slow where a processor has other work too
        environment["OMP_NUM_THREADS"] = "2" if GPUS else "1"
    return ranks.Job(name, arguments, log_dir, processes, 7200 if large else 300 if at_once > 1 else 600, environment)


training, jobs = {}, []
for i, dtype in enumerate(dtypes):
    one, many = (results.folder / f"B_{dtype}_{kind}" for kind in ("one", "many"))
    training[dtype] = (
        job(f"{dtype}, 1 process", [*common, "--dtype", dtype, "--accumulation", str(accumulation * count), "--output_dir", str(one)], gpu=i % max(GPUS, 1)),
        job(f"{dtype}, {count} ranks", [*common, "--dtype", dtype, "--fsdp2", "True", "--accumulation", str(accumulation), "--output_dir", str(many)], count),
        one, many,
    )  # fmt: skip
    jobs += training[dtype][:2]
again = results.folder / f"B_{dtypes[-1]}_again"
if at_once > 1:  # with room to spare: does one process repeat itself?
    jobs.append(job(f"{dtypes[-1]}, 1 process again", [*common, "--dtype", dtypes[-1], "--accumulation", str(accumulation * count), "--output_dir", str(again)], gpu=len(dtypes) % GPUS))

features = job("features", [
    "-m", "helpers.fsdp2_features", "--out", str(results.folder / "B_features"),
    *(["--model", "shape:llama-3.2-1b-4-layers", "--dataset", "random:256-512x64", "--max-length", "512"] if GPUS
      else ["--model", "shape:tiny-untied", "--dataset", "random:8-40x64", "--max-length", "40"]),
    "--learning-rate", "5e-4" if GPUS else "1e-3",
], count)  # fmt: skip
pipeline = ["-m", "helpers.zero_bubble", "--model", "shape:llama-3.2-1b-4-layers" if GPUS else "shape:tiny-deep", "--steps", "4",
            "--length", "512" if GPUS else "32", "--micro-batches", "8"]  # fmt: skip
stages = {n: results.folder / f"B_pipeline_{n}.json" for n in (1, 2)}
pipelined = GPUS > 1 or (not GPUS and torch.__version__ >= (2, 13))
jobs.append(features)
if pipelined:
    jobs += [job(f"pipeline on {n}", [*pipeline, "--out", str(stages[n])], n if n > 1 else 0, gpu=max(GPUS - 1, 0)) for n in (1, 2)]

# %% [markdown]
# Where there is memory, a process already saves the random weights that Unsloth will load in the bench further down.

# %%
from helpers import bench_fsdp2

sections.begin("B.speed")
bench = None
if GPUS >= 2 and BENCH and not host.rehearsing_t4():
    runs, further = (bench_fsdp2.possible(runs) for runs in (bench_fsdp2.RUNS, bench_fsdp2.FURTHER_RUNS))
    bench = bench_fsdp2.Bench(
        bench_fsdp2.Case(), runs, results.folder / "B_bench", limit_s=240 if at_once > 1 else 3600, further=further,
        until=began + 330,
    )
    if at_once > 1:
        bench.start()

# %% [markdown]
# ## One process, then all of them
# Shown as it comes: what rank 0 of the first sharded run says.

# %%
sections.begin("B.loss")
if model == "embedded":
    checkpoints.embedded_folder()  # converted once, before several runs want it
failures = ranks.run_jobs(jobs, at_once, shown=training[dtypes[0]][1])
for name, said in failures.items():
    print(f"{name:22s} {said or 'done'}")

# %% [markdown]
# ## Loss

# %%
import matplotlib.pyplot as plt


def numbers(path):
    return [{key: float(value) for key, value in row.items()} for row in read_rows(path)]


def logged(folder):
    return numbers(folder / "train_log.csv")


TOLERANCE = {"float32": 5e-4, "float16": 2e-3, "bfloat16": 2e-3}
rows, missing = [], {}
for dtype, (alone, sharded, one, many) in training.items():
    if missed := failures[alone.name] or failures[sharded.name]:
        missing[dtype] = missed
        continue
    for a, b in zip(logged(one), logged(many), strict=True):
        rows.append({"dtype": dtype, "step": int(a["step"]), "one": a["loss"], "many": b["loss"],
                     "relative_difference": abs(a["loss"] - b["loss"]) / a["loss"],
                     "norm_difference": abs(a["grad_norm"] - b["grad_norm"]) / a["grad_norm"]})  # fmt: skip
fig, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=(2, 1))
for dtype, colour in zip(dtypes, ("tab:blue", "tab:orange"), strict=False):
    mine = [row for row in rows if row["dtype"] == dtype]
    at = [row["step"] for row in mine]
    top.plot(at, [row["many"] for row in mine], color=colour, label=f"{count} ranks, FSDP2, {dtype}")
    top.plot(at, [row["one"] for row in mine], "--", color="black", lw=1, label=f"1 process, {dtype}")
    bottom.semilogy(at, [max(row["relative_difference"], 1e-9) for row in mine], color=colour)
    bottom.axhline(TOLERANCE[dtype], ls="--", color="grey")
top.set(ylabel="loss", title=f"QLoRA, {label}, sharded and alone\n{host.machine()}")
top.legend()
bottom.set(xlabel="step", ylabel="relative difference")
fig.tight_layout()
save_figure(fig, "B_loss", rows)

# %% [markdown]
# **What you should see:** one curve a dtype, and on two ranks no difference at all, which the lower half draws as 1e-9:
# ranks reduce gradients in float32, where a sum of two has no order, and the token count that divides the loss is not rounded
# to 16 bits on the way, as the stock policy would do. More ranks add up in another order, and in 16 bits runs that part in
# one bit drift apart: LoRA's weights moved by 1e-7 at step 20 move SmolLM2's later losses in bfloat16 by up to 4e-3.

# %%
for dtype, (*_, one, many) in training.items():
    mine = [row for row in rows if row["dtype"] == dtype]
    scaled = " with a gradient scaler" if dtype == "float16" else ""
    id = "B.loss" if dtype == dtypes[0] else f"B.loss_{dtype}"
    text = f"FSDP2 works with QLoRA under SFTTrainer: {label}, {dtype}{scaled}, loss equals one process over {steps} steps, worst relative difference"
    if dtype in missing:
        results.criterion(id, f"{text} ({missing[dtype]})", float("nan"), f"<= {TOLERANCE[dtype]}")
        continue
    results.criterion(id, text, worst(row["relative_difference"] for row in mine), f"<= {TOLERANCE[dtype]}")
    results.metric(f"{dtype}: gradient norm, worst relative difference", worst(row["norm_difference"] for row in mine), "1")
    equal = next((i for i, row in enumerate(mine) if row["relative_difference"] or row["norm_difference"]), len(mine))
    results.metric(f"{dtype}: steps until loss or norm differ by a bit", equal, "steps")
    if dtype == dtypes[-1] and failures.get(f"{dtype}, 1 process again") == "":
        pairs = zip(logged(one), logged(again), strict=True)
        repeated = worst(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in pairs)
        results.metric(f"{dtype}: loss, one process run again, worst relative difference", repeated, "1")
    for name, folder in (("1 process", one), (f"{count} ranks", many)):
        log = logged(folder)
        results.metric(f"{dtype}: peak allocated a GPU, {name}", max(row["memory_gib"] for row in log), "GiB")
        if at_once == 1:  # else the runs were in each other's way
            results.metric(f"{dtype}: tokens a second, {name}", sorted(row["tokens_per_s"] for row in log)[len(log) // 2], "tokens/s")

if large:
    equal = [row["relative_difference"] for row in rows if row["dtype"] == dtypes[0]]
    results.criterion("B.llama_8b", f"Llama 3.1 8B, real weights: loss of {steps} steps, worst relative difference", worst(equal), "<= 2e-3")
else:
    why = "no GPU" if not GPUS else "the Hub does not answer here"
    results.not_run("B.llama_8b", "Llama 3.1 8B, real weights: loss per step", f"{why}; rehearsed by {label} above and by the 8B shape below")

# %% [markdown]
# ## Every feature, on and off
# One start of the ranks, a short run a feature, all on the same rows. The first line is the default: mixed precision on a
# GPU with float32 reduction, blocks resharded after forward, the next block prefetched, activations checkpointed. Before
# the runs the ranks gather every weight of the model and compare it with the loaded checkpoint. On a GPU the model has
# Llama 3.2 1B's widths and 4 layers, with random weights.

# %%
import json

from IPython.display import Markdown

sections.begin("B.features")
document = json.loads((results.folder / "B_features" / "fsdp2_features.json").read_text())
table = document["features"]
for row in table:
    pairs = [] if row["error"] else list(zip(row["losses"], table[0]["losses"], strict=True))
    row["difference"] = worst(abs(a - b) / b for a, b in pairs)
save_rows("B_features", [{k: v for k, v in row.items() if k not in ("losses", "norms")} for row in table])
Markdown("\n".join([
    "| on | loss differs by | frozen MiB a rank, of all | parameters on | allocated GiB |",
    "|---|---|---|---|---|",
    *(f"| {r['feature']} | FAILED: {r['error']} | | | |" if r["error"] else
      f"| {r['feature']} | {r['difference']:.1e} | {r['frozen_gib'] * 1024:.1f} of {r['frozen_gib_loaded'] * 1024:.1f} | "
      f"{r['parameters_on']} | {r['allocated_gib']:.2f} |" for r in table),
]))  # fmt: skip

# %%
gathered, ran = document["gathered"], [row for row in table if not row["error"]]
results.criterion("B.bytes", f"of {gathered['compared']:,} bytes gathered, bytes that are not as loaded", gathered["changed"], "== 0")
text = "bytes of a frozen weight on a rank beyond its equal part; a double-quantisation block has 8452"
if count > 1:
    results.criterion("B.shards", text, max(row["beyond_share_bytes"] for row in ran), "<= 8452", "bytes")
else:
    results.not_run("B.shards", text, "needs two ranks")
exact = [row for row in ran if "8-bit" not in row["feature"] and "computed in" not in row["feature"]]
text = "features that failed" + (f" ({failures['features']})" if failures["features"] else "")
results.criterion("B.features", text, len(table) - len(ran) + bool(failures["features"]), "== 0")
results.criterion("B.same", f"{len(exact)} runs, each with another feature, leave the loss as it is, worst relative difference", worst(row["difference"] for row in exact), "<= 5e-4")
for row in ran:
    if "computed in" in row["feature"]:
        results.criterion("B.precision", f"mixed precision on and off ({row['feature']}), worst relative difference", row["difference"], "<= 2e-3")
    if "compiled" in row["feature"]:
        results.criterion("B.compile", "torch.compile works: graph breaks with each block compiled whole (fullgraph)", row["graph_breaks"], "== 0")
    if "resumed" in row["feature"]:
        last, wanted = row["losses"][-1], table[0]["losses"][-1]
        results.criterion("B.resume", "a run resumed from its checkpoint ends at the same loss, relative difference", abs(last - wanted) / wanted, "<= 5e-4")

# %% [markdown]
# ## Zero bubble
# The challenge's other way: a pipeline under `ScheduleInterleavedZeroBubble`, two stages a rank. Its losses and gradient
# norms are those of one process. It is not the main path: the schedule fills gaps with the gradients of weights, and in
# QLoRA only LoRA's are left; it keeps a rank's weights whole; and neither `torch.compile` nor `Trainer` goes with it.

# %%
sections.begin("B.zero_bubble")
text = "losses and norms of the pipeline equal one process, worst relative difference"
if missed := failures.get("pipeline on 1") or failures.get("pipeline on 2"):
    results.criterion("B.zero_bubble", f"{text} ({missed})", float("nan"), f"<= {TOLERANCE[dtypes[-1]]}")
elif pipelined:
    a, b = (json.loads(file.read_text()) for file in stages.values())
    pairs = [*zip(a["losses"], b["losses"], strict=True), *zip(a["norms"], b["norms"], strict=True)]
    results.criterion("B.zero_bubble", text, worst(abs(x - y) / x for x, y in pairs), f"<= {TOLERANCE[dtypes[-1]]}")
    for n, found in ((1, a), (2, b)):
        if at_once == 1:
            results.metric(f"pipeline, step on {n}", min(found["seconds"]), "s")
        if GPUS:
            results.metric(f"pipeline, allocated on the first of {n}", found["allocated_gib"], "GiB")
    print("losses of one process:", *(f"{loss:.5f}" for loss in a["losses"]))
    print("losses of the pipeline:", *(f"{loss:.5f}" for loss in b["losses"]))
else:
    results.not_run("B.zero_bubble", text, "needs two GPUs, or torch 2.13 without any")

# %% [markdown]
# ## The 8B shape beside Unsloth
# Llama 3.1 8B's shape with random weights, rows of 2048 tokens, batch 2 x 4, LoRA of rank 64, each GPU's memory capped at
# a T4's 14.7 GiB. Ours: base truly sharded, blocks compiled, loss in chunks, micro-steps recorded as CUDA graphs with all
# their collectives, since two GPUs would wait for Python otherwise, and frozen shards read where they lie, if GPUs reach each
# other's memory; on each GPU alone too; with NCCL gathering all, by part A's kernel and by bitsandbytes' own linear layer; and
# launched one by one. Unsloth replicates the frozen weights when they fit, and shards what is trained. Torch
# AO's NF4 tensors, where that package is installed, in our trainer in place of our own. As many as the memory holds load and
# compile side by side; then each takes its timed steps with nobody beside it, and leaves. The three that no criterion asks
# for come last, and only if little time has passed until then.

# %%
BENCHES = {
    "B.memory": ("GiB allocated a GPU, 8B shape, 8-bit Adam", "<= 6.5", "GiB"),
    "B.memory_unsloth": ("GiB allocated a GPU over Unsloth's FSDP2 in the same run", "<= 1", "of it"),
    "B.speed": ("tokens a second over Unsloth's FSDP2 in the same run", ">= 1.1", "x"),
    "B.scaling": ("tokens a second of two GPUs over one, the mean of both, each alone", ">= 1.95", "x"),
    "B.kernel": ("part A's single kernel used, and faster: tokens a second over bitsandbytes' linear layer, NCCL gathering for both", ">= 1.0", "x"),
}
OURS = "2:ours, 8-bit Adam"
OVER = {"B.memory_unsloth": ["2:unsloth"], "B.speed": ["2:unsloth"], "B.kernel": ["2:ours, bitsandbytes' linear"],
        "B.scaling": ["1:ours, 8-bit Adam", "1:ours, on the other GPU"]}  # fmt: skip
OF = {"B.kernel": "2:ours, all gathered by NCCL"}  # else OURS
sections.begin("B.speed")
found = {}
if bench:
    found = {f"{row['gpus']}:{row['contender']}": row for row in bench.finish()}
    save_rows("B_bench", found.values())
ran = {name: row for name, row in found.items() if not row["error"]}
for name, row in ran.items():
    results.metric(f"8B shape, {name}", row["tokens_per_s"], "tokens/s")
    results.metric(f"8B shape, {name}, allocated", row["allocated_gib"], "GiB")
    results.metric(f"8B shape, {name}, reserved", row["reserved_gib"], "GiB")
for id, (text, bound, unit) in BENCHES.items():
    others, mine = OVER.get(id, []), OF.get(id, OURS)
    if not found:
        why = "needs two GPUs" + " and Unsloth" * ("2:unsloth" in others) if GPUS < 2 else "BENCH is off"
        results.not_run(id, text, "a rehearsal says nothing of a T4's speed" if host.rehearsing_t4() else why)
    elif not found.keys() >= {*others}:
        results.not_run(id, text, "Unsloth is not installed here")
    elif failed := [found[name]["error"] for name in (mine, *others) if name not in ran]:
        results.criterion(id, f"{text} ({failed[0]})", float("nan"), bound, unit)
    else:
        what = "tokens_per_s" if unit == "x" else "allocated_gib"
        over = sum(ran[name][what] for name in others) / len(others) if others else 1
        results.criterion(id, text, ran[mine][what] / over, bound, unit, speed=unit == "x")
if ran:
    fig, axis = plt.subplots(figsize=(7, 3.5))
    axis.barh([f"{row['gpus']} GPU{'s' * (row['gpus'] > 1)}, {row['contender']}  ({row['allocated_gib']:.1f} GiB)" for row in ran.values()], [row["tokens_per_s"] for row in ran.values()])
    axis.set(xlabel="tokens a second", title=f"Llama 3.1 8B shape, RANDOM weights\n{host.machine()}")
    axis.invert_yaxis()
    axis.locator_params(axis="x", nbins=6)
    fig.tight_layout()
    shown = save_figure(fig, "B_throughput", list(ran.values()))
else:
    shown = "not run: needs two GPUs"
shown

# %% [markdown]
# A GPU at its power limit lowers its clock until it keeps to it, and reading another GPU's memory takes power too. So where
# the watts are at the limit, the clocks say how much of what two GPUs lose against each alone is the hardware's.

# %%
Markdown("\n".join([
    "| run | s a step | MHz of each GPU's multiprocessors | watts | watts allowed |",
    "|---|---|---|---|---|",
    *(f"| {name} | {row['step_s']:.3f} | {row['sm_mhz']} | {row['watts']} | {row['limit_watts']} |" for name, row in ran.items()),
]) if ran else "not run: needs two GPUs")  # fmt: skip

# %% [markdown]
# ## Memory of each GPU over time
# What PyTorch gave out on each GPU, from the start of a process to its last step, with what CUDA graphs hold: ours loads
# the base whole, which is its first peak, shards it, and waits for its turn to train. The table above counts training alone.
# The dashed line is a T4's memory.

# %%
sections.begin("B.memory")
shown, timelines = "not run: needs two GPUs", []
colours = {OURS: "tab:blue", "2:unsloth": "tab:orange"}
for name in colours:
    for gpu in range(2 if name in ran else 0):
        path = results.folder / "B_bench" / f"{name.replace(':', ' ')}, memory of GPU {gpu}.csv"
        timelines += [{"run": name, "gpu": gpu, **row} for row in numbers(path)]
if timelines:
    fig, axis = plt.subplots(figsize=(7, 3))
    for name, gpu in dict.fromkeys((row["run"], row["gpu"]) for row in timelines):
        mine = [row for row in timelines if (row["run"], row["gpu"]) == (name, gpu)]
        axis.plot([row["seconds"] for row in mine], [row["allocated_gib"] for row in mine], ls=("-", ":")[gpu],
                  color=colours[name], label=f"{name[2:]}, GPU {gpu}")  # fmt: skip
    axis.axhline(14.7, ls="--", color="grey")
    axis.set(xlabel="seconds from the process's start", ylabel="GiB allocated", ylim=0, title=f"Llama 3.1 8B shape, RANDOM weights\n{host.machine()}")
    axis.legend(fontsize=8)
    fig.tight_layout()
    shown = save_figure(fig, "B_memory", timelines)
shown

# %% [markdown]
# ## Two Tesla T4s
# On Kaggle this notebook is the showcase itself. Elsewhere the T4's code can be rehearsed: its Triton and Inductor code,
# fp16 with a gradient scaler, its memory, NCCL without peer-to-peer.

# %%
sections.begin("B.kaggle")
text, done = "60 steps of Llama 3.1 8B on Kaggle's two Tesla T4s", [row for row in rows if row["dtype"] == "float16"]
if GPUS >= 2 and "T4" in torch.cuda.get_device_name(0) and not host.rehearsing_t4():
    results.criterion("B.kaggle", text, large and len(done) >= 60)
elif GPUS >= 2 and host.rehearsing_t4():
    peak = max(row["memory_gib"] for row in logged(training["float16"][-1]))
    results.criterion("B.rehearsal", f"{len(done)} steps of a T4's code within its memory, GiB allocated", peak, "<= 14.7", "GiB")
    results.not_run("B.kaggle", text, "rehearsed above: a T4's code and memory, not its speed")
else:
    results.not_run("B.kaggle", text, "needs two T4s; `python3 -m helpers run B --rehearse-t4` rehearses them on two newer GPUs")

# %% [markdown]
# ## Summary

# %%
results.save()
results.table()
