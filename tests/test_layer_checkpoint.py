"""Checkpointing by halves: the same loss and gradients as without, in parts of the tokens."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from helpers import layer_checkpoint
from helpers.host_store import HostStore
from helpers.layer_checkpoint import attention_half, can_be_halved, checkpointed, feed_forward_half, parts

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES), "mistral": MistralConfig(**SIZES, sliding_window=5), "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES), "smollm3": SmolLM3Config(**SIZES),
}  # fmt: skip


def layer_and_inputs(config) -> tuple[nn.Module, torch.Tensor, dict]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    hidden = torch.randn(2, 11, 32)
    positions = torch.arange(11)[None]
    kwargs = {
        "attention_mask": None, "position_ids": positions, "past_key_values": None, "use_cache": False,
        "position_embeddings": model.model.rotary_emb(hidden, positions),
    }  # fmt: skip
    return model.model.layers[0], hidden, kwargs


def step(layer: nn.Module, hidden: torch.Tensor, run, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Output, the input's gradient and every parameter's."""
    hidden = hidden.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        out = run(hidden)
    (out.float().sin() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), hidden.grad, *(p.grad.clone() for p in layer.parameters())]


def by_halves(layer: nn.Module, kwargs: dict, store: HostStore | None = None):
    return lambda hidden: checkpointed(
        layer, hidden, kwargs, whole=lambda hidden: layer(hidden, **kwargs), first=attention_half,
        second=feed_forward_half, store=store,
    )  # fmt: skip


@pytest.mark.parametrize("store", [None, HostStore()], ids=["kept", "in host memory"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_layer_by_halves_is_the_layer(family, store, monkeypatch):
    monkeypatch.setattr(layer_checkpoint, "LEAST_TOKENS", 4)
    layer, hidden, kwargs = layer_and_inputs(CONFIGS[family])
    assert can_be_halved(layer)
    expected = step(layer, hidden, lambda hidden: layer(hidden, **kwargs))
    for got, wanted in zip(step(layer, hidden, by_halves(layer, kwargs, store)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_backward_computes_in_forwards_precision_and_adds_to_gradients():
    layer, hidden, kwargs = layer_and_inputs(CONFIGS["llama"])
    expected = step(layer, hidden, lambda hidden: layer(hidden, **kwargs), torch.bfloat16)
    found = step(layer, hidden, by_halves(layer, kwargs), torch.bfloat16)
    for got, wanted in zip(found, expected, strict=True):
        assert (got - wanted).norm() <= 1e-2 * wanted.norm()
    before = layer.mlp.up_proj.weight.grad.clone()
    by_halves(layer, kwargs)(hidden.requires_grad_()).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(layer.mlp.up_proj.weight.grad, before)


def test_the_feed_forward_half_sees_a_part_of_the_tokens_at_a_time(monkeypatch):
    monkeypatch.setattr(layer_checkpoint, "LEAST_TOKENS", 4)
    layer, hidden, kwargs = layer_and_inputs(CONFIGS["llama"])
    seen, alive, most = [], 0, 0
    forward = layer.mlp.forward

    def watched(x):
        nonlocal alive, most
        out = forward(x)
        if torch.is_grad_enabled():
            seen.append(x.shape[:-1].numel())
            alive += seen[-1]
            most = max(most, alive)

            def gone(gradient, tokens=seen[-1]):
                nonlocal alive
                alive -= tokens

            x.register_hook(gone)
        return out

    layer.mlp.forward = watched
    step(layer, hidden, by_halves(layer, kwargs))
    assert sum(seen) == 22 and len(seen) == 2 and most == max(seen)


def test_four_bit_weights_of_the_feed_forward_half_are_decoded_once(monkeypatch):
    from helpers import checkpoints, nf4_linear

    monkeypatch.setattr(layer_checkpoint, "LEAST_TOKENS", 4)
    model = checkpoints.attach_lora(checkpoints.load_base("shape:tiny", torch.float32).model, 4).train()
    base = model.get_base_model().model
    layer, hidden = base.layers[0], torch.randn(2, 11, base.config.hidden_size, device=model.device)
    positions = torch.arange(11, device=model.device)[None]
    kwargs = {"attention_mask": None, "position_embeddings": base.rotary_emb(hidden, positions)}
    decodes, real = [], nf4_linear.dequantize_nf4
    monkeypatch.setattr(nf4_linear, "dequantize_nf4", lambda *a, **k: decodes.append(1) or real(*a, **k))
    found = []
    with nf4_linear.triton_nf4(model):
        for run in (lambda hidden: layer(hidden, **kwargs), by_halves(layer, kwargs)):
            decodes.clear()
            inputs = hidden.clone().requires_grad_()
            layer.zero_grad()
            run(inputs).square().sum().backward()
            found.append([inputs.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    assert len(decodes) == 7 + 4 + 4 + 3, "forward, the attention half again and backward, and three weights once"
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not any("decoded" in vars(module) for module in model.modules())


@pytest.mark.parametrize("tokens", [1, 511, 512, 513, 2048, 4096, 8191, 100_000])
def test_parts_are_nearly_equal_and_bounded(tokens):
    sizes = parts(tokens)
    assert sum(sizes) == tokens and max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(512, min(-(-tokens // 2), 2048)) and min(sizes) >= min(tokens, 256)


def test_layers_that_are_not_known_or_draw_random_numbers_stay_whole():
    assert not can_be_halved(layer_and_inputs(Gemma2Config(**SIZES))[0])
    assert not can_be_halved(layer_and_inputs(LlamaConfig(**SIZES, attention_dropout=0.1))[0])
    layer, _, _ = layer_and_inputs(CONFIGS["llama"])
    layer.mlp.act_fn = nn.Sequential(layer.mlp.act_fn, nn.Dropout(0.1))
    assert not can_be_halved(layer)


def test_what_was_put_before_is_fetched_ahead_and_what_nobody_holds_is_forgotten():
    store = HostStore()
    first, second, third, fourth = (store.put(torch.full((2,), float(i), requires_grad=True)) for i in range(4))
    del fourth  # a loss without a backward pass
    assert torch.equal(store.get(third), torch.full((2,), 2.0)) and second.fetched is not None and first.fetched is None
    assert torch.equal(store.get(first), torch.zeros(2))  # out of turn
    assert torch.equal(store.get(second), torch.ones(2)) and not store.get(second).requires_grad


class OnAGPU(torch.Tensor):
    """A CPU's tensor that says it is on a GPU."""

    is_cuda, device = True, torch.device("cuda")


def test_pinned_memory_is_used_again_and_copies_are_waited_for(monkeypatch):
    """With a GPU's streams played: every copy is done when it is asked for."""
    waited, empty = [], torch.empty
    event = lambda: len(waited)  # noqa: E731
    stream = SimpleNamespace(wait_stream=lambda other: None, record_event=event, wait_event=waited.append)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, **where: empty(*shape, dtype=dtype))
    store = HostStore()
    store.reserve(3, 64)
    reserved = [buffer.data_ptr() for buffer in store.free]
    for _ in range(2):  # a step, and one that writes to the same memory
        values = [torch.full((2, 4), float(i), dtype=torch.bfloat16) for i in range(3)]
        kept = [store.put(value.as_subclass(OnAGPU)) for value in values]
        assert len(store.leaving) == 2 and {k.waiting.data_ptr() for k in kept} == set(reserved) and not store.free
        store.settle()
        assert not store.leaving and len(waited) == 3
        for k, value in zip(reversed(kept), reversed(values), strict=True):
            k.waiting.sub_(0)
            assert torch.equal(store.get(k), value)
        assert len(waited) == 6
        waited.clear()
        del kept, k
        assert sorted(buffer.data_ptr() for buffer in store.free) == sorted(reserved)
    store.put(torch.zeros(100).as_subclass(OnAGPU))  # larger than what there is
    assert len(store.free) == 4, "and kept, with nobody to fetch it"


@pytest.mark.gpu
def test_gpu_memory_is_free_while_a_tensor_waits():
    store, size = HostStore(), 64 * 2**20
    before = torch.cuda.memory_allocated()
    tensors = [torch.randn(size // 4, device="cuda") for _ in range(3)]
    sums = [t.sum() for t in tensors]
    kept = [store.put(t) for t in tensors]
    del tensors
    assert torch.cuda.memory_allocated() - before < 3 * size  # the last two may be on their way
    store.settle()
    assert torch.cuda.memory_allocated() - before < size
    for k, total in reversed(list(zip(kept, sums, strict=True))):
        assert torch.equal(store.get(k).sum(), total)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
def test_gpu_training_by_halves_is_training(offload):
    from helpers import checkpoints
    from helpers.compiling import compile_model

    found = {}
    for halves in (False, True):
        torch.manual_seed(0)
        model = checkpoints.attach_lora(checkpoints.load_base("shape:tiny", torch.bfloat16).model, 8).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        ids = torch.arange(3, 603, device="cuda").remainder(500).view(2, 300)
        with compile_model(model, offload=offload) if halves else contextlib.nullcontext():
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        found[halves] = torch.cat([loss[None], *(p.grad.flatten() for p in model.parameters() if p.requires_grad)])
    assert (found[True] - found[False]).norm() <= 2e-2 * found[False].norm()
