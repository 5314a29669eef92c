"""CUDA graphs of whole micro-steps: forward and backward of a batch as two launches, whatever the model is made of.

A compiled QLoRA step of a small model is a few thousand kernels of some 10 us: launching them takes longer than running
them. Where lengths recur (`compile_model` pads them), a step of each length is recorded once and then replayed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.cudagraph_trees import clear_cublas_manager
from torch.distributed.tensor import DTensor

from .memory import note_replay


@dataclass
class _Step:
    """One recorded length: what it reads (inputs, items, upstream), what it writes, and its two graphs."""

    inputs: tuple[Tensor, ...]
    items: Tensor
    upstream: Tensor
    loss: Tensor
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class StepGraphs:
    """``graphs(inputs, items)`` is ``loss(inputs, items)``, replayed; its backward pass adds to ``grad``.

    All recordings share one memory pool and need no more than the longest alone: after a longer one the shorter are
    recorded again, into its memory. A replayed loss must be differentiated before the next is made. Gradients are in
    buffers of ours, which ``grad`` is set to.

    Args:
        loss: (inputs: tensors, items [], *mode) -> float32 []; may not wait for the GPU.
        warm_up: context in which ``loss`` is a small part of itself that launches each kind of kernel once.
        parameters: everything that is trained; sharded ones are DTensors.
        other_streams: those that ``loss`` launches on beside the current one, asked for after the warm-up.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        warm_up: Callable[[], contextlib.AbstractContextManager],
        parameters: Sequence[nn.Parameter],
        other_streams: Callable[[], Sequence[torch.cuda.Stream]] = tuple,
    ):
        self.loss, self.warm_up, self.parameters = loss, warm_up, list(parameters)
        self.other_streams = other_streams
        self.steps: dict[tuple, _Step] = {}
        self.buffers = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.local_buffers = _local(self.buffers)
        # What autograd believes the loss depends on.
        self.anchor = torch.zeros((), device=self.parameters[0].device, requires_grad=True)
        self.pending: object = None
        self.longest = 0  # tokens of a recorded batch
        self.pool: tuple[int, int] | None = None  # the memory that all recordings share
        self.recorded_bytes = 0  # of the memory that the recordings share

    def __call__(self, inputs: tuple[Tensor, ...], items: Tensor | int, *mode: Any) -> Tensor:
        """``mode``: whatever else a recording depends on, for ``loss`` too."""
        key = (*[x.shape for x in inputs], *mode, torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        key += tuple(parameter.data_ptr() for parameter in _local(self.parameters))
        step = self.steps.get(key)
        if step is None:
            if inputs[0].numel() > self.longest:
                self.longest = inputs[0].numel()
                self.clear()
            step = self.steps[key] = self._recorded(inputs, mode)
        for held, given in zip(step.inputs, inputs, strict=True):
            held.copy_(given)
        step.items.copy_(items) if isinstance(items, Tensor) else step.items.fill_(items)
        return _Replay.apply(self.anchor, self, step)

    def clear(self) -> None:
        """Forget all recordings, as must be done before leaving NCCL, where it is part of them (pytorch#115388)."""
        if self.steps:
            torch.cuda.synchronize()  # the last replay
        self.steps.clear()

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        """Where everything is recorded."""
        return torch.cuda.Stream()

    def _recorded(self, inputs: tuple[Tensor, ...], mode: tuple) -> _Step:
        if not self.steps:  # the first, or longer than all before
            self.pool = torch.cuda.graph_pool_handle()
        inputs = tuple(x.clone() for x in inputs)
        items, upstream = (torch.ones((), device=inputs[0].device) for _ in range(2))
        held = [parameter.grad for parameter in self.parameters]
        self._hold([None] * len(held))
        self.stream.wait_stream(torch.cuda.current_stream())
        # thread_local: another thread, which pins memory say, may go on as it likes.
        how = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Backward in this thread too: one of its own would have a cuBLAS workspace of its own, 32 MiB on Hopper.
        with torch.autograd.set_multithreading_enabled(False):
            with torch.cuda.stream(self.stream), self.warm_up():  # compiles, loads kernels, lets cuBLAS choose
                for _ in range(2):
                    self.loss(inputs, items, *mode).backward()
            torch.cuda.current_stream().wait_stream(self.stream)
            self._hold(self.buffers)  # into which autograd adds in place
            # cuBLAS' workspaces are then the recording's own, not beside those of other streams.
            with clear_cublas_manager():
                with torch.cuda.graph(forward, **how), self._with_other_streams():
                    loss = self.loss(inputs, items, *mode)
                with torch.cuda.graph(backward, **how), self._with_other_streams():
                    loss.backward(upstream)
        self._hold(held)
        pools = [(tuple(s["segment_pool_id"]), s["total_size"]) for s in torch.cuda.memory_snapshot()]
        self.recorded_bytes = sum(size for pool, size in pools if pool == self.pool)
        return _Step(inputs, items, upstream, loss.detach(), forward, backward)

    @contextlib.contextmanager
    def _with_other_streams(self) -> Iterator[None]:
        """Within, the other streams record as well: one that had not forked from ours would run there and then, and
        ours could not wait for it. What they recorded must have joined ours by the end."""
        others = self.other_streams()
        for stream in others:
            stream.wait_stream(self.stream)
        yield
        for stream in others:
            self.stream.wait_stream(stream)

    def _hold(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def own_gradients(self) -> None:
        """Make ``grad`` of each parameter our buffer, with what it held."""
        fresh = [local for p, local in zip(self.parameters, self.local_buffers, strict=True) if p.grad is None]
        if fresh:
            torch._foreach_zero_(fresh)
        for parameter, buffer in zip(self.parameters, self.buffers, strict=True):
            if parameter.grad is not None and parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
        self._hold(self.buffers)


@torch.no_grad()
def _local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this rank holds of tensors that may be sharded."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor: Tensor, graphs: StepGraphs, step: _Step) -> Tensor:
        ctx.graphs, ctx.step = graphs, step
        graphs.pending = ctx
        step.forward.replay()
        return step.loss.clone()  # the next length may write there

    @staticmethod
    def backward(ctx, upstream: Tensor):
        graphs, step = ctx.graphs, ctx.step
        if graphs.pending is not ctx:
            raise RuntimeError(
                "another loss was computed before the backward pass of this one, and took its activations' place: call "
                "backward after each forward, or do without cuda_graphs"
            )
        graphs.pending = None
        step.upstream.copy_(upstream)
        graphs.own_gradients()
        note_replay(graphs.recorded_bytes)
        step.backward.replay()
        return None, None, None
