"""One chunk of rows through a linear layer and a function of its output, with gradients by torch.autograd.

`Chunks` is used by `helpers.linear_loss`. What is peculiar here: the layer's trained parameters are replaced by leaves
for the duration, so that nothing reaches a parameter's ``grad`` or hooks; and the graph of a trained plain layer is cut
at the logits, so that the product that makes its weight's gradient can add to the sum over chunks by itself.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class Chunks:
    """A context in which f is run on chunks, and the gradients of ``linear``'s parameters are added up over them.

    Args:
        function: f(x, linear, *rows), unmodified.
        linear: the layer; within, it holds ``leaves`` in place of ``parameters``.
        trained: parameters as linear holds them, and the plain tensor that stands for each (gathered, if sharded).
        frozen: the same of others that must be replaced.
        sum_dtype: of the sums; None: the parameter's.
        autocast: what `autocast_now` returned when f was first called.
        cast: autocast may cast a plain layer's weight once rather than at every chunk: f only calls the layer.
        cut: cut the graph at the logits.
        compile: run f through torch.compile.
        walks: how often a graph may have to be walked backward.
    """

    def __init__(
        self,
        function: Callable,
        linear: nn.Module,
        trained: Sequence[tuple[nn.Parameter, Tensor]] = (),
        frozen: Sequence[tuple[nn.Parameter, Tensor]] = (),
        *,
        sum_dtype: torch.dtype | None = torch.float32,
        autocast: dict[str, Any] | None = None,
        cast: bool = False,
        cut: bool = False,
        compile: bool = False,
        walks: int = 1,
    ):
        self.function, self.linear, self.cut = function, linear, cut
        self._compiled = _compiled(function) if compile else None
        self._autocast, self._sum_dtype, self._walks = autocast, sum_dtype, walks
        self.single = True  # f returned a tensor, not a tuple
        dtype = autocast["dtype"] if cast and autocast and autocast["enabled"] and type(linear) is nn.Linear else None

        def leaf(tensor: Tensor, requires_grad: bool) -> nn.Parameter:
            tensor = tensor.detach()
            if dtype is not None and tensor.dtype == torch.float32:
                tensor = tensor.to(dtype)
            return nn.Parameter(tensor, requires_grad)

        self.leaves = [leaf(tensor, True) for _, tensor in trained]
        self._wanted = [tensor.dtype for _, tensor in trained]
        swaps = dict(zip([id(p) for p, _ in trained], self.leaves, strict=True))
        swaps |= {id(p): leaf(tensor, False) for p, tensor in frozen}
        if dtype is not None and not trained:
            swaps |= {id(p): leaf(p, False) for p in linear.parameters() if id(p) not in swaps}
        self._swaps = swaps
        self.sums: list[Tensor | None] = [None] * len(self.leaves)

    def __enter__(self) -> Chunks:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(_swapped(self.linear, self._swaps))
        if self._autocast is not None:
            self._stack.enter_context(torch.autocast(**self._autocast, cache_enabled=False))
        if self._compiled is not None and self._walks > 1:
            # Otherwise the compiled backward pass writes over what it saved, and cannot run again.
            self._stack.enter_context(torch._functorch.config.patch(donated_buffer=False))
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            # An outer checkpoint or offload would take what a chunk saves, and recompute itself to give it back.
            self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def outputs(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """What f returns for ``inputs``, x and row tensors, always as a tuple, without a graph."""
        with torch.no_grad():
            return self._call(self.linear, [None if t is None else t.detach() for t in inputs])

    def graph(self, inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> Graph:
        """f's outputs with the graph back to the inputs that ``needs`` names, and to the leaves."""
        with torch.enable_grad():
            inputs = [None if t is None else t.detach().requires_grad_(g) for t, g in zip(inputs, needs, strict=True)]
            if not self.cut:
                return Graph(self._call(self.linear, inputs), inputs)
            y = self.linear(inputs[0])
            logits = y.detach().requires_grad_()
            return Graph(self._call(lambda _: logits, inputs, logits), inputs, y, logits)

    def gradients(self, graph: Graph, cotangents: Sequence[Tensor | None], retain: bool = False) -> list[Tensor | None]:
        """Gradients to x and rows, None where not asked for; those of the leaves are added to ``sums``."""
        pairs = [(o, c) for o, c in zip(graph.outputs, cotangents, strict=True) if c is not None and o.requires_grad]
        found: dict[int, Tensor] = {}  # by the id of the input
        asked = [t for t in graph.inputs if t is not None and t.requires_grad]
        if pairs:
            outputs, cotangents = zip(*pairs, strict=True)
            middle = [graph.logits] if self.cut else self.leaves
            gradients = torch.autograd.grad(
                outputs, [*asked, *middle], cotangents, retain_graph=retain, allow_unused=True
            )
            found = {id(t): g for t, g in zip(asked, gradients, strict=False) if g is not None}
            if not self.cut:
                for i, gradient in enumerate(gradients[len(asked) :]):
                    self._add(i, gradient)
            elif gradients[-1] is not None:
                self._through_linear(graph, gradients[-1], found)
        return [found.get(id(t)) if t is not None else None for t in graph.inputs]

    def finished_sums(self) -> list[Tensor | None]:
        """The sums in the dtypes of their parameters."""
        return [s if s is None else s.to(dtype) for s, dtype in zip(self.sums, self._wanted, strict=True)]

    def _through_linear(self, graph: Graph, cotangent: Tensor, found: dict[int, Tensor]) -> None:
        x = graph.inputs[0]
        if x.requires_grad:  # before the sums change, so that a chunk that runs out of memory can be repeated
            (dx,) = torch.autograd.grad(graph.y, x, cotangent, retain_graph=True)
            found[id(x)] = dx if id(x) not in found else found[id(x)] + dx
        weight = next(i for i, leaf in enumerate(self.leaves) if leaf.ndim == 2)
        fresh = self.sums[weight] is None
        total = torch.empty_like(self.leaves[weight], dtype=self._dtype_of_sum(weight)) if fresh else self.sums[weight]
        with _AddingProduct(self.leaves[weight], total, fresh) as product:
            gradients = torch.autograd.grad(graph.y, self.leaves, cotangent)
        if product.added:
            self.sums[weight] = total
        for i, gradient in enumerate(gradients):
            if i != weight or not product.added:
                self._add(i, gradient)

    def _dtype_of_sum(self, i: int) -> torch.dtype:
        own = self.leaves[i].dtype
        if own == torch.float16:  # it would overflow
            return torch.float32
        return own if self._sum_dtype is None else torch.promote_types(own, self._sum_dtype)

    def _add(self, i: int, gradient: Tensor | None) -> None:
        if gradient is None:
            return
        if self.sums[i] is None:
            self.sums[i] = gradient.to(self._dtype_of_sum(i), copy=True)  # two parameters may share one gradient
        else:
            self.sums[i].add_(gradient)

    def _call(self, linear: Callable, inputs: Sequence[Tensor | None], *more: Tensor) -> tuple[Tensor, ...]:
        x, *rows = inputs
        function = self.function
        if self._compiled is not None and len(x) > 1:  # torch.compile takes a size of 1 for a constant: another graph
            function = self._compiled
            for tensor in (*inputs, *more):
                for dim in range(1, tensor.ndim if tensor is not None else 0):
                    torch._dynamo.mark_static(tensor, dim)
        outputs = function(x, linear, *rows)
        self.single = not isinstance(outputs, (tuple, list))
        return (outputs,) if self.single else tuple(outputs)


@dataclass
class Graph:
    """f's outputs on a chunk and what they were made of; ``y`` and ``logits`` where the graph is cut between them."""

    outputs: tuple[Tensor, ...]
    inputs: list[Tensor | None]
    y: Tensor | None = None
    logits: Tensor | None = None


class _AddingProduct(TorchDispatchMode):
    """Within, the product by which autograd makes the gradient of ``weight`` [out, in] adds to ``total`` itself.

    Autograd decides what is multiplied; only where the result goes is changed: no [out, in] temporary, no second pass,
    and one rounding less. What autograd gets is a stand-in of the shape and without storage. ``added`` says whether it
    happened: if not, because this release multiplies otherwise, the gradient that autograd returns is the real one.
    """

    def __init__(self, weight: Tensor, total: Tensor, fresh: bool):
        super().__init__()
        self.weight, self.total, self.beta, self.added = weight, total, 0 if fresh else 1, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default and not self.added:
            a, b = args
            if (a.shape[0], b.shape[1]) == self.weight.shape and b.data_ptr() != self.weight.data_ptr():
                self.added = True
                _add_product(self.total, a, b, self.beta)
                return a.new_zeros(()).expand(self.weight.shape)
        return function(*args, **(kwargs or {}))


def _add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """``total = beta * total + a @ b``, not rounded to the dtype of a and b on the way."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


def _compiled(function: Callable) -> Callable:
    """``function`` under torch.compile, once for all numbers of rows.

    The wrapper takes milliseconds to make, so the function keeps it; not a closure over tensors, which would then wait
    for the garbage collector. A wrapper made anew finds the same code compiled.
    """
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    kept = getattr(function, "__dict__", None)
    if kept is None or any(isinstance(value, Tensor) for value in cells):
        return torch.compile(function, dynamic=True)
    if "_compiled_for_chunks" not in kept:
        kept["_compiled_for_chunks"] = torch.compile(function, dynamic=True)
    return kept["_compiled_for_chunks"]


@contextlib.contextmanager
def _swapped(module: nn.Module, swaps: dict[int, nn.Parameter]) -> Iterator[None]:
    """``module`` with other parameters, by the id of those they replace; FSDP2's hooks, which would gather, are off."""
    places = [(m, name, p) for m in module.modules() for name, p in m._parameters.items() if id(p) in swaps]
    hooks = [(m, name, vars(m)[name]) for m in module.modules() if isinstance(m, FSDPModule) for name in HOOKS]
    for m, name, p in places:
        m._parameters[name] = swaps[id(p)]
    for m, name, _ in hooks:
        setattr(m, name, OrderedDict())
    try:
        yield
    finally:
        for m, name, p in places:
            m._parameters[name] = p
        for m, name, hook in hooks:
            setattr(m, name, hook)


def autocast_now(device: torch.device) -> dict[str, Any]:
    """The autocast state of ``device``'s type, as arguments of torch.autocast."""
    return {
        "device_type": device.type,
        "dtype": torch.get_autocast_dtype(device.type),
        "enabled": torch.is_autocast_enabled(device.type),
    }


class Watched:
    """A stand-in for ``linear`` that notes how f uses it: what it is called with, and whether else touched."""

    def __init__(self, linear: nn.Module):
        self.__dict__.update(_linear=linear, calls=[], vocabulary=None, touched=False)

    def __call__(self, *args, **kwargs):
        y = self._linear(*args, **kwargs)
        self.calls.append(args[0] if len(args) == 1 and not kwargs else None)
        self.__dict__["vocabulary"] = y.shape[-1]
        return y

    def __getattr__(self, name: str):
        self.__dict__["touched"] = True
        return getattr(self._linear, name)
