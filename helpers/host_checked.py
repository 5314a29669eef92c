"""Batches whose masks are looked at before they go to the GPU: there, an answer waits for all that is queued.

    trainer.data_collator = HostChecked(trainer.data_collator)

A compiled step asks whether padding is on the right, so that causal attention needs no mask, and a recorded one how
many packed documents there are. Asked on the GPU at every micro-step, that keeps Python from queueing the next in time.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from torch import Tensor

from .attention_mask import document_starts


def padded_on_the_right(mask: Tensor) -> bool:
    """Whether ``mask`` [rows, length], 1 where there is a token, has nothing but padding after the first padding."""
    return bool((mask[:, 1:] <= mask[:, :-1]).all())


class HostChecked:
    """``collator`` with the answers in its batches.

    Where padding is on the right ``attention_mask`` gives way to ``num_tokens``, the tokens that it marked;
    ``documents`` counts what ``position_ids`` [rows, length] pack. Both are ints.
    """

    def __init__(self, collator: Callable[[list[Any]], MutableMapping[str, Any]]):
        self.collator = collator

    def __call__(self, rows: list[Any]) -> MutableMapping[str, Any]:
        batch = self.collator(rows)
        mask, positions = batch.get("attention_mask"), batch.get("position_ids")
        if mask is not None and mask.ndim == 2 and padded_on_the_right(mask):
            batch["num_tokens"] = int(mask.sum())
            del batch["attention_mask"]
        if positions is not None and positions.ndim == 2:
            batch["documents"] = int(document_starts(positions).sum())
        return batch
