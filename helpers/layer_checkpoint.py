"""Checkpointing of a decoder layer whose feed-forward half runs backward in parts of the tokens.

`torch.utils.checkpoint` keeps a layer's input and does the layer again in the backward pass, where all of one layer's
activations then live at once. Nearly all of them are the feed-forward part's: a dozen tensors, four times as wide as
the hidden state. But after attention nothing mixes tokens. So here backward does the attention half again, whole, and
then the feed-forward half for some tokens at a time, each with its backward pass before the next. The work is equal,
but that its three 4-bit weights are decoded once for all parts instead of twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack, to_dlpack
from transformers import Cache

from .host_store import HostStore

# Families whose layer is hidden + attention(norm(hidden)), then hidden + mlp(norm(hidden)).
KNOWN = {
    "LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "SmolLM3DecoderLayer",
}  # fmt: skip
LEAST_TOKENS, MOST_TOKENS = 512, 2048  # of a part: fewer keep a GPU less busy, more are more memory
PARTS = 2  # four took 5% longer on an H100 at 4,096 tokens: products of fewer rows, and Python for each part


def attention_half(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """``hidden`` [batch, length, width] plus the attention over it."""
    return hidden + layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)[0]


def feed_forward_half(layer: nn.Module, hidden: Tensor, upstream: Tensor) -> Tensor:
    """0, whose gradients are those of ``hidden`` plus the feed-forward part under ``upstream``; both [tokens, width].

    The value itself is nobody's: compiled, the last product of the feed-forward part is left out.
    """
    return _Directed.apply(hidden + layer.mlp(layer.post_attention_layernorm(hidden)), upstream)


class _Directed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, upstream: Tensor) -> Tensor:
        ctx.save_for_backward(upstream)
        return value.new_zeros(())

    @staticmethod
    def backward(ctx, one: Tensor):
        return ctx.saved_tensors[0], None


def can_be_halved(layer: nn.Module) -> bool:
    """Whether the layer is one of the known ones, and draws no random numbers that a second pass would draw anew."""
    kind = {cls.__name__ for cls in type(layer).__mro__}
    dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in layer.modules())
    return bool(kind & KNOWN) and not dropout and not getattr(layer.self_attn, "attention_dropout", 0)


def generates(kwargs: dict[str, Any]) -> bool:
    """Whether a layer is called with a cache: ``past_key_values`` in transformers 5.17, ``cache`` later."""
    return any(isinstance(value, Cache) for value in kwargs.values())


def parts(tokens: int) -> list[int]:
    """Tokens of each part: nearly equal, `PARTS` of them where that is within `LEAST_TOKENS` and `MOST_TOKENS`."""
    size = min(max(-(-tokens // PARTS), LEAST_TOKENS), MOST_TOKENS)
    count = max(1, -(-tokens // size))
    return [tokens * (i + 1) // count - tokens * i // count for i in range(count)]


def checkpointed(
    layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any], *, whole: Callable, first: Callable, second: Callable,
    store: HostStore | None = None,
) -> Tensor:  # fmt: skip
    """``whole(hidden)``, keeping ``hidden`` alone for the backward pass.

    Args:
        hidden: [batch, length, width]. kwargs: of the layer; nothing in them is trained.
        whole: the layer. first, second: `attention_half` and `feed_forward_half`, which make it up; or compiled.
        store: where ``hidden`` waits for the backward pass; None: where it is.
    """
    return _Checkpointed.apply(hidden, layer, kwargs, whole, first, second, store)


@contextlib.contextmanager
def decoded_once(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within, the 4-bit layers of ``module`` that part A's kernel decodes (helpers/nf4_linear.py) stay decoded.

    Args:
        dtype: of what they are called with, where neither autocast nor the layer says what to compute in.
    """
    layers = [layer for layer in module.modules() if "decoded" in vars(layer)]
    try:
        for layer in layers:
            layer.decoded = layer.decode(dtype)
        yield
    finally:
        for layer in layers:
            layer.decoded = None


def _apart(x: Tensor) -> Tensor:
    """``x``'s own memory as a view of no other tensor: torch.compile would guard what it is a view of."""
    return from_dlpack(to_dlpack(x))


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, layer: nn.Module, kwargs: dict, whole, first, second, store) -> Tensor:
        ctx.save_for_backward(*([hidden] if store is None else []))
        ctx.store, ctx.kept = store, store and store.put(hidden)
        ctx.again = layer, kwargs, first, second
        kind = hidden.device.type
        ctx.autocast = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
        return whole(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        layer, kwargs, first, second = ctx.again
        hidden = ctx.saved_tensors[0] if ctx.store is None else ctx.store.get(ctx.kept)
        hidden, ctx.kept = hidden.detach().requires_grad_(), None
        width = hidden.shape[-1]
        with torch.enable_grad(), torch.autocast(hidden.device.type, **ctx.autocast):
            middle = first(layer, hidden, kwargs)
            flat, upstream = middle.detach().reshape(-1, width), grad.reshape(-1, width)
            found, sizes = torch.empty_like(flat), parts(len(flat))
            with decoded_once(layer.mlp, hidden.dtype):
                for rows, given, into in zip(*(x.split(sizes) for x in (flat, upstream, found)), strict=True):
                    rows = _apart(rows).requires_grad_()
                    second(layer, rows, _apart(given)).backward()
                    into.copy_(rows.grad)
            torch.autograd.backward(middle, found.view_as(middle))
        return hidden.grad, *[None] * 6
