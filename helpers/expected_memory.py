"""The GPU memory that a QLoRA run should take at its worst moment: arithmetic on shapes, from a meta-device copy.

The formulas are of Llama-like layers: RMSNorm in float32, and q, k, v, o, gate, up and down projections with LoRA. What
a layer keeps for the backward pass is counted as `torch.autograd.graph.saved_tensors_hooks` sees it; what lives while
backward is inside a layer is an estimate. Memory is what PyTorch's allocator gives out: fragmentation, CUDA's context
and NCCL are not in it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from . import checkpoints
from .attention import device_capability
from .compiled_loss import chunk_rows
from .compiling import PAD_TO
from .fsdp2 import FSDP2Config
from .layer_checkpoint import can_be_halved, parts
from .linear_loss import COMPILE_LOGITS
from .linear_plan import FROZEN_LOGITS, LEAST_ROWS

if TYPE_CHECKING:
    from .train_arguments import TrainArguments

STATE_BYTES = {"8bit": 2, "lion": 4, "sgd": 0, "adafactor": 0}  # of the optimizer, a trained number; Adam's two: 8
EAGER_LOSS, FUSED_LOSS = 12.0, 2.1  # bytes a logit at the peak: three float32 copies; one in half precision, in place
CUBLAS_BYTES = {False: 8 * 1024**2, True: 32 * 1024**2}  # of a thread's workspace; on Hopper
TRL_TOKENS, TRL_WORDS = 4096, 8192  # the tile of TRL's fused head
SAMPLED_ROWS = 4000  # whose lengths are looked at


@dataclass
class Shapes:
    """A decoder as the formulas need it: numbers of parameters, and widths in numbers a token."""

    quantised: int
    plain_bytes: int
    adapters: int
    layers: int
    hidden: int
    heads: int
    head_dim: int
    query: int
    key: int
    feed_forward: int
    vocabulary: int
    largest: int  # parameters of the largest quantised matrix
    lora: int  # adapted projections of a layer
    halved: bool  # compiled and checkpointed, backward does the feed-forward half in parts


@dataclass
class Memory:
    """Bytes expected; ``rows`` is the table, and ``total`` what is allocated at the worst moment of a step."""

    tokens: int
    weights: tuple[int, int, int]  # packed, absmax, unquantised
    trained: tuple[int, int, int]  # adapters, gradients, optimizer
    saved: int  # activations kept for the backward pass
    work: int  # of the layer that backward is in
    loss: int

    @property
    def total(self) -> int:
        """Bytes at the peak: the loss's chunk is gone before a layer's backward begins."""
        return sum(self.weights) + sum(self.trained) + self.saved + max(self.work, self.loss)

    def rows(self) -> list[tuple[str, int]]:
        """Name and bytes of each part, the sum last."""
        names = ("weights, packed NF4", "weights, absmax", "weights, unquantised")
        names += ("adapters", "gradients", "optimizer")
        named = list(zip(names, (*self.weights, *self.trained), strict=True))
        busier = "loss chunk" if self.loss >= self.work else "a layer's backward"
        return [
            *named, (f"activations kept, {self.tokens:,} tokens", self.saved), ("loss chunk", self.loss),
            ("a layer's backward", self.work), (f"sum (with {busier}, the larger)", self.total),
        ]  # fmt: skip


def shapes_of(config: Any, dtype: torch.dtype, rank: int) -> Shapes:
    """Count the model of ``config`` on the meta device.

    Raises:
        ValueError: its layers have not the seven projections of a Llama.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    head, text = model.get_output_embeddings(), config.get_text_config()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    first = {name.rpartition(".")[2]: m for name, m in linears.items() if ".layers.0." in name}
    if missing := set(checkpoints.LORA_TARGETS) - first.keys():
        raise ValueError(f"the plan knows Llama-like layers; those of {config.model_type} have no {sorted(missing)}")
    quantised = sum(m.weight.numel() for m in linears.values())
    every = sum(p.numel() for p in model.parameters())
    adapted = [m for name, m in linears.items() if name.rpartition(".")[2] in checkpoints.LORA_TARGETS]
    heads = text.num_attention_heads
    return Shapes(
        quantised=quantised,
        plain_bytes=(every - quantised) * dtype.itemsize,
        adapters=rank * sum(m.in_features + m.out_features for m in adapted),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        query=first["q_proj"].out_features,
        key=first["k_proj"].out_features,
        feed_forward=first["up_proj"].out_features,
        vocabulary=text.vocab_size,
        largest=max(m.weight.numel() for m in linears.values()),
        lora=len(adapted) // text.num_hidden_layers,
        halved=bool(layers) and can_be_halved(layers[0]),
    )


def saved_bytes(s: Shapes, width: int, rank: int, *, compiled: bool, shared_heads: bool = True, scores: int = 0) -> int:
    """Bytes a token that one layer keeps for its backward pass; ``width`` of a number, ``scores``: keys, if kept.

    Eager: two norms' float32 inputs and outputs; q, k, v, the attention's output and log-sum; the gate, its
    activation, the other branch and their product; LoRA's inner products. Compiled: what matrix products and attention
    made, and the two norms' inputs; the rest is made again.
    """
    keys = s.key if shared_heads else s.query
    attention = width * (2 * s.query + 2 * (s.key if compiled else keys)) + 4 * s.heads
    inner = width * rank * s.lora
    if compiled:
        return attention + inner + width * (2 * s.hidden + 2 * s.feed_forward) + 8
    probabilities = s.heads * scores * (4 if width == 4 else 4 + width)
    return attention + inner + 2 * (4 + width) * s.hidden + 4 * width * s.feed_forward + probabilities + 8


def tokens_of(lengths: Sequence[int], args: TrainArguments) -> tuple[int, int]:
    """Rows and tokens a row, padding included, of the longest micro-batch to be expected of ``args.steps`` steps."""
    if args.packing:
        return args.batch_size, args.max_length
    drawn = args.steps * args.accumulation * args.batch_size
    ordered = sorted(lengths)
    longest = min(ordered[min(len(ordered) * drawn // (drawn + 1), len(ordered) - 1)], args.max_length)
    return args.batch_size, -(-longest // PAD_TO) * PAD_TO if args.compile else longest


def expected(config: Any, args: TrainArguments, lengths: Sequence[int]) -> Memory:
    """The memory of a run with decided ``args`` over rows of ``lengths`` tokens, on a GPU; a rank's under FSDP2."""
    dtype = getattr(torch, args.dtype)
    s = shapes_of(config, dtype, args.lora_rank)
    rows, length = tokens_of(lengths, args)
    longest = _memory(s, args, dtype.itemsize, rows, length)
    few = COMPILE_LOGITS // s.vocabulary // rows  # tokens a row, up to which the chunked loss is not compiled
    short = sum(tokens <= few for tokens in lengths) / len(lengths)
    met = short**rows * args.steps * args.accumulation  # micro-batches so short
    if args.loss != "chunked" or args.compile or args.packing or met < 0.5 or few >= length:
        return longest
    return max(longest, _memory(s, args, dtype.itemsize, rows, few), key=lambda memory: memory.total)


def inputs_wait(s: Shapes, args: TrainArguments) -> bool:
    """Whether a run on a GPU, with decided ``args``, lets its layers' inputs wait in host memory."""
    return args.compile and args.checkpointing and s.halved and args.offload is not False


def _memory(s: Shapes, args: TrainArguments, width: int, rows: int, length: int) -> Memory:
    tokens = rows * length
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if args.fsdp2 else 1
    state = next((size for name, size in STATE_BYTES.items() if name in args.optimizer), 8)
    gradients = 4 * s.adapters if args.accumulation > 1 else 0  # else they come as the activations go
    weights = (s.quantised // 2, s.quantised // 64 + s.quantised // 4096, s.plain_bytes)
    trained = (4 * s.adapters, gradients, state * s.adapters)
    workspaces = CUBLAS_BYTES[capability() >= (9, 0)]
    if not args.cuda_graphs:  # which are recorded by one thread; else backward has its own
        workspaces *= 2
    work, loss = workspaces + width * s.largest, workspaces + _loss_bytes(s, args, tokens, width)  # a weight, decoded
    if ranks > 1:
        options, layer = FSDP2Config.parse(args.fsdp2_options), sum(weights[:2]) // s.layers
        in_pieces = args.nf4 != "bitsandbytes" and options.peer_reads is not False and not options.cpu_offload
        kept = not options.reshard_after_forward
        gathered = layer * (s.layers if kept else options.prefetch + 1 if in_pieces else 2)
        if in_pieces:  # of the other ranks' pieces, in buffers that stay (helpers/nf4_pieces.py)
            gathered = gathered * (ranks - 1) // ranks
        else:  # beside what NCCL gathers, rank by rank
            workspaces, work, loss = (size + 2 * layer for size in (workspaces, work, loss))
        work += gathered
        if in_pieces or kept:
            loss += gathered
        if args.compile and options.prefetch:  # the head is gathered beside the last layer's forward
            forward = width * (s.largest + tokens * (2 * s.feed_forward + 7 * s.hidden))
            loss = max(loss, workspaces + gathered + forward)
        loss += width * s.vocabulary * s.hidden
        whole = (2 if args.cuda_graphs else 1) * width * s.adapters  # adapters; a recording keeps where they arrive
        summed = (width + 4) * s.adapters + 4 * s.adapters // ranks  # their gradients, at the end of a backward pass
        work, loss = work + whole, max(loss, summed) + whole
        weights = (0, 0, 0) if options.cpu_offload else tuple(x // ranks for x in weights)
        trained = tuple(x // ranks for x in trained)
    dense = args.attention in ("eager", "stock") or (args.packing and args.attention == "sdpa")  # a mask for each head
    layer = tokens * saved_bytes(
        s, width, args.lora_rank, compiled=args.compile, scores=length if args.attention == "eager" else 0,
        shared_heads=width == 2 and not dense and capability() >= (8, 0),
    )  # fmt: skip
    casts = 0 if args.compile or width == 4 else width * s.adapters  # autocast's copies of the adapters
    # Gradients and recomputed values of the feed-forward part that live at once; compiled, as counted on an H100.
    feed_forward = (7 if args.compile else 2) * width * s.feed_forward * tokens
    if args.checkpointing and args.compile and s.halved:
        saved = (2 if inputs_wait(s, args) else s.layers) * width * s.hidden * tokens  # two are on their way
        work += tokens * width * (2 * s.query + 2 * s.key + 3 * s.hidden)  # of attention, and what joins the halves
        feed_forward = 6 * width * s.feed_forward * max(parts(tokens))
        feed_forward += 2 * width * s.largest * (args.nf4 != "bitsandbytes")  # its three weights are decoded once
    elif args.checkpointing:
        saved, work = s.layers * width * s.hidden * tokens, work + layer + casts // s.layers
    else:
        saved = s.layers * layer + casts
    work += feed_forward
    return Memory(tokens, weights, trained, saved, work, loss)


def _loss_bytes(s: Shapes, args: TrainArguments, tokens: int, width: int) -> int:
    """Bytes while the loss runs: the chunk's logits and their gradients, and the hidden states around the norm."""
    around = tokens * s.hidden * (4 + 2 * width)
    if args.loss == "trl":
        return around + 4 * tokens * s.hidden + width * min(tokens, TRL_TOKENS) * TRL_WORDS
    if args.loss == "full":
        return around + int(EAGER_LOSS * tokens * s.vocabulary)
    if args.compile:
        rows = chunk_rows(tokens, width * s.vocabulary)
        return tokens * s.hidden * 2 * width + int(FUSED_LOSS / 2 * width * rows * s.vocabulary)
    rows = min(tokens, max(LEAST_ROWS, FROZEN_LOGITS // s.vocabulary))
    fused = tokens * s.vocabulary > COMPILE_LOGITS
    return around + int((FUSED_LOSS / 2 * width if fused else EAGER_LOSS) * rows * s.vocabulary)


def row_lengths(rows: Any, tokenizer: Any = None) -> list[int]:
    """Tokens of the first rows of a data set, in whichever of the trainer's forms they are."""
    rows = rows.select(range(min(len(rows), SAMPLED_ROWS)))
    columns = rows.column_names
    if "input_ids" in columns:
        return [len(ids) for ids in rows["input_ids"]]
    if "text" in columns:
        return [len(ids) + 1 for ids in tokenizer(list(rows["text"]))["input_ids"]]  # and the end of the text
    if "messages" in columns:
        talks = list(rows["messages"])
    else:
        talks = [a + b for a, b in zip(rows["prompt"], rows["completion"], strict=True)]
        if isinstance(talks[0], str):
            return [len(ids) + 1 for ids in tokenizer(talks)["input_ids"]]
    return [len(ids) for ids in tokenizer.apply_chat_template(talks, return_dict=True)["input_ids"]]


def capability() -> tuple[int, int]:
    """Of this process's GPU; without one, of an H100, for which memory is then expected."""
    return device_capability(torch.cuda.current_device()) if torch.cuda.is_available() else (9, 0)
