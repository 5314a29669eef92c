"""Tests marked gpu are deselected where there is no GPU, those marked llamacpp unless asked for: one line says so."""

from __future__ import annotations

import os

import pytest

GPU = None


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
        items[:] = kept


def pytest_report_header() -> str:
    return "GPU: " + ("yes" if _gpu() else "none; gpu tests are deselected, kernels run in Triton's interpreter")
