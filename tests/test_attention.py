"""Every backend against float64 truth and against stock transformers; FlexAttention's block mask and graph count."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from helpers import attention as module
from helpers.attention import BACKENDS, Case, attention, choose, explain, flex_call, unsupported
from helpers.attention_mask import AttentionMask, document_ids, packed_mask
from helpers.attention_transformers import REGISTERED, packed_as, register
from helpers.compile_counter import CompileCounter

register()
MASKS = ("causal", "window", "packed", "mixed", "padded", "decode", "bidirectional")


def make_mask(kind: str, length: int, device="cpu") -> AttentionMask:
    cut = max(1, length // 3)
    documents = document_ids([cut, length - cut] if length > cut else [length], device)
    padding = (torch.arange(length, device=device) >= cut)[None] if length > cut else None
    return {
        "causal": lambda: AttentionMask(),
        "window": lambda: AttentionMask(window=37),
        "packed": lambda: AttentionMask(documents=documents),
        "mixed": lambda: AttentionMask(window=37, documents=documents, padding=padding),
        "padded": lambda: AttentionMask(padding=padding),
        "decode": lambda: AttentionMask(),
        "bidirectional": lambda: AttentionMask(causal=False, window=20),
    }[kind]()


def make_qkv(kind: str, length: int, device="cpu", dtype=torch.float32, head_dim=16):
    generator = torch.Generator(device).manual_seed(length)
    q_len = max(1, length // 4) if kind == "decode" else length
    sizes = ((1, 4, q_len), (1, 2, length), (1, 2, length))
    return [torch.randn(*s, head_dim, generator=generator, device=device, dtype=dtype) for s in sizes]


def truth(q, k, v, mask):
    """Scores in float64, masked pair by pair as the mask's description says it."""
    q_len, length = q.shape[2], k.shape[2]
    p = torch.arange(length - q_len, length, device=q.device)[:, None]
    j = torch.arange(length, device=q.device)
    seen = torch.ones(q_len, length, dtype=torch.bool, device=q.device)
    if mask.causal:
        seen &= j <= p
    if mask.window is not None:
        seen &= (p - j).abs() < mask.window
    if mask.segments is not None:
        seen &= mask.segments[0][p] == mask.segments[0][j]
    q, k, v = q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex"])
def test_forward_and_gradients_are_the_definitions(backend, kind):
    for length in (1, 5, 130):
        q, k, v = make_qkv(kind, length)
        expected = truth(q, k, v, make_mask(kind, length))
        if backend == "flex":
            with torch.no_grad():
                torch.testing.assert_close(
                    attention(q, k, v, make_mask(kind, length), backend="flex").double(), expected, atol=1e-5, rtol=1e-5
                )
            continue
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        doubles = [x.double().requires_grad_() for x in (q, k, v)]
        weights = torch.randn_like(expected)
        out = attention(*inputs, make_mask(kind, length), backend=backend)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
        (out.double() * weights).sum().backward()
        (truth(*doubles, make_mask(kind, length)) * weights).sum().backward()
        for x, x64 in zip(inputs, doubles, strict=True):
            torch.testing.assert_close(x.grad.double(), x64.grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", MASKS)
def test_block_mask_is_the_one_pytorch_finds_by_looking_at_every_pair(kind):
    for length in (1, 127, 128, 300, 700):
        q_len = max(1, length // 4) if kind == "decode" else length
        ours = make_mask(kind, length).block_mask(1, q_len, length, torch.device("cpu"))
        slow = create_block_mask(ours.mask_mod, 1, None, q_len, length, device="cpu")
        rows, columns = slow.kv_indices.shape[-2:]
        assert ours.kv_indices.shape[-2] >= 2 and ours.kv_indices.shape[-1] >= 2
        torch.testing.assert_close(ours.to_dense()[:, :, :rows, :columns], slow.to_dense())
        assert ours.to_dense().sum() == slow.to_dense().sum(), "blocks outside the sequence are visited"


def test_blocks_between_documents_are_skipped():
    length = 8 * 128
    packed = AttentionMask(documents=document_ids([128] * 8)).block_mask(1, length, length, torch.device("cpu"))
    causal = AttentionMask().block_mask(1, length, length, torch.device("cpu"))
    assert packed.to_dense().sum() == 8
    assert causal.to_dense().sum() == 8 * 9 // 2
    assert causal.full_kv_num_blocks.sum() == 8 * 7 // 2, "blocks below the diagonal need no mask"


def test_flex_has_two_graphs_for_fifty_lengths_and_every_mask(monkeypatch):
    torch._dynamo.reset()

    def trace_only(graph, inputs):  # the trace is what is counted; run as written, 4096 tokens take seconds
        return lambda *arguments: (torch.empty(0),)

    compiled = torch.compile(flex_call, dynamic=True, fullgraph=True, backend=trace_only)
    monkeypatch.setattr(module, "_compiled_flex", lambda device: compiled)
    draw = random.Random(3407)
    lengths = [300, 1, 16, 2, 4, 128, 129, 4096] + [draw.randint(1, 4096) for _ in range(42)]
    with torch.no_grad(), CompileCounter() as counter:
        for i, length in enumerate(lengths):
            kind = ("causal", "window", "packed", "mixed")[i % 4]
            attention(*make_qkv(kind, length), make_mask(kind, length), backend="flex")
    assert counter.compiles <= 2 and counter.graph_breaks == 0, str(counter)
    torch._dynamo.reset()


def test_softcap_and_dropout_and_fallback():
    q, k, v = make_qkv("causal", 40)
    capped = attention(q, k, v, AttentionMask(), softcap=5.0)
    scores = 5 * torch.tanh(q @ k.repeat_interleave(2, 1).mT * 0.25 / 5)
    expected = scores.masked_fill(~torch.ones(40, 40).tril().bool(), -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(capped, expected)
    with pytest.raises(ValueError, match="no softcap.*Take .*eager"):
        attention(q, k, v, AttentionMask(), softcap=5.0, backend="sdpa")
    torch.manual_seed(0)
    dropped = torch.stack([attention(q, k, v, AttentionMask(), dropout=0.5) for _ in range(400)])
    torch.testing.assert_close(dropped.mean(0), attention(q, k, v, AttentionMask()), atol=0.5, rtol=0)
    assert not torch.equal(dropped[0], dropped[1])


T4 = {"device": "cuda", "capability": (7, 5), "dtype": torch.float16, "head_dim": 64}
CPU = {"device": "cpu", "capability": (0, 0), "dtype": torch.float32, "head_dim": 64}
H100 = {"device": "cuda", "capability": (9, 0), "dtype": torch.bfloat16, "head_dim": 128}


@pytest.mark.parametrize(
    ("backend", "case", "reason"),
    [
        ("flex", T4 | {"head_dim": 256}, "64 KiB"),
        ("flex", T4 | {"dtype": torch.bfloat16}, "bfloat16"),
        ("flex", H100 | {"dropout": True}, "dropout"),
        ("flex", H100 | {"head_dim": 8}, "16 on"),
        ("flex", CPU | {"gradient": True}, "CPU"),
        ("flash", T4, "8.0"),
        ("flash", H100 | {"dtype": torch.float32}, "float16"),
        ("flash", H100 | {"head_dim": 512}, "256"),
        ("sdpa", H100 | {"softcap": True}, "softcap"),
    ],
)  # fmt: skip
def test_the_table_says_why_not(backend, case, reason):
    case = Case(**case)
    importable = module._importable(module.FLASH) or module._importable(module.VARLEN)
    if backend == "flash" and case.capability >= (8, 0) and not importable:
        reason = "can be imported"  # PyTorch has its own from 2.10 on
    assert reason in unsupported(backend, case)
    with pytest.raises(ValueError, match=backend):
        choose(backend, case)
    assert unsupported(choose("auto", case), case) is None
    rows = {row["backend"]: row["answer"] for row in explain(case)}
    assert set(rows) == set(BACKENDS) and list(rows.values()).count("auto takes it") == 1


def test_auto_on_the_cards_we_know():
    assert choose("auto", Case(**H100)) == "sdpa"
    assert choose("auto", Case(**H100, segments=True)) in ("flash", "flex")
    assert choose("auto", Case(**T4, segments=True)) in ("flex", "xformers")
    assert choose("auto", Case(**T4 | {"head_dim": 256}, segments=True)) in ("xformers", "sdpa")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window is 0"),
        ({"documents": torch.tensor([[0, 1, 0]])}, "ascend"),
        ({"padding": torch.ones(1, 3)}, "mask of torch.float32"),
        ({"documents": torch.tensor([0, 1])}, "shape"),
    ],
)
def test_bad_masks(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionMask(**arguments)
    AttentionMask(documents=torch.tensor([[-1, 0, 0, 1, -1]]))


def test_unknown_backend_and_heads_that_do_not_divide():
    q, k, v = make_qkv("causal", 4)
    with pytest.raises(ValueError, match="'fast' is not one of auto"):
        attention(q, k, v, backend="fast")
    with pytest.raises(ValueError, match="divide"):
        attention(q[:, :3], k, v)


COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny(family: str):
    from transformers import (
        AutoModelForCausalLM,
        Gemma2Config,
        Gemma3TextConfig,
        LlamaConfig,
        MistralConfig,
        Qwen2Config,
    )

    config = {
        "llama": lambda: LlamaConfig(**COMMON),
        "qwen2": lambda: Qwen2Config(**COMMON),
        "mistral": lambda: MistralConfig(**COMMON, sliding_window=6),
        "gemma2": lambda: Gemma2Config(
            **COMMON, sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=16
        ),
        "gemma3": lambda: Gemma3TextConfig(**COMMON, sliding_window=6, query_pre_attn_scalar=16),
    }[family]()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


FAMILIES = ("llama", "qwen2", "mistral", "gemma2", "gemma3")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["qlora_auto", "qlora_sdpa", "qlora_eager", "qlora_flex"])
def test_stock_models_give_transformers_own_logits_and_gradients(family, name):
    if name == "qlora_sdpa" and family == "gemma2":
        pytest.skip("SDPA has no softcap")
    model = tiny(family)
    ids = torch.randint(3, 61, (2, 20))
    left, right = torch.ones(2, 20, dtype=torch.long), torch.ones(2, 20, dtype=torch.long)
    left[0, :7], right[1, 13:] = 0, 0
    packed = torch.cat([torch.arange(8), torch.arange(12)])[None].expand(2, -1)
    batches = [
        ({"input_ids": ids}, torch.ones(2, 20).bool()),
        ({"input_ids": ids, "attention_mask": left}, left.bool()),
        ({"input_ids": ids, "attention_mask": right}, right.bool()),
        ({"input_ids": ids, "position_ids": packed}, torch.ones(2, 20).bool()),
    ]
    trains = name != "qlora_flex"
    for batch, real in batches:
        found = {}
        for implementation in ("eager", name):
            model.set_attn_implementation(implementation)
            model.zero_grad()
            with torch.set_grad_enabled(trains):
                logits = model(**batch, use_cache=False).logits[real]
                if trains:
                    logits.square().mean().backward()
            gradients = [p.grad.clone() for p in model.parameters()] if trains else []
            found[implementation] = [logits.detach(), *gradients]
        for stock, ours in zip(found["eager"], found[name], strict=True):
            torch.testing.assert_close(ours, stock, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["qlora_auto", "qlora_sdpa", "qlora_flex"])
def test_generation_with_a_cache_gives_transformers_own_tokens(family, name):
    if name == "qlora_sdpa" and family == "gemma2":
        pytest.skip("SDPA has no softcap")
    model = tiny(family)
    ids = torch.randint(3, 61, (2, 9))
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = {}
    for implementation in ("eager", name):
        model.set_attn_implementation(implementation)
        found[implementation] = torch.stack(model.generate(ids, attention_mask=padding, **options).logits)
    torch.testing.assert_close(found[name], found["eager"], atol=2e-5, rtol=1e-4)


def test_varlen_is_traced_in_one_graph_and_right_with_documents_that_are_not_there(varlen_on_the_cpu):
    positions = torch.cat([torch.arange(n) for n in (5, 1, 3, 4, 2, 3)]).view(2, 9)
    q, k, v = (torch.randn(2, heads, 9, 16, requires_grad=True) for heads in (4, 2, 2))

    def rows(mask):
        return attention(q, k, v, mask, backend="flash")

    def recorded(positions):
        return rows(packed_mask(positions, 16))

    expected = rows(AttentionMask(documents=(positions == 0).cumsum(1)))
    found = torch.compile(recorded, fullgraph=True, dynamic=True, backend="aot_eager")(positions)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)
    assert packed_mask(positions, 16).cu_seqlens(2, 9, 9, "cpu")[0].tolist() == [0, 5, 6, 9, 13, 15, *[18] * 11]


@pytest.mark.parametrize("name", ["qlora_auto", "qlora_sdpa", "qlora_eager", "qlora_varlen", "recorded"])
def test_packed_rows_train_as_rows_apart(name, request):
    model = tiny("mistral")
    recorded = name == "recorded"
    if name in ("qlora_varlen", "recorded"):
        request.getfixturevalue("varlen_on_the_cpu")
        name = "qlora_varlen"
    model.set_attn_implementation(name)
    rows = [torch.randint(3, 61, (n,)) for n in (9, 1, 14)]
    apart = 0.0
    for row in rows:
        logits = model(row[None], use_cache=False).logits[0]
        apart = apart + torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum")
    apart.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    with packed_as(positions, 16) if recorded else contextlib.nullcontext():
        logits = model(torch.cat(rows)[None], position_ids=positions, use_cache=False).logits[0]
    together = sum(
        torch.nn.functional.cross_entropy(part[:-1], row[1:], reduction="sum")
        for part, row in zip(logits.split([len(row) for row in rows]), rows, strict=True)
    )
    together.backward()
    torch.testing.assert_close(together, apart)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


def test_masks_that_cannot_be_described_are_refused():
    model = tiny("llama")
    model.set_attn_implementation("qlora_sdpa")
    with pytest.raises(ValueError, match="mask of floats"):
        model(torch.ones(1, 4, dtype=torch.long), attention_mask=torch.zeros(1, 1, 4, 4), use_cache=False)
    own = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    ids = torch.randint(3, 61, (1, 4))
    ours = model(ids, attention_mask=own, use_cache=False).logits
    torch.testing.assert_close(ours, model(ids, use_cache=False).logits)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_gpu_backends_are_the_definition(backend, kind):
    dtype = torch.float16
    for length in (1, 100, 300):
        mask = make_mask(kind, length, "cuda")
        q, k, v = make_qkv(kind, length, "cuda", dtype, head_dim=64)
        case = Case("cuda", torch.cuda.get_device_capability(), dtype, 64, mask.causal, mask.window is not None,
                    mask.segments is not None, q.shape[2] != k.shape[2], gradient=True)  # fmt: skip
        if reason := unsupported(backend, case):
            pytest.skip(reason)
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        doubles = [x.double().requires_grad_() for x in (q, k, v)]
        expected = truth(*doubles, mask)
        weights = torch.randn_like(expected)
        out = attention(*inputs, mask, backend=backend)
        torch.testing.assert_close(out.double(), expected, atol=4e-3, rtol=4e-3)
        (out.double() * weights).sum().backward()
        (expected * weights).sum().backward()
        for x, x64 in zip(inputs, doubles, strict=True):
            scale = x64.grad.abs().max().item()
            torch.testing.assert_close(x.grad.double(), x64.grad, atol=1e-2 * max(scale, 0.1), rtol=1e-2)


@pytest.mark.gpu
def test_gpu_flex_trains_at_fifty_lengths_with_two_graphs():
    torch._dynamo.reset()
    draw = random.Random(3407)
    with CompileCounter() as counter:
        for i in range(50):
            length = [300, 1, 128, 127, 64][i] if i < 5 else draw.randint(1, 4096)
            kind = ("causal", "window", "packed", "mixed")[i % 4]
            inputs = [x.requires_grad_() for x in make_qkv(kind, length, "cuda", torch.float16, head_dim=64)]
            attention(*inputs, make_mask(kind, length, "cuda"), backend="flex").float().square().mean().backward()
            assert all(x.grad.isfinite().all() for x in inputs)
    assert counter.compiles <= 2 and counter.graph_breaks == 0, str(counter)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(REGISTERED))
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_models_train_with_every_name(family, name):
    model = tiny(family).cuda().half()
    batch = {"input_ids": torch.randint(3, 61, (2, 20), device="cuda")}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 13:] = 0
    found = {}
    for implementation in ("eager", name):
        model.set_attn_implementation(implementation)
        try:
            found[implementation] = model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
        except ValueError as error:
            pytest.skip(str(error))
    torch.testing.assert_close(found[name], found["eager"], atol=5e-3, rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(REGISTERED))
def test_gpu_smollm2_keeps_its_logits_and_ten_training_steps(name, smollm2):
    model, ids, mask = smollm2
    case = Case("cuda", torch.cuda.get_device_capability(), torch.float16, 64, gradient=True)
    if REGISTERED[name] != "auto" and (reason := unsupported(REGISTERED[name], case)):
        pytest.skip(reason)
    labels = ids.masked_fill(~mask.bool(), -100)
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    found = {}
    for implementation in ("eager", name):
        for parameter, value in zip(trained, start, strict=True):
            parameter.data.copy_(value)
        model.set_attn_implementation(implementation)
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        losses = []
        for _ in range(10):
            with torch.autocast("cuda", dtype=torch.float16):
                out = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
            losses.append(out.loss.item())
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.float16):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        found[implementation] = torch.tensor(losses), logits.float()
    torch.testing.assert_close(found[name][0], found["eager"][0], rtol=5e-3, atol=5e-3)
    assert (found[name][1] - found["eager"][1]).abs().mean() < 0.05 * found["eager"][1].std()


@pytest.fixture(scope="module")
def smollm2():
    from helpers import checkpoints

    base = checkpoints.load_base("embedded", torch.float16)
    model = checkpoints.attach_lora(base.model, 8).train()
    text = ["Attention is a weighted sum of values.", "The weights come from queries and keys, " * 8]
    base.tokenizer.pad_token = base.tokenizer.eos_token
    batch = base.tokenizer(text, return_tensors="pt", padding=True).to("cuda")
    return model, batch["input_ids"], batch["attention_mask"]
