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
# **Needs:** two CUDA GPUs from the Tesla T4 on, about 12 minutes; with one GPU it runs what one can show, and without any two CPU processes train SmolLM2, about 3 minutes.
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
import torch

from helpers import host

host.prepare()

from helpers import checkpoints, fsdp2
from helpers.results import Results, save_figure, save_rows

GPUS = torch.cuda.device_count()
results = Results("B")
host.environment_table()

# %% [markdown]
# ## Parameters
# The defaults are the real run. `-p NAME VALUE` of `python3 -m helpers run`, or papermill's own, changes them.
# `MODEL = "auto"` is Llama 3.1 8B where a GPU and the Hub answer. `RANKS = 0` is one process a GPU, and two without any;
# `STEPS = 0` is 60 on a GPU and 4 without. `BENCH` runs the shape of Llama 3.1 8B beside Unsloth, on two GPUs.

# %% tags=["parameters"]
MODEL = "auto"
DATASET = "auto"
RANKS = 0
STEPS = 0
BENCH = True

# %%
ranks = RANKS or GPUS or 2
steps = STEPS or (60 if GPUS else 4)
accumulation = 4 if GPUS else 1
model = checkpoints.resolve_model(MODEL, checkpoints.CHALLENGE_8B)
if GPUS == 1 and ranks == 1:
    print("One GPU: FSDP2 runs over one rank. Sharding and scaling need a second one; all else is shown.")
print(f"{model}, {ranks} rank(s) on {host.machine()}")

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
# ## One process, then all of them
# The same script, `helpers.train`, on the same rows in the same global batches: alone, then under `torchrun` with
# `--fsdp2`. The challenge's settings on a GPU: LoRA of rank 64, rows of up to 2048 tokens, batch 2 x 4 a GPU. One rank
# prints; the launcher names the rank that fails, if one does.

# %%
import csv

from helpers.memory import MemoryTimeline

common = [
    "-m", "helpers.train", "--model", model, "--dataset", DATASET, "--steps", str(steps), "--prompt=",
    *(["--batch_size", "2", "--max_length", "2048", "--lora_rank", "64"] if GPUS
      else ["--batch_size", "1", "--max_length", "128"]),
]  # fmt: skip


def alone(*arguments):
    """Run a module in one process on the first GPU, showing its output as it comes."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0"}
    command = [sys.executable, *arguments]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
    )
    for line in process.stdout:
        print(line, end="")
    if process.wait():
        raise RuntimeError(f"{' '.join(arguments)} ended with code {process.returncode}")


def logged(folder):
    with open(folder / "train_log.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


one, many = results.folder / "B_one", results.folder / "B_many"
alone(*common, "--accumulation", str(accumulation * ranks), "--output_dir", str(one))

# %%
with MemoryTimeline() as timeline:
    fsdp2.launch(ranks, [
        *common, "--fsdp2", "True", "--accumulation", str(accumulation), "--output_dir", str(many),
    ], results.folder / "B_logs")  # fmt: skip

# %% [markdown]
# ## Loss

# %%
import matplotlib.pyplot as plt

tolerance = 5e-4 if not GPUS else 2e-3
rows = [
    {"step": int(a["step"]), "one": a["loss"], "many": b["loss"], "relative_difference": abs(a["loss"] - b["loss"]) / a["loss"]}
    for a, b in zip(logged(one), logged(many), strict=True)
]
fig, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=(2, 1))
top.plot([r["step"] for r in rows], [r["one"] for r in rows], "--", color="grey", label="1 process")
top.plot([r["step"] for r in rows], [r["many"] for r in rows], color="tab:blue", label=f"{ranks} ranks, FSDP2")
top.set(ylabel="loss", title=f"QLoRA, sharded and alone\n{host.machine()}")
top.legend()
bottom.semilogy([r["step"] for r in rows], [max(r["relative_difference"], 1e-9) for r in rows], color="tab:blue")
bottom.axhline(tolerance, ls="--", color="grey")
bottom.set(xlabel="step", ylabel="relative difference")
fig.tight_layout()
save_figure(fig, "B_loss", rows)

# %% [markdown]
# **What you should see:** one curve, and a difference far below the dashed line: ranks reduce gradients in float32, and
# the token count that divides the loss is not rounded to 16 bits on the way, as the stock policy would do.

# %%
worst = max(row["relative_difference"] for row in rows)
results.criterion("B.loss", f"FSDP2 works with QLoRA: loss equals one process over {steps} steps, worst relative difference", worst, f"<= {tolerance}")
norms = [abs(a["grad_norm"] - b["grad_norm"]) / a["grad_norm"] for a, b in zip(logged(one), logged(many), strict=True)]
results.metric("gradient norm, worst relative difference", max(norms), "1")
for name, folder in (("1 process", one), (f"{ranks} ranks", many)):
    log = logged(folder)
    results.metric(f"tokens a second, {name}", sorted(row["tokens_per_s"] for row in log)[len(log) // 2], "tokens/s")
    results.metric(f"peak allocated a GPU, {name}", max(row["memory_gib"] for row in log), "GiB")

# %% [markdown]
# ## Memory of each GPU over time
# As the driver sees it, contexts and NCCL included, while the ranks load, shard and train.

# %%
if timeline.rows:
    fig, axis = plt.subplots(figsize=(7, 3))
    for key in (key for key in timeline.rows[0] if key != "seconds"):
        axis.plot([r["seconds"] for r in timeline.rows], [r[key] for r in timeline.rows], label=key.split("_")[0])
    axis.set(xlabel="seconds", ylabel="GiB in use", ylim=0, title=f"{ranks} ranks\n{host.machine()}")
    axis.legend()
    fig.tight_layout()
    shown = save_figure(fig, "B_memory", timeline.rows)
else:
    shown = "no GPU, so no timeline of its memory"
shown

# %% [markdown]
# ## Every feature, on and off
# One start of the ranks, a short run a feature, all on the same rows. The first line is the default: mixed precision with
# float32 reduction, blocks resharded after forward, the next block prefetched, activations checkpointed. Before the runs
# the ranks gather every weight of the model and compare it with the loaded checkpoint.

# %%
import json

fsdp2.launch(ranks, [
    "-m", "helpers.fsdp2_features", "--out", str(results.folder / "B_features"),
    *(["--model", checkpoints.resolve_model(MODEL), "--dataset", DATASET, "--max-length", "1024"] if GPUS
      else ["--model", "shape:tiny-untied", "--dataset", "random:8-40x64", "--max-length", "40"]),
], results.folder / "B_logs")  # fmt: skip
document = json.loads((results.folder / "B_features" / "fsdp2_features.json").read_text())

# %%
from IPython.display import Markdown

features = document["features"]
for row in features:
    pairs = zip(row["losses"], features[0]["losses"], strict=True)
    row["difference"] = max(abs(a - b) / b for a, b in pairs)
save_rows("B_features", [{k: v for k, v in row.items() if k not in ("losses", "norms")} for row in features])
Markdown("\n".join([
    "| on | loss differs by | frozen GiB a rank, of all | parameters on | allocated GiB | tokens/s |",
    "|---|---|---|---|---|---|",
    *(f"| {r['feature']} | {r['difference']:.1e} | {r['frozen_gib']:.3f} of {r['frozen_gib_loaded']:.3f} | {r['parameters_on']} | "
      f"{r['allocated_gib']:.2f} | {r['tokens_per_s']:,.0f} |" for r in features),
]))  # fmt: skip

# %%
gathered = document["gathered"]
results.criterion("B.bytes", f"of {gathered['compared']:,} bytes gathered, bytes that are not as loaded", gathered["changed"], "== 0")
text = "bytes of a frozen weight on a rank beyond its equal part; a double-quantisation block has 8452"
if ranks > 1:
    results.criterion("B.shards", text, max(row["beyond_share_bytes"] for row in features), "<= 8452", "bytes")
else:
    results.not_run("B.shards", text, "needs two ranks")
adam = next(row for row in features if "8-bit" in row["feature"])
same = max(row["difference"] for row in features if row is not adam)
results.criterion("B.features", "every feature leaves the loss as it is, worst relative difference", same, f"<= {tolerance}")
compiled = next(row for row in features if "compiled" in row["feature"])
results.criterion("B.compile", "torch.compile works: graph breaks with each block compiled whole (fullgraph)", compiled["graph_breaks"], "== 0")
resumed = features[-1]["losses"]
results.criterion(
    "B.resume", "a run resumed from its checkpoint ends at the same loss, relative difference",
    abs(resumed[-1] - features[0]["losses"][-1]) / resumed[-1], f"<= {tolerance}",
)  # fmt: skip

# %% [markdown]
# ## The 8B shape beside Unsloth
# Llama 3.1 8B's shape with random weights, rows of 2048 tokens, batch 2 x 4, LoRA of rank 64, each GPU's memory capped at
# a T4's 14.7 GiB. Ours: base truly sharded, blocks compiled, loss in chunks; with part A's kernel and with bitsandbytes'
# own linear layer; on one GPU too. Unsloth replicates the frozen weights when they fit, and shards what is trained.

# %%
BENCHES = {
    "B.memory": ("GiB allocated a GPU, 8B shape, 8-bit Adam", "<= 6.5", "GiB"),
    "B.speed": ("tokens a second over Unsloth's FSDP2 in the same run", ">= 1.1", "x"),
    "B.scaling": ("tokens a second of two GPUs over one", ">= 1.95", "x"),
    "B.kernel": ("part A's single kernel used, and faster: tokens a second over bitsandbytes' linear layer", ">= 1.0", "x"),
}
bench = {}
if GPUS >= 2 and BENCH:
    import importlib.util

    from helpers import bench_fsdp2

    runs = ["2:ours, 8-bit Adam", "2:ours, float32 AdamW", "2:ours, bitsandbytes' linear", "1:ours, 8-bit Adam"]
    runs += ["2:unsloth"] if importlib.util.find_spec("unsloth") else []
    bench_fsdp2.main(["--out", str(results.folder / "B_bench"), "--runs", *runs])
    with open(results.folder / "B_bench" / "fsdp2_bench.csv", newline="") as file:
        table = list(csv.DictReader(file))
    save_rows("B_bench", table)
    bench = {f"{row['gpus']}:{row['contender']}": row for row in table if not row["error"]}
    for name, row in bench.items():
        results.metric(f"8B shape, {name}", float(row["tokens_per_s"]), "tokens/s")
        results.metric(f"8B shape, {name}, allocated", float(row["allocated_gib"]), "GiB")
        results.metric(f"8B shape, {name}, reserved", float(row["reserved_gib"]), "GiB")

# %%
ours, speed = bench.get("2:ours, 8-bit Adam"), {name: float(row["tokens_per_s"]) for name, row in bench.items()}
measured = {"B.memory": float(ours["allocated_gib"])} if ours else {}
for id, other in (("B.speed", "2:unsloth"), ("B.scaling", "1:ours, 8-bit Adam"), ("B.kernel", "2:ours, bitsandbytes' linear")):
    if ours and other in speed:
        measured[id] = speed["2:ours, 8-bit Adam"] / speed[other]
for id, (text, bound, unit) in BENCHES.items():
    if id in measured:
        results.criterion(id, text, measured[id], bound, unit, speed=unit == "x")
    else:
        results.not_run(id, text, "needs two GPUs" + (" and Unsloth" if id == "B.speed" else ""))
if bench:
    fig, axis = plt.subplots(figsize=(7, 3))
    axis.barh([f"{name}  ({float(row['allocated_gib']):.1f} GiB)" for name, row in bench.items()], list(speed.values()))
    axis.set(xlabel="tokens a second", title=f"Llama 3.1 8B shape, RANDOM weights\n{host.machine()}")
    axis.invert_yaxis()
    fig.tight_layout()
    shown = save_figure(fig, "B_throughput", [{"run": name, "tokens_per_s": value} for name, value in speed.items()])
else:
    shown = "not run: needs two GPUs"
shown

# %% [markdown]
# ## Zero bubble
# The challenge's other way: a pipeline under `ScheduleInterleavedZeroBubble`, two stages a rank. Its losses and gradient
# norms are those of one process. It is not the main path: the schedule fills gaps with the gradients of weights, and in
# QLoRA only LoRA's are left; it keeps a rank's weights whole; and neither `torch.compile` nor `Trainer` goes with it.

# %%
pipeline = ["-m", "helpers.zero_bubble", "--model", "embedded" if GPUS else "shape:tiny-deep", "--steps", "4", "--length",
            "512" if GPUS else "32", "--micro-batches", "8"]  # fmt: skip
files = {n: results.folder / f"B_pipeline_{n}.json" for n in (1, 2)}
alone(*pipeline, "--out", str(files[1]))
if GPUS > 1 or (not GPUS and torch.__version__ >= (2, 13)):
    fsdp2.launch(2, [*pipeline, "--out", str(files[2])], results.folder / "B_logs")
    a, b = (json.loads(file.read_text()) for file in files.values())
    pairs = [*zip(a["losses"], b["losses"], strict=True), *zip(a["norms"], b["norms"], strict=True)]
    results.criterion("B.zero_bubble", "losses and norms of the pipeline equal one process, worst relative difference",
                      max(abs(x - y) / x for x, y in pairs), f"<= {tolerance}")  # fmt: skip
    results.metric("pipeline, step on 1", min(a["seconds"]), "s")
    results.metric("pipeline, step on 2", min(b["seconds"]), "s")
else:
    reason = "needs two GPUs, or torch 2.13 without any"
    results.not_run("B.zero_bubble", "losses and norms of the pipeline equal one process", reason)

# %% [markdown]
# ## Two Tesla T4s
# On Kaggle this notebook is the showcase itself. Elsewhere the T4's code can be rehearsed: its Triton and Inductor code,
# fp16 with a gradient scaler, its memory, NCCL without peer-to-peer.

# %%
text = "60 steps on Kaggle's two Tesla T4s"
if GPUS >= 2 and "T4" in torch.cuda.get_device_name(0) and not host.rehearsing_t4():
    results.criterion("B.kaggle", text, len(rows) >= 60)
elif GPUS >= 2 and host.rehearsing_t4():
    peak = max(row["memory_gib"] for row in logged(many))
    results.criterion("B.rehearsal", f"{len(rows)} steps of a T4's code within its memory, GiB allocated", peak, "<= 14.7", "GiB")
    results.not_run("B.kaggle", text, "rehearsed above: a T4's code and memory, not its speed")
else:
    results.not_run("B.kaggle", text, "needs two T4s; `python3 -m helpers run B --rehearse-t4` rehearses them on two newer GPUs")

# %% [markdown]
# ## Summary

# %%
results.save()
results.table()
