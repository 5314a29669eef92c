"""Sums of products are added in place; values and gradients stay what they were, and nothing else is changed."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from helpers.compiling import Recomputed
from helpers.summed_products import ADD, SumProducts


class Counted(CustomGraphPass):
    """The pass, and how many sums each of its graphs then has in place."""

    def __init__(self):
        self.counts: list[int] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        SumProducts()(graph)
        graph.lint()
        self.counts.append(sum(node.target is ADD for node in graph.nodes))

    def uuid(self) -> None:
        return None  # not to be cached


def compiled(function):
    torch._dynamo.reset()
    counted = Counted()

    def call(*args, upstream=None):
        with torch._inductor.config.patch(joint_custom_pre_pass=Recomputed(), post_grad_custom_post_pass=counted):
            out = torch.compile(function, dynamic=True, fullgraph=True)(*args)
            if upstream is not None:
                out.backward(upstream)  # which is compiled now
            return out

    return call, counted.counts


def lora(x, base, a, b):
    """[batch, length, out], as a LoRA layer makes it."""
    return x @ base + x @ a @ b


def gated(x, base, a, b):
    gate, up = lora(x, base, a, b), lora(x, base.flip(1), a.flip(0), b)
    return torch.nn.functional.silu(gate) * up


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (3, 5, 16), (16, 32), (16, 4), (4, 32)
    return [(torch.randn(shape, dtype=dtype) / 2).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_sum(dtype):
    given = tensors(dtype)
    truth = [x.detach().double().requires_grad_() for x in given]
    out = gated(*truth)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    function, counts = compiled(gated)
    found = function(*given, upstream=upstream.to(dtype))
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    for got, wanted in [(found, out), *((x.grad, y.grad) for x, y in zip(given, truth, strict=True))]:
        assert (got - wanted).norm() <= tolerance * wanted.norm()
    forward, backward = counts
    assert forward == 2, "gate and up"
    assert backward >= 3, "what each of the four products adds to x's gradient"


def test_what_is_read_elsewhere_stays():
    """A product that another function reads, or another product that is to be added itself; a sum of unequal shapes."""
    a, b, c = torch.randn(6, 8), torch.randn(8, 8), torch.randn(1, 8)

    def read_elsewhere(a, b, c):
        product = a @ b
        return product + torch.sin(product), product

    def read_by_a_product(a, b, c):
        product = a @ b
        return torch.relu(product + a.sin() @ b), torch.relu(a.cos() @ b + product @ b)

    def broadcast(a, b, c):
        return (torch.relu(a @ b + c @ b),)

    for case, number in ((read_elsewhere, 0), (read_by_a_product, 1), (broadcast, 0)):
        function, counts = compiled(case)
        for got, wanted in zip(function(a, b, c), case(a, b, c), strict=True):
            torch.testing.assert_close(got, wanted)
        assert counts == [number], case.__name__


def test_a_sum_of_three_products_is_one_tensor():
    a, b, c = torch.randn(6, 8), torch.randn(8, 4), torch.randn(4, 8)

    def three(a, b, c):
        return torch.relu((a @ b @ c + a @ (b @ c)) + a.sin() @ (b @ c))

    function, counts = compiled(three)
    torch.testing.assert_close(function(a, b, c), three(a, b, c))
    assert counts == [2]
