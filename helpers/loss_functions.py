"""Functions of a linear layer's output for `helpers.linear_loss.linear_forward`, and a language model's loss by it.

Each is plain PyTorch, differentiated by autograd; ``linear`` makes the logits, and the float32 upcast stays in sight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear_loss import IGNORED, linear_forward


def cross_entropy(x: Tensor, linear: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
    """Summed over rows. x: [rows, hidden]; labels: int64 [rows], -100 ignored. Returns float32 []."""
    return F.cross_entropy(linear(x).float(), labels, ignore_index=IGNORED, reduction="sum")


def log_probs(x: Tensor, linear: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
    """Log-probability of each label: float32 [rows]. (Compiled, a gather's gradient is a matrix; this one's is not.)"""
    return -F.cross_entropy(linear(x).float(), labels, reduction="none")


def log_probs_and_entropy(x: Tensor, linear: Callable[[Tensor], Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of each distribution: float32 [rows] both, both differentiable."""
    logp = F.log_softmax(linear(x).float(), dim=1)
    return -F.nll_loss(logp, labels, reduction="none"), -(logp.exp() * logp).sum(1)


def causal_lm_loss(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    num_items_in_batch: int | Tensor | None = None,
    *,
    forward_function: Callable = cross_entropy,
    **options,
) -> Tensor:
    """The loss that transformers computes from full logits, without them.

    Args:
        hidden: [batch, length, hidden], the decoder's last hidden states, after the final norm.
        head: the language model's output layer (``model.get_output_embeddings()``).
        labels: int64 [batch, length], not shifted, -100 where nothing is to be learnt.
        num_items_in_batch: labels of the whole optimizer step, by which the sum is divided; None: those of this batch.
        forward_function: another sum over rows, e.g. with label smoothing.
        options: further ones of `linear_forward`.

    Returns: float32 []; zero, and connected to ``hidden``, where every label is ignored.
    """
    shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].to(hidden.device)
    if num_items_in_batch is None:
        num_items_in_batch = (shifted != IGNORED).sum().clamp(min=1)
    elif torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(hidden.device)
    return linear_forward(
        hidden, head, shifted, forward_function=forward_function, ignore_index=IGNORED,
        denominator=num_items_in_batch, **options,
    )  # fmt: skip
