"""Rotary embedding in one launch: as right as float32 can be, traced for any length, there only where it is meant."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GlmConfig, LlamaConfig, PhiConfig, Qwen3Config
from transformers.models.llama import modeling_llama

from helpers import rotary
from helpers.attention import one_graph
from helpers.compile_counter import CompileCounter
from helpers.compiling import compile_model
from helpers.rotary import INTERPRETED, fused_rotary, rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STOCK = modeling_llama.apply_rotary_pos_emb
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tensors(batch=2, heads=(4, 2), length=3, size=64, dtype=torch.float32, rows=1, device=DEVICE):
    """q and k as a projection gives them, cos and sin whose halves differ, and gradients of q and k."""
    torch.manual_seed(length)
    q, k, q_grad, k_grad = (
        torch.randn(batch, length, n, size, device=device).to(dtype).transpose(1, 2) for n in (*heads, *heads)
    )
    cos, sin = (torch.randn(rows, length, size, device=device).to(dtype) for _ in range(2))
    return [q.requires_grad_(), k.requires_grad_(), cos, sin], [q_grad, k_grad]


def results(function, inputs, grads) -> list[torch.Tensor]:
    """What it returns, and the gradients of q and k."""
    out = function(*inputs)
    return [*(x.detach() for x in out), *torch.autograd.grad(out, inputs[:2], grads)]


def truth(inputs, grads) -> list[torch.Tensor]:
    doubled = [x.detach().double().requires_grad_(i < 2) for i, x in enumerate(inputs)]
    return results(STOCK, doubled, [x.double() for x in grads])


def assert_as_right_as_rounding(inputs, grads):
    dtype = inputs[0].dtype
    # One rounding, after float32: half a unit in the last place, but the interpreter truncates to bfloat16.
    ulp = torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 and INTERPRETED else 0.5)
    found, expected, stock = results(rotate, inputs, grads), truth(inputs, grads), results(STOCK, inputs, grads)
    for got, wanted, theirs in zip(found, expected, stock, strict=True):
        assert got.dtype == dtype and got.shape == wanted.shape
        torch.testing.assert_close(got.double(), wanted, rtol=1.01 * ulp, atol=4e-6)
        torch.testing.assert_close(got, theirs, rtol=4 * ulp, atol=64 * ulp)  # theirs is rounded three times


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "heads"), [(64, (4, 2)), (80, (3, 1)), (128, (24, 2))])
def test_output_and_gradients_are_the_truth_rounded_once(size, heads, dtype):
    inputs, grads = tensors(size=size, heads=heads, dtype=dtype)
    assert_as_right_as_rounding(inputs, grads)
    for x in rotate(*inputs):
        assert x.transpose(1, 2).is_contiguous(), "attention takes it as it is"


def test_more_heads_than_fit_at_once_and_a_rotation_for_each_row(monkeypatch):
    monkeypatch.setattr(rotary, "TILE", 64)  # two heads of 64
    assert_as_right_as_rounding(*tensors(heads=(5, 1), rows=2))


@pytest.mark.parametrize("layout", ["by head", "slice", "expanded", "last stride 2", "one token", "wider cos"])
def test_any_layout(layout):
    inputs, grads = tensors(length=1 if layout == "one token" else 3, dtype=torch.float16)
    q, k, cos, sin = inputs
    if layout == "by head":
        inputs[:2] = [x.detach().contiguous().requires_grad_() for x in (q, k)]
        grads = [x.contiguous() for x in grads]
    elif layout == "slice":  # of queries, keys and values made by one projection
        packed = torch.randn(2, 3, 8, 64, device=DEVICE).half().transpose(1, 2)
        inputs[:2] = [x.detach().requires_grad_() for x in packed.split([4, 2, 2], 1)[:2]]
    elif layout == "expanded":
        inputs[2:] = [x.expand(2, -1, -1) for x in (cos, sin)]
        grads = [x[:, :1].expand_as(x) for x in grads]
    elif layout == "last stride 2":
        inputs[:2] = [torch.stack([x, x], -1).detach()[..., 0].requires_grad_() for x in (q, k)]
        inputs[2:] = [x.mT.contiguous().mT for x in (cos, sin)]
    elif layout == "wider cos":
        inputs[2:] = [x.float() for x in (cos, sin)]
    found, expected = results(rotate, inputs, grads), truth(inputs, grads)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2**-11, atol=1e-6)


@pytest.mark.skipif(not INTERPRETED, reason="the registration is the same; a traced kernel cannot be compared so")
def test_the_operator_is_registered_as_pytorch_wants_it():
    inputs, _ = tensors(batch=1, length=2, heads=(2, 1))
    torch.library.opcheck(torch.ops.qlora.rotate, (*inputs, False))


def test_what_does_not_fit_is_said():
    (q, k, cos, sin), _ = tensors()
    for bad, what in [
        ((q.double(), k, cos, sin), "float64"), ((q, k[:, :, 1:], cos, sin), "even size"),
        ((q, k, cos[..., :32], sin), r"not \[batch or 1"), ((q, k, cos, sin.clone().requires_grad_()), "requires_grad"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=what):
            rotate(*bad)


def test_one_graph_for_every_batch_and_length():
    @torch.compile(dynamic=True, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    def layer(q, k, cos, sin):
        heads = [x.view(*x.shape[:2], -1, 64).transpose(1, 2) for x in (q, k)]
        return [x.transpose(1, 2).flatten(2) for x in rotate(*heads, cos, sin)]

    def as_layer(q, k, cos, sin):
        heads = [x.unflatten(2, (-1, 64)).transpose(1, 2) for x in (q, k)]
        return [x.transpose(1, 2).flatten(2) for x in STOCK(*heads, cos, sin)]

    with one_graph(), CompileCounter() as counter:
        for batch, length in ((2, 3), (3, 2), (4, 4)):
            inputs, grads = tensors(batch=batch, length=length)
            inputs[:2] = [x.detach().transpose(1, 2).flatten(2).requires_grad_() for x in inputs[:2]]
            grads = [x.transpose(1, 2).flatten(2) for x in grads]
            for got, wanted in zip(results(layer, inputs, grads), results(as_layer, inputs, grads), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert (counter.compiles, counter.graph_breaks) == (1, 0), str(counter)


def model_of(config, device=DEVICE, dtype=torch.float32):
    """A small one whose layers alone are trained: of a frozen head the loss is compiled."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers." in name)
    return model


def steps(model, lengths: tuple[int, ...], evaluate: bool = False) -> list:
    """Losses, gradients, the loss of an evaluation of one row, and what is generated."""
    found = []
    model.train()
    for length in lengths:
        ids = torch.arange(3, 3 + 2 * length, device=model.device).view(2, length)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append(loss.detach())
    found += [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    if evaluate:
        model.eval()
        with torch.no_grad():
            found.append(model(input_ids=ids[:1], labels=ids[:1]).loss)
        found.append(model.generate(ids[:1, :3], max_new_tokens=2, do_sample=False))
    return found


def checkpointing(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model


@pytest.fixture
def launches(monkeypatch) -> list[tuple[int, int, int]]:
    """Query heads, key heads and head size of each launch; where the kernel is compiled, of each trace."""
    calls, real = [], rotary.launch_options
    monkeypatch.setattr(rotary, "launch_options", lambda *sizes: calls.append(sizes) or real(*sizes))
    return calls


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU compile_model enters fused_rotary itself")
def test_a_compiled_model_keeps_its_losses_gradients_graphs_and_tokens(launches):
    model = checkpointing(model_of(LlamaConfig(**SIZES)))
    expected = steps(model, (3, 5), evaluate=True)
    with CompileCounter() as counter, fused_rotary(model), compile_model(model, backend="eager", pad_to=1):
        found = steps(model, (3, 5), evaluate=True)
    assert counter.graph_breaks == 0, str(counter)
    # As with transformers' function: a layer with and without gradients, its halves, the loss; and the frequencies of a
    # step, an evaluation, a prompt and a token.
    assert counter.compiles <= 9, str(counter)
    # Two layers: two steps of forward, forward again and backward, and one evaluation; generation is not compiled.
    assert launches == [(4, 2, 16)] * 2 * (2 * 3 + 1)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU compile_model enters fused_rotary itself")
@pytest.mark.parametrize("config", [Qwen3Config, Gemma2Config])
def test_other_families_keep_their_losses_and_gradients(config, launches):
    model = model_of(config(**SIZES | {"num_hidden_layers": 1}))
    if config is Gemma2Config:  # a checkpoint within the graph
        checkpointing(model)
    expected = steps(model, (4,))
    with fused_rotary(model), compile_model(model, backend="eager", pad_to=1):
        found = steps(model, (4,))
    assert len(launches) >= 2, "forward and backward"
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_it_is_there_within_only_and_for_what_is_llamas_only(launches):
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.glm import modeling_glm
    from transformers.models.phi import modeling_phi

    config = {**SIZES, "num_hidden_layers": 1}
    llama, gemma, glm, phi = (model_of(c(**config)) for c in (LlamaConfig, Gemma2Config, GlmConfig, PhiConfig))
    theirs = [m.apply_rotary_pos_emb for m in (modeling_llama, modeling_gemma2, modeling_glm, modeling_phi)]
    ids = torch.arange(3, 11, device=DEVICE)[None]
    before = llama(ids).logits
    with fused_rotary(gemma) as there:
        assert there == [modeling_gemma2.__name__]
        ours = modeling_gemma2.apply_rotary_pos_emb
        with fused_rotary(gemma) as again:
            assert again == [], "not twice"
        assert modeling_llama.apply_rotary_pos_emb is theirs[0]
        with fused_rotary(llama), fused_rotary(model_of(Qwen3Config(**config))) as there:
            assert len(there) == 1, "whatever else is replaced"
    with fused_rotary(gemma):
        assert modeling_gemma2.apply_rotary_pos_emb is ours, "else all graphs would be compiled again"
    with fused_rotary(glm) as there:
        assert there == [], "GLM rotates pairs of neighbours, and part of a head"
    with pytest.raises(KeyError), fused_rotary(llama):
        assert torch.equal(llama(ids).logits, before), "eager layers keep transformers'"
        raise KeyError
    with fused_rotary(phi) as there, compile_model(phi, backend="aot_eager", pad_to=1):
        assert there == [modeling_phi.__name__]
        phi(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert launches == [], "Phi gives a part of each head"
    now = [m.apply_rotary_pos_emb for m in (modeling_llama, modeling_gemma2, modeling_glm, modeling_phi)]
    assert all(a is b for a, b in zip(now, theirs, strict=True))


def test_within_a_graph_what_the_kernel_cannot_do_is_transformers(launches):
    fused = rotary._fused(STOCK)
    (q, k, cos, sin), _ = tensors(dtype=torch.float16)
    half = [q[..., :32], k[..., :32], cos[..., :32], sin[..., :32]]  # as of a partial rotation
    by_token = [q.transpose(1, 2), k.transpose(1, 2), cos, sin, 2]
    trained = [q, k, cos.clone().requires_grad_(), sin]
    for arguments in (half, by_token, trained, [q.double(), k.double(), cos, sin], [q, k, cos.float(), sin.float()]):
        torch._dynamo.reset()
        found = torch.compile(fused, backend="aot_eager", fullgraph=True)(*arguments)
        for got, wanted in zip(found, STOCK(*arguments), strict=True):
            assert torch.equal(got, wanted) and got.dtype == wanted.dtype
    assert launches == []
    with torch.autocast(DEVICE, torch.float16):  # attention would round what is wider
        torch._dynamo.reset()
        found = torch.compile(fused, backend="aot_eager", fullgraph=True)(q, k, cos.float(), sin.float())
    assert launches and found[0].dtype == torch.float16


# ---- what torch.compile and Triton make of it: no GPU needed, but a process without the interpreter

AHEAD = """
import torch, triton
from triton.backends.compiler import GPUTarget
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from helpers.rotary import launch_options, rotate_kernel
from helpers.sass import compile_ahead, opcodes

strides = ("length", "q_batch", "q_head", "q_token", "k_batch", "k_head", "k_token", "cos_batch", "sin_batch")
for capability, dtype in ((75, "fp16"), (90, "bf16")):
    types = dict.fromkeys(("q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "q_out_ptr", "k_out_ptr"), f"*{dtype}")
    options = launch_options(32, 8, 128)
    warps = options.pop("num_warps")
    compiled = compile_ahead(
        rotate_kernel, types | dict.fromkeys(strides, "i32"), options | {"TRANSPOSED": True}, capability, warps
    )
    print(*opcodes(compiled))

class Driver:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
triton.runtime.driver.set_active(Driver())

def attend(x, wq, wk, cos, sin):
    q, k = ((x @ w).view(*x.shape[:2], -1, 64).transpose(1, 2) for w in (wq, wk))
    q, k = torch.ops.qlora.rotate(q, k, cos, sin, False)
    return torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)

def show(name):
    def compiler(graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        launches = sum("triton_kernel_wrapper" in target for target in targets)
        print(name, launches, sum("clone" in target for target in targets))
        return make_boxed_func(graph.forward)
    return compiler

with FakeTensorMode():
    x = torch.empty(2, 32, 256, dtype=torch.bfloat16, requires_grad=True)
    wq, wk = (torch.empty(256, n, dtype=torch.bfloat16) for n in (256, 128))
    cos = torch.empty(1, 32, 64, dtype=torch.bfloat16)
    compiled = aot_function(attend, show("forward"), show("backward"), min_cut_rematerialization_partition)
    compiled(x, wq, wk, cos, cos).transpose(1, 2).flatten(2).sum().backward()
"""


@pytest.mark.skipif(not INTERPRETED, reason="a GPU compiles for real")
def test_one_launch_each_way_whose_accesses_are_16_bytes_wide(said_without_interpreter):
    *listings, forward, backward = said_without_interpreter("-c", AHEAD).splitlines()
    assert (forward, backward) == ("forward 1 0", "backward 1 0"), "what attention saved is not rotated again"
    for ops in map(str.split, listings):
        moved = [op for op in ops if op.startswith(("LDG", "STG"))]
        assert all(".128" in op or ".64" in op for op in moved), moved  # 64: what a thread has of 8 heads, and of cos
        assert not any(op.startswith(("LDL", "STL")) for op in ops), "registers spill"


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "heads"), [(64, (9, 3)), (80, (8, 8)), (128, (40, 8))])
def test_gpu_output_and_gradients(size, heads, dtype):
    for rows in (1, 3):
        assert_as_right_as_rounding(*tensors(batch=3, heads=heads, length=257, size=size, dtype=dtype, rows=rows))


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gpu_compiled_layers_rotate_in_one_launch(checkpointed):
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    model = model_of(LlamaConfig(**SIZES | {"head_dim": 64}), dtype=torch.bfloat16)
    if checkpointed:
        checkpointing(model)
    expected = steps(model, (20, 30), evaluate=True)
    fresh = torch._inductor.config.patch(force_disable_caches=True)
    with CompileCounter() as counter, fresh, compile_model(model, pad_to=1):
        found, codes = run_and_get_code(steps, model, (20, 30), evaluate=True)
    assert counter.graph_breaks == 0, str(counter)
    assert sum("rotate_kernel" in code for code in codes) >= 2, "forward and backward"
    assert modeling_llama.apply_rotary_pos_emb is STOCK
    for got, wanted in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)
    for got, wanted in zip(found[2:-2], expected[2:-2], strict=True):
        assert (got - wanted).norm() <= 5e-2 * wanted.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2])
def test_gpu_sizes_of_heads_may_be_symbols(rows):
    # As in a block that FSDP2 wraps, whose integers torch.compile does not take for constants.
    def attend(apply, x, projections, cos, sin, size):
        q, k, v = ((x @ w).view(*x.shape[:2], -1, size).transpose(1, 2) for w in projections)
        q, k = apply(q, k, cos, sin)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    torch._dynamo.reset()
    torch.manual_seed(0)
    shapes = (rows, 40, 256), (256, 512), (256, 128), (256, 128), (1, 40, 64)
    x, *projections, angle = (torch.randn(shape, device="cuda").bfloat16() / 4 for shape in shapes)
    inputs = x, projections, angle.cos(), angle.sin(), 64
    with torch.no_grad():
        found = torch.compile(attend, dynamic=True, fullgraph=True)(rotary.rotate, *inputs)
        torch.testing.assert_close(found, attend(STOCK, *inputs), rtol=2e-2, atol=2e-2)
