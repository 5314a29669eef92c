"""FlexAttention's graphs over many lengths, and the attention backends' time and memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .attention import BACKENDS, Case, attention, unsupported
from .attention_mask import AttentionMask, document_ids
from .checkpoints import default_dtype
from .compile_counter import CompileCounter
from .memory import GIB, measure_peak

MASKS = ("causal", "window", "packed", "mixed")


def mask_of(kind: str, length: int, device: torch.device | str = "cpu", documents: Sequence[int] = ()) -> AttentionMask:
    """One of `MASKS`: a window of 37 tokens (512 in long rows), and two documents where no lengths are given."""
    lengths = list(documents) or ([length // 3, length - length // 3] if length > 2 else [length])
    ids = document_ids(lengths, device)
    window = 37 if length < 2048 else 512
    return {
        "causal": lambda: AttentionMask(),
        "window": lambda: AttentionMask(window=window),
        "packed": lambda: AttentionMask(documents=ids),
        "mixed": lambda: AttentionMask(window=window, documents=ids),
    }[kind]()


def _qkv(length: int, device: str, dtype: torch.dtype, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(length)
    shapes = ((1, n, length, 64) for n in (heads, kv_heads, kv_heads))
    return [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]


def flex_at_many_lengths(lengths: Sequence[int], device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Graphs compiled up to each length, ours and `flex_attention` as it is usually compiled, the masks taking turns.

    Ours runs, forward and on a GPU backward too; ``error`` is its worst difference from float64. The usual way (a mask
    function of its own for each kind of mask, `create_block_mask`) is only traced: no more than that is counted.
    """

    def trace_only(graph, inputs):
        return lambda *arguments: (torch.empty(0),)

    def usual(kind: str, mask: AttentionMask, length: int):
        def causal(b, h, q, k):
            return q >= k

        def window(b, h, q, k):
            return (q >= k) & (q - k < mask.window)

        def packed(b, h, q, k):
            return (q >= k) & (mask.segments[b, q] == mask.segments[b, k])

        def mixed(b, h, q, k):
            return (q >= k) & (q - k < mask.window) & (mask.segments[b, q] == mask.segments[b, k])

        functions = {"causal": causal, "window": window, "packed": packed, "mixed": mixed}
        return create_block_mask(functions[kind], 1, None, length, length, device=device)

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=True, backend=trace_only)
    rows = []
    ours = others = 0
    for i, length in enumerate(lengths):
        kind = MASKS[i % len(MASKS)]
        inputs = [x.requires_grad_(device == "cuda") for x in _qkv(length, device, dtype)]
        with CompileCounter() as counter:
            out = attention(*inputs, mask_of(kind, length, device), backend="flex")
            if device == "cuda":
                out.float().square().mean().backward()
        ours += counter.compiles
        with torch.no_grad():
            exact = attention(*[x.double() for x in inputs], mask_of(kind, length, device), backend="eager")
            error = (out.double() - exact).abs().max().item()
        with CompileCounter() as counter, torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
            compiled(*inputs, block_mask=usual(kind, mask_of(kind, length, device), length), enable_gqa=True)
        others += counter.compiles
        rows.append({"length": length, "mask": kind, "ours": ours, "usual": others, "error": error})
    torch._dynamo.reset()
    return rows


def median_ms(function: Callable[[], Any], repeats: int = 20) -> float:
    """Median GPU milliseconds of one call, after three that warm up."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def attention_times(length: int = 4096, heads: int = 32, kv_heads: int = 8) -> list[dict[str, Any]]:
    """Forward and backward of each backend that can, of one row: ms, and the peak above the inputs in GiB."""
    dtype = default_dtype()
    documents = [700, 300, 900, 150, 800, 446, 600, 200]
    rows = []
    for kind in ("causal", "window", "packed"):
        for backend in BACKENDS:
            mask = mask_of(kind, length, "cuda", documents)
            inputs = [x.requires_grad_() for x in _qkv(length, "cuda", dtype, heads, kv_heads)]
            case = Case("cuda", torch.cuda.get_device_capability(), dtype, 64, window=mask.window is not None,
                        segments=mask.segments is not None, gradient=True)  # fmt: skip
            if unsupported(backend, case):
                continue

            def both(inputs=inputs, mask=mask, backend=backend):
                attention(*inputs, mask, backend=backend).sum().backward()

            ms = median_ms(both)
            rows.append({"mask": kind, "backend": backend, "ms": ms, "gib": measure_peak(both)[1] / GIB})
    return rows
