"""``python3 -m helpers doctor``: what is here, and for each thing missing the next step. Standard library only."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys

from . import environment, windows

OK, MISSING = "ok     ", "MISSING"


def main() -> int:
    """Print one line a finding; 1 where something that `run` needs is missing."""
    rows = [_python(), *_packages(), *_gpu(), *_windows(), *_disk_and_memory(), *_hub()]
    for state, what, step in rows:
        print(f"{state}  {what}" + (f"\n           next: {step}" if step else ""))
    return 1 if any(state == MISSING for state, _, _ in rows) else 0


def _python() -> tuple[str, str, str]:
    return OK, f"Python {platform.python_version()} on {platform.system()} {platform.machine()}", ""


def _packages() -> list[tuple[str, str, str]]:
    if not environment.uses_running_python() and environment.missing(development=False):
        half = (environment.ROOT / ".venv" / environment.UNFINISHED).exists()
        return [(MISSING, "a half-made .venv" if half else "no .venv yet", "python3 -m helpers run, which makes it")]
    rows = []
    for name, specifier, line in environment.requirements(development=False):
        pin, have = line.split(";")[0].strip(), environment.installed(name)
        if environment.satisfied(name, specifier):
            rows.append((OK, f"{name} {have}", ""))
        else:
            what = f"{name} {have}, pinned {pin}" if have else name
            rows.append((MISSING, what, f'{sys.executable} -m pip install "{pin}"'))
    return rows


def _gpu() -> list[tuple[str, str, str]]:
    fields = "name,compute_cap,driver_version,memory.total,memory.free"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=30)
        lines = found.stdout.strip().splitlines() if found.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        lines = []
    if not lines:
        return [(OK, "no NVIDIA GPU: the kernels run in Triton's interpreter and training on the CPU", "")]
    rows = [(OK, f"GPU {i}: {line} (name, capability, driver, memory, free)", "") for i, line in enumerate(lines)]
    rows += [
        (MISSING, f"GPU {i} is older than capability 7.5, which Triton needs", "use a Tesla T4 or later")
        for i, line in enumerate(lines)
        if environment.numbers(line.split(",")[1]) < (7, 5)
    ]
    try:
        import torch
    except ImportError:
        return rows
    if torch.version.cuda is None:
        step = f"pip install torch=={torch.__version__.split('+')[0]} --index-url {windows.CUDA_INDEX}"
        rows.append((MISSING, f"torch {torch.__version__} is a CPU build beside a GPU", step))
    elif not torch.cuda.is_available():
        step = f"update the NVIDIA driver to one that serves CUDA {torch.version.cuda}"
        rows.append((MISSING, "torch cannot start CUDA", step))
    return rows


def _windows() -> list[tuple[str, str, str]]:
    """What no wheel brings to Windows, and xFormers beside a torch for another CUDA than its own."""
    if sys.platform != "win32":
        return []
    rows = [(MISSING, dll, step) for dll, step in windows.missing_here()]
    try:
        import torch
    except ImportError:
        return rows
    if environment.installed("xformers") and not (torch.version.cuda or "").startswith("12."):
        step = f"pip install torch=={torch.__version__.split('+')[0]} --index-url {windows.CUDA_INDEX}"
        rows.append((MISSING, f"xformers is built for CUDA 12, torch for {torch.version.cuda or 'CPUs'}", step))
    return rows


def _disk_and_memory() -> list[tuple[str, str, str]]:
    free = shutil.disk_usage(environment.ROOT).free / 1024**3
    what = f"{free:.0f} GiB of disk free"
    rows = [(OK, what, "") if free >= environment.FREE_GIB_NEEDED else
            (MISSING, what, f"free some: {environment.FREE_GIB_NEEDED} GiB are needed to set up")]  # fmt: skip
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        gib = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1024**3
        rows.append((OK, f"{gib:.1f} GiB of memory free", ""))
    return rows


def _hub() -> list[tuple[str, str, str]]:
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError:
        return [(OK, "the Hugging Face Hub does not answer: the embedded model and data are used", "")]
    return [(OK, "the Hugging Face Hub answers", "")]
