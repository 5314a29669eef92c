"""nf4_linear against a linear layer over the decoded weight: values, gradients, and what is kept for the backward."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit

from helpers.nf4 import INTERPRETED
from helpers.nf4_linear import nf4_linear, triton_nf4
from helpers.nf4_reference import dequantize_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUT, IN = 64, 128


def quantized(dtype=torch.float32, out=OUT, inputs=IN):
    torch.manual_seed(0)
    weight = torch.randn(out, inputs, dtype=dtype, device=DEVICE)
    return bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")


def layer(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return Linear4bit(IN, OUT, bias=bias, compute_dtype=dtype, quant_type="nf4").to(DEVICE)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_the_decoded_weight(bias, transposed):
    packed, state = quantized()
    weight = dequantize_reference(packed, state)
    x = torch.randn(2, 3, IN, device=DEVICE, requires_grad=True)
    b = torch.randn(OUT, device=DEVICE, requires_grad=True) if bias else None
    inputs = [x, b] if bias else [x]
    found, expected = nf4_linear(x, packed.t() if transposed else packed, state, b), F.linear(x, weight, b)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_decides_the_dtype():
    packed, state = quantized()
    x = torch.randn(3, IN, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = nf4_linear(x, packed, state)
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.sum(), x)[0].dtype == torch.float32


def test_an_input_of_another_width_is_refused():
    packed, state = quantized()
    with pytest.raises(ValueError, match=r"x has 7 features.*\(64, 128\)"):
        nf4_linear(torch.randn(3, 7, device=DEVICE), packed, state)


def saved_by(function, *arguments):
    """The tensors that autograd keeps of a call."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        function(*arguments)
    return saved


def test_autograd_keeps_the_packed_weight_alone():
    packed, state = quantized()
    x = torch.randn(3, IN, device=DEVICE, requires_grad=True)
    (kept,) = saved_by(nf4_linear, x, packed, state)
    assert kept.data_ptr() == packed.data_ptr()


def test_compiled_whole_for_any_number_of_rows():
    packed, state = quantized()
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(lambda x: nf4_linear(x, packed, state), backend=backend, fullgraph=True)
    for rows in (3, 5):
        x = torch.randn(rows, IN, device=DEVICE, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)  # an error where a graph would hold for one number of rows alone
        found, expected = compiled(x), nf4_linear(x, packed, state)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), x), check_stride=False
        )


# A functional operator would be common to forward and backward, and the partitioner would save its output.
PARTITION = """
import torch, triton
from triton.backends.compiler import GPUTarget
class Driver:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
triton.runtime.driver.set_active(Driver())
from bitsandbytes.functional import QuantState
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from helpers import nf4
from helpers.nf4_linear import nf4_linear
nf4._capability, nf4._check = lambda device: (9, 0), lambda *arguments: None  # fake tensors on the CPU are fine here

def linear(x, packed, absmax, code2, absmax2, offset):
    state2 = QuantState(absmax2, None, code2, 256)
    state = QuantState(absmax, torch.Size((512, 256)), None, 64, "nf4", torch.bfloat16, offset, state2)
    return nf4_linear(x, packed, state)

def show(name):
    def compiler(graph, inputs):
        launches = sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes)
        outputs = [tuple(node.meta["val"].shape) for node in graph.graph.output_node().args[0] if node is not None]
        print(name, launches, *outputs, sep=";")
        return make_boxed_func(graph.forward)
    return compiler

with FakeTensorMode():
    sizes = {"uint8": [(65536, 1), (2048,)], "float32": [(256,), (8,), ()]}
    tensors = [torch.empty(s, dtype=getattr(torch, t)) for t in sizes for s in sizes[t]]
    x = torch.empty(32, 256, dtype=torch.bfloat16, requires_grad=True)
    compiled = aot_function(linear, show("forward"), show("backward"), min_cut_rematerialization_partition)
    compiled(x, *tensors).sum().backward()
"""


@pytest.mark.skipif(not INTERPRETED, reason="a GPU compiles for real")
def test_a_compiled_step_saves_the_packed_weight_and_decodes_again(said_without_interpreter):
    traced = said_without_interpreter("-c", PARTITION)
    forward, backward = (line.split(";") for line in traced.split("\n")[:2])
    assert forward[:2] == ["forward", "1"] and backward[:2] == ["backward", "1"]
    assert "(65536, 1)" in forward[2:] and not {"(512, 256)", "(256, 512)"} & set(forward[2:])


# ---- the switch


def test_the_switch_replaces_every_4bit_layer_and_undoes_itself():
    model = torch.nn.Sequential(layer(), torch.nn.ReLU(), torch.nn.Linear(OUT, 2).to(DEVICE))
    x = torch.randn(70, IN, device=DEVICE)
    weight = dequantize_reference(model[0].weight, model[0].weight.quant_state)
    stock = Linear4bit.forward
    with triton_nf4(model):
        assert "forward" in vars(model[0]) and "forward" not in vars(model[2])
        torch.testing.assert_close(model[0](x), F.linear(x, weight, model[0].bias))
    assert "forward" not in vars(model[0]) and model[0].forward.__func__ is stock


def test_the_switch_goes_under_a_hook_and_survives_an_error():
    module = layer()
    module._old_forward = module.forward  # as accelerate leaves it
    before = module._old_forward
    with pytest.raises(RuntimeError, match="stop"), triton_nf4(module):
        assert module._old_forward is not before
        raise RuntimeError("stop")
    assert module._old_forward is before


def test_a_model_without_4bit_layers_is_refused():
    with pytest.raises(ValueError, match="no bitsandbytes Linear4bit"), triton_nf4(torch.nn.Linear(2, 2)):
        pass


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_computes_what_bitsandbytes_computes(dtype):
    module = layer(dtype, bias=False)
    for rows in (1, 64, 500):  # both sides of the row count where bitsandbytes' own product is taken
        x = torch.randn(rows, IN, dtype=dtype, device=DEVICE, requires_grad=True)
        stock = module(x)
        with triton_nf4(module):
            ours = module(x)
        torch.testing.assert_close(ours, stock, rtol=1e-2, atol=1e-2)
        grad = torch.randn_like(ours)
        a, b = torch.autograd.grad(ours, x, grad)[0], torch.autograd.grad(stock, x, grad)[0]
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_what_inductor_keeps_is_smaller_than_the_decoded_weight():
    out, inputs = 1024, 512
    packed, state = quantized(torch.bfloat16, out, inputs)
    x = torch.randn(8, inputs, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    compiled = torch.compile(lambda x: nf4_linear(x.sin(), packed, state).cos(), fullgraph=True, dynamic=True)
    compiled(x)
    kept = saved_by(compiled, x)
    assert any(k.data_ptr() == packed.data_ptr() for k in kept)
    assert not any(k.numel() == out * inputs for k in kept)
