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
from torch.distributed.tensor import DTensor, Replicate
from transformers import masking_utils
from transformers.modeling_outputs import CausalLMOutput

from .attention_mask import document_starts
from .attention_transformers import packed_as, packed_backend
from .host_checked import padded_on_the_right
from .host_store import HostStore
from .linear_chunk import autocast_now
from .linear_loss import IGNORED, MemoryEfficientLinear, linear_forward
from .linear_plan import Form, Output, Plan
from .replaced import called_as, replaced_forward
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


def compile_loss(
    stack: contextlib.ExitStack, base: nn.Module, decoder: nn.Module, compiled: CompiledModel, compile: Callable
) -> str:
    """Make ``base(..., labels=...)`` the fused loss over the hidden states before the final norm."""
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
        with _gathered(head, hidden.device):
            return _summed_in_chunks(region_of, head, hidden, labels, items)

    def recorded_loss(inputs: tuple[Tensor, ...], items: Tensor, documents: int, checkpointed: bool) -> Tensor:
        ids, labels, *positions = inputs
        if compiled.store is not None:
            size = ids.numel() * decoder.config.hidden_size * decoder.dtype.itemsize
            compiled.store.reserve(len(decoder.layers), size)
        return loss_of(ids, labels, items, documents, **({"position_ids": positions[0]} if documents else {}))

    graphs: StepGraphs | None = None

    @functools.wraps(forward)
    def compiled_forward(
        input_ids: Tensor | None = None, labels: Tensor | None = None, documents: int | None = None, **kwargs
    ):
        nonlocal graphs
        more = any(kwargs.get(name) for name in ("fused_lm_head", "output_hidden_states", "output_attentions"))
        if not compiled.active or labels is None or input_ids is None or more:
            if labels is not None:
                kwargs["labels"] = labels
            return forward(input_ids=input_ids, **kwargs)
        items = kwargs.pop("num_items_in_batch", None)
        kwargs = {k: v for k, v in kwargs.items() if v is not None and k not in ("use_cache", "return_dict")}
        input_ids, labels = _batch_for_one_graph(compiled, input_ids, labels, kwargs)
        if items is None:
            items = (labels[:, 1:] != IGNORED).sum().clamp(min=1)
        elif torch.is_tensor(items):
            items = items.to(input_ids.device)
        trained = base.training and torch.is_grad_enabled() and _on_a_gpu(input_ids)
        known = compiled.cuda_graphs or documents is not None
        most = _most_documents(decoder, kwargs, documents) if trained and known else None
        if most is None or not compiled.cuda_graphs:
            return CausalLMOutput(loss=loss_of(input_ids, labels, items, most or 0, **kwargs))
        if graphs is None:
            few = min(2, decoder.config.num_hidden_layers)  # two, where layers are of two kinds
            graphs = StepGraphs(
                recorded_loss, lambda: mock.patch.object(decoder.config, "num_hidden_layers", few),
                [parameter for parameter in base.parameters() if parameter.requires_grad],
            )  # fmt: skip
        inputs = input_ids, labels, *kwargs.values()
        return CausalLMOutput(loss=graphs(inputs, items, most, decoder.layers[0].gradient_checkpointing))

    stack.enter_context(replaced_forward(base, compiled_forward))  # inactive, it passes on
    return "compiled"


def _on_a_gpu(ids: Tensor) -> bool:
    return ids.is_cuda


def _most_documents(decoder: nn.Module, kwargs: dict[str, Any], documents: int | None) -> int | None:
    """How many documents a step like this batch's has room for; 0: no packed rows; None: it cannot be recorded.

    ``documents``: those of the batch where they are counted already (`HostChecked`), before padding, a row's last.
    """
    if not kwargs:
        return 0
    positions = kwargs.get("position_ids")
    if kwargs.keys() != {"position_ids"} or positions.ndim != 2:
        return None
    if packed_backend(decoder.config, positions.device, decoder.dtype) != "flash":
        return None  # its mask cannot be made without waiting for the GPU
    documents = int(document_starts(positions).sum()) if documents is None else documents + len(positions)
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


def gather_head(head: nn.Module, device: torch.device) -> None:
    """Begin to gather the weight of a head that FSDP2 shards; whoever reads it in `_gathered` waits for it."""
    head._gathering = {
        name: p.to(device).redistribute(placements=[Replicate()], async_op=True)
        for name, p in head.named_parameters(recurse=False)
        if isinstance(p, DTensor)
    }


@contextlib.contextmanager
def _gathered(head: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, the frozen weight of a head that FSDP2 shards is whole. Nobody calls the head, so no hook gathers it; nor
    does backward need it, since the loss's gradient is made together with the loss. FSDP2's own gathering would hold it
    twice for a moment, which is where a step needs the most memory."""
    if "_gathering" not in vars(head):
        gather_head(head, device)
    gathering = vars(head).pop("_gathering").items()
    whole = {name: nn.Parameter(p.full_tensor(), requires_grad=False) for name, p in gathering}
    sharded = {name: head._parameters[name] for name in whole}
    head._parameters.update(whole)
    try:
        yield
    finally:
        head._parameters.update(sharded)


def _batch_for_one_graph(
    compiled: CompiledModel, ids: Tensor, labels: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The same batch: a length that recurs, at least two rows if it ever had, and no mask it can do without."""
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and padded_on_the_right(mask):  # waits, unless `HostChecked` has looked
        del kwargs["attention_mask"]
    if kwargs.keys() - {"position_ids"}:
        return ids, labels
    positions = kwargs.get("position_ids")
    more = -ids.shape[1] % compiled.pad_to or int(ids.shape[1] == 1)
    if more and (positions is None or positions.ndim == 2):
        ids, labels = F.pad(ids, (0, more)), F.pad(labels, (0, more), value=IGNORED)
        if positions is not None:  # packed: what is added is a document of its own
            added = torch.arange(more, device=positions.device).expand(len(positions), -1)
            kwargs["position_ids"] = torch.cat([positions, added], 1)
    mode = torch.is_grad_enabled()
    compiled.most_rows[mode] = most = max(compiled.most_rows.get(mode, 0), ids.shape[0])
    if positions is None and ids.shape[0] == 1 < most:
        ids, labels = F.pad(ids, (0, 0, 0, 1)), F.pad(labels, (0, 0, 0, 1), value=IGNORED)
    return ids, labels


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Rows of a chunk of at most `LOGITS_BYTES` of logits, so that all are nearly equal and none has a single row."""
    chunks = -(-rows * row_bytes // LOGITS_BYTES)
    return max(2, -(-rows // chunks))
