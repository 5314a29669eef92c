"""NF4Tensor alone: no copy, no other byte, every operation that FSDP2 performs, and the same result compiled."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from helpers.fsdp2 import frozen_bytes
from helpers.nf4_tensor import NF4Linear, NF4Tensor, unpack, use_nf4_tensors

SHAPES = [(512, 256), (576, 192), (300, 64), (96, 64), (7, 33)]


def params4bit(shape, nested=True, storage=torch.uint8, payload=None, quant_type="nf4"):
    generator = torch.Generator().manual_seed(shape[0])
    packed, state = quantize_4bit(
        torch.randn(shape, generator=generator), quant_type=quant_type, compress_statistics=nested
    )
    if payload is not None:
        packed = payload[: packed.numel()].view(-1, 1)
    stored = packed.view(-1).view(storage).view(-1, 1)
    return Params4bit(stored, quant_state=state, quant_type=quant_type, bnb_quantized=True)


def linear(shape=(128, 64), dtype=torch.float32, bias=False):
    module = Linear4bit(shape[1], shape[0], bias=bias, compute_dtype=dtype, quant_type="nf4")
    module.to("cpu")
    return module.requires_grad_(False)


def test_frozen_weights_count_as_they_are_stored():
    module = nn.Module()
    module.ours = NF4Linear(linear()).weight
    module.another_subclass = nn.Parameter(TwoTensor(torch.zeros(6), torch.zeros(6)), requires_grad=False)
    stored = 128 * 64 // 2 + 128 + 4  # half a byte a weight, a byte a block, 4 of its one double-quantisation block
    assert frozen_bytes(module) == {"ours": stored, "another_subclass": 48}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nested", [True, False])
def test_wraps_and_unwraps_without_copy(shape, nested):
    weight = params4bit(shape, nested)
    tensor = NF4Tensor.from_params4bit(weight, shards=3)
    back = tensor.to_params4bit()
    assert tensor.packed.data_ptr() == weight.data_ptr() == back.data_ptr()
    assert back.quant_state.absmax.data_ptr() == weight.quant_state.absmax.data_ptr()
    assert torch.equal(back.data, weight.data) and back.quant_state.shape == weight.quant_state.shape
    assert back.quant_state.nested is nested and tensor.shape[0] % 3 == 0


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_any_storage_dtype_is_read_as_bytes(storage):
    every_byte = torch.arange(256, dtype=torch.uint8).repeat(512)
    weight = params4bit((512, 256), storage=storage, payload=every_byte)
    packed, _ = unpack(NF4Tensor.from_params4bit(weight))
    assert packed.dtype == torch.uint8 and torch.equal(packed.view(-1), every_byte[: packed.numel()])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shards_as_fsdp2_cuts_them_join_to_the_same_bytes(shape, ranks):
    """The operations of FSDPParam's own set-up, then the hooks, without a process group."""
    payload = torch.randint(0, 256, (shape[0] * shape[1],), dtype=torch.uint8)
    weight = params4bit(shape, payload=payload)
    tensor = nn.Parameter(NF4Tensor.from_params4bit(weight, ranks), requires_grad=False)
    shards = []
    for chunk in torch.chunk(tensor, ranks):
        shard = tensor.new_zeros(chunk.size())
        shard.narrow(0, 0, chunk.size(0)).copy_(chunk)
        assert torch.as_strided(shard.view(-1), shard.size(), shard.stride()).shape == shard.shape
        shards.append(shard.cpu())
    mesh = SimpleNamespace(size=lambda: ranks)
    inputs = [shard.fsdp_pre_all_gather(mesh, None, None, None, None) for shard in shards]
    assert all(t.dtype == torch.uint8 for parts, _ in inputs for t in parts)
    outputs = [torch.cat(parts) for parts in zip(*(parts for parts, _ in inputs), strict=True)]
    whole, freed = shards[0].fsdp_post_all_gather(outputs, inputs[0][1], torch.bfloat16)
    packed, state = unpack(whole)
    assert torch.equal(packed, weight.data) and torch.equal(state.absmax, weight.quant_state.absmax)
    assert torch.equal(state.state2.absmax, weight.quant_state.state2.absmax)
    assert whole.shape == tensor.shape and packed.data_ptr() == outputs[0].data_ptr() and freed == ()
    held, all_bytes = shards[0].frozen_bytes, tensor.frozen_bytes
    assert held <= all_bytes / ranks + 16384 // 2 + 256 + 4  # within one double-quantisation block


def test_linear_equals_bitsandbytes_and_compiles_whole():
    torch.manual_seed(0)
    module = linear(bias=True)
    x = torch.randn(5, 64, requires_grad=True)
    expected = module(x)
    expected.sum().backward()
    expected_grad, x.grad = x.grad, None
    for run in (NF4Linear(module), torch.compile(NF4Linear(module), fullgraph=True, backend="aot_eager")):
        result = run(x)
        result.sum().backward()
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        torch.testing.assert_close(x.grad, expected_grad, rtol=0, atol=0)
        x.grad = None


def test_two_layers_share_one_graph():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    layers = [NF4Linear(linear()) for _ in range(3)]
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=True, backend=backend)
        layer(torch.randn(5, 64))
    assert len(graphs) == 1


def test_replaced_layers_go_at_once():
    model = nn.Sequential(linear())
    replaced = weakref.ref(model[0])
    gc.disable()
    try:
        use_nf4_tensors(model)
        assert replaced() is None
    finally:
        gc.enable()


def test_replaces_every_4bit_linear_in_place():
    model = nn.Sequential(linear(), nn.Sequential(linear((64, 128)), nn.Linear(64, 2)))
    assert use_nf4_tensors(model, shards=2) == 2
    assert [type(m) for m in model.modules() if isinstance(m, nn.Linear | NF4Linear)] == [NF4Linear] * 2 + [nn.Linear]
    assert not any(p.requires_grad for n, p in model.named_parameters() if "1.1" not in n)


def test_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="fp4"):
        NF4Tensor.from_params4bit(params4bit((128, 64), quant_type="fp4"))
    with pytest.raises(ValueError, match="not quantised"):
        NF4Tensor.from_params4bit(Params4bit(torch.randn(4, 4)))
    with pytest.raises(NotImplementedError, match="decode it with unpack"):
        NF4Tensor.from_params4bit(params4bit((128, 64))) + 1
    with pytest.raises(NotImplementedError, match="dim 0"):
        torch.chunk(NF4Tensor.from_params4bit(params4bit((512, 256))), 2, dim=1)
