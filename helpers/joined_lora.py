"""Fewer and narrower operations of LoRA layers, in graphs that Inductor compiles.

q, k and v read the same hidden state, and so do gate and up. LoRA's first factors are a few rows each: joined, they
read it once instead of three times, in forward and again for their own gradients, and what they add to the hidden
state's gradient is summed within a product. And LoRA's scale multiplies what the second factor makes, as wide as the
layer; here it multiplies what that factor reads, a few columns, and so does its gradient. The sums are the same, of
products that may round in another order.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.custom_graph_pass import CustomGraphPass

MOST_ROWS = 256  # of a factor; larger matrices are no gain
LINEAR = torch._C._nn.linear  # what torch.nn.functional.linear is in a graph
AUTOCAST = {torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast}


class JoinLoRA(CustomGraphPass):
    """For Inductor's ``pre_grad_custom_pass``: autograd then goes through the joined products."""

    def __call__(self, graph: fx.Graph) -> None:
        groups: dict[tuple, list[fx.Node]] = defaultdict(list)
        part = 0  # what is computed under another autocast is not joined
        for node in graph.nodes:
            part += node.op == "call_function" and node.target in AUTOCAST
            if _is_small(node):
                groups[part, *_read(node.args[0])].append(node)
        for nodes in groups.values():
            if len(nodes) > 1:
                _join(graph, nodes)
        for node in graph.find_nodes(op="call_function", target=operator.mul):
            _scale_before(graph, node)

    def uuid(self) -> str:
        return "qlora: join LoRA, 2"


def _is_small(node: fx.Node) -> bool:
    """Whether ``node`` is a product with few rows of a weight that the graph is given, and nothing added."""
    return _is_plain(node) and node.args[1].meta["example_value"].shape[0] <= MOST_ROWS


def _is_plain(node: fx.Node) -> bool:
    """Whether ``node`` is a product with a weight that the graph is given, and nothing added."""
    if node.op != "call_function" or node.target is not LINEAR or node.kwargs or len(node.args) not in (2, 3):
        return False
    x, weight, *bias = node.args
    return not any(b is not None for b in bias) and isinstance(x, fx.Node) and weight.op == "placeholder"


def _read(x: fx.Node) -> tuple:
    """What a layer reads, and in which dtype: PEFT converts the tensor anew for each."""
    if x.op == "call_method" and x.target == "to" and len(x.args) == 1 and x.kwargs.keys() == {"dtype"}:
        return x.args[0], x.kwargs["dtype"]
    return x, None


def _join(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Replace ``nodes``, linears of one input, by one of all their weights."""

    def call(function: Callable, *args: Any) -> fx.Node:
        node = graph.call_function(function, args)
        given = fx.node.map_arg(args, lambda n: n.meta["example_value"])
        with enable_python_dispatcher(), torch.no_grad():  # sizes are symbols
            node.meta["example_value"] = function(*given)
        return node

    weights = [node.args[1] for node in nodes]
    rows = [weight.meta["example_value"].shape[0] for weight in weights]
    with graph.inserting_before(nodes[0]):
        product = call(LINEAR, nodes[0].args[0], call(torch.cat, weights))
        parts = call(torch.split, product, rows, -1)
        for i, node in enumerate(nodes):
            part = call(operator.getitem, parts, i)
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)


def _scale_before(graph: fx.Graph, node: fx.Node) -> None:
    """Replace ``linear(x, weight) * scale`` by ``linear(x * scale, weight)`` where x is the narrower side."""
    product, scale = node.args
    if not (isinstance(product, fx.Node) and _is_plain(product) and len(product.users) == 1):
        return
    if not isinstance(scale, float | int):
        return
    x, weight, *_ = product.args
    out, inner = weight.meta["example_value"].shape
    if inner > min(out, MOST_ROWS):
        return
    with graph.inserting_before(product):
        scaled = graph.call_function(operator.mul, (x, scale))
        scaled.meta["example_value"] = x.meta["example_value"]
    product.replace_input_with(x, scaled)
    node.replace_all_uses_with(product)
    graph.erase_node(node)
