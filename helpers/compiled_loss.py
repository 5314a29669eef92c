"""The loss of a compiled model: final norm, head and loss of a chunk of rows as one region, over batches that recur.

`compile_loss` makes a model called with labels return that loss and no logits, and has whole steps replayed
(helpers/step_graphs.py) where that is wanted and can be.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import masking_utils
from transformers.modeling_outputs import CausalLMOutput

from .attention_mask import document_starts
from .attention_transformers import packed_as, packed_backend
from .gathered import gathered
from .host_checked import padded_on_the_right
from .host_store import HostStore
from .linear_chunk import autocast_now
from .linear_loss import IGNORED, MemoryEfficientLinear, linear_forward
from .linear_plan import Form, Output, Plan
from .replaced import called_as, replaced_forward
from .sharded_steps import agreed, put_away, sharded_modules, streams_of
from .step_graphs import StepGraphs

LOGITS_BYTES = 64 * 1024**2  # of one chunk's logits; the loss needs about twice that
# Families whose forward is backbone, head, optional softcap: what the fused loss computes.
PLAIN_HEADS = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"}


@dataclass
class CompiledModel:
    """What :func:`compile_model` compiled: ``parts`` maps a region to "compiled" or to why it is not."""

    parts: dict[str, str] = field(default_factory=dict)
    active: bool = True
    pad_to: int = 1
    cuda_graphs: bool = False
    store: HostStore | None = None  # of layers' inputs
    most_rows: dict[bool, int] = field(default_factory=dict)  # so far, with gradients and without


@dataclass
class _Batch:
    """A batch as its step takes it. ``more``: ``position_ids`` or nothing, where it is recorded. ``documents``: those
    that the recording has room for, 0 where rows are not packed; None: it is not recorded."""

    ids: Tensor
    labels: Tensor
    items: Tensor | int
    more: dict[str, Any]
    documents: int | None


def compile_loss(
    stack: contextlib.ExitStack, base: nn.Module, decoder: nn.Module, compiled: CompiledModel, compile: Callable,
    root: nn.Module | None = None,
) -> str:  # fmt: skip
    """Make ``base(..., labels=...)`` the fused loss over the hidden states before the final norm.

    Args:
        root: ``base`` or what is around it, which FSDP2 is going to shard; None: nobody is.
    """
    head, norm, config = base.get_output_embeddings(), getattr(decoder, "norm", None), base.config
    if config.model_type not in PLAIN_HEADS or type(head) is not nn.Linear or norm is None:
        return f"not compiled: the head of {config.model_type} is not a plain one"
    if any(parameter.requires_grad for module in (head, norm) for parameter in module.parameters()):
        return "not compiled: norm or head is trained"
    softcap = getattr(config, "final_logit_softcapping", None)

    def summed_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        logits = F.linear(norm.forward(hidden), weight, bias).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    region = compile(summed_loss)

    def region_of(hidden: Tensor, linear: nn.Linear, labels: Tensor) -> Tensor:
        return region(hidden, linear.weight, linear.bias, labels)

    deferred = False  # the norm's own call returns its input: the region above applies it

    def call_norm(cls: type, module: nn.Module, hidden: Tensor) -> Tensor:
        return hidden if deferred else cls.__call__(module, hidden)

    stack.enter_context(called_as([norm], call_norm))
    forward = base.forward

    def loss_of(ids: Tensor, labels: Tensor, items: Tensor | int, documents: int = 0, **kwargs: Any) -> Tensor:
        nonlocal deferred
        deferred = True
        try:
            with contextlib.ExitStack() as masks:
                if documents or not kwargs:
                    masks.enter_context(_not_packed())
                if documents:
                    masks.enter_context(packed_as(kwargs["position_ids"], documents))
                hidden = decoder(input_ids=ids, use_cache=False, **kwargs).last_hidden_state
        finally:
            deferred = False
        if compiled.store is not None:
            compiled.store.settle()
        with gathered(head, hidden.device):  # not for backward too: the gradient is made together with the loss
            return _summed_in_chunks(region_of, head, hidden, labels, items)

    def recorded_loss(inputs: tuple[Tensor, ...], items: Tensor, documents: int, checkpointed: bool) -> Tensor:
        ids, labels, *positions = inputs
        more = {"position_ids": positions[0]} if documents else {}
        if compiled.store is not None and ids.is_cuda:
            size = ids.numel() * decoder.config.hidden_size * decoder.dtype.itemsize
            compiled.store.reserve(len(decoder.layers), size)
        if root is not None:  # FSDP2's hooks are part of its step
            return call_root(input_ids=ids, labels=labels, num_items_in_batch=items, room_for=documents, **more).loss
        return loss_of(ids, labels, items, documents, **more)

    def is_ours(input_ids: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any) -> bool:
        more = any(kwargs.get(name) for name in ("fused_lm_head", "output_hidden_states", "output_attentions"))
        return compiled.active and labels is not None and input_ids is not None and not more

    def trains(input_ids: Tensor, **kwargs: Any) -> bool:
        return base.training and torch.is_grad_enabled() and _on_a_gpu(input_ids)

    def batch_of(
        agree: bool, input_ids: Tensor, labels: Tensor, documents: int | None = None, num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> _Batch:  # fmt: skip
        items, known = num_items_in_batch, compiled.cuda_graphs or documents is not None
        more = _given(kwargs)
        mask = more.get("attention_mask")
        if mask is not None and mask.ndim == 2 and padded_on_the_right(mask):  # waits, unless `HostChecked` has looked
            del more["attention_mask"]
        room = _most_documents(decoder, more, documents) if trains(input_ids) and known else None
        rows, length = _size_for_one_graph(compiled, input_ids, more)
        if agree:
            length, room = agreed(rows, length, room) or (length, None)
        ids, labels = _padded(input_ids, labels, more, rows, length)
        if items is None:
            items = (labels[:, 1:] != IGNORED).sum().clamp(min=1)
        elif torch.is_tensor(items):
            items = items.to(ids.device)
        return _Batch(ids, labels, items, more, room)

    @functools.cache
    def graphs() -> StepGraphs:
        few = min(2, decoder.config.num_hidden_layers)  # two, where layers are of two kinds
        made = StepGraphs(
            recorded_loss, lambda: mock.patch.object(decoder.config, "num_hidden_layers", few),
            [parameter for parameter in base.parameters() if parameter.requires_grad],
            tuple if root is None else functools.partial(streams_of, root),
        )  # fmt: skip
        stack.callback(made.clear)
        return made

    def replayed(batch: _Batch) -> CausalLMOutput:
        inputs = batch.ids, batch.labels, *batch.more.values()
        checkpointed = decoder.layers[0].gradient_checkpointing
        return CausalLMOutput(loss=graphs()(inputs, batch.items, batch.documents, checkpointed))

    @functools.wraps(forward)
    def compiled_forward(
        input_ids: Tensor | None = None, labels: Tensor | None = None, documents: int | None = None,
        room_for: int | None = None, **kwargs: Any,
    ):  # fmt: skip
        if not is_ours(input_ids, labels, **kwargs):
            if labels is not None:
                kwargs["labels"] = labels
            return forward(input_ids=input_ids, **kwargs)
        if room_for is not None:  # of a step that is being recorded, whose batch is as it shall be
            items = kwargs.pop("num_items_in_batch")
            return CausalLMOutput(loss=loss_of(input_ids, labels, items, room_for, **_given(kwargs)))
        batch = batch_of(False, input_ids, labels, documents, **kwargs)
        if batch.documents is not None and compiled.cuda_graphs and root is None:
            return replayed(batch)
        loss = loss_of(batch.ids, batch.labels, batch.items, batch.documents or 0, **batch.more)
        return CausalLMOutput(loss=loss)

    stack.enter_context(replaced_forward(base, compiled_forward))  # inactive, it passes on
    if root is not None and compiled.cuda_graphs:
        call_root = functools.partial(type(root).__call__, root)
        sharded = functools.cache(functools.partial(sharded_modules, root))  # once it is, and not at every replay

        def call(cls: type, module: nn.Module, *args: Any, **kwargs: Any):
            if not args and is_ours(**kwargs) and trains(**kwargs):
                batch = batch_of(True, **kwargs)
                if batch.documents is not None:
                    put_away(sharded())
                    return replayed(batch)
            return cls.__call__(module, *args, **kwargs)

        stack.enter_context(called_as([root], call))
    return "compiled"


def _given(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if v is not None and k not in ("use_cache", "return_dict")}


def _on_a_gpu(ids: Tensor) -> bool:
    return ids.is_cuda


def _most_documents(decoder: nn.Module, kwargs: dict[str, Any], documents: int | None) -> int | None:
    """How many documents a step like this batch's has room for; 0: no packed rows; None: it cannot be recorded.

    ``documents``: those of the batch where they are counted already (`HostChecked`), before padding.
    """
    if not kwargs:
        return 0
    positions = kwargs.get("position_ids")
    if kwargs.keys() != {"position_ids"} or positions.ndim != 2:
        return None
    if packed_backend(decoder.config, positions.device, decoder.dtype) != "flash":
        return None  # its mask cannot be made without waiting for the GPU
    documents = int(document_starts(positions).sum()) if documents is None else documents
    documents += len(positions)  # of padding
    return max(16, 1 << (documents - 1).bit_length())  # few kinds of recording


def _summed_in_chunks(region: Callable, head: nn.Linear, hidden: Tensor, labels: Tensor, items: Tensor | int) -> Tensor:
    """``region`` over all rows, divided by ``items``: `linear_forward` without its checks, which wait for the GPU."""
    hidden = hidden.reshape(-1, hidden.shape[-1])
    labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].reshape(-1)
    rows = chunk_rows(len(hidden), head.out_features * hidden.itemsize)
    if not (hidden.requires_grad and torch.is_grad_enabled()):
        return linear_forward(
            hidden, head, labels, forward_function=_in_the_graph_of_training(region), chunk_size=rows,
            denominator=items, compile=False,
        )  # fmt: skip
    plan = Plan(
        region, head, trained=[], frozen=[], sum_dtype=None, autocast=autocast_now(hidden.device), count=len(hidden),
        kept=None, form=Form((Output(False, torch.Size(), torch.float32, True),)), total=True, denominator=items,
        rows=rows,
    )  # fmt: skip
    return MemoryEfficientLinear.apply(plan, hidden, 1, labels)[0]


def _in_the_graph_of_training(region: Callable) -> Callable:
    """``region`` for evaluation: without gradients it would be compiled once more."""

    def evaluated(hidden: Tensor, linear: nn.Linear, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            return region(hidden.detach().requires_grad_(), linear, labels).detach()

    return evaluated


@contextlib.contextmanager
def _not_packed() -> Iterator[None]:
    """Within, transformers does not look for packed rows where no positions are given: it would wait for the GPU. Nor
    does it take a CUDA graph's recording for a reason to write out the mask of causal attention."""
    with (
        mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None),
        mock.patch.object(masking_utils, "is_tracing", lambda tensor=None: False),
    ):
        yield


def _size_for_one_graph(compiled: CompiledModel, ids: Tensor, more: dict[str, Any]) -> tuple[int, int]:
    """Rows and length to pad a batch to: a length that recurs, and at least two rows if it ever had."""
    rows, length = ids.shape
    positions = more.get("position_ids")
    if more.keys() - {"position_ids"}:
        return rows, length
    if positions is None or positions.ndim == 2:
        length = max(length, 2)
        length += -length % compiled.pad_to
    mode = torch.is_grad_enabled()
    compiled.most_rows[mode] = most = max(compiled.most_rows.get(mode, 0), rows)
    return 2 if positions is None and rows == 1 < most else rows, length


def _padded(ids: Tensor, labels: Tensor, more: dict[str, Any], rows: int, length: int) -> tuple[Tensor, Tensor]:
    """``ids`` and ``labels`` [rows, length]; ``position_ids``, in ``more``, likewise."""
    positions, added = more.get("position_ids"), length - ids.shape[1]
    if added:
        ids, labels = F.pad(ids, (0, added)), F.pad(labels, (0, added), value=IGNORED)
        if positions is not None:  # packed: what is added is a document of its own
            last = torch.arange(added, device=positions.device).expand(len(positions), -1)
            more["position_ids"] = torch.cat([positions, last], 1)
    if rows > len(ids):
        ids, labels = F.pad(ids, (0, 0, 0, 1)), F.pad(labels, (0, 0, 0, 1), value=IGNORED)
    return ids, labels


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Rows of a chunk of at most `LOGITS_BYTES` of logits, so that all are nearly equal and none has a single row."""
    chunks = -(-rows * row_bytes // LOGITS_BYTES)
    return max(2, -(-rows // chunks))
