"""LoRA factors that read one tensor become one product; results and gradients stay what they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import checkpoints
from helpers.joined_lora import LINEAR, JoinLoRA


def joined(function):
    """``function`` compiled by the pass alone, and the number of products it had before and after."""
    counts = []

    def backend(graph_module, example_inputs):
        for change in (lambda graph: None, JoinLoRA()):
            change(graph_module.graph)
            counts.append(sum(node.target is LINEAR for node in graph_module.graph.nodes))
        graph_module.graph.lint()
        graph_module.recompile()
        return graph_module

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=True), counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_what_it_was(dtype):
    torch.manual_seed(0)
    model = checkpoints.attach_lora(checkpoints.load_base("shape:tiny", dtype).model, 8)
    layer = model.get_base_model().model.layers[0].train()
    for name, parameter in layer.named_parameters():
        if "lora_B" in name:  # zeros at first
            parameter.data.normal_()
    attention, width = layer.self_attn, layer.input_layernorm.weight.shape[0]
    hidden = torch.randn(2, 12, width, dtype=dtype, requires_grad=True)  # PEFT converts it for each layer
    upstream = None

    def results(function):
        nonlocal upstream
        layer.zero_grad()
        hidden.grad = None
        out = torch.cat(function(hidden), -1)
        upstream = torch.randn_like(out) if upstream is None else upstream
        out.float().backward(upstream.float())
        return [out.detach(), hidden.grad, *[p.grad.clone() for p in layer.parameters() if p.grad is not None]]

    def products(x):
        mlp = layer.mlp
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x), mlp.gate_proj(x), mlp.up_proj(x)

    expected = results(products)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    function, counts = joined(products)
    found = results(function)
    assert len(found) == len(expected) == 12
    for got, wanted in zip(found, expected, strict=True):
        assert (got - wanted).norm() <= tolerance * wanted.norm()
    assert counts[0] - counts[1] == 4, "five factors of one tensor are one"


@pytest.mark.parametrize("case", ["another tensor", "a bias", "many rows", "another dtype", "another autocast"])
def test_what_differs_stays_apart(case):
    torch.manual_seed(0)
    a, b = nn.Linear(16, 4, bias=False), nn.Linear(16, 300 if case == "many rows" else 4, bias=case == "a bias")

    def function(x):
        if case == "another autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return a(x), b(x * 1.0)
        y = x * 2 if case == "another tensor" else x
        return a(x), b(y.to(torch.float64).to(torch.float32)) if case == "another dtype" else b(y)

    changed, counts = joined(function)
    x = torch.randn(3, 16)
    for got, wanted in zip(changed(x), function(x), strict=True):
        torch.testing.assert_close(got, wanted)
    assert counts == [2, 2]
