"""One attention over many kernels: `attention(q, k, v, mask)`, and a table that decides which kernel runs and says why.

Backends: ``sdpa`` (PyTorch), ``flex`` (FlexAttention), ``flash`` (the flash-attn package, else
`torch.nn.attention.varlen`), ``xformers`` and ``eager``. An explicit choice that cannot work raises with the reason;
``auto`` goes on to the next. `helpers.attention_transformers` makes each of them an ``attn_implementation``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .attention_mask import UNBOUNDED, AttentionMask

# What `auto` tries, best first: without a band or segments SDPA has a kernel for it; else dense masks come last.
AUTO_CPU = ("sdpa", "eager")
AUTO_PLAIN = ("sdpa", "flash", "flex", "eager")
AUTO_MASKED = ("flash", "flex", "xformers", "sdpa", "eager")
HALF = (torch.float16, torch.bfloat16)
FLASH, VARLEN, XFORMERS = "flash_attn", "torch.nn.attention.varlen", "xformers.ops"  # modules


@dataclass(frozen=True)
class Case:
    """What a backend has to cope with."""

    device: str
    capability: tuple[int, int]  # (0, 0) without CUDA
    dtype: torch.dtype
    head_dim: int
    causal: bool = True
    window: bool = False
    segments: bool = False
    decoding: bool = False  # fewer queries than keys
    offset: bool = False  # the queries are not the last keys
    gradient: bool = False
    dropout: bool = False
    softcap: bool = False


def unsupported(backend: str, case: Case) -> str | None:
    """Why ``backend`` cannot do ``case``; None where it can.

    Raises:
        ValueError: no such backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    for reason, applies in RULES.get(backend, ()):
        if applies(case):
            return reason
    return None


def _sm(case: Case) -> int:
    return case.capability[0] * 10 + case.capability[1]


# Each row: why not, and when. The first that applies is the reason.
RULES: dict[str, tuple[tuple[str, Callable[[Case], bool]], ...]] = {
    "sdpa": (("scaled_dot_product_attention has no softcap", lambda c: c.softcap),),
    "flex": (
        ("FlexAttention has no dropout", lambda c: c.dropout),
        ("FlexAttention has no backward pass on the CPU (pytorch#148752)", lambda c: c.device == "cpu" and c.gradient),
        ("FlexAttention's kernels take float16, bfloat16 and float32",
         lambda c: c.dtype not in (*HALF, torch.float32)),
        ("FlexAttention's kernels take head sizes from 16 on", lambda c: c.device == "cuda" and c.head_dim < 16),
        ("bfloat16 needs compute capability 8.0", lambda c: 0 < _sm(c) < 80 and c.dtype == torch.bfloat16),
        ("FlexAttention's forward keeps head_dim * itemsize * 256 bytes in shared memory, and below compute "
         "capability 8.0 there are 64 KiB",
         lambda c: 0 < _sm(c) < 80 and c.head_dim * c.dtype.itemsize > 256),
    ),
    "flash": (
        ("flash attention runs on CUDA", lambda c: c.device != "cuda"),
        ("flash attention needs compute capability 8.0", lambda c: _sm(c) < 80),
        ("neither flash_attn nor torch.nn.attention.varlen can be imported",
         lambda c: not (_importable(FLASH) or _importable(VARLEN))),
        ("flash attention takes float16 and bfloat16", lambda c: c.dtype not in HALF),
        ("flash attention takes head sizes to 256 that 8 divides", lambda c: c.head_dim > 256 or c.head_dim % 8 > 0),
        ("torch.nn.attention.varlen has no dropout and no softcap; install flash-attn",
         lambda c: (c.dropout or c.softcap) and not _importable(FLASH)),
        ("this torch.nn.attention.varlen has no window; install flash-attn or torch 2.11",
         lambda c: c.window and not _importable(FLASH) and not _varlen_has("window_size")),
        ("its segments are of queries and keys alike, so a padded batch cannot be decoded",
         lambda c: c.decoding and c.segments),
        ("flash attention takes the queries for the last keys", lambda c: c.offset),
    ),
    "xformers": (
        ("xFormers runs on CUDA", lambda c: c.device != "cuda"),
        ("xFormers cannot be imported", lambda c: not _importable(XFORMERS)),
        ("xFormers has no softcap", lambda c: c.softcap),
        ("xFormers takes float16, bfloat16 and float32", lambda c: c.dtype not in (*HALF, torch.float32)),
        ("bfloat16 needs compute capability 8.0", lambda c: _sm(c) < 80 and c.dtype == torch.bfloat16),
        ("decoding is left to the other backends", lambda c: c.decoding or c.offset),
        ("only causal masks are handed to xFormers", lambda c: not c.causal),
    ),
}  # fmt: skip


def choose(backend: str, case: Case) -> str:
    """The backend that runs ``case``: ``backend`` itself, or the first that can for ``auto``.

    Raises:
        ValueError: an explicit choice cannot work; the message says why and what can.
    """
    if backend == "auto":
        masked = case.window or case.segments or not case.causal
        order = AUTO_CPU if case.device == "cpu" else AUTO_MASKED if masked else AUTO_PLAIN
        return next(name for name in order if unsupported(name, case) is None)
    reason = unsupported(backend, case)
    if reason is None:
        return backend
    able = [name for name in BACKENDS if unsupported(name, case) is None]
    raise ValueError(
        f"attention backend {backend!r} cannot run {case.dtype}, head size {case.head_dim}, on {case.device}: "
        f"{reason}. Take {', '.join(able)}, or auto"
    )


def explain(case: Case) -> list[dict[str, str]]:
    """The table for one case: a row a backend, with what ``auto`` takes and why the others cannot."""
    chosen = choose("auto", case)
    return [
        {"backend": name, "answer": reason or ("auto takes it" if name == chosen else "can")}
        for name in BACKENDS
        for reason in [unsupported(name, case)]
    ]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """``dropout(softmax(softcap(scale * q @ k.T) masked)) @ v``, by whichever kernel can.

    Args:
        q: [batch, heads, queries, head_dim].
        k, v: [batch, kv_heads, keys, head_dim]; ``kv_heads`` divides ``heads``.
        mask: which keys a query sees; None: all.
        scale: default ``head_dim ** -0.5``.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        dropout: probability with which an attention weight is dropped.
        backend: ``auto`` or one of `BACKENDS`.

    Returns: [batch, heads, queries, head_dim] of q's dtype.

    Raises:
        ValueError: the backend cannot do it (with the reason), or the shapes do not fit.
    """
    if q.ndim != 4 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)}: give [batch, heads, length, head_dim] with kv heads that "
            "divide the heads"
        )
    mask = AttentionMask(causal=False) if mask is None else mask
    case = Case(
        device=q.device.type,
        capability=device_capability(q.device.index or 0) if q.is_cuda else (0, 0),
        dtype=q.dtype,
        head_dim=q.shape[-1],
        causal=mask.causal,
        window=mask.window is not None,
        segments=mask.segments is not None,
        decoding=bool(q.shape[2] != k.shape[2]),
        offset=mask.q_offset is not None,
        gradient=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
        dropout=dropout > 0,
        softcap=softcap is not None,
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return BACKENDS[choose(backend, case)](q, k, v, mask, scale, softcap, dropout)


def _expanded(q: Tensor, x: Tensor) -> Tensor:
    """Keys or values repeated for the query heads that share them."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _eager(q, k, v, mask, scale, softcap, dropout):
    k, v = _expanded(q, k), _expanded(q, v)
    scores = q @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask.dense(q.shape[2], k.shape[2], q.device), torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(torch.float32, q.dtype)).to(q.dtype)
    return F.dropout(weights, dropout) @ v


def _sdpa(q, k, v, mask, scale, softcap, dropout):
    q_len, kv_len = q.shape[2], k.shape[2]
    dense, is_causal = None, False
    if mask.window is not None or mask.segments is not None or "dense" in mask.forms:
        dense = mask.dense(q_len, kv_len, q.device)
    elif mask.causal and mask.q_offset is None and q_len == kv_len:
        is_causal = True
    elif mask.causal and not (mask.q_offset is None and q_len == 1):
        dense = mask.dense(q_len, kv_len, q.device)
    # Shared heads reach only the flash kernel; the others would fall back to materialised scores.
    shared = q.is_cuda and dense is None and q.dtype in HALF and _is_ampere(q.device.index or 0)
    if not shared:
        k, v = _expanded(q, k), _expanded(q, v)
    # A comparison of head counts would be symbolic where Dynamo knows them only as quotients; it must be a bool.
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=dense, dropout_p=dropout, is_causal=is_causal, scale=scale, enable_gqa=shared
    )


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """Within, SDPA leaves out cuDNN's kernels, which plan anew for every length they meet: tens of ms each time.

    PyTorch prefers them on Hopper, where they take some 0.7 of flash attention's time. Over rows of many lengths the
    plans cost more than all the rest of a training step; where lengths recur they are made once.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _flex(q, k, v, mask, scale, softcap, dropout):
    block_mask = mask.block_mask(q.shape[0], q.shape[2], k.shape[2], q.device)
    if torch.compiler.is_compiling():
        return flex_call(q, k, v, block_mask, scale, softcap)
    with one_graph():
        return _compiled_flex(q.device.type)(q, k, v, block_mask, scale, softcap)


def flex_call(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float, softcap: float | None) -> Tensor:
    """`flex_attention` with softcap, grouped heads and this project's kernel options; to be compiled."""
    score_mod = None
    if softcap is not None:

        def score_mod(score, b, h, q_index, k_index):
            return softcap * torch.tanh(score / softcap)

    options = None
    if q.is_cuda:
        options = {"FORCE_USE_FLEX_ATTENTION": True}
        if not _is_ampere(q.device.index or 0):  # FMA code: the default tile spills (measured on sm_75 PTX)
            options |= {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32}
    return flex_attention(q, k, v, score_mod, block_mask, scale, enable_gqa=True, kernel_options=options)


@functools.cache
def _compiled_flex(device: str) -> Callable[..., Tensor]:
    # Inductor's C++ template replaces size symbols textually (s2 within s24), so on the CPU the trace runs as it is.
    return torch.compile(flex_call, dynamic=True, fullgraph=True, backend="eager" if device == "cpu" else "inductor")


@contextlib.contextmanager
def one_graph() -> Iterator[None]:
    """Within, FlexAttention compiles to one graph even for lengths that equal another size or stay below 128.

    Duck shaping takes two sizes that happen to be equal for one. Inductor asks whether the queries are fewer than 128
    even where its decoding kernel is ruled out, and that question becomes a guard. A softcap held as a symbol, as
    dynamic graphs hold floats, is refused. Code shared by several models needs more graphs than Dynamo's 8.
    """
    from torch._inductor.kernel.flex import flex_attention as lowering
    from torch.fx.experimental import _config

    dynamo = torch._dynamo.config.patch(specialize_float=True, recompile_limit=64)
    no_decoding = mock.patch.object(lowering, "_use_flex_decoding", lambda *a, **k: False)
    with _config.patch(use_duck_shape=False), dynamo, no_decoding:
        yield


def _flash_attention(q, k, v, mask, scale, softcap, dropout):
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    cu_q, cu_k = mask.cu_seqlens(batch, q_len, kv_len, q.device)
    left, right = (-1 if reach == UNBOUNDED else reach for reach in mask.reach)
    window = (left - 1 if left > 0 else -1, right)
    q, k, v = (x.transpose(1, 2).reshape(-1, x.shape[1], head_dim) for x in (q, k, v))
    if _importable(FLASH):
        from flash_attn import flash_attn_varlen_func  # here: what Dynamo can trace

        out = flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, q_len, kv_len, dropout_p=dropout, softmax_scale=scale, causal=mask.causal,
            window_size=window, softcap=softcap or 0.0,
        )  # fmt: skip
    else:
        options = {"scale": scale} if _varlen_has("scale") else {}
        if not options:
            q = q * (scale * head_dim**0.5)
        if _varlen_has("window_size"):
            options["window_size"] = window
        else:
            options["is_causal"] = mask.causal
        if k.shape[1] != heads and _varlen_has("enable_gqa"):  # earlier releases share heads without being told to
            options["enable_gqa"] = True
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(q, k, v, cu_q, cu_k, q_len, kv_len, **options)
    return out.view(batch, q_len, heads, head_dim).transpose(1, 2)


def _xformers_attention(q, k, v, mask, scale, softcap, dropout):
    from xformers.ops import fmha, memory_efficient_attention

    batch, heads, length, head_dim = q.shape
    k, v = _expanded(q, k), _expanded(q, v)
    bias = mask.forms.get("xformers")
    if bias is None:
        cu_seqlens, _ = mask.cu_seqlens(batch, length, length, q.device)
        lengths = cu_seqlens.diff().tolist()
        bias = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths, device=q.device)
        if mask.window is not None:
            bias = bias.make_local_attention(mask.window)
        mask.forms["xformers"] = bias
    q, k, v = (x.transpose(1, 2).reshape(1, batch * length, heads, head_dim) for x in (q, k, v))
    out = memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout, scale=scale)
    return out.view(batch, length, heads, head_dim).transpose(1, 2)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "sdpa": _sdpa, "flex": _flex, "flash": _flash_attention, "xformers": _xformers_attention, "eager": _eager,
}  # fmt: skip


@torch.compiler.assume_constant_result
def device_capability(device_index: int) -> tuple[int, int]:
    """``torch.cuda.get_device_capability``, a constant to Dynamo."""
    return torch.cuda.get_device_capability(device_index)


@torch.compiler.assume_constant_result
def _is_ampere(device_index: int) -> bool:
    # Of capability 8.0 or later. Dynamo of torch 2.11 cannot guard the comparison of two tuples within a checkpoint.
    return torch.cuda.get_device_capability(device_index) >= (8, 0)


@functools.cache  # within a constant: Dynamo looks through the cache
def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except Exception:  # a broken binary raises whatever it likes; it is not there, then
        return None


@torch.compiler.assume_constant_result
def _importable(name: str) -> bool:
    return _import(name) is not None


@torch.compiler.assume_constant_result
def _varlen_has(parameter: str) -> bool:
    module = _import(VARLEN)
    return module is not None and parameter in inspect.signature(module.varlen_attn).parameters
