"""torch.compile for a QLoRA model, in place and undone on exit: no graph break, and one graph for every length.

Three regions: the rotary frequencies, the decoder layer (attention, MLP, norms, LoRA and the decoding of NF4, a graph
for all layers), and the final norm with the head and the loss. The embedding is a lookup: nothing in it to compile.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.checkpoint import CheckpointPolicy, checkpoint
from transformers import masking_utils
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput

from .attention import one_graph, without_cudnn
from .attention_mask import document_starts
from .attention_transformers import packed_as, packed_backend
from .host_checked import padded_on_the_right
from .host_store import HostStore
from .layer_checkpoint import attention_half, can_be_halved, checkpointed, feed_forward_half, generates
from .linear_chunk import autocast_now
from .linear_loss import IGNORED, MemoryEfficientLinear, linear_forward
from .linear_plan import Form, Output, Plan
from .loss_functions import replaced_forward
from .rotary import fused_rotary
from .step_graphs import StepGraphs

PAD_TO = 128  # tokens
LOGITS_BYTES = 64 * 1024**2  # of one chunk's logits; the loss needs about twice that
# Families whose forward is backbone, head, optional softcap: what the fused loss computes.
PLAIN_HEADS = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"}
# transformers 5.17 checkpoints in the layer's __call__, later releases in its forward.
CHECKPOINTS_IN_CALL = "__call__" in vars(GradientCheckpointingLayer)


@dataclass
class CompiledModel:
    """What :func:`compile_model` compiled: ``parts`` maps a region to "compiled" or to why it is not."""

    parts: dict[str, str] = field(default_factory=dict)
    active: bool = True
    pad_to: int = 1
    cuda_graphs: bool = False
    store: HostStore | None = None  # of layers' inputs
    most_rows: dict[bool, int] = field(default_factory=dict)  # so far, with gradients and without


@contextlib.contextmanager
def compile_model(
    model: nn.Module,
    *,
    backend: str | Callable = "inductor",
    max_autotune: bool = False,
    save_less: bool = True,
    pad_to: int = PAD_TO,
    cuda_graphs: bool = False,
    offload: bool | None = False,
    sharded: bool = False,
) -> Iterator[CompiledModel]:
    """Within the context the model's regions run compiled, in training and in evaluation with labels.

    Generation (a forward with a cache) stays eager. Gradient checkpointing may be switched on or off at any time; of
    the families that helpers/layer_checkpoint.py knows it is done there, over the two halves of a layer as graphs of
    their own; of others inside the layer's graph, whose backward pass then recomputes all of it. Right padding is
    invisible to causal attention, so its mask is dropped, and a batch of one token or row is padded to two: PyTorch
    compiles sizes 0 and 1 apart. With ``labels`` the model returns a loss and no logits.

    Args:
        model: a causal language model of transformers, plain or within PEFT, on its device, in any precision.
        backend: of torch.compile.
        max_autotune: let Inductor time Triton's matrix products against cuBLAS, on small GPUs too.
        save_less: recompute what is cheap (norms, activations, casts) rather than keep it for the backward pass.
        pad_to: lengths are padded on the right to multiples of it. For each size they have not met cuBLAS looks for its
            kernels anew, in milliseconds, and cuDNN plans its attention, in tens; multiples recur. 1: no cuDNN.
        cuda_graphs: record a training step of each length once and replay it, where the batch needs no mask or is of
            packed rows that flash attention takes.
        offload: with checkpointing, what a layer got waits in host memory until its backward pass. None: on a GPU,
            where the layers are known.
        sharded: FSDP2 will shard the model: its layers are compiled by helpers/fsdp2.py, since FSDP2's hooks must run
            around them.

    Raises:
        ValueError: the model has no decoder layers that this could compile, or none whose inputs it could offload.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(isinstance(x, GradientCheckpointingLayer) for x in layers):
        raise ValueError(
            f"{type(base).__name__} has no list of decoder layers that torch.compile could take one by one: "
            "train it without compile"
        )
    halved = can_be_halved(layers[0])
    if offload is None:
        offload = halved and not sharded and next(base.parameters()).is_cuda
    if offload and (sharded or not halved):
        why = "layers that FSDP2 shards" if sharded else type(layers[0]).__name__
        raise ValueError(f"offload is not there for {why}: leave it out")
    options = {"max_autotune": True, "max_autotune_gemm_backends": "ATEN,TRITON"} if max_autotune else None
    compile = functools.partial(torch.compile, dynamic=True, fullgraph=True, backend=backend, options=options)
    compiled = CompiledModel(pad_to=pad_to, cuda_graphs=cuda_graphs and not sharded)
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_graph())
        if pad_to == 1:
            stack.enter_context(without_cudnn())
        if torch.cuda.is_available():  # FSDP2's blocks and the halves of layers are traced within too
            stack.enter_context(fused_rotary(base))
        # Fused kernels round where eager's do, so that the loss is eager's.
        stack.enter_context(torch._inductor.config.patch(emulate_precision_casts=True))
        stack.enter_context(torch._inductor.config.patch(joint_custom_pre_pass=RecomputeAll()))
        if save_less:
            stack.enter_context(torch._functorch.config.patch(aggressive_recomputation=True))
        if max_autotune:
            stack.enter_context(triton_matmul_on_small_gpus())
        compiled.parts["layers"] = "compiled"
        if not sharded:
            regions = compile(_layer), compile(attention_half), compile(feed_forward_half)
            if offload:
                compiled.store = HostStore()
                compiled.parts["layer inputs"] = "in host memory"
            stack.enter_context(_called_as(layers, functools.partial(_call_layer, regions, halved, compiled.store)))
        compiled.parts["rotary"] = _compile_rotary(stack, decoder, compile)
        compiled.parts["norm and loss"] = _compile_loss(stack, base, decoder, compiled, compile)
        if compiled.cuda_graphs:
            done = compiled.parts["norm and loss"] == "compiled"  # the loss's region is what records
            compiled.parts["steps"] = "CUDA graphs" if done else "not recorded: the loss is not compiled"
        try:
            yield compiled
        finally:
            compiled.active = False


class RecomputeAll(CustomGraphPass):
    """Marks all that a checkpoint's forward pass does as to be done again.

    Up to torch 2.11 at least, what an autograd.Function does inside a checkpoint carries no mark: the outputs of every
    4-bit layer, nearly all of the activations, would be kept.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        marked = [node.meta for node in graph.nodes if "recompute" in node.meta]
        for node in graph.nodes if marked else ():
            forward = node.meta.get("partitioner_tag") not in ("is_backward", "must_be_in_backward")
            if node.op == "call_function" and forward and "recompute" not in node.meta:
                node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
                node.meta["ac_graph_id"] = marked[0].get("ac_graph_id", 0)

    def uuid(self) -> str:
        return "qlora: recompute all, 1"


@contextlib.contextmanager
def triton_matmul_on_small_gpus() -> Iterator[None]:
    """Within, max_autotune times Triton's matrix products on GPUs of fewer than 68 multiprocessors too (a T4 has 40).

    Inductor drops the templates there without trying them (pytorch#141690).
    """
    from torch._inductor import utils

    with mock.patch.object(utils, "is_big_gpu", lambda *args, **kwargs: True):
        yield


@contextlib.contextmanager
def _called_as(modules: Iterable[nn.Module], call: Callable) -> Iterator[None]:
    """Within, ``module(...)`` is ``call(its class, module, ...)``. A call is looked up on the class: that is changed.

    Replacing forward instead would hide from some releases of transformers that the layer can be checkpointed.
    """
    before = [(module, type(module)) for module in modules]

    def compiled_class(cls: type) -> type:
        def __call__(self, *args, **kwargs):
            return call(cls, self, *args, **kwargs)

        return type(f"Compiled{cls.__name__}", (cls,), {"__call__": __call__, "__module__": cls.__module__})

    classes = {cls: compiled_class(cls) for cls in {cls for _, cls in before}}  # one each: its identity is guarded
    for module, cls in before:
        module.__class__ = classes[cls]
    try:
        yield
    finally:
        for module, cls in before:
            module.__class__ = cls


def _layer(layer: nn.Module, marked: bool, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The region of a decoder layer.

    A checkpoint around the compiled call would run two Python hooks for each of the fifty-odd tensors it saves, packed
    weights and their statistics included, in forward and again in backward. In the graph it is a mark for the compiler.
    """
    if marked:
        return checkpoint(functools.partial(nn.Module.__call__, layer, **kwargs), *args, use_reentrant=False)
    return nn.Module.__call__(layer, *args, **kwargs)


def _call_layer(
    regions: tuple[Callable, ...], halved: bool, store: HostStore | None, cls: type, layer: nn.Module, *args, **kwargs
) -> Tensor:
    if generates(kwargs):
        return cls.__call__(layer, *args, **kwargs)
    region, first, second = regions
    hidden, *more = args
    learning = layer.training and torch.is_grad_enabled()
    if hidden.requires_grad is not torch.is_grad_enabled():  # the first layer's, which would be a graph of its own
        hidden = hidden.detach().requires_grad_(learning)
    checkpointing = layer.gradient_checkpointing and learning
    if checkpointing and halved and not more:
        return checkpointed(
            layer, hidden, kwargs, first=first, second=second, store=store,
            whole=lambda hidden: region(layer, False, (hidden,), kwargs),
        )  # fmt: skip
    return region(layer, checkpointing and CHECKPOINTS_IN_CALL, (hidden, *more), kwargs)


def _compile_rotary(stack: contextlib.ExitStack, decoder: nn.Module, compile: Callable) -> str:
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        return "not compiled: the model has none"
    kind = getattr(rotary, "rope_type", "default")
    if not isinstance(kind, str) or kind in ("dynamic", "longrope"):
        return f"not compiled: frequencies of type {kind} depend on the batch's values"
    forward = type(rotary).forward

    def frequencies(module: nn.Module, x: Tensor, position_ids: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return forward(module, x, position_ids, *args, **kwargs)

    region = compile(frequencies)

    def call(cls: type, module: nn.Module, x: Tensor, position_ids: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        with torch.no_grad():  # only x's device and dtype matter
            return region(module, x.detach()[:1, :1], position_ids, *args, **kwargs)

    stack.enter_context(_called_as([rotary], call))
    return "compiled"


def _compile_loss(
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

    stack.enter_context(_called_as([norm], call_norm))
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
    rows = _chunk_rows(len(hidden), head.out_features * hidden.itemsize)
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


def _chunk_rows(rows: int, row_bytes: int) -> int:
    """Rows of a chunk of at most `LOGITS_BYTES` of logits, so that all are nearly equal and none has a single row."""
    chunks = -(-rows * row_bytes // LOGITS_BYTES)
    return max(2, -(-rows // chunks))
