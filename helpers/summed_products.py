"""Sums of matrix products, none of which is written out apart, in graphs that Inductor compiles.

A LoRA layer adds two products, its base's and its factors', and a backward pass adds one more for each layer that read
the same tensor. Inductor writes each product and adds them in a kernel of its own. But cuBLAS can add a product to what
lies there already, while it computes: so the product that costs least is written, and the others are added in place.
A sum of two then takes half the memory, and its elements are moved three times instead of five.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

aten = torch.ops.aten
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}

# Inductor takes an operation that changes an argument as it is if it returns nothing; `addmm_` returns the argument.
_library = torch.library.Library("qlora_sums", "DEF")
_library.define("add_product_(Tensor(a!) total, Tensor a, Tensor b) -> ()")


@torch.library.impl(_library, "add_product_", "CompositeExplicitAutograd")
def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    total.addmm_(a, b)


@torch.library.register_fake("qlora_sums::add_product_", lib=_library)
def _fake(total: Tensor, a: Tensor, b: Tensor) -> None:
    pass


ADD = torch.ops.qlora_sums.add_product_.default


class SumProducts(CustomGraphPass):
    """For Inductor's ``post_grad_custom_post_pass``, after which nodes keep their order.

    ``a @ b + c @ d`` then rounds the second product once, with the sum.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for node in [*graph.nodes]:
            if adds_products(node):
                total, other = sorted(map(_product, node.args), key=lambda p: (not _added(p), _inner(p)))
                if not _added(other):
                    _add_in_place(graph, node, total, other.args)
            elif node.target is aten.addmm.default and not node.kwargs:  # Inductor's, where no fused kernel reads a sum
                total = _product(node.args[0])
                if total is not None:
                    _add_in_place(graph, node, total, node.args[1:])

    def uuid(self) -> str:
        return "qlora: sum products, 1"


def adds_products(node: fx.Node) -> bool:
    """Whether ``node`` adds two matrix products that nothing else reads."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    first, second = map(_product, node.args)
    return first is not None and second is not None and first is not second


def _product(term: object) -> fx.Node | None:
    """The product that ``term`` is, or is a view of, if nothing else reads it."""
    while isinstance(term, fx.Node) and term.op == "call_function":
        if len(term.users) - len(_added(term)) != 1:
            return None
        if term.target is aten.mm.default:
            return term
        if term.target not in VIEWS:
            return None
        term = term.args[0]
    return None


def _added(product: fx.Node) -> list[fx.Node]:
    """What adds something to ``product`` in place."""
    return [user for user in product.users if user.target is ADD and user.args[0] is product]


def _inner(product: fx.Node) -> float:
    """How many products of numbers each element sums: a product of few is limited by memory in any case."""
    inner = product.args[1].meta["val"].shape[0]
    return inner if isinstance(inner, int) else float("inf")


def _add_in_place(graph: fx.Graph, node: fx.Node, total: fx.Node, factors: tuple[fx.Node, fx.Node]) -> None:
    """Have ``node``, the sum of ``total`` and the product of ``factors``, read ``total`` after that was added to it."""
    terms = [term for term in node.args if term not in factors]
    value, (a, b) = node.meta["val"], (factor.meta["val"] for factor in factors)
    alike = all(x.shape == value.shape and x.dtype == value.dtype for x in (term.meta["val"] for term in terms))
    if not alike or total.meta["val"].shape != (a.shape[0], b.shape[1]):
        return  # broadcast, converted, or two products seen as one shape
    term = next(term for term in terms if _product(term) is total)
    with graph.inserting_before(node):
        graph.call_function(ADD, (total, *factors))
        whole = total if term is total else graph.call_function(term.target, (total, *term.args[1:]))
        whole.meta["val"] = value
    node.replace_all_uses_with(whole)
    graph.erase_node(node)
    for gone in terms:  # the views that it read, and the other product
        while gone is not total and not gone.users:
            above = gone.args[0]
            graph.erase_node(gone)
            gone = above
