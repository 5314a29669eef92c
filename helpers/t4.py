"""Rehearses a Tesla T4 on a newer NVIDIA card: its Triton code, its choices, its memory; not its speed.

Triton emits PTX for sm_75, which ``ptxas`` then assembles for the card at hand, so the T4's own code runs. PyTorch,
Inductor and bitsandbytes see a T4's capability and properties and choose as they would there; attention falls to the
kernels that a T4 has; and the allocator stops at 14.7 GiB. ``with rehearse():`` does it in this process and, through
the environment, in the processes it starts; every change is undone on exit.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

CAPABILITY = (7, 5)
MEMORY_BYTES = int(14.7 * 1024**3)
PROPERTIES = {
    "name": "Tesla T4", "major": 7, "minor": 5, "multi_processor_count": 40, "total_memory": MEMORY_BYTES,
    "warp_size": 32, "max_threads_per_multi_processor": 1024, "regs_per_multiprocessor": 65536,
    "shared_memory_per_block": 48 * 1024, "shared_memory_per_block_optin": 64 * 1024,
    "shared_memory_per_multiprocessor": 64 * 1024, "L2_cache_size": 4 * 1024**2, "gcnArchName": "",
}  # fmt: skip
# Assembles what Triton wrote for sm_75 for the real card, and notes the target of every PTX that passes.
PTXAS_WRAPPER = """#!/bin/sh
for argument in "$@"; do
  case "$argument" in *.ptx) grep -m1 '^\\.target' "$argument" >> '{log}' ;; esac
done
n=$#
while [ "$n" -gt 0 ]; do
  argument=$1; shift; n=$((n - 1))
  case "$argument" in --gpu-name=sm_75) argument=--gpu-name={arch} ;; esac
  set -- "$@" "$argument"
done
exec '{ptxas}' "$@"
"""
_active: Path | None = None


@contextlib.contextmanager
def rehearse() -> Iterator[None]:
    """Run the block as a Tesla T4 would run it.

    Raises:
        ValueError: no CUDA device, or one older than a T4.
    """
    global _active
    if not torch.cuda.is_available():
        raise ValueError("--rehearse-t4 runs a T4's code on a newer NVIDIA card; this machine has no GPU")
    real = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if (real[0].major, real[0].minor) < CAPABILITY:
        raise ValueError(f"--rehearse-t4: {real[0].name} is older than a T4")
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    with tempfile.TemporaryDirectory(prefix="t4-") as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        wrapper = folder / "ptxas"
        arch = f"sm_{real[0].major}{real[0].minor}"
        script = PTXAS_WRAPPER.format(log=folder / "targets", arch=arch, ptxas=knobs.nvidia.ptxas.path)
        wrapper.write_text(script)
        wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
        # Caches of their own: a kernel found in one would run without its PTX having been seen.
        stack.enter_context(mock.patch.dict(os.environ, {
            "TRITON_PTXAS_PATH": str(wrapper), "TRITON_CACHE_DIR": str(folder / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "QLORA_REHEARSE_T4": "1",
            "QLORA_REHEARSAL_CARD": real[0].name, "NCCL_P2P_DISABLE": "1",
        }))  # fmt: skip
        fakes = [_properties(card) for card in real]
        utils = driver.active.utils
        launch_limits = utils.get_device_properties

        def fake_properties(device=None):
            return fakes[_index(device)]

        def fake_launch_limits(device):
            limits = {"max_shared_mem": 64 * 1024, "multiprocessor_count": 40}
            return {**launch_limits(device), **limits}

        def fake_memory_info(device=None):
            return max(0, MEMORY_BYTES - torch.cuda.memory_reserved(_index(device))), MEMORY_BYTES

        for owner, name, value in (
            (CudaDriver, "get_current_target", lambda self: GPUTarget("cuda", 75, 32)),
            (utils, "get_device_properties", fake_launch_limits),
            (torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
            (torch.cuda, "get_device_properties", fake_properties),
            (torch.cuda, "get_device_name", lambda device=None: PROPERTIES["name"]),
            (torch.cuda, "is_bf16_supported", _bf16_supported),
            (torch.cuda, "mem_get_info", fake_memory_info),
            *_inductor_patches(fake_properties),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        flash, cudnn = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_flash_sdp(False)  # both need sm_80
        torch.backends.cuda.enable_cudnn_sdp(False)
        for i, card in enumerate(real):
            torch.cuda.set_per_process_memory_fraction(min(1.0, MEMORY_BYTES / card.total_memory), i)
        outer, _active = _active, folder
        try:
            yield
        finally:
            _active = outer
            torch.backends.cuda.enable_flash_sdp(flash)
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            for i in range(len(real)):
                torch.cuda.set_per_process_memory_fraction(1.0, i)


def targets() -> Counter[str]:
    """How often each ``.target`` stood in a PTX assembled since the rehearsal began, here and in child processes."""
    if _active is None:
        raise RuntimeError("no rehearsal is under way")
    log = _active / "targets"
    return Counter(log.read_text().split("\n")[:-1]) if log.exists() else Counter()


def proof() -> str:
    """One line that says what ran.

    Raises:
        RuntimeError: a PTX for anything but sm_75 was assembled, or none at all.
    """
    seen = targets()
    if not seen or any("sm_75" not in target for target in seen):
        raise RuntimeError(f"the rehearsal assembled {dict(seen)}; every PTX should say .target sm_75")
    card = os.environ["QLORA_REHEARSAL_CARD"]
    return f"{seen.total()} kernels assembled from PTX, each '.target sm_75', run on {card}"


def _index(device) -> int:
    if isinstance(device, int):
        return device
    index = torch.device(device).index if device is not None else None
    return torch.cuda.current_device() if index is None else index


def _properties(card) -> SimpleNamespace:
    """A T4's properties; what is not listed above stays the real card's."""
    values = {name: getattr(card, name) for name in dir(card) if not name.startswith("_")}
    return SimpleNamespace(**{**values, **PROPERTIES})


def _inductor_patches(fake_properties) -> list[tuple[object, str, object]]:
    """Inductor keeps its own references to the functions replaced above."""
    from torch._dynamo import device_interface

    device_interface.caching_worker_device_properties.pop("cuda", None)
    cuda = device_interface.CudaInterface
    return [
        (cuda, "get_device_properties", staticmethod(fake_properties)),
        (cuda, "is_bf16_supported", staticmethod(_bf16_supported)),
    ]


def _bf16_supported(including_emulation: bool = True) -> bool:
    """A T4 has bfloat16 by emulation only."""
    return including_emulation
