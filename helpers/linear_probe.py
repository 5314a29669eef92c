"""Before `helpers.linear_loss.linear_forward` does any work: are its arguments possible, and what does f return?"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .linear_chunk import Chunks, Graph, Watched
from .linear_plan import EAGER_BYTES, IGNORED, PROBED_ROWS, Form, Output, Plan, random_state, random_state_of

_FORMS: weakref.WeakKeyDictionary[Callable, dict[tuple, Form]] = weakref.WeakKeyDictionary()


def check_arguments(
    x: Tensor, linear: nn.Module, row_tensors: tuple, function: Callable, chunk_size: int | str, reduction: str | None,
    denominator: float | Tensor | None,
) -> tuple[int, list[Tensor | None]]:  # fmt: skip
    """The number of rows, and row tensors flattened to it."""
    if not isinstance(linear, nn.Module):
        raise TypeError(f"linear is a {type(linear).__name__}; it must be an nn.Module, whose parameters can be found")
    if not callable(function):
        raise TypeError(f"forward_function is a {type(function).__name__}; it must be callable")
    if chunk_size != "auto" and not (type(chunk_size) is int and chunk_size >= 1):
        raise ValueError(f"chunk_size is {chunk_size!r}; it must be 'auto' or at least 1 row")
    if reduction not in (None, "none", "sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}; it must be None, 'none', 'sum' or 'mean'")
    if denominator is not None and reduction in ("none", "mean"):
        raise ValueError(f"a denominator divides a sum, and reduction is {reduction!r}: leave one of them out")
    if isinstance(denominator, Tensor) and (denominator.numel() != 1 or denominator.requires_grad):
        raise ValueError("denominator must be a number, or a tensor of one without a gradient")
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
                f"row tensor {i} is {shape}, but x has rows of shape {tuple(leading)}: expand it to that leading shape "
                "or bind it to forward_function with functools.partial"
            )
        rows.append(row.reshape(leading.numel(), *row.shape[len(leading) :]))
    tensors = {"x": x} | {f"row tensor {i}": r for i, r in enumerate(rows) if r is not None}
    tensors |= {f"linear.{name}": p for name, p in linear.named_parameters() if not isinstance(p, DTensor)}
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


def _out_features(linear: nn.Module) -> int | None:
    return getattr(linear, "out_features", None)


def kept_rows(rows: Sequence[Tensor | None], ignore_index: int | None, linear: nn.Module, check: bool) -> Tensor | None:
    """Indices of the rows whose label is not ``ignore_index``, or None for all; ValueError on impossible labels."""
    labels = rows[0] if rows else None
    if labels is None or labels.dtype != torch.int64 or labels.ndim != 1:
        if ignore_index is not None and rows:
            raise ValueError("ignore_index needs labels: an int64 tensor of one label a row, as the first row tensor")
        return None
    if check:
        _check_labels(labels, IGNORED if ignore_index is None else ignore_index, _out_features(linear))
    if ignore_index is None:
        return None
    kept = torch.where(labels != ignore_index)[0]
    return None if len(kept) == len(labels) else kept


def _check_labels(labels: Tensor, ignored: int, vocabulary: int | None) -> None:
    bad = labels < 0 if vocabulary is None else (labels < 0) | (labels >= vocabulary)
    bad &= (labels != ignored) & (labels != IGNORED)
    if bad.any():
        where = int(bad.nonzero()[0])
        raise ValueError(
            f"label {int(labels[where])} in row {where} is out of range: it must be at least 0"
            + (f" and below {vocabulary}" if vocabulary else "")
            + f", or {ignored} to be ignored"
        )


def form_of(plan: Plan, x: Tensor, rows: Sequence[Tensor | None], parameters: Sequence[Tensor], graph: bool) -> Form:
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
    with random_state_of(random_state(x.device), x.device), plan.chunks(parameters) as chunks:
        chunks.linear = watched = Watched(plan.linear)
        try:
            found = chunks.graph(inputs, needs) if graph else Graph(chunks.outputs(inputs), inputs)
        except Exception:  # f may want a real module; if that is not it, the error is f's own
            chunks.linear = plan.linear
            found = chunks.graph(inputs, needs) if graph else Graph(chunks.outputs(inputs), inputs)
            watched = None
        form = _described(found.outputs, chunks.single, len(inputs[0]), graph)
        form.vocabulary = (watched.vocabulary if watched else None) or _out_features(plan.linear) or 1
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
            "forward_function's output cannot be differentiated: no graph leads back to its input (is there a detach, "
            "an argmax or a no_grad inside?). To evaluate only, call linear_forward under torch.no_grad()"
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
                "parameter of linear nor a row tensor; its gradient would be lost: make it part of linear, or detach it"
            )
