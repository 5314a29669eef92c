"""Tests marked gpu are deselected where there is no GPU, those marked llamacpp unless asked for: one line says so."""

from __future__ import annotations

import os

import pytest

GPU = None
# First, so that no core is left alone with one of them at the end.
LONG = {"test_train", "test_fsdp2", "test_faults", "test_compiling", "test_composed"}


def _gpu() -> bool:
    global GPU
    if GPU is None:
        import torch

        GPU = torch.cuda.is_available()
        if not GPU:  # the kernels run under Triton's interpreter, which must be chosen before they are imported
            os.environ["TRITON_INTERPRET"] = "1"
    return GPU


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other
    _gpu()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wants_llamacpp = "llamacpp" in (config.option.markexpr or "")
    kept, dropped = [], []
    for item in items:
        needs_gpu = item.get_closest_marker("gpu") and not _gpu()
        needs_llamacpp = item.get_closest_marker("llamacpp") and not wants_llamacpp
        (dropped if needs_gpu or needs_llamacpp else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    items[:] = sorted(kept, key=lambda item: item.path.stem not in LONG)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process a core; on a GPU one in all, whose memory is then measured alone."""
    return 0 if _gpu() else os.cpu_count() or 1


def pytest_report_header() -> str:
    return "GPU: " + ("yes" if _gpu() else "none; gpu tests are deselected, kernels run in Triton's interpreter")
