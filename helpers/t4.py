"""Rehearses a Tesla T4 on a newer NVIDIA card: its Triton code, its choices, its memory; not its speed.

Triton emits PTX for sm_75, which ``ptxas`` then assembles for the card at hand, so the T4's own code runs. PyTorch,
Inductor and bitsandbytes see a T4's capability and properties and choose as they would there; attention falls to the
kernels that a T4 has; and the allocator stops at 14.7 GiB. ``with rehearse():`` does it in this process and undoes it
on exit. Inductor's compile workers follow by the environment they inherit; a Python process that it starts, such as
torchrun's ranks, follows by entering :func:`rehearsal_if_asked` itself, as the trainer and ``host.prepare()`` do.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
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
ASKED = "QLORA_REHEARSE_T4"  # "1" in every process that is to rehearse
CARD = "QLORA_REHEARSAL_CARD"  # name of the real card
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


def rehearsal_if_asked(asked: bool = False) -> contextlib.AbstractContextManager[None]:
    """:func:`rehearse` where ``asked`` or the environment says so, else a context that does nothing."""
    return rehearse() if asked or os.environ.get(ASKED) == "1" else contextlib.nullcontext()


@contextlib.contextmanager
def rehearse() -> Iterator[None]:
    """Run the block as a Tesla T4 would run it; inside another rehearsal it changes nothing.

    Raises:
        ValueError: no NVIDIA card to rehearse on, or one older than a T4.
    """
    global _active
    if _active is not None:
        yield
        return
    if os.name != "posix" or not torch.cuda.is_available():
        raise ValueError("--rehearse-t4 runs a T4's code on a newer NVIDIA card under Linux; here is no such GPU")
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if (cards[0].major, cards[0].minor) < CAPABILITY:
        raise ValueError(f"--rehearse-t4: {cards[0].name} is older than a T4")
    from triton import knobs

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="t4-", ignore_cleanup_errors=True)))
        # A newer card than Hopper has an assembler of its own in Triton's package.
        tool = knobs.nvidia.ptxas_blackwell if cards[0].major >= 10 else knobs.nvidia.ptxas
        wrapper = write_ptxas_wrapper(folder, tool.path, f"sm_{cards[0].major}{cards[0].minor}")
        stack.callback(_forget_the_card)
        # Caches of their own: a kernel found in one would run without its PTX having been seen.
        stack.enter_context(mock.patch.dict(os.environ, {
            "TRITON_PTXAS_PATH": str(wrapper), "TRITON_CACHE_DIR": str(folder / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), ASKED: "1", CARD: cards[0].name,
            "NCCL_P2P_DISABLE": "1",
        }))  # fmt: skip
        for owner, name, value in _fakes(cards):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_sdp_kernels_of_a_t4())
        stack.enter_context(_memory_of_a_t4(cards))
        _forget_the_card()
        _active = folder
        try:
            yield
        finally:
            _active = None


def targets() -> Counter[str]:
    """How often each ``.target`` stood in a PTX assembled since the rehearsal began, here and in child processes."""
    if _active is None:
        raise RuntimeError("no rehearsal is under way")
    log = _active / "targets"
    return Counter(log.read_text().split("\n")[:-1]) if log.exists() else Counter()


def proof() -> str:
    """One line that says what ran.

    Raises:
        RuntimeError: a PTX for anything but sm_75 was assembled.
    """
    seen = targets()
    if any(".target sm_75" not in target for target in seen):
        raise RuntimeError(f"the rehearsal assembled {dict(seen)}; every PTX should say .target sm_75")
    return f"{seen.total()} kernels assembled from PTX, each '.target sm_75', run on {os.environ[CARD]}"


def write_ptxas_wrapper(folder: Path, ptxas: str, arch: str) -> Path:
    """An executable that stands in for ``ptxas`` and assembles for ``arch``; it logs into ``folder/targets``."""
    wrapper = folder / "ptxas"
    wrapper.write_text(PTXAS_WRAPPER.format(log=folder / "targets", arch=arch, ptxas=ptxas))
    wrapper.chmod(0o755)
    return wrapper


def _fakes(cards: list) -> list[tuple[object, str, object]]:
    """``(owner, name, stand-in)`` of everything through which Python asks about the card."""
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    t4s, utils = [_as_t4(card) for card in cards], driver.active.utils
    launch_limits = utils.get_device_properties

    def properties(device=None):
        return t4s[_index(device)]

    def limits(device):
        return {**launch_limits(device), "max_shared_mem": 64 * 1024, "multiprocessor_count": 40}

    def memory_info(device=None):
        return max(0, MEMORY_BYTES - torch.cuda.memory_reserved(_index(device))), MEMORY_BYTES

    def bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation  # a T4 has bfloat16 by emulation only

    return [
        (CudaDriver, "get_current_target", lambda self: GPUTarget("cuda", 75, 32)),
        (utils, "get_device_properties", limits),
        (torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
        (torch.cuda, "get_device_properties", properties),
        (torch.cuda, "get_device_name", lambda device=None: PROPERTIES["name"]),
        (torch.cuda, "is_bf16_supported", bf16_supported),
        (torch.cuda, "mem_get_info", memory_info),
        # Inductor keeps its own references to two of them.
        (CudaInterface, "get_device_properties", staticmethod(properties)),
        (CudaInterface, "is_bf16_supported", staticmethod(bf16_supported)),
    ]


def _as_t4(card) -> SimpleNamespace:
    """A T4's properties; what is not listed above stays the real card's."""
    values = {name: getattr(card, name) for name in dir(card) if not name.startswith("_")}
    return SimpleNamespace(**{**values, **PROPERTIES})


def _index(device) -> int:
    if isinstance(device, int):
        return device
    index = torch.device(device).index if device is not None else None
    return torch.cuda.current_device() if index is None else index


@contextlib.contextmanager
def _sdp_kernels_of_a_t4() -> Iterator[None]:
    """Flash attention and cuDNN's need sm_80."""
    flash, cudnn = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(flash)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)


@contextlib.contextmanager
def _memory_of_a_t4(cards: list) -> Iterator[None]:
    """Stop the allocator at a T4's memory; a rank of torchrun touches its own card alone."""
    rank = os.environ.get("LOCAL_RANK")
    mine = range(len(cards)) if rank is None else [int(rank)]
    for i in mine:
        torch.cuda.set_per_process_memory_fraction(min(1.0, MEMORY_BYTES / cards[i].total_memory), i)
    try:
        yield
    finally:
        for i in mine:
            torch.cuda.set_per_process_memory_fraction(1.0, i)


def _forget_the_card() -> None:
    """Drop what Dynamo, Inductor, Triton and we compiled for the card or remember of it, and the compile workers.

    Only modules that are loaded can remember anything, and Inductor takes seconds to load.
    """
    loaded = dict(sys.modules)
    if dynamo := loaded.get("torch._dynamo"):
        dynamo.reset()
    if interface := loaded.get("torch._dynamo.device_interface"):
        interface.caching_worker_device_properties.pop("cuda", None)
    if workers := loaded.get("torch._inductor.async_compile"):
        workers.shutdown_compile_workers()  # they keep the environment that they started with
    if hints := loaded.get("torch._inductor.runtime.hints"):
        hints.DeviceProperties.create.cache_clear()
    if utils := loaded.get("torch._inductor.utils"):
        utils.clear_caches()
    for name, module in loaded.items():
        if module is utils or name.startswith(f"{__package__}."):
            for function in vars(module).values():
                if hasattr(function, "cache_clear"):
                    function.cache_clear()
    if nf4 := loaded.get(f"{__package__}.nf4"):  # launches compiled kernels past Triton
        nf4._PLANS.clear()
        nf4._LAUNCHES.clear()
    if triton := loaded.get("triton.runtime.jit"):
        for thing in gc.get_objects():
            if type(thing) is triton.JITFunction:
                thing.device_caches.clear()
