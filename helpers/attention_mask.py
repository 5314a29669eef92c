"""Which keys a query may see: one description, and the forms in which the attention backends want it.

A mask is a band around the diagonal (causal, sliding window) that may not leave its segment. A packed document is a
segment; a run of padding is one too, so padding is seen by padding alone and no row is ever empty. Each form is made
once, from the description rather than from a dense mask, and kept for the layers that follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # FlexAttention's own default
UNBOUNDED = 1 << 30


def document_ids(lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    """Ids [1, sum(lengths)] of documents packed one after the other: ``[2, 3]`` gives ``[[0, 0, 1, 1, 1]]``."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].to(device)


def segments_of(ids: Tensor) -> Tensor:
    """Number the runs of equal ``ids`` [batch, keys] along each row from 0: int32, ascending."""
    changes = torch.zeros_like(ids, dtype=torch.int32)
    changes[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return changes.cumsum(1, dtype=torch.int32)


@dataclass
class AttentionMask:
    """A query at position ``p`` sees key ``k`` where all that is given here allows it.

    Args:
        causal: ``k <= p``.
        window: ``k > p - window``; without ``causal`` also ``k < p + window``.
        documents: int [batch, keys]; ``documents[k] == documents[p]``. Ids ascend along a row; -1 marks padding.
        padding: bool or int [batch, keys], true for real tokens (a tokenizer's ``attention_mask``).
        q_offset: position of the first query; None: the queries are the last keys, as when decoding with a cache.
        segments: int32 [batch, keys] as :func:`segments_of` gives it, in place of ``documents`` and ``padding``.
        backend: the backend that a caller with no other way to say it (a transformers model) has chosen.
        forms: what has been made of it so far; ``{"dense": mask}`` on its own stands for an arbitrary mask.

    Raises:
        ValueError: a window below 1, a mask of floats, ids that do not ascend, or tensors that are not [batch, keys].
    """

    causal: bool = True
    window: int | None = None
    documents: Tensor | None = None
    padding: Tensor | None = None
    q_offset: int | Tensor | None = None
    segments: Tensor | None = None
    backend: str | None = None
    forms: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}; a query sees at least itself, so give 1 or more, or None")
        ids = None
        for name in ("documents", "padding"):
            given = getattr(self, name)
            if given is None:
                continue
            if given.is_floating_point():
                raise ValueError(f"{name} is a mask of {given.dtype}; give bool or integers [batch, keys]")
            if given.ndim != 2:
                raise ValueError(f"{name} has shape {tuple(given.shape)}; give [batch, keys]")
            if name == "documents":
                ids = given
                real = torch.where(ids < 0, torch.cummax(ids, 1).values, ids)
                if (real.diff(dim=1) < 0).any():
                    raise ValueError(
                        "document ids do not ascend along a row: number the documents in the order they are packed in"
                    )
            else:
                ids = given.long() - 1 if ids is None else torch.where(given.bool(), ids, -1)
        if ids is not None:
            self.segments = segments_of(ids)
            self.documents = self.padding = None

    def offset(self, q_len: int, kv_len: int) -> int | Tensor:
        """Position of the first query among the keys, the last of which the queries are without a ``q_offset``."""
        return kv_len - q_len if self.q_offset is None else self.q_offset

    @property
    def reach(self) -> tuple[int, int]:
        """(left, right): a query sees keys ``k`` with ``p - left < k <= p + right``."""
        left = UNBOUNDED if self.window is None else self.window
        right = 0 if self.causal else UNBOUNDED if self.window is None else self.window - 1
        return left, right

    def dense(self, q_len: int, kv_len: int, device: torch.device) -> Tensor:
        """bool [batch or 1, 1, q_len, kv_len], true where a query may see a key."""
        if "dense" not in self.forms:
            left, right = self.reach
            q = torch.arange(q_len, device=device) + self.offset(q_len, kv_len)
            k = torch.arange(kv_len, device=device)
            seen = ((k > q[:, None] - left) & (k <= q[:, None] + right))[None, None]
            if self.segments is not None:
                seen = seen & (self.segments[:, None, q, None] == self.segments[:, None, None, :])
            self.forms["dense"] = seen
        return self.forms["dense"]

    def block_mask(self, batch: int, q_len: int, kv_len: int, device: torch.device) -> BlockMask:
        """FlexAttention's mask. Blocks that no query reaches are left out; documents' blocks meet only their own.

        What it costs does not grow with q_len * kv_len, and every mask has the same shape of program: the same
        ``mask_mod``, band and segments as tensors, never fewer than two blocks, so that one graph serves all lengths.
        """
        if "block" not in self.forms:
            left, right = self.reach
            offset = self.offset(q_len, kv_len)
            segments = self.segments
            if segments is None:
                segments = torch.zeros(batch, kv_len, dtype=torch.int32, device=device)
            if not isinstance(offset, Tensor):
                offset = torch.full((), offset, dtype=torch.int32, device=device)
            band = [torch.full((), bound, dtype=torch.int32, device=device) for bound in (left, right)]
            of_queries = segments[:, torch.arange(q_len, device=device) + offset]
            mask_mod = _mask_mod(of_queries, segments, offset, *band)
            self.forms["block"] = _block_mask(mask_mod, segments, offset, band, q_len, kv_len)
        return self.forms["block"]

    def cu_seqlens(self, batch: int, q_len: int, kv_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where segments begin among all queries and all keys of the batch: int32 [segments + 1] each."""
        if "cu_seqlens" not in self.forms:
            if self.segments is None:
                steps = torch.arange(batch + 1, dtype=torch.int32, device=device)
                self.forms["cu_seqlens"] = steps * q_len, steps * kv_len
            else:
                starts = torch.ones_like(self.segments, dtype=torch.bool)
                starts[:, 1:] = self.segments.diff(dim=1) != 0
                ends = torch.full((1,), starts.numel(), dtype=torch.int32, device=device)
                where = torch.cat([starts.flatten().nonzero().flatten().int(), ends])
                self.forms["cu_seqlens"] = where, where
        return self.forms["cu_seqlens"]


def document_starts(positions: Tensor) -> Tensor:
    """bool [rows, length]: where a position does not follow the one before it, and so a packed document begins."""
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions.diff(dim=1) != 1
    return starts


def packed_mask(positions: Tensor, most: int, window: int | None = None) -> AttentionMask:
    """The causal mask of packed rows, for flash attention and made without waiting for the GPU.

    Args:
        positions: [rows, length], of which `document_starts` tells the documents.
        most: documents that all rows may have: `cu_seqlens` has as many, those that are not there empty, at the end.
    """
    starts = document_starts(positions)
    document = starts.flatten().cumsum(0) - 1
    begins = torch.searchsorted(document, torch.arange(most + 1, device=positions.device), out_int32=True)
    segments = starts.cumsum(1, dtype=torch.int32)
    return AttentionMask(True, window, segments=segments, backend="flash", forms={"cu_seqlens": (begins, begins)})


def _mask_mod(
    of_queries: Tensor, of_keys: Tensor, offset: Tensor, left: Tensor, right: Tensor
) -> Callable[..., Tensor]:
    """FlexAttention's mask function: one code object for every mask, all that varies in tensors."""

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        p = q + offset
        return (k > p - left) & (k <= p + right) & (of_queries[b, q] == of_keys[b, k])

    return mask_mod


def _block_mask(
    mask_mod: Callable[..., Tensor], segments: Tensor, offset: Tensor, band: list[Tensor], q_len: int, kv_len: int
) -> BlockMask:
    """Which [BLOCK, BLOCK] tiles are reached (`some`) and which hold no masked pair (`every`), from their corners."""
    device, (left, right) = segments.device, band
    # A single block would specialise the graph to it; the second then lies outside and is never visited.
    q0 = torch.arange(max(2, -(-q_len // BLOCK)), device=device, dtype=torch.int32) * BLOCK
    k0 = torch.arange(max(2, -(-kv_len // BLOCK)), device=device, dtype=torch.int32) * BLOCK
    q_first, q_last = q0.clamp(max=q_len - 1) + offset, (q0 + BLOCK - 1).clamp(max=q_len - 1) + offset
    k_first, k_last = k0.clamp(max=kv_len - 1), (k0 + BLOCK - 1).clamp(max=kv_len - 1)
    # Segments ascend, so a block's first and last key hold its least and greatest.
    q_low, q_high = segments[:, q_first, None], segments[:, q_last, None]
    k_low, k_high = segments[:, None, k_first], segments[:, None, k_last]
    first, last = q_first[:, None], q_last[:, None]
    inside = (q0 < q_len)[:, None] & (k0 < kv_len)
    whole = (q0 + BLOCK <= q_len)[:, None] & (k0 + BLOCK <= kv_len)
    some = inside & (k_first <= last + right) & (k_last > first - left) & (k_low <= q_high) & (k_high >= q_low)
    every = some & whole & (k_last <= first + right) & (k_first > last - left)
    every = every & (q_low == q_high) & (k_low == q_low) & (k_high == q_low)
    partial, full = _ordered(some & ~every), _ordered(every)
    return BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(q_len, kv_len), compute_q_blocks=True
    )


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """(how many, which first) of the true tiles [batch, q, k] of each row, with a dimension for heads."""
    tiles = tiles[:, None].int()
    return tiles.sum(-1, dtype=torch.int32), tiles.argsort(dim=-1, descending=True, stable=True).int().contiguous()
