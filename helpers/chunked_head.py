"""TRL's fused head by `helpers.linear_loss`, for every trainer of TRL that asks its model for one, on any device.

Its SFT, DPO, KTO, RLOO and GRPO trainers call ``model(..., labels=labels, fused_lm_head=True)`` for log-probabilities
and more; `chunked_head` answers, and what they make of the answer stays theirs. TRL's own answer takes the weight of a
plain head and a Triton kernel; here the head itself is called, so it may have LoRA, a bias or 4 bits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput
from trl.trainer.utils import FusedCausalLMOutput

from .linear_loss import IGNORED, linear_forward
from .loss_functions import causal_lm_loss, cross_entropy
from .replaced import replaced_forward


@contextlib.contextmanager
def chunked_head(
    model: nn.Module,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("log_probs", "entropy"),
    differentiable_entropy: bool = True,
    full: bool = False,
    **options: Any,
) -> Iterator[None]:
    """Within, ``model(..., labels=labels, fused_lm_head=True)`` returns TRL's own output type by `linear_forward`.

    Args:
        model: a causal language model of transformers, plain or within PEFT or a wrapper that has it as ``module``.
        temperature: what logits are divided by.
        outputs: among "log_probs" (always), "entropy", "log_sum_sq_probs", "mean_logits" and "is_top1", as TRL names
            them: DPO and KTO want all or nearly all, SFT the first two and the last, GRPO the first two.
        differentiable_entropy: False where the entropy is only logged: it then costs nothing in the backward pass.
        full: all logits at once and plain autograd, for comparison.
        options: of `linear_forward`.

    Raises: ValueError where the model makes its logits in a way that is not known here.
    """
    model = getattr(model, "module", model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    function = _scored(*_logits_of(base.config.get_text_config()), temperature, outputs, differentiable_entropy)
    forward, active = base.forward, True

    def fused(*args, fused_lm_head: bool = False, labels: Tensor | None = None, shift_labels=None, **kwargs):
        if not active or not fused_lm_head:
            own = {"labels": labels, "shift_labels": shift_labels, "fused_lm_head": fused_lm_head or None}
            return forward(*args, **{name: value for name, value in own.items() if value is not None}, **kwargs)
        if kwargs.get("output_router_logits"):
            raise ValueError("only TRL's own head adds the load-balancing loss of experts: do without chunked_head")
        items = kwargs.pop("num_items_in_batch", None)
        hidden = base.base_model(*args, **(kwargs | {"use_cache": False})).last_hidden_state
        if shift_labels is None:
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        head, mask = base.get_output_embeddings(), shift_labels != IGNORED
        hidden, shift_labels = hidden[mask], shift_labels[mask]
        if full:
            found = function(hidden, head, shift_labels)
        elif len(hidden):
            found = linear_forward(hidden, head, shift_labels, forward_function=function, **options)
        else:
            found = [hidden.sum(1).float()] * len(outputs)  # of no row: a zero that backward can pass through
        found = {k: t.new_zeros(mask.shape).masked_scatter(mask, t) for k, t in zip(outputs, found, strict=True)}
        loss = -found["log_probs"].sum() / (mask.sum().clamp(min=1) if items is None else items)
        return FusedCausalLMOutput(loss=loss, label_mask=mask, **found)

    with replaced_forward(base, fused):
        try:
            yield
        finally:
            active = False  # a trainer may have wrapped it since: then it passes on


@contextlib.contextmanager
def chunked_loss(model: nn.Module, **options: Any) -> Iterator[None]:
    """Within, ``model(..., labels=labels)`` returns transformers' own loss by `linear_forward`, and no logits.

    Args:
        model: a causal language model of transformers, plain or within PEFT.
        options: of `linear_forward`.

    Raises: ValueError where the model makes its logits in a way that is not known here.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    function = _summed(*_logits_of(base.config.get_text_config()))
    forward, active = base.forward, True

    @functools.wraps(forward)
    def with_loss(*args, labels: Tensor | None = None, **kwargs):
        if not active or labels is None or kwargs.get("fused_lm_head"):
            return forward(*args, **({"labels": labels} if labels is not None else {}), **kwargs)
        items = kwargs.pop("num_items_in_batch", None)
        hidden = base.base_model(*args, **(kwargs | {"use_cache": False})).last_hidden_state
        head = base.get_output_embeddings()
        return CausalLMOutput(loss=causal_lm_loss(hidden, head, labels, items, forward_function=function, **options))

    with replaced_forward(base, with_loss):
        try:
            yield
        finally:
            active = False  # as above


def _logits_of(config: Any) -> tuple[float, float | None]:
    """The scale and the soft cap that a model of this config puts on its head's output."""
    if getattr(config, "logits_scaling", None) and config.model_type == "hyperclovax":
        raise ValueError("hyperclovax scales its logits in a way of its own: do without chunked_head")
    scale = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None) or scale
    return scale, getattr(config, "final_logit_softcapping", None)


def _logits(x: Tensor, linear: Callable, scale: float, cap: float | None) -> Tensor:
    logits = linear(x).float() * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


@functools.lru_cache
def _summed(scale: float, cap: float | None) -> Callable:
    """f for `linear_forward`: cross entropy of scaled and capped logits, summed; plain where there is neither."""
    if scale == 1.0 and cap is None:
        return cross_entropy

    def summed(x: Tensor, linear: Callable, labels: Tensor) -> Tensor:
        return F.cross_entropy(_logits(x, linear, scale, cap), labels, ignore_index=IGNORED, reduction="sum")

    return summed


@functools.lru_cache
def _scored(
    scale: float, cap: float | None, temperature: float, outputs: tuple[str, ...], differentiable_entropy: bool
) -> Callable:
    """f for `linear_forward`: ``outputs`` of each label. One function for the same arguments, so compiled once."""

    def scored(x: Tensor, linear: Callable, labels: Tensor) -> tuple[Tensor, ...]:
        logits = _logits(x, linear, scale, cap)
        logp = torch.log_softmax(logits / temperature, dim=1)
        found = {"log_probs": -F.nll_loss(logp, labels, reduction="none")}
        if "entropy" in outputs:
            seen = logp if differentiable_entropy else logp.detach()
            found["entropy"] = -(seen.exp() * seen).sum(1)
        if "log_sum_sq_probs" in outputs:
            found["log_sum_sq_probs"] = torch.logsumexp(2 * logp.detach(), 1)
        if "mean_logits" in outputs:
            found["mean_logits"] = logits.detach().mean(1) / temperature
        if "is_top1" in outputs:
            found["is_top1"] = logits.detach().argmax(1) == labels
        return tuple(found[name] for name in outputs)

    return scored
