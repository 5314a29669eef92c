"""Tests marked gpu are deselected where there is no GPU, those marked llamacpp unless asked for: one line says so."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

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


@pytest.fixture
def said_without_interpreter():
    """``python3 arguments...`` in the repository, where kernels are compiled and not interpreted: what it printed."""

    def run(*arguments: str) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        command, root = [sys.executable, *arguments], Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def varlen_on_the_cpu(monkeypatch):
    """PyTorch's operator, which only CUDA has, by its definition; and the table's word that it runs here."""
    import torch

    from helpers import attention

    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(attention, "unsupported", lambda backend, case: None)

    def weights(q, k, cu_q, cu_k, scale, causal, window):
        part = lambda cu, x: torch.bucketize(torch.arange(len(x)), cu[1:].long(), right=True)  # noqa: E731
        apart = torch.arange(len(q))[:, None] - torch.arange(len(k))
        seen = (part(cu_q, q)[:, None] == part(cu_k, k)) & ((apart <= window[0]) | (window[0] < 0))
        seen &= (apart >= 0) | (not causal and window[1] != 0)
        return (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~seen, -torch.inf).softmax(-1)

    def given(operator, arguments):
        bound = inspect.signature(operator._init_fn).bind(*arguments)
        bound.apply_defaults()
        given = bound.arguments
        q, k, v = (given[name] for name in ("query", "key", "value"))
        groups, scale = q.shape[1] // k.shape[1], given.get("scale") or q.shape[-1] ** -0.5
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        mask = given["cu_seq_q"], given["cu_seq_k"], scale, given["is_causal"], given.get("window_size", (-1, -1))
        return given.get("grad_out"), q, k, v, weights(q, k, *mask), groups, scale

    @varlen._varlen_attn.register_kernel("cpu")
    def _(*arguments):
        _, q, _, v, p, _, _ = given(varlen._varlen_attn, arguments)
        return torch.einsum("hqk,khd->qhd", p, v), q.new_zeros(q.shape[1], len(q)), torch.zeros(2).to(torch.uint64)

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def _(*arguments):
        grad, q, k, v, p, groups, scale = given(varlen._varlen_attn_backward, arguments)
        upstream = torch.einsum("qhd,khd->hqk", grad, v)
        scores = scale * p * (upstream - (upstream * p).sum(-1, keepdim=True))
        dk, dv = torch.einsum("hqk,qhd->khd", scores, q), torch.einsum("hqk,qhd->khd", p, grad)
        dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
        return torch.einsum("hqk,khd->qhd", scores, k), dk, dv
