"""torch.compile for a QLoRA model, in place and undone on exit: no graph break, and one graph for every length.

Three regions: the rotary frequencies, the decoder layer (attention, MLP, norms, LoRA and the decoding of NF4, a graph
for all layers), and the final norm with the head and the loss. The embedding is a lookup: nothing in it to compile.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import CheckpointPolicy, checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import one_graph, without_cudnn
from .compiled_loss import CompiledModel, compile_loss
from .host_store import HostStore
from .joined_lora import JoinLoRA
from .layer_checkpoint import attention_half, can_be_halved, checkpointed, feed_forward_half, generates
from .replaced import called_as
from .rotary import fused_rotary
from .summed_products import SumProducts, adds_products

PAD_TO = 128  # tokens
ATTENTION = re.compile("attention|attn")  # in the names of all operations that compute it
# transformers 5.17 checkpoints in the layer's __call__, later releases in its forward.
CHECKPOINTS_IN_CALL = "__call__" in vars(GradientCheckpointingLayer)


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
            around them. Replayed, all its ranks' batches are padded to the longest.

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
        offload = halved and next(base.parameters()).is_cuda
    if offload and not halved:
        raise ValueError(f"offload is not there for {type(layers[0]).__name__}: leave it out")
    options = {"max_autotune": True, "max_autotune_gemm_backends": "ATEN,TRITON"} if max_autotune else None
    compile = functools.partial(torch.compile, dynamic=True, fullgraph=True, backend=backend, options=options)
    compiled = CompiledModel(pad_to=pad_to, cuda_graphs=cuda_graphs)
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_graph())
        if pad_to == 1:
            stack.enter_context(without_cudnn())
        if torch.cuda.is_available():  # FSDP2's blocks and the halves of layers are traced within too
            stack.enter_context(fused_rotary(base))
        stack.enter_context(torch._inductor.config.patch(
            emulate_precision_casts=True,  # fused kernels round where eager's do, so that the loss is eager's
            joint_custom_pre_pass=Recomputed(), pre_grad_custom_pass=JoinLoRA(),
            post_grad_custom_post_pass=None if max_autotune else SumProducts(),  # a Triton product adds by itself
        ))  # fmt: skip
        if save_less:
            stack.enter_context(torch._functorch.config.patch(aggressive_recomputation=True))
        if max_autotune:
            stack.enter_context(triton_matmul_on_small_gpus())
        compiled.parts["layers"] = "compiled"
        if offload:
            compiled.store = HostStore()
            compiled.parts["layer inputs"] = "in host memory"
        if not sharded:
            call = compiled_layer(compile, nn.Module.__call__, halved, compiled.store, CHECKPOINTS_IN_CALL)
            stack.enter_context(called_as(layers, functools.partial(_call_layer, call)))
        compiled.parts["rotary"] = _compile_rotary(stack, decoder, compile)
        compiled.parts["norm and loss"] = compile_loss(
            stack, base, decoder, compiled, compile, model if sharded else None
        )
        if compiled.cuda_graphs:
            done = compiled.parts["norm and loss"] == "compiled"  # the loss's region is what records
            compiled.parts["steps"] = "CUDA graphs" if done else "not recorded: the loss is not compiled"
        try:
            yield compiled
        finally:
            compiled.active = False


class Recomputed(CustomGraphPass):
    """Says what a backward pass does again: within a checkpoint all that the forward pass did, elsewhere no attention.

    Up to torch 2.11 at least, what an autograd.Function does inside a checkpoint carries no mark: the outputs of every
    4-bit layer, nearly all of the activations, would be kept. And the partitioner's list of what is too dear to be done
    again has neither cuDNN's attention nor that of packed rows. A sum of products is kept rather than the products.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        marked = [node.meta for node in graph.nodes if "recompute" in node.meta]
        for node in graph.nodes:
            forward = node.meta.get("partitioner_tag") not in ("is_backward", "must_be_in_backward")
            if node.op != "call_function" or not forward:
                continue
            if marked and "recompute" not in node.meta:
                node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
                node.meta["ac_graph_id"] = marked[0].get("ac_graph_id", 0)
            elif not marked and (ATTENTION.search(str(node.target)) or adds_products(node)):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> str:
        return "qlora: recomputed, 2"


@contextlib.contextmanager
def triton_matmul_on_small_gpus() -> Iterator[None]:
    """Within, max_autotune times Triton's matrix products on GPUs of fewer than 68 multiprocessors too (a T4 has 40).

    Inductor drops the templates there without trying them (pytorch#141690).
    """
    from torch._inductor import utils

    with mock.patch.object(utils, "is_big_gpu", lambda *args, **kwargs: True):
        yield


def compiled_layer(
    compile: Callable, run: Callable, halved: bool, store: HostStore | None, marks: bool = True
) -> Callable[..., Tensor]:
    """``call(layer, checkpointing, hidden, *more, **kwargs)`` is ``run(layer, hidden, *more, **kwargs)``, in regions.

    A checkpoint around a compiled call would run two Python hooks for each of the fifty-odd tensors it saves, packed
    weights and their statistics included, in forward and again in backward. So a checkpointed layer is done again by
    halves; in its graph, where a checkpoint is a mark for the compiler, if it is of a kind that has none.

    Args:
        run: a decoder layer as it is uncompiled.
        halved: layers can be done by halves (helpers/layer_checkpoint.py).
        store: where the inputs of such layers wait for the backward pass; None: on the device.
        marks: a layer without halves is to be checkpointed; False: ``run`` does so by itself.
    """

    def whole_layer(layer: nn.Module, marked: bool, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        if marked:
            return checkpoint(functools.partial(run, layer, **kwargs), *args, use_reentrant=False)
        return run(layer, *args, **kwargs)

    region, first, second = compile(whole_layer), compile(attention_half), compile(feed_forward_half)

    def call(layer: nn.Module, checkpointing: bool, hidden: Tensor, *more: Any, **kwargs: Any) -> Tensor:
        if generates(kwargs):
            return run(layer, hidden, *more, **kwargs)
        checkpointing = checkpointing and layer.training and torch.is_grad_enabled()
        if checkpointing and halved and not more:
            return checkpointed(
                layer, hidden, kwargs, first=first, second=second, store=store,
                whole=lambda hidden: region(layer, False, (hidden,), kwargs),
            )  # fmt: skip
        return region(layer, checkpointing and marks, (hidden, *more), kwargs)

    return call


def _call_layer(call: Callable, cls: type, layer: nn.Module, hidden: Tensor, *more: Any, **kwargs: Any) -> Tensor:
    if generates(kwargs):
        return cls.__call__(layer, hidden, *more, **kwargs)
    if hidden.requires_grad is not torch.is_grad_enabled():  # the first layer's, which would be a graph of its own
        hidden = hidden.detach().requires_grad_(layer.training and torch.is_grad_enabled())
    return call(layer, layer.gradient_checkpointing, hidden, *more, **kwargs)


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

    stack.enter_context(called_as([rotary], call))
    return "compiled"
