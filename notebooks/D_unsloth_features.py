# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # D. Nine features for Unsloth
#
# {{BADGES}}
#
# **Needs:** any CUDA GPU from a Tesla T4 on, about 10 minutes and 6 GiB; without a GPU everything runs small, about 3 minutes.
#
# Nine features that Unsloth's users ask for, in the challenge's order, worth 12 points together. Each stands on stock
# transformers, PEFT and TRL, so that it works in a user's own script as well as inside Unsloth. Each section says what the
# feature does, shows what fails today, then what works now, and judges it by a check.
#
# | | feature | points | in Unsloth it would replace |
# |---|---|---|---|
# | 1 | vision: text and images mixed | 1 | `UnslothVisionDataCollator` |
# | 2 | vision: image resizing | 1 | the `resize` of `UnslothVisionDataCollator` |
# | 3 | vision: GGUF export | 1 | the vision half of `save_pretrained_gguf` |
# | 4 | FlexAttention | 2 | `unsloth.kernels.flex_attention` |
# | 5 | sequence classification | 1 | `FastModel.from_pretrained(num_labels=...)` |
# | 6 | one attention interface | 2 | `unsloth.utils.attention_dispatch` |
# | 7 | tool calling | 1 | the FunctionGemma notebook, and its parsing by hand |
# | 8 | vision: completions only | 1 | `unsloth_zoo.dataset_utils.train_on_responses_only` |
# | 9 | Windows | 2 | the `triton` and `xformers` lines of `pyproject.toml` |

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
results = Results("D")
host.environment_table()

# %% [markdown]
# ## Parameters
# The defaults are the real run. `-p NAME VALUE` of `python3 -m helpers run`, or papermill's own, changes them. 0 is decided
# by the device: `STEPS` of training for tool calling, `CLASSIFY_STEPS` for classification, `QUESTIONS` scored of each.

# %% tags=["parameters"]
MODEL = "embedded"
STEPS = 0
CLASSIFY_STEPS = 0
QUESTIONS = 0

# %% [markdown]
# ## 1. Vision: text and images mixed in a batch (1 point)

# %%

# %% [markdown]
# ## 2. Vision: image resizing (1 point)

# %%

# %% [markdown]
# ## 3. Vision: GGUF export (1 point)

# %%

# %% [markdown]
# ## 4. FlexAttention for any length, window and packing (2 points)

# %%

# %% [markdown]
# ## 5. Sequence classification (1 point)

# %%

# %% [markdown]
# ## 6. One attention interface over five kernels (2 points)

# %%

# %% [markdown]
# ## 7. Tool calling (1 point)

# %%

# %% [markdown]
# ## 8. Vision: train on completions only (1 point)

# %%

# %% [markdown]
# ## 9. Windows (2 points)

# %%

# %% [markdown]
# ## Summary
# Twelve points, criterion by criterion.

# %%
results.save()
results.table()
