"""CUDA's streams, events and recordings played on the CPU by CUDA's rules: which waits a recording allows.

Work runs at once, whatever its stream, so results are right; what is checked is the order that a GPU would be given.
"""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Recording:
    """One graph. ``before``: of each of its nodes, all nodes that it comes after, itself included."""

    def __init__(self):
        self.before: dict[int, set[int]] = {}
        self.ended = False

    def add(self, after: set[int]) -> int:
        node = len(self.before)
        self.before[node] = {node}.union(*(self.before[n] for n in after))
        return node


class Event:
    def __init__(self, *args, **kwargs):
        self.recording: Recording | None = None
        self.nodes: set[int] = set()
        self.recorded = False

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or Stream.current
        self.recording, self.nodes, self.recorded = stream.recording, set(stream.nodes), True


class Stream:
    """``nodes``: what its next work comes after, in the ``recording`` that it takes part in."""

    current: Stream
    everyone: list[Stream] = []

    def __init__(self, *args, **kwargs):
        self.recording: Recording | None = None
        self.nodes: set[int] = set()
        self.everyone.append(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: Event) -> None:
        if not event.recorded:
            return
        if event.recording is None:
            if self.recording is not None:
                raise RuntimeError("cudaErrorStreamCaptureIsolation: a recording waits for what is not in it")
            return
        if event.recording.ended:
            raise RuntimeError("cudaErrorCapturedEvent: waiting for an event of a recording that is over")
        if self.recording not in (None, event.recording):
            raise RuntimeError("cudaErrorStreamCaptureMerge: a recording waits for another")
        self.recording = event.recording
        self.nodes |= event.nodes


Stream.current = Stream()


@contextlib.contextmanager
def on(stream: Stream | None):
    before, Stream.current = Stream.current, stream or Stream.current
    try:
        yield
    finally:
        Stream.current = before


class Launches(TorchDispatchMode):
    """Each operation is a node on the current stream, which must record."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        stream = Stream.current
        if stream.recording is None:
            raise RuntimeError(f"{func} runs while others are recorded: its stream has not forked")
        stream.nodes = {stream.recording.add(stream.nodes)}
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
    stream.recording, stream.nodes = recording, _ = Recording(), set()
    with on(stream), Launches():
        yield
    reached = set().union(*(recording.before[node] for node in stream.nodes))
    for other in Stream.everyone:
        if other.recording is recording and not other.nodes <= reached:
            raise RuntimeError("cudaErrorStreamCaptureUnjoined: a stream has recorded what ours does not wait for")
    for other in Stream.everyone:
        other.recording, other.nodes = None, set()
    recording.ended = True
    cuda_graph.nodes = len(recording.before)


@contextlib.contextmanager
def played():
    """Within, torch.cuda's and FSDP2's streams and recordings are these; FSDP2 must shard within."""
    device = SimpleNamespace(Stream=Stream, Event=Event, stream=on, current_stream=lambda *device: Stream.current)
    everything = {
        "Stream": Stream, "Event": Event, "stream": on, "current_stream": device.current_stream, "graph": graph,
        "CUDAGraph": SimpleNamespace, "graph_pool_handle": lambda: (0, 1), "memory_snapshot": list,
        "synchronize": lambda *device: None,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, value in everything.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, create=True))
        stack.enter_context(mock.patch.object(torch.accelerator, "current_stream", device.current_stream))
        for name in ("collectives", "param_group", "state"):
            module = sys.modules[f"torch.distributed.fsdp._fully_shard._fsdp_{name}"]
            stack.enter_context(mock.patch.object(module, "_get_device_handle", lambda kind: device))
        yield
