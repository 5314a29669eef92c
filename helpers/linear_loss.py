"""Any function of a linear layer's output, forward and backward, without that output: logits exist a chunk at a time.

``linear_forward(x, linear, labels, forward_function=f)`` is ``f(x, linear, labels)``, for an f that treats rows apart.
No derivative is written here: torch.autograd differentiates f, as it is, on each chunk (`helpers.linear_chunk`).

A sum over rows is differentiated in the forward pass, where the chunk's logits are at hand and are made only once; the
gradients are multiplied by the upstream one later, for a sum's gradient is linear in it. Outputs a row each are made
again in the backward pass, where each row's upstream gradient is known; but where only x is trained, d(output)/dx is no
bigger than x and is kept instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .linear_chunk import autocast_now
from .linear_plan import IGNORED, Outputs, Plan, random_state, random_state_of, whole_parameters
from .linear_probe import check_arguments, form_of, kept_rows

__all__ = ["IGNORED", "MemoryEfficientLinear", "linear_forward"]

FP16_SCALE = 1024.0  # of a float16 chunk's cotangent, divided out in float32: small probabilities survive
COMPILE_LOGITS = 2**26  # from so many logits on, compiling f pays on a GPU
MAX_JACOBIANS = 4  # columns of outputs whose d/dx are kept; with more, recomputing is cheaper


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
    check_labels: bool = True,
) -> Tensor | tuple[Tensor, ...]:
    """``forward_function(x, linear, *row_tensors)`` in chunks of rows, with gradients to x, linear and row tensors.

    Args:
        x: [..., hidden], of any floating dtype.
        linear: the layer: plain, quantized, tied, or wrapped by PEFT. What it trains gets gradients.
        row_tensors: labels, advantages, masks, ...: [..., *anything] with x's leading shape; or None, handed on. The
            first, if it is int64, is taken for labels, each in [0, vocabulary) or ignored (-100 or ``ignore_index``).
        forward_function: called with x [rows, hidden], linear, and row tensors [rows, *anything]. Returns a scalar, or
            a tuple of a scalar and metrics (scalars are added up, rows concatenated, neither passes a gradient); or a
            tensor or tuple of tensors [rows, *anything], of which those that do not require grad pass none. What it
            returns for a row must not depend on others. It is called once more, on the first rows, to find out.
        chunk_size: rows at a time; "auto": as many as are fast, fewer where memory is short, halved when it runs out.
        reduction: None: scalars are added up, outputs a row each returned as they are. "none": the latter is demanded.
            "sum", "mean": one scalar. "mean" weighs the means that f returns by the rows of their chunks, without those
            labelled ``ignore_index`` (-100).
        denominator: what a sum is divided by, e.g. num_items_in_batch.
        ignore_index: rows with this label are left out before any work is done, and are zero in outputs a row each: for
            an f that gives them no weight.
        compile: torch.compile f, once for all lengths; "auto": on a GPU, given work enough.
        sum_dtype: of the sum of a parameter's gradients over chunks; None: its own, at half the memory, unless float16.
        check_labels: look for labels out of range, which waits for the GPU (so does leaving rows out).

    Returns: a scalar (float32; float64 of float64) and metrics, or outputs [..., *anything] with x's leading shape.

    Raises: TypeError or ValueError, before any work; RuntimeError, when backward runs a second time.
    """
    n, rows = check_arguments(x, linear, row_tensors, forward_function, chunk_size, reduction, denominator)
    flat = x.reshape(n, x.shape[-1])
    ignore_index = IGNORED if reduction == "mean" and ignore_index is None else ignore_index
    kept = kept_rows(rows, ignore_index, linear, check_labels)
    count = n if kept is None else len(kept)
    trained, frozen, tensors = whole_parameters(linear, x.device)
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in (flat, *trained, *rows) if t is not None)
    plan = Plan(forward_function, linear, trained, frozen, sum_dtype, autocast_now(x.device), count, kept)
    plan.form = form_of(plan, flat, rows, tensors, graph)
    first = plan.form.outputs[0]
    if reduction == "none" and not first.per_row:
        raise ValueError("reduction 'none' needs outputs of a row each, and forward_function returned a scalar")
    if first.per_row and denominator is not None and reduction != "sum":
        raise ValueError("a denominator divides a sum: give reduction='sum' too, or divide the outputs")
    plan.total = not first.per_row or reduction in ("sum", "mean")
    plan.weigh = reduction == "mean" and not first.per_row
    work = count * plan.form.vocabulary
    plan.compile = compile is True or (compile == "auto" and x.is_cuda and work >= COMPILE_LOGITS)
    plan.auto = chunk_size == "auto"
    plan.rows = wanted = plan.auto_rows(x.device) if plan.auto else int(chunk_size)
    if reduction == "mean":
        denominator = max(count, 1) * (first.shape.numel() if first.per_row else 1)
    plan.denominator = denominator.to(x.device).reshape(()) if isinstance(denominator, Tensor) else denominator
    if graph:
        outputs = list(MemoryEfficientLinear.apply(plan, flat, len(rows), *rows, *tensors))
    else:
        outputs = _without_graph(plan, (flat, *rows), tensors)
    if plan.rows < wanted:
        plan.form.rows = plan.rows
    outputs = [o.reshape(*x.shape[:-1], *o.shape[1:]) if o.ndim else o for o in outputs]
    return outputs[0] if plan.form.single else tuple(outputs)


class MemoryEfficientLinear(torch.autograd.Function):
    """f of a linear layer, a chunk at a time. All tensors are arguments, so that autograd routes their gradients.

    ``apply(plan, x [n, hidden], number of row tensors, *row tensors, *trained parameters)``, as `linear_forward` does.
    """

    @staticmethod
    def forward(ctx, plan: Plan, x: Tensor, row_tensors: int, *tensors: Tensor | None):
        inputs, parameters = (x, *tensors[:row_tensors]), tensors[row_tensors:]
        ctx.plan, ctx.inputs, ctx.used = plan, len(inputs), False
        ctx.needs = (ctx.needs_input_grad[1], *ctx.needs_input_grad[3 : 2 + len(inputs)])
        half = torch.float16 in (x.dtype, plan.autocast["dtype"] if plan.autocast["enabled"] else None)
        upcast = all(output.dtype != torch.float16 for output in plan.form.outputs)
        ctx.scale = FP16_SCALE if half and upcast else 1.0
        if plan.total:
            ctx.kind, ctx.dtypes = "sum", [None if t is None else t.dtype for t in (*inputs, *parameters)]
            cotangent, ctx.scale = _cotangent(plan.denominator, ctx.scale)
            outputs, saved = _sum(plan, inputs, parameters, ctx.needs, cotangent)
            fixed = outputs[1:]
        else:
            if ctx.needs[0] and not any(ctx.needs[1:]) and not parameters and plan.columns <= MAX_JACOBIANS:
                ctx.kind = "jacobians"
                outputs, saved = _with_jacobians(plan, inputs, ctx.needs, ctx.scale)
            else:
                ctx.kind, ctx.random = "again", random_state(x.device)
                outputs, saved = _without_graph(plan, inputs, parameters), (*inputs, *parameters)
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
            with random_state_of(ctx.random, saved[0].device):
                gradients = _again(ctx.plan, saved[: ctx.inputs], saved[ctx.inputs :], ctx.needs, upstream)
        return None, gradients[0], None, *gradients[1:]


def _cotangent(denominator: float | Tensor | None, scale: float) -> tuple[float | Tensor, float | Tensor]:
    """What a sum's gradient starts from, ``scale / denominator``; and what the result must be divided by for that.

    Where the upstream gradient is one, the saved gradient is then handed on as it is. In float16 the denominator would
    undo the scale: its power of two goes into the scale too.
    """
    if denominator is None:
        return scale, scale
    if scale != 1:
        power = torch.as_tensor(denominator, dtype=torch.float32).abs().log2().round()
        scale = torch.ldexp(torch.full_like(power, scale), power.int())
    return scale / denominator, scale


def _sum(
    plan: Plan,
    inputs: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    needs: Sequence[bool],
    cotangent: float | Tensor,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The first output's sum and the metrics; and the sum's gradients from ``cotangent`` to inputs and parameters."""
    outputs = Outputs(plan, inputs[0])
    gradients = [plan.buffer(t) if need else None for t, need in zip(inputs, needs, strict=True)]
    with plan.chunks(parameters, cut=True) as chunks:

        def work(start: int, stop: int) -> None:
            graph = chunks.graph(plan.take(inputs, start, stop), needs)
            ones = torch.ones_like(graph.outputs[0])
            start_from = (ones * cotangent * (stop - start if plan.weigh else 1)).to(ones.dtype)
            found = chunks.gradients(graph, [start_from, *[None] * (len(graph.outputs) - 1)])
            plan.put(gradients, found, start, stop)
            outputs.add(graph.outputs, start, stop)

        plan.each_chunk(work)
        return outputs.finished(), [*gradients, *chunks.sums]


def _with_jacobians(
    plan: Plan, inputs: Sequence[Tensor | None], needs: Sequence[bool], scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs a row each; and for each of their columns d(column)/dx times ``scale``, [n, hidden]."""
    outputs = Outputs(plan, inputs[0])
    jacobians = [plan.buffer(inputs[0]) for _ in range(plan.columns)]
    columns = [(i, j) for i, output in enumerate(plan.form.outputs) for j in range(output.columns)]
    with plan.chunks() as chunks:

        def work(start: int, stop: int) -> None:
            graph = chunks.graph(plan.take(inputs, start, stop), needs)
            for (i, j), jacobian in zip(columns, jacobians, strict=True):
                cotangents: list[Tensor | None] = [None] * len(graph.outputs)
                cotangents[i] = torch.zeros_like(graph.outputs[i], memory_format=torch.contiguous_format)
                cotangents[i].view(stop - start, -1)[:, j] = scale
                found = chunks.gradients(graph, cotangents, retain=jacobian is not jacobians[-1])
                plan.put([jacobian], found[:1], start, stop)
            outputs.add(graph.outputs, start, stop)

        plan.each_chunk(work)
    return outputs.finished(), jacobians


def _times_jacobians(plan: Plan, jacobians: Sequence[Tensor], upstream: Sequence[Tensor], scale: float) -> Tensor:
    columns = [
        gradient.reshape(len(gradient), -1)[:, j]
        for output, gradient in zip(plan.form.outputs, upstream, strict=True)
        for j in range(output.columns)
    ]
    parts = [_scaled(j, column / scale, j.dtype) for j, column in zip(jacobians, columns, strict=True)]
    for part in parts[1:]:
        parts[0].add_(part)
    return parts[0]


def _again(
    plan: Plan, inputs: Sequence[Tensor | None], parameters: Sequence[Tensor], needs: Sequence[bool],
    upstream: Sequence[Tensor],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients to inputs and parameters of outputs a row each, which are made again."""
    gradients = [plan.buffer(t) if need else None for t, need in zip(inputs, needs, strict=True)]
    with plan.chunks(parameters, cut=True) as chunks:

        def work(start: int, stop: int) -> None:
            graph = chunks.graph(plan.take(inputs, start, stop), needs)
            plan.put(gradients, chunks.gradients(graph, plan.take(upstream, start, stop)), start, stop)

        plan.each_chunk(work, again=True)
        return [*gradients, *chunks.finished_sums()]


def _without_graph(plan: Plan, inputs: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor]:
    outputs = Outputs(plan, inputs[0])
    with plan.chunks(parameters) as chunks:
        plan.each_chunk(lambda start, stop: outputs.add(chunks.outputs(plan.take(inputs, start, stop)), start, stop))
    return outputs.finished()


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """``gradient * factor``, one for all or one a row, in float32; as ``dtype``, in place if that is its own."""
    if gradient is None:
        return None
    factor = torch.atleast_1d(factor.to(torch.promote_types(factor.dtype, torch.float32)))
    factor = factor.reshape(factor.shape + (1,) * (gradient.ndim - factor.ndim))
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor, out=out)
