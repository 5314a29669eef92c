"""A user's own ``AutoModelForSequenceClassification.from_pretrained`` on this project's fast path, and undone again.

:func:`patch` changes two calls of transformers, for sequences and for tokens. A model they load has its weights in NF4,
decoded by one kernel, the attention of `helpers.attention`, its decoder layers compiled, a head in float32, and is
pooled where its attention mask ends. What is saved is stock: plain transformers and PEFT load it.

Three faults of the stock path are gone with it. Pooling "the last token that is not the padding token" lands before the
end of a text that ends in the padding token, as texts do where padding and end of text are one token
(transformers#35352). A packed row gives one result for all its texts. And the loss ignores ``num_items_in_batch``,
which ``Trainer`` leaves to every forward with ``**kwargs``, so that loss and gradients grow with the number of
accumulation steps (transformers#47688).
"""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils.generic import can_return_tuple

from .attention_transformers import register
from .checkpoints import default_dtype, nf4_config
from .nf4 import INTERPRETED

HEADS = ("score", "classifier")  # what transformers and PEFT's modules_to_save call a classification head
OF_THE_MODEL = ("dtype", "torch_dtype", "quantization_config", "device_map", "attn_implementation")
OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
              "trust_remote_code", "code_revision")  # fmt: skip


def patch(
    *, quantize: bool = True, nf4: str = "auto", attention: str = "qlora_auto", compile: bool | None = None
) -> contextlib.ExitStack:
    """Put the stock calls on the fast path until the returned stack is closed; it is a context manager too.

    Closing also gives every model that was loaded meanwhile back its stock methods; its weights stay as they are. Until
    then the models are kept alive.

    Args:
        quantize: load in NF4 where the call and the checkpoint say nothing of quantisation.
        nf4: who decodes: ``triton``, ``bitsandbytes``, or ``auto``: triton on a GPU.
        attention: ``attn_implementation`` where the call names none.
        compile: compile embedding, rotary frequencies and decoder layers at the first training step; None: on a GPU.
            The final norm, the head and its loss, which see few tokens, stay eager.

    Raises:
        ValueError: ``nf4`` is none of those.
    """
    if nf4 not in ("auto", "triton", "bitsandbytes"):
        raise ValueError(f"nf4={nf4!r} is not one of auto, triton, bitsandbytes")
    register()
    stack = contextlib.ExitStack()
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        stock = auto.from_pretrained

        def from_pretrained(cls, name, *args, _stock=stock, **kwargs):
            loaded = _stock(name, *args, **_arguments(name, kwargs, quantize, attention))
            _accelerate(loaded[0] if isinstance(loaded, tuple) else loaded, stack, nf4, compile)
            return loaded

        stack.callback(_restore, auto, "from_pretrained", vars(auto).get("from_pretrained"))
        auto.from_pretrained = classmethod(functools.wraps(stock)(from_pretrained))
    return stack


def parts(model: nn.Module) -> dict[str, str]:
    """What is active on a loaded model, read off the model itself; for a run's first line and for tests."""
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    ours = sum("forward" in vars(layer) for layer in layers)
    heads = {f"{p.dtype}".removeprefix("torch.") for name in HEADS for n, p in model.named_parameters()
             if f".{name}." in f".{n}" and "original_module" not in n}  # fmt: skip
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        "NF4": f"{len(layers)} layers, {ours} decoded by the Triton kernel",
        "attention": base.config._attn_implementation,
        "compiled": f"{sum(type(m).__name__.startswith('Compiled') for m in base.modules())} modules",
        "head": ", ".join(sorted(heads)),
        "pooling": "attention mask" if isinstance(base, _MaskPooled) else "stock",
    }


def last_tokens(attention_mask: Tensor | None, position_ids: Tensor | None, ids: Tensor, pad: int | None):
    """(row, column) of the token that stands for each text: the last real one, on whichever side the padding is.

    Args:
        attention_mask: [batch, length], nonzero for real tokens.
        position_ids: [batch, length]; without a mask, a text begins wherever they are 0 (packed rows).
        ids: [batch, length] or embeddings [batch, length, hidden]; pad: the padding token's id.

    Raises:
        ValueError: a mask that is not [batch, length], or none though there is padding.
    """
    batch, length = ids.shape[:2]
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; give [batch, length]")
        real = attention_mask[:, -length:] != 0
        columns = torch.arange(length, device=ids.device)
        return torch.arange(batch, device=ids.device), (columns * real).argmax(-1)
    if position_ids is not None:
        begins = (position_ids.expand(batch, -1) == 0)[:, 1:]
        return F.pad(begins, (0, 1), value=True).nonzero(as_tuple=True)
    if batch > 1 and pad is not None and ids.ndim == 2 and (ids[:, [0, -1]] == pad).any():
        raise ValueError(f"rows begin or end with the padding token {pad}: give attention_mask, to tell it from text")
    return torch.arange(batch, device=ids.device), torch.full((batch,), length - 1, device=ids.device)


def classification_loss(
    logits: Tensor, labels: Tensor, problem_type: str | None, items: Tensor | int | None = None
) -> tuple[Tensor, str]:
    """The loss and its problem type, which is inferred as transformers does where None is given.

    Args:
        logits: [texts, labels].
        labels: a class [texts], -100 ignored; several [texts, labels] of 0 and 1; numbers [texts] or [texts, labels].
        items: labels of the whole batch, over which this is one step of accumulation; None: those at hand.

    Raises:
        ValueError: labels of the wrong shape, a class out of range, or an unknown problem type.
    """
    classes = logits.shape[-1]
    if problem_type is None:
        whole = labels.dtype in (torch.long, torch.int)
        problem_type = "regression" if classes == 1 else \
            "single_label_classification" if whole else "multi_label_classification"  # fmt: skip
    logits, labels = logits.float(), labels.to(logits.device)
    if problem_type == "single_label_classification":
        labels = labels.reshape(-1)
        if len(labels) != len(logits):
            raise ValueError(f"{len(labels)} labels for {len(logits)} texts; give one class a text")
        if bool(((labels >= classes) | (labels < 0) & (labels != -100)).any()):  # CUDA would end the process instead
            raise ValueError(f"labels reach from {labels.min()} to {labels.max()}, but num_labels is {classes}")
        loss = F.cross_entropy(logits, labels, reduction="mean" if items is None else "sum")
    elif problem_type in ("multi_label_classification", "regression"):
        if labels.numel() != logits.numel():
            raise ValueError(f"labels of shape {tuple(labels.shape)} do not fit logits of {tuple(logits.shape)}")
        function = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
        labels = labels.to(logits.dtype).view_as(logits)
        loss = function(logits, labels, reduction="mean" if items is None else "sum")
    else:
        raise ValueError(
            f"problem_type {problem_type!r} is not one of regression, single_label_classification, "
            "multi_label_classification"
        )
    return (loss if items is None else loss / items), problem_type


class _MaskPooled:
    """Mixed in before a transformers class built on ``GenericForSequenceClassification``."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        given = input_ids if inputs_embeds is None else inputs_embeds
        pad = self.config.get_text_config().pad_token_id
        use_cache = past_key_values is not None if use_cache is None else use_cache
        where = last_tokens(attention_mask, position_ids, given, pad)
        out = getattr(self, self.base_model_prefix)(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        logits = self.score(out.last_hidden_state[where])  # the head sees one token a text, not all of them
        loss = None
        if labels is not None:
            kind = self.config.problem_type
            loss, self.config.problem_type = classification_loss(logits, labels, kind, num_items_in_batch)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states,
            attentions=out.attentions,
        )  # fmt: skip


class FloatLinear(nn.Linear):
    """A head that computes in its own precision, whatever autocast is on and whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


@functools.cache
def _pooled_class(cls: type) -> type:
    # The same name: save_pretrained writes it into config.json as the architecture.
    return type(cls.__name__, (_MaskPooled, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _arguments(name: Any, kwargs: dict[str, Any], quantize: bool, attention: str) -> dict[str, Any]:
    """The call's own arguments, completed: NF4 with the head left out of it, attention, dtype."""
    kwargs = dict(kwargs)
    hub = {key: kwargs[key] for key in OF_THE_HUB if key in kwargs}
    config = kwargs.get("config")
    stored = getattr(config, "quantization_config", None)
    if not isinstance(config, PreTrainedConfig):
        with contextlib.suppress(OSError):  # a folder that holds an adapter only
            stored = PreTrainedConfig.get_config_dict(name, **hub)[0].get("quantization_config")
    asked = kwargs.pop("torch_dtype", None)
    dtype = kwargs.setdefault("dtype", default_dtype() if asked is None else asked)
    if stored is not None:
        # The checkpoint's list of what stays float was made for a language model: without this the new head is taken
        # for a 4-bit layer whose weights are missing.
        if not isinstance(config, PreTrainedConfig):
            held = {key: kwargs.pop(key) for key in OF_THE_MODEL if key in kwargs}
            config, rest = AutoConfig.from_pretrained(name, return_unused_kwargs=True, **kwargs)
            kwargs = hub | rest | held
        config = copy.deepcopy(config)
        stored = config.quantization_config
        config.quantization_config = dict(stored if isinstance(stored, dict) else stored.to_dict())
        skipped = config.quantization_config.get("llm_int8_skip_modules") or []
        config.quantization_config["llm_int8_skip_modules"] = sorted({*skipped, *HEADS})
        kwargs["config"] = config
    elif kwargs.get("quantization_config") is not None or quantize:
        compute = dtype if isinstance(dtype, torch.dtype) else default_dtype()
        given = kwargs.get("quantization_config") or nf4_config(compute)
        if isinstance(given, BitsAndBytesConfig):
            given = copy.deepcopy(given)
            given.llm_int8_skip_modules = sorted({*(given.llm_int8_skip_modules or []), *HEADS})
        kwargs["quantization_config"] = given
    kwargs.setdefault("attn_implementation", attention)
    return kwargs


def _accelerate(model: PreTrainedModel, stack: contextlib.ExitStack, nf4: str, compile: bool | None) -> None:
    if isinstance(model, GenericForSequenceClassification):
        stack.callback(setattr, model, "__class__", type(model))
        model.__class__ = _pooled_class(type(model))
    stack.callback(_plain_heads, model)
    for name in HEADS:
        for module in getattr(model, name).modules() if hasattr(model, name) else ():
            if type(module) is nn.Linear:
                module.float().__class__ = FloatLinear
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    on_gpu = model.device.type == "cuda"
    for layer in layers:  # else bitsandbytes repacks it on a CPU at the first evaluation, and gradients are wrong then
        layer.support_avx512bf16_for_cpu = False
    if layers and (nf4 == "triton" or (nf4 == "auto" and on_gpu)):
        from .nf4_linear import triton_nf4

        stack.enter_context(triton_nf4(model))
    if on_gpu and not INTERPRETED if compile is None else compile:
        backbone = getattr(model, model.base_model_prefix)

        def compile_now(module: nn.Module, *_: Any) -> None:
            """At the first training step, when adapters are in and what is frozen is frozen."""
            if module.training and torch.is_grad_enabled():
                from .compiling import compile_model

                hook.remove()
                stack.enter_context(compile_model(model))

        hook = backbone.register_forward_pre_hook(compile_now)
        stack.callback(hook.remove)


def _plain_heads(model: nn.Module) -> None:
    for module in model.modules():  # PEFT has copied the head meanwhile
        if type(module) is FloatLinear:
            module.__class__ = nn.Linear


def _restore(target: Any, name: str, previous: Any) -> None:
    if previous is None:
        delattr(target, name)
    else:
        setattr(target, name, previous)
