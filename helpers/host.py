"""Where we run: Kaggle, Colab or one's own machine; its GPUs and versions; and a console without noise."""

from __future__ import annotations

import atexit
import importlib.metadata
import importlib.util
import logging
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "triton-windows", "transformers", "peft", "accelerate", "trl", "datasets",
            "bitsandbytes", "unsloth", "liger-kernel", "cut-cross-entropy")  # fmt: skip
# For comparisons only, and without their dependencies, which would replace the pins.
UNSLOTH = ("unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "cut-cross-entropy", "tyro", "docstring_parser",
           "hf_transfer")  # fmt: skip


def name() -> str:
    """``kaggle``, ``colab`` or ``local``. Kaggle's image sets Colab's variables too, so Kaggle is asked first."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "kaggle"
    if "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ:
        return "colab"
    return "local"


def rehearsing_t4() -> bool:
    """True in a process that rehearses a Tesla T4 on another card (``--rehearse-t4``, helpers/t4.py)."""
    return os.environ.get("QLORA_REHEARSE_T4") == "1"


def add_unsloth() -> bool:
    """Whether Unsloth is there to compare with; on Kaggle and Colab with a GPU it is installed first."""
    import torch

    if importlib.util.find_spec("unsloth"):
        return True
    if name() == "local" or not torch.cuda.is_available():
        return False
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", *UNSLOTH]
    return subprocess.run(command).returncode == 0


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Short git commit of this checkout, with ``+`` where files differ from it; empty outside a checkout."""
    root = Path(__file__).parents[1]
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True)
    except OSError:
        return ""
    if head.returncode:
        return os.environ.get("QLORA_COMMIT", "")
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability and GiB of each GPU."""
    import torch

    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append({
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "gib": round(properties.total_memory / 1024**3, 1),
        })  # fmt: skip
    return found


def machine() -> str:
    """One line for a figure's title: the GPUs, or the processor where there is none."""
    cards = gpus()
    if not cards:
        return f"CPU, {os.cpu_count()} cores"
    name = os.environ.get("QLORA_REHEARSAL_CARD", cards[0]["name"])
    label = f"{len(cards)} x {name}" if len(cards) > 1 else name
    return f"T4 rehearsal on {label}" if rehearsing_t4() else label


def environment() -> dict[str, Any]:
    """Everything a reader needs to know about the machine behind a number."""
    import torch

    return {
        "host": name(),
        "machine": machine(),
        "gpus": gpus(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
    }


def environment_table():
    """The environment as a Markdown table that a notebook displays."""
    from IPython.display import Markdown

    facts = environment()
    rows = [("machine", facts["machine"]), ("host", facts["host"]), ("Python", facts["python"])]
    rows += [(f"GPU {i}", f"{g['name']}, capability {g['capability']}, {g['gib']} GiB")
             for i, g in enumerate(facts["gpus"])]  # fmt: skip
    rows += [("CUDA", facts["cuda"])] if facts["cuda"] else []
    rows += list(facts["versions"].items()) + [("commit", facts["commit"] or "not a git checkout")]
    return Markdown("\n".join(["| | |", "|---|---|"] + [f"| {key} | {value} |" for key, value in rows]))


def prepare() -> None:
    """What a notebook or benchmark does first: a quiet console, and a T4 rehearsal where one is asked for."""
    quiet()
    if rehearsing_t4():
        from . import t4

        rehearsal = t4.rehearse()
        rehearsal.__enter__()
        atexit.register(rehearsal.__exit__, None, None, None)


def quiet() -> None:
    """No progress bars and no library chatter: notebooks keep text that a reader needs, and stay small."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["TQDM_DISABLE"] = "1"
    warnings.filterwarnings("ignore", message="IProgress not found")  # as tqdm says when it is first imported
    warnings.filterwarnings("ignore", message=".*deterministic")  # asked for where PyTorch has it, and no further
    warnings.filterwarnings("ignore", message="\nOnline softmax is disabled")  # Inductor, of the loss
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # float32 stays float32
    warnings.filterwarnings("ignore", message="Warning: Profiler clears events")  # one cycle is all that is recorded
    warnings.filterwarnings("ignore", message="invalid escape sequence")  # torch AO's docstrings, compiled on import
    if rehearsing_t4():  # of max_autotune on few multiprocessors, which `compile_model` uses all the same
        logging.getLogger("torch._inductor.utils").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
