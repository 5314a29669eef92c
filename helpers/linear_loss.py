"""Any function of a linear layer's output, forward and backward, without its output: the logits exist a chunk at a time.

``linear_forward(x, linear, labels, forward_function=f)`` is ``f(x, linear, labels)`` for an f that treats rows apart. No
derivative is written here: torch.autograd differentiates f, as it is, on each chunk (`helpers.linear_chunk`). A sum is
differentiated in the forward pass, where the chunk's logits are at hand (they are made once), and its gradients are scaled
by the upstream one later. Outputs a row each are made again in the backward pass, where their upstream gradients are known;
but where only x is trained, d(output)/dx is no bigger than x, and is kept instead.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from .linear_chunk import Chunks, Graph, Watched, autocast_now

IGNORED = -100
FP16_SCALE = 1024.0  # of a float16 chunk's cotangent, divided out in float32: small probabilities survive
PROBED_ROWS = 64
COMPILE_LOGITS = 2**26  # from so many logits on, compiling f pays on a GPU
MAX_JACOBIANS = 4  # outputs a row whose d/dx are kept; beyond, recomputing is cheaper
LEAST_ROWS, FROZEN_LOGITS, TRAINED_LOGITS, CPU_LOGITS = 1024, 2**27, 2**28, 2**24  # of a chunk, where memory allows
EAGER_BYTES = 22.0  # a logit, of a function as greedy as log-probabilities with entropy


@dataclass
class Output:
    """One of f's outputs: a scalar, or [rows, *shape]."""

    per_row: bool
    shape: torch.Size
    dtype: torch.dtype
    differentiable: bool

    @property
    def columns(self) -> int:
        return self.shape.numel() if self.per_row and self.differentiable else 0


@dataclass
class Form:
    """What the first rows told about f."""

    outputs: tuple[Output, ...] = ()
    single: bool = True  # it returns a tensor, not a tuple
    vocabulary: int = 0  # logits a row
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
    weigh: bool = False  # f's scalars are means over their rows
    compile: bool = False
    rows: int = PROBED_ROWS  # of a chunk
    auto: bool = False
    done: list[tuple[int, int]] = field(default_factory=list)  # chunks of the forward pass

    def chunks(self, parameters: Sequence[Tensor] = (), cut: bool = False) -> Chunks:
        return Chunks(
            self.function, self.linear, list(zip(self.trained, parameters, strict=False)), self.frozen,
            sum_dtype=self.sum_dtype, autocast=self.autocast, cast=self.form.only_called, cut=cut and self.form.cut,
            compile=self.compile, columns=self.columns,
        )  # fmt: skip

    @property
    def columns(self) -> int:
        """Differentiable numbers that f returns for a row."""
        return sum(output.columns for output in self.form.outputs)

    def take(self, tensors: Sequence[Tensor | None], start: int, stop: int) -> list[Tensor | None]:
        """Rows ``start`` to ``stop`` of those to do."""
        at = slice(start, stop) if self.kept is None else self.kept[start:stop]
        return [None if t is None else t[at] for t in tensors]

    def put(self, buffers: Sequence[Tensor | None], values: Sequence[Tensor | None], start: int, stop: int) -> None:
        """The reverse of `take`, into ``buffers``; where a value is None, the buffer's rows are zero."""
        at = slice(start, stop) if self.kept is None else self.kept[start:stop]
        for buffer, value in zip(buffers, values, strict=True):
            if buffer is not None:
                buffer[at] = 0 if value is None else value

    def buffer(self, like: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor to `put` rows into, zero in rows that are not to be done."""
        make = torch.empty if self.kept is None else torch.zeros
        return make(like.shape if shape is None else (len(like), *shape), dtype=dtype or like.dtype, device=like.device)


class _Outputs:
    """Collects the outputs of chunks: ``values`` are sums of scalars, and rows in their places."""

    def __init__(self, plan: Plan, x: Tensor, total: bool = False):
        self.plan, self.total = plan, total
        self.values = [
            plan.buffer(x, form.shape, form.dtype) if form.per_row and not (i == 0 and total)
            else torch.zeros((), dtype=torch.promote_types(form.dtype, torch.float32), device=x.device)
            for i, form in enumerate(plan.form.outputs)
        ]  # fmt: skip

    def add(self, outputs: Sequence[Tensor], start: int, stop: int, weight: int = 1) -> None:
        for value, output in zip(self.values, outputs, strict=True):
            output = output.detach()
            if value.ndim:
                self.plan.put([value], [output], start, stop)
            else:
                value += output.sum(dtype=value.dtype) * weight
                weight = 1  # the others are metrics, sums as they are


_FORMS: weakref.WeakKeyDictionary[Callable, dict[tuple, Form]] = weakref.WeakKeyDictionary()


@torch.compiler.disable
def linear_forward(
    x: Tensor,
    linear: nn.Module,
    *row_tensors: Tensor | None,
    forward_function: Callable,
    chunk_size: int | str = "auto",
    reduction: str | None = None,
    denominator: float | Tensor | None = None,
    ignore_index: int | None = None,
    compile: bool | str = "auto",
    sum_dtype: torch.dtype | None = torch.float32,
) -> Tensor | tuple[Tensor, ...]:
    """``forward_function(x, linear, *row_tensors)`` in chunks of rows, with gradients to x, linear and row tensors.

    Args:
        x: [..., hidden], of any floating dtype.
        linear: the layer: plain, quantized, tied or wrapped by PEFT. What it trains gets gradients.
        row_tensors: labels, advantages, masks, ...: [..., *anything] with x's leading shape; or None, handed on. The
            first, if it is int64, is taken for labels, each in [0, vocabulary) or ignored (-100 or ``ignore_index``).
        forward_function: called with x [rows, hidden], linear and row tensors [rows, *anything]. Returns a scalar, or a
            tuple of a scalar and metrics (scalars are added up, rows concatenated, neither passes a gradient); or a
            tensor or tuple of tensors [rows, *anything], of which those that do not require grad pass none. What it
            returns for a row must not depend on others. It is called once more, on the first rows, to find out.
        chunk_size: rows at a time; or "auto": as many as are fast, less where memory is short, halved when it runs out.
        reduction: None: scalars are added up, outputs a row each returned as they are. "none": demands the latter. "sum"
            and "mean": one scalar. "mean" weighs the means f returns by the rows of their chunks, ignored ones left out.
        denominator: what a sum is divided by, e.g. num_items_in_batch.
        ignore_index: rows with this label are left out before any work is done, and are zero in outputs a row each: for
            an f that gives them no weight.
        compile: torch.compile f, once for all lengths; "auto": on a GPU, given work enough.
        sum_dtype: of the sum of a parameter's gradients over chunks; None: its own, at half the memory.

    Returns: a scalar (float32; float64 of float64) and metrics, or outputs [..., *anything] with x's leading shape.

    Raises: TypeError or ValueError, before any work; RuntimeError, when backward runs a second time.
    """
    n, rows = _checked(x, linear, row_tensors, forward_function, chunk_size, reduction, denominator)
    flat = x.reshape(n, x.shape[-1])
    kept = _kept_rows(rows, IGNORED if reduction == "mean" and ignore_index is None else ignore_index, linear)
    count = n if kept is None else kept.numel()
    trained, frozen, tensors = _parameters(linear)
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in (flat, *trained, *rows) if t is not None)
    plan = Plan(forward_function, linear, trained, frozen, sum_dtype, autocast_now(x.device), count, kept)
    plan.form = _form(plan, flat, rows, tensors, graph)
    first = plan.form.outputs[0]
    if reduction == "none" and not first.per_row:
        raise ValueError("reduction 'none' needs outputs of a row each; forward_function returned a scalar")
    if first.per_row and denominator is not None and reduction != "sum":
        raise ValueError("a denominator divides a sum: give reduction='sum' too, or divide the outputs")
    plan.total = not first.per_row or reduction in ("sum", "mean")
    plan.weigh = reduction == "mean" and not first.per_row
    plan.compile = compile is True or (compile == "auto" and x.is_cuda and count * plan.form.vocabulary >= COMPILE_LOGITS)
    wanted = _auto_rows(plan, flat) if chunk_size == "auto" else chunk_size
    plan.rows, plan.auto = wanted, chunk_size == "auto"
    if graph:
        outputs = list(MemoryEfficientLinear.apply(plan, flat, len(rows), *rows, *tensors))
    else:
        outputs = list(_without_graph(plan, flat, *rows))
    if plan.rows < wanted:
        plan.form.rows = plan.rows
    if reduction == "mean":
        denominator = max(count, 1) * max(first.columns, 1)
    if denominator is not None:
        outputs[0] = outputs[0] / denominator
    outputs = [o.reshape(*x.shape[:-1], *o.shape[1:]) if o.ndim else o for o in outputs]
    return outputs[0] if plan.form.single else tuple(outputs)


class MemoryEfficientLinear(torch.autograd.Function):
    """f of a linear layer, a chunk at a time. Every tensor comes in as an argument, so that autograd routes its gradient.

    ``apply(plan, x [n, hidden], number of row tensors, *row tensors, *trained parameters)``; see `linear_forward`.
    """

    @staticmethod
    def forward(ctx, plan: Plan, x: Tensor, row_tensors: int, *tensors: Tensor | None):
        inputs, parameters = (x, *tensors[:row_tensors]), tensors[row_tensors:]
        ctx.plan, ctx.inputs, ctx.used = plan, len(inputs), False
        ctx.needs = (ctx.needs_input_grad[1], *ctx.needs_input_grad[3 : 2 + len(inputs)])
        half = torch.float16 in (x.dtype, plan.autocast["dtype"] if plan.autocast["enabled"] else None)
        ctx.scale = FP16_SCALE if half else 1.0
        only_x = ctx.needs[0] and not any(ctx.needs[1:]) and not parameters
        if plan.total:
            ctx.kind = "sum"
            ctx.dtypes = [None if t is None else t.dtype for t in (*inputs, *parameters)]
            outputs, saved = _sum(plan, inputs, parameters, ctx.needs, ctx.scale)
            fixed = outputs[1:]
        else:
            if only_x and plan.columns <= MAX_JACOBIANS:
                ctx.kind = "jacobians"
                outputs, saved = _with_jacobians(plan, inputs, ctx.needs, ctx.scale)
            else:
                ctx.kind, ctx.random = "again", _random_state(x.device)
                outputs, saved = _without_graph(plan, *inputs), (*inputs, *parameters)
            fixed = [o for o, form in zip(outputs, plan.form.outputs, strict=True) if not form.differentiable]
        ctx.mark_non_differentiable(*fixed)
        ctx.save_for_backward(*saved)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream: Tensor):
        if ctx.used:
            raise RuntimeError(
                "backward ran a second time through linear_forward, whose gradients the first time used up: call "
                "linear_forward again rather than retain its graph"
            )
        ctx.used = True
        saved = ctx.saved_tensors
        if ctx.kind == "sum":
            factor = upstream[0] / ctx.scale
            gradients = [_scaled(g, factor, dtype) for g, dtype in zip(saved, ctx.dtypes, strict=True)]
        elif ctx.kind == "jacobians":
            gradients = [_times_jacobians(ctx.plan, saved, upstream, ctx.scale), *[None] * (ctx.inputs - 1)]
        else:
            with _random_state_of(ctx.random, saved[0].device):
                gradients = _again(ctx.plan, saved[: ctx.inputs], saved[ctx.inputs :], ctx.needs, upstream)
        return None, gradients[0], None, *gradients[1:]


def _sum(plan: Plan, inputs, parameters, needs, scale: float) -> tuple[list[Tensor], list[Tensor | None]]:
    """The sum of the first output and the metrics; and the sum's gradients times ``scale`` to inputs and parameters."""
    outputs = _Outputs(plan, inputs[0], total=True)
    gradients = [plan.buffer(t) if need else None for t, need in zip(inputs, needs, strict=True)]
    with plan.chunks(parameters, cut=True) as chunks:

        def work(start: int, stop: int) -> None:
            graph = chunks.graph(plan.take(inputs, start, stop), needs)
            weight = stop - start if plan.weigh else 1
            cotangent = torch.full_like(graph.outputs[0], scale * weight)
            found = chunks.gradients(graph, [cotangent, *[None] * (len(graph.outputs) - 1)])
            plan.put(gradients, found, start, stop)
            outputs.add(graph.outputs, start, stop, weight)

        _each_chunk(plan, work)
        # A float16 sum would not hold the scale; bfloat16 has float32's range.
        return outputs.values, [*gradients, *chunks.finished_sums(keep_dtype=scale != 1)]


def _with_jacobians(plan: Plan, inputs, needs, scale: float) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs a row each, and d(output)/dx times ``scale``, [n, hidden] for each of their columns."""
    outputs = _Outputs(plan, inputs[0])
    jacobians = [plan.buffer(inputs[0]) for _ in range(plan.columns)]
    with plan.chunks() as chunks:

        def work(start: int, stop: int) -> None:
            graph = chunks.graph(plan.take(inputs, start, stop), needs)
            outputs.add(graph.outputs, start, stop)
            column = 0
            for i, form in enumerate(plan.form.outputs):
                for j in range(form.columns):
                    cotangents: list[Tensor | None] = [None] * len(graph.outputs)
                    cotangents[i] = torch.zeros_like(graph.outputs[i])
                    cotangents[i].view(stop - start, -1)[:, j] = scale
                    found = chunks.gradients(graph, cotangents, retain=column + 1 < plan.columns)
                    plan.put([jacobians[column]], found[:1], start, stop)
                    column += 1

        _each_chunk(plan, work)
    return outputs.values, jacobians


def _times_jacobians(plan: Plan, jacobians, upstream, scale: float) -> Tensor:
    dx, column = None, 0
    for form, gradient in zip(plan.form.outputs, upstream, strict=True):
        for j in range(form.columns):
            factor = gradient.reshape(len(gradient), -1)[:, j : j + 1] / scale
            part = _scaled(jacobians[column], factor, jacobians[column].dtype)
            dx = part if dx is None else dx.add_(part)
            column += 1
    return dx


def _without_graph(plan: Plan, x: Tensor, *rows: Tensor | None) -> list[Tensor]:
    outputs = _Outputs(plan, x, total=plan.total)
    with plan.chunks() as chunks:

        def work(start: int, stop: int) -> None:
            found = chunks.outputs(plan.take((x, *rows), start, stop))
            outputs.add(found, start, stop, stop - start if plan.weigh else 1)

        _each_chunk(plan, work)
    return outputs.values


def _again(plan: Plan, inputs, parameters, needs, upstream) -> list[Tensor | None]:
    """Gradients to inputs and parameters, of outputs a row each, which are made again."""
    gradients = [plan.buffer(t) if need else None for t, need in zip(inputs, needs, strict=True)]
    with plan.chunks(parameters, cut=True) as chunks:

        def work(start: int, stop: int) -> None:
            graph = chunks.graph(plan.take(inputs, start, stop), needs)
            plan.put(gradients, chunks.gradients(graph, plan.take(upstream, start, stop)), start, stop)

        _each_chunk(plan, work, plan.done)
        return [*gradients, *chunks.finished_sums()]


def _each_chunk(plan: Plan, work: Callable[[int, int], None], repeat: list[tuple[int, int]] | None = None) -> None:
    """Call ``work(start, stop)`` for all rows; where it runs out of memory, again with half of them.

    ``repeat``: the chunks of the forward pass, to which a function that draws random numbers is bound.
    """
    start, todo = 0, list(repeat or ())
    while start < plan.count:
        stop = todo[0][1] if todo else min(start + plan.rows, plan.count)
        error = None
        try:
            work(start, stop)
        except torch.OutOfMemoryError as raised:
            if not plan.auto or stop - start < 2:
                raise
            error = raised
        if error is not None:  # outside of except, whose traceback holds on to the chunk
            del error
            torch.cuda.empty_cache()
            plan.rows, todo = (stop - start + 1) // 2, []
            continue
        if repeat is None:
            plan.done.append((start, stop))
        start, todo = stop, todo[1:]


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """``gradient * factor`` as ``dtype``, in place where that is its own; the factor is not rounded to half precision."""
    if gradient is None:
        return None
    factor = torch.atleast_1d(factor.to(torch.promote_types(factor.dtype, torch.float32)))
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor.reshape(factor.shape + (1,) * (gradient.ndim - factor.ndim)), out=out)


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


@contextlib.contextmanager
def _random_state_of(state: list[Tensor], device: torch.device) -> Iterator[None]:
    """Random numbers are drawn as from ``state`` on, and what is drawn does not count after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)
        yield


def _auto_rows(plan: Plan, x: Tensor) -> int:
    """Rows of a chunk: what keeps the device busy, in at most half of the memory that is free."""
    vocabulary = max(plan.form.vocabulary, 1)
    if not x.is_cuda:
        rows = CPU_LOGITS // vocabulary
    else:
        rows = max(LEAST_ROWS, (TRAINED_LOGITS if plan.trained else FROZEN_LOGITS) // vocabulary)
        statistics = torch.cuda.memory_stats(x.device)
        unused = statistics["reserved_bytes.all.current"] - statistics["allocated_bytes.all.current"]
        free = torch.cuda.mem_get_info(x.device)[0] + unused - sum(4 * p.numel() for p in plan.trained)
        rows = min(rows, int(free / 2 / (plan.form.bytes_per_logit * vocabulary)))
    rows = min(rows, plan.form.rows or rows)
    return max(rows // 128 * 128 if rows > 128 else rows, 1)


def _parameters(linear: nn.Module) -> tuple[list[nn.Parameter], list[tuple[nn.Parameter, Tensor]], list[Tensor]]:
    """Trained parameters; sharded frozen ones with their whole; and the whole of the trained ones, to be differentiated."""
    trained = [p for p in linear.parameters() if p.requires_grad]
    frozen = [(p, p.full_tensor()) for p in linear.parameters() if isinstance(p, DTensor) and not p.requires_grad]
    return trained, frozen, [_gathered(p) if isinstance(p, DTensor) else p for p in trained]


def _gathered(parameter: DTensor) -> Tensor:
    """The whole of an FSDP2 parameter; the gradient is averaged over the ranks, each of which saw other rows."""
    whole = parameter.full_tensor(grad_placements=[Partial()] * parameter.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / parameter.device_mesh.size())
    return whole


def _form(plan: Plan, x: Tensor, rows: Sequence[Tensor | None], parameters: Sequence[Tensor], graph: bool) -> Form:
    """`_probe`, remembered for as long as f lives, by everything that could change the answer."""
    key = (
        weakref.ref(plan.linear), graph, x.shape[1], x.dtype, x.device, x.requires_grad, len(plan.trained),
        str(plan.autocast), *[None if r is None else (r.shape[1:], r.dtype, r.requires_grad) for r in rows],
    )  # fmt: skip
    try:
        known = _FORMS.setdefault(plan.function, {})
    except TypeError:  # it cannot be hashed or referred to weakly
        known = {}
    if key not in known:
        known[key] = _probe(plan, x, rows, parameters, graph)
    return known[key]


def _probe(plan: Plan, x: Tensor, rows: Sequence[Tensor | None], parameters: Sequence[Tensor], graph: bool) -> Form:
    """Run f on the first rows and describe it; raises ValueError where what it returns cannot be used."""
    inputs = plan.take([x, *rows], 0, PROBED_ROWS)
    if plan.count == 0:  # all are ignored: any label will do
        inputs = [None if t is None else t[:PROBED_ROWS] for t in (x, *rows)]
        inputs[1] = torch.zeros_like(inputs[1])
    needs = [t is not None and t.requires_grad for t in (x, *rows)]
    with _random_state_of(_random_state(x.device), x.device), plan.chunks(parameters) as chunks:
        chunks.linear = watched = Watched(plan.linear)
        try:
            found = chunks.graph(inputs, needs) if graph else Graph(chunks.outputs(inputs), inputs)
        except Exception:  # f may want a real module; if that is not it, the error is f's own
            chunks.linear = plan.linear
            found = chunks.graph(inputs, needs) if graph else Graph(chunks.outputs(inputs), inputs)
            watched = None
        form = _described(found.outputs, chunks.single, len(inputs[0]), graph)
        form.vocabulary = watched and watched.vocabulary or _outputs_of(plan.linear) or 1
        form.only_called = watched is not None and not watched.touched
        if graph:
            _check_leaves(found, chunks.leaves)
            called_once = form.only_called and len(watched.calls) == 1 and watched.calls[0] is found.inputs[0]
            chunks.linear = plan.linear
            form.cut = called_once and _may_be_cut(chunks, inputs, needs)
            form.bytes_per_logit = _bytes_per_logit(chunks, inputs, needs, form.vocabulary)
        return form


def _may_be_cut(chunks: Chunks, inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> bool:
    """Whether f takes logits that are a leaf of the graph; it cannot, for one, change them in place."""
    linear = chunks.linear
    hooked = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks
    if type(linear) is not nn.Linear or hooked or not linear.weight.requires_grad:
        return False
    chunks.cut = True
    try:
        chunks.graph(inputs, needs)
    except RuntimeError:
        return False
    finally:
        chunks.cut = False
    return True


def _bytes_per_logit(chunks: Chunks, inputs: Sequence[Tensor | None], needs: Sequence[bool], vocabulary: int) -> float:
    """All that f allocates, forward and backward, for one more logit: no less than its peak."""
    x = inputs[0]
    if not x.is_cuda or len(x) < PROBED_ROWS:
        return EAGER_BYTES

    def allocated() -> int:  # ever; a peak would have to be reset, which the caller may be measuring
        return torch.cuda.memory_stats(x.device)["allocated_bytes.all.allocated"]

    def spent(rows: int) -> int:
        before = allocated()
        graph = chunks.graph([None if t is None else t[:rows] for t in inputs], [True, *needs[1:]])
        chunks.gradients(graph, [torch.ones_like(o) if o.requires_grad else None for o in graph.outputs])
        return allocated() - before

    chunks.leaves = []  # their gradients do not grow with the rows
    half = PROBED_ROWS // 2
    return max((spent(PROBED_ROWS) - spent(half)) / (half * vocabulary), 2.0)


def _described(outputs: tuple, single: bool, n: int, graph: bool) -> Form:
    for output in outputs:
        if not isinstance(output, Tensor):
            raise TypeError(f"forward_function returned a {type(output).__name__}; it must return tensors")
    scalar = outputs[0].ndim == 0
    for i, output in enumerate(outputs):
        if output.ndim and len(output) != n or not (output.ndim or scalar):
            raise ValueError(
                f"forward_function was given {n} rows and its output {i} has shape {tuple(output.shape)}: it must be "
                + (f"a scalar or [{n}, ...], a metric" if scalar else f"[{n}, ...], one for each row, as the first is")
            )
    if graph and not any(o.requires_grad for o in (outputs[:1] if scalar else outputs)):
        raise ValueError(
            "forward_function's output cannot be differentiated: it has no graph back to its input (a detach, an argmax or "
            "a no_grad inside it?). To evaluate only, call linear_forward under torch.no_grad()"
        )
    kinds = [Output(o.ndim > 0, o.shape[1:], o.dtype, graph and o.requires_grad and (not scalar or not i))
             for i, o in enumerate(outputs)]  # fmt: skip
    return Form(tuple(kinds), single)


def _check_leaves(graph: Graph, leaves: Sequence[Tensor]) -> None:
    """Raises ValueError where f trains what it was not given: its gradient would be lost."""
    known = {id(t) for t in (*graph.inputs, *leaves)}
    seen, todo = set(), [o.grad_fn for o in graph.outputs if o.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [parent for parent, _ in node.next_functions]
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise ValueError(
                f"forward_function uses a tensor of shape {tuple(variable.shape)} that requires grad and is neither a "
                "parameter of linear nor a row tensor, so its gradient would be lost: make it part of linear, or detach it"
            )


def _checked(
    x: Tensor, linear: nn.Module, row_tensors: tuple, function: Callable, chunk_size: int | str, reduction: str | None,
    denominator: float | Tensor | None,
) -> tuple[int, list[Tensor | None]]:  # fmt: skip
    """The number of rows, and row tensors flattened to it."""
    if not isinstance(linear, nn.Module):
        raise TypeError(f"linear is a {type(linear).__name__}; it must be an nn.Module, whose parameters can be found")
    if not callable(function):
        raise TypeError(f"forward_function is a {type(function).__name__}; it must be callable")
    if chunk_size != "auto" and (isinstance(chunk_size, (bool, str)) or chunk_size != int(chunk_size) or chunk_size < 1):
        raise ValueError(f"chunk_size is {chunk_size!r}; it must be 'auto' or at least 1 row")
    if reduction not in (None, "none", "sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}; it must be None, 'none', 'sum' or 'mean'")
    if denominator is not None and reduction in ("none", "mean"):
        raise ValueError(f"a denominator divides a sum, and reduction is {reduction!r}: leave one of them out")
    if not isinstance(x, Tensor) or x.ndim < 2 or not x.is_floating_point():
        raise ValueError("x must be a floating tensor of shape [..., hidden]")
    leading = x.shape[:-1]
    if leading.numel() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: there are no rows")
    rows = []
    for i, row in enumerate(row_tensors):
        if row is None:
            rows.append(None)
            continue
        if not isinstance(row, Tensor) or row.shape[: len(leading)] != leading:
            shape = tuple(row.shape) if isinstance(row, Tensor) else type(row).__name__
            raise ValueError(
                f"row tensor {i} is {shape}, but x has rows of shape {tuple(leading)}: expand it to [..., *anything] with "
                "that leading shape, or bind it to forward_function with functools.partial"
            )
        rows.append(row.reshape(leading.numel(), *row.shape[len(leading) :]))
    tensors = {"x": x} | {f"row tensor {i}": r for i, r in enumerate(rows) if r is not None}
    tensors |= {f"linear.{name}": p for name, p in linear.named_parameters()}
    apart = [name for name, t in tensors.items() if t.device != x.device]
    if apart:
        raise ValueError(f"x is on {x.device}, but {apart[0]} on {tensors[apart[0]].device}: move them together")
    if type(linear) is nn.Linear:
        if linear.in_features != x.shape[-1]:
            raise ValueError(f"x has {x.shape[-1]} features, but linear takes {linear.in_features}")
        if linear.weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"x is {x.dtype}, but linear.weight {linear.weight.dtype}: cast one of them, or use torch.autocast"
            )
    return leading.numel(), rows


def _outputs_of(linear: nn.Module) -> int | None:
    return getattr(linear, "out_features", None)


def _kept_rows(rows: Sequence[Tensor | None], ignore_index: int | None, linear: nn.Module) -> Tensor | None:
    """Indices of the rows whose label is not ``ignore_index``, or None for all; raises ValueError on impossible labels."""
    labels = rows[0] if rows else None
    if labels is None or labels.dtype != torch.int64 or labels.ndim != 1:
        if ignore_index is not None and rows:
            raise ValueError("ignore_index needs labels: an int64 tensor of one label a row, as the first row tensor")
        return None
    ignored = (labels == IGNORED) | (labels == (IGNORED if ignore_index is None else ignore_index))
    bad = (labels < 0) & ~ignored
    if (vocabulary := _outputs_of(linear)) is not None:
        bad |= (labels >= vocabulary) & ~ignored
    kept = torch.where(labels != ignore_index)[0] if ignore_index is not None else None
    if bad.any():
        where = int(bad.nonzero()[0])
        raise ValueError(
            f"label {int(labels[where])} in row {where} is out of range: the layer has {vocabulary or 'no negative'} outputs"
            f"; a row to leave out is labelled {IGNORED if ignore_index is None else ignore_index}"
        )
    return None if kept is None or len(kept) == len(labels) else kept
