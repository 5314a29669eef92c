"""What is decided about one call of `helpers.linear_loss.linear_forward`, and how its rows are walked in chunks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from .linear_chunk import Chunks

IGNORED = -100
PROBED_ROWS = 64
# Logits of a chunk, where memory allows. With less, the GPU's products wait for memory: the sum of the weight's
# gradient is read and written once a chunk. LEAN: the sum is in half precision, so memory is what counts.
FROZEN_LOGITS, TRAINED_LOGITS, LEAN_LOGITS, CPU_LOGITS = 2**27, 2**28, 5 * 2**24, 2**22
LEAST_ROWS = 512
EAGER_BYTES = 22.0  # a logit: log-probabilities with entropy, float32 upcast, forward and backward


@dataclass
class Output:
    """One of f's outputs: a scalar, or [rows, *shape]."""

    per_row: bool
    shape: torch.Size
    dtype: torch.dtype
    differentiable: bool

    @property
    def columns(self) -> int:
        """Differentiable numbers that this output has for a row."""
        return self.shape.numel() if self.per_row and self.differentiable else 0


@dataclass
class Form:
    """What the first rows told about f (`helpers.linear_probe`)."""

    outputs: tuple[Output, ...] = ()
    single: bool = True  # it returns a tensor, not a tuple
    vocabulary: int = 1  # logits a row
    only_called: bool = False  # f does nothing with linear but call it
    cut: bool = False  # once, on its very argument, and the graph may be cut at the logits
    bytes_per_logit: float = EAGER_BYTES  # at most
    rows: int | None = None  # that fitted after memory ran out


@dataclass
class Plan:
    """The arguments of one call that are not tensors, and what was decided about them."""

    function: Callable
    linear: nn.Module
    trained: list[nn.Parameter]  # as linear holds them
    frozen: list[tuple[nn.Parameter, Tensor]]  # sharded ones, gathered
    sum_dtype: torch.dtype | None
    autocast: dict[str, Any]
    count: int  # of rows to do
    kept: Tensor | None  # their indices; None: all rows
    form: Form = field(default_factory=Form)
    total: bool = False  # the first output is added up to one scalar
    denominator: float | Tensor | None = None  # of that
    weigh: bool = False  # f's scalars are means over their rows
    compile: bool = False
    rows: int = PROBED_ROWS  # of a chunk
    auto: bool = False
    done: list[tuple[int, int]] = field(default_factory=list)  # chunks of the forward pass

    @property
    def columns(self) -> int:
        """Differentiable numbers that f returns for a row."""
        return sum(output.columns for output in self.form.outputs)

    def chunks(self, parameters: Sequence[Tensor] = (), cut: bool = False) -> Chunks:
        """What walks over the rows a chunk at a time, with ``parameters`` standing in for the trained ones."""
        return Chunks(
            self.function, self.linear, list(zip(self.trained, parameters, strict=False)), self.frozen,
            sum_dtype=self.sum_dtype, autocast=self.autocast, cast=self.form.only_called, cut=cut and self.form.cut,
            compile=self.compile, walks=self.columns,
        )  # fmt: skip

    def take(self, tensors: Sequence[Tensor | None], start: int, stop: int) -> list[Tensor | None]:
        """Rows ``start`` to ``stop`` of those to do."""
        at = slice(start, stop) if self.kept is None else self.kept[start:stop]
        return [None if t is None else t[at] for t in tensors]

    def put(self, buffers: Sequence[Tensor | None], values: Sequence[Tensor | None], start: int, stop: int) -> None:
        """The reverse of `take`, into ``buffers``; a value of None is zero."""
        at = slice(start, stop) if self.kept is None else self.kept[start:stop]
        for buffer, value in zip(buffers, values, strict=True):
            if buffer is not None:
                buffer[at] = 0 if value is None else value

    def buffer(self, like: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor to `put` rows into, zero in rows that are not to be done."""
        make = torch.empty if self.kept is None else torch.zeros
        return make(like.shape if shape is None else (len(like), *shape), dtype=dtype or like.dtype, device=like.device)

    def each_chunk(self, work: Callable[[int, int], None], again: bool = False) -> None:
        """Call ``work(start, stop)`` for all rows; where it runs out of memory, again with half of them.

        ``again``: in the chunks of the forward pass, to which a function that draws random numbers is bound.
        """
        start, todo = 0, list(self.done) if again else []
        while start < self.count:
            stop = todo[0][1] if todo else min(start + self.rows, self.count)
            short = False
            try:
                work(start, stop)
            except torch.OutOfMemoryError:
                if not self.auto or stop - start < 2:
                    raise
                short = True
            if short:  # outside of except, whose traceback holds on to the chunk
                torch.cuda.empty_cache()
                self.rows, todo = (stop - start + 1) // 2, []
                continue
            if not again:
                self.done.append((start, stop))
            start, todo = stop, todo[1:]

    def auto_rows(self, device: torch.device) -> int:
        """Rows of a chunk: what keeps the device busy, in at most half of the memory that is free."""
        vocabulary = self.form.vocabulary
        if device.type != "cuda":
            rows = CPU_LOGITS // vocabulary
        else:
            trained = TRAINED_LOGITS if self.sum_dtype is not None else LEAN_LOGITS
            rows = max(LEAST_ROWS, (trained if self.trained else FROZEN_LOGITS) // vocabulary)
            statistics = torch.cuda.memory_stats(device)
            free, whole = torch.cuda.mem_get_info(device)
            if torch.are_deterministic_algorithms_enabled():  # what others hold at the moment must not change a result
                free = whole - statistics["allocated_bytes.all.current"]
            else:
                free += statistics["reserved_bytes.all.current"] - statistics["allocated_bytes.all.current"]
            free -= sum(4 * p.numel() for p in self.trained)
            rows = min(rows, int(free / 2 / (self.form.bytes_per_logit * vocabulary)))
        rows = min(rows, self.form.rows or rows)
        return max(rows // 128 * 128 if rows > 128 else rows, 1)


class Outputs:
    """Collects f's outputs over chunks: scalars are added up and rows put in their places."""

    def __init__(self, plan: Plan, x: Tensor):
        self.plan = plan
        self.values = [
            plan.buffer(x, form.shape, form.dtype) if form.per_row and not (i == 0 and plan.total)
            else torch.zeros((), dtype=torch.promote_types(form.dtype, torch.float32), device=x.device)
            for i, form in enumerate(plan.form.outputs)
        ]  # fmt: skip

    def add(self, outputs: Sequence[Tensor], start: int, stop: int) -> None:
        """Take in what f gave for rows ``start`` to ``stop``."""
        weight = stop - start if self.plan.weigh else 1
        for value, output in zip(self.values, outputs, strict=True):
            if value.ndim:
                self.plan.put([value], [output.detach()], start, stop)
            else:
                value += output.detach().sum(dtype=value.dtype) * weight
                weight = 1  # the others are metrics, sums as they are

    def finished(self) -> list[Tensor]:
        """The outputs for all rows, a total divided by its denominator."""
        if self.plan.denominator is not None:
            self.values[0] = self.values[0] / self.plan.denominator
        return self.values


def whole_parameters(
    linear: nn.Module, device: torch.device
) -> tuple[list[nn.Parameter], list[tuple[nn.Parameter, Tensor]], list[Tensor]]:
    """Trained parameters; sharded frozen ones with their whole; the whole of the trained ones, for autograd."""
    trained, frozen = [], []
    for parameter in linear.parameters():
        if parameter.requires_grad:
            trained.append(parameter)
        elif isinstance(parameter, DTensor):
            frozen.append((parameter, _gathered(parameter, device)))
    return trained, frozen, [_gathered(p, device) if isinstance(p, DTensor) else p for p in trained]


def _gathered(parameter: DTensor, device: torch.device) -> Tensor:
    """The whole of an FSDP2 parameter; the gradient is averaged over the ranks, each of which saw other rows."""
    whole = parameter.to(device).full_tensor(grad_placements=[Partial()] * parameter.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / parameter.device_mesh.size())
    return whole


def random_state(device: torch.device) -> list[Tensor]:
    """States of the CPU's random generator and of ``device``'s, for `random_state_of`."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


@contextlib.contextmanager
def random_state_of(state: list[Tensor], device: torch.device) -> Iterator[None]:
    """Within, random numbers are drawn as from ``state`` on; those drawn after are as if nothing had happened."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)
        yield
