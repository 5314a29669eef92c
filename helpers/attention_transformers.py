"""The attention backends as ``attn_implementation="qlora_..."`` of stock transformers models.

`register()` adds each to transformers' two registries: a mask function, called once a batch, which turns what the model
asks for into one `AttentionMask` that all layers share, and an attention function, called in each layer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function
from transformers.utils.import_utils import is_tracing

from .attention import Case, attention, choose, device_capability
from .attention_mask import AttentionMask, packed_mask, segments_of

# transformers takes any name with "flash" in it for its own.
REGISTERED = {
    "qlora_auto": "auto", "qlora_sdpa": "sdpa", "qlora_flex": "flex", "qlora_varlen": "flash",
    "qlora_xformers": "xformers", "qlora_eager": "eager",
}  # fmt: skip


def register() -> None:
    """Make every name of `REGISTERED` an ``attn_implementation`` of transformers; registering twice does no harm."""
    for name, backend in REGISTERED.items():
        AttentionInterface.register(name, functools.partial(_transformers_attention, backend))
        AttentionMaskInterface.register(name, functools.partial(_transformers_mask, backend))


_packed: tuple[Tensor, int] | None = None  # within `packed_as`


@contextlib.contextmanager
def packed_as(positions: Tensor, most: int) -> Iterator[None]:
    """Within, a model's masks are those of `packed_mask`, whatever it asks for: nothing waits for the GPU."""
    global _packed
    _packed = positions, most
    try:
        yield
    finally:
        _packed = None


def packed_backend(config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """What packed rows train with on ``device``: one of `helpers.attention.BACKENDS`, or None where it is not ours."""
    backend = REGISTERED.get(config._attn_implementation)
    window = getattr(config, "sliding_window", None) is not None
    return _chosen(config, device, dtype, window=window, segments=True) if backend == "auto" else backend


def _chosen(config: Any, device: torch.device, dtype: torch.dtype, **case: bool) -> str:
    """What `auto` stands for in a model of this configuration. ``dtype``: of its hidden states."""
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return choose("auto", Case(
        device=device.type,
        capability=device_capability(device.index or 0) if device.type == "cuda" else (0, 0),
        dtype=dtype,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        gradient=torch.is_grad_enabled(),
        dropout=bool(getattr(config, "attention_dropout", 0.0)),
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        **case,
    ))  # fmt: skip


def _transformers_attention(
    backend: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention function; returns [batch, queries, heads, head_dim] and no weights."""
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"this model's attention has {name}, which is not supported: take transformers' 'eager'")
    if isinstance(attention_mask, Tensor):
        if attention_mask.is_floating_point():
            raise ValueError("attention_mask is a mask of floats; give bool [batch, 1, queries, keys], or 'eager'")
        mask = AttentionMask(causal=False, forms={"dense": attention_mask})
        backend = "eager" if softcap is not None else "sdpa"
    elif attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask = AttentionMask(causal=bool(query.shape[2] > 1 and causal))
    else:
        mask, backend = attention_mask, attention_mask.backend or backend
    return attention(query, key, value, mask, scaling, softcap, dropout, backend).transpose(1, 2).contiguous(), None


def _transformers_mask(
    backend: str,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config=None,
    **kwargs,
) -> AttentionMask | None:
    """transformers' mask function: called once a batch, its result goes to every layer. None: causal, nothing else."""
    chunked = local_size is not None and local_size == getattr(config, "attention_chunk_size", None)
    if use_vmap or chunked:
        raise ValueError("this model asks for a mask beyond window, documents and padding: take transformers' 'sdpa'")
    # Bidirectional masks are asked for with an argument of their own.
    causal = "allow_is_bidirectional_skip" not in kwargs
    # Flex has one graph for all masks, so none is simplified; the others have better kernels for simpler ones.
    flex = backend == "flex"
    window = local_size if local_size is not None and (flex or local_size < kv_length) else None
    if _packed is not None:
        return packed_mask(*_packed, window)
    aligned = isinstance(q_offset, int) and q_offset == kv_offset and q_length == kv_length
    last = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    ids = None
    if aligned and causal and kv_length > 1 and mask_function is not causal_mask_function:
        ids = _packed_ids(mask_function, batch_size, kv_length, device)
    if attention_mask is not None:
        ids = F.pad(attention_mask, (0, max(0, kv_offset + kv_length - attention_mask.shape[1])))
        ids = ids[:, kv_offset : kv_offset + kv_length].to(torch.int32)
    # Padding on the right is beyond every real token's causal reach. One synchronisation a batch.
    if ids is not None and not flex and not is_tracing(ids):
        unneeded = ids.diff(dim=1) <= 0 if aligned and causal else ids > 0
        if unneeded.all():
            ids = None
    if flex and ids is None:
        ids = torch.zeros(batch_size, kv_length, dtype=torch.int32, device=device)
    if ids is None and window is None and causal and (aligned or (q_length == 1 and last)):
        return None
    segments = None if ids is None else segments_of(ids)
    mask = AttentionMask(causal, window, q_offset=None if last else q_offset - kv_offset, segments=segments)
    device = torch.device(device)
    if backend == "auto":
        backend = _chosen(
            config, device, kwargs["dtype"], causal=causal, window=window is not None, segments=segments is not None,
            decoding=q_length != kv_length, offset=mask.q_offset is not None,
        )  # fmt: skip
    mask.backend = backend
    # Made here, before the layers: inside a compiled layer it would be made again in each, and would synchronise.
    if backend == "flex":
        mask.block_mask(batch_size, q_length, kv_length, device)
    elif backend in ("flash", "xformers"):
        mask.cu_seqlens(batch_size, q_length, kv_length, device)
    else:
        mask.dense(q_length, kv_length, device)
    return mask


def _packed_ids(mask_function: Callable, batch: int, length: int, device: torch.device | str) -> Tensor:
    """Document ids [batch, length] read off a transformers mask function, which has no other way to tell them.

    The diagonal below the main one is false exactly where a document begins.

    Raises:
        ValueError: it also lets queries see later keys (an image's tokens each other), which no band describes.
    """
    rows, later = torch.arange(batch, device=device)[:, None], torch.arange(1, length, device=device)[None]
    if mask_function(rows, 0, later - 1, later).any():
        raise ValueError("this model's mask is not causal within blocks of tokens: take transformers' 'sdpa'")
    follows = mask_function(rows, 0, later, later - 1).expand(batch, -1)
    return F.pad((~follows).int(), (1, 0)).cumsum(1, dtype=torch.int32)
