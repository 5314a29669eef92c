"""A compiled QLoRA model: eager's losses and gradients, no graph break, six graphs for a whole run, and all undone."""

from __future__ import annotations

import contextlib
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy

from helpers import checkpoints
from helpers.attention_transformers import register
from helpers.compile_counter import CompileCounter
from helpers.compiling import Recomputed, compile_model, triton_matmul_on_small_gpus
from helpers.memory import peak_gib, reset_peak
from helpers.step_graphs import StepGraphs, _Step

register()
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def qlora_model(device="cpu", dtype=torch.float32, layers=2):
    checkpoints.SHAPES["test"] = {k: v for k, v in SIZES.items() if not k.endswith("token_id")} | {
        "num_hidden_layers": layers, "tie_word_embeddings": True,
    }  # fmt: skip
    try:
        base = checkpoints._random_shape("test", dtype, torch.device(device))
    finally:
        del checkpoints.SHAPES["test"]
    return with_lora(base.model)


def with_lora(model):
    model = checkpoints.attach_lora(model, 4)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def family_model(family: str):
    from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

    config = {
        "llama": lambda: LlamaConfig(**SIZES),
        "qwen2": lambda: Qwen2Config(**SIZES),
        "mistral": lambda: MistralConfig(**SIZES, sliding_window=9),
        "gemma2": lambda: Gemma2Config(**SIZES, sliding_window=9, final_logit_softcapping=2.0),
    }[family]()
    torch.manual_seed(0)
    return with_lora(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def batches(steps: int, longest: int, rows: int = 2, device="cpu", accumulation: int = 2):
    """Padded batches of 1 to ``longest`` tokens, sizes that equal other dimensions among them, the last of one row."""
    draw = random.Random(3407)
    lengths = [1, 64, 16, 2, 4] + [draw.randint(1, longest) for _ in range(steps * accumulation)]
    generator = torch.Generator().manual_seed(3407)
    for step in range(steps):
        micro = []
        for i in range(accumulation):
            length = lengths[step * accumulation + i]
            ids = torch.randint(3, 256, (1 if step == steps - 1 else rows, length), generator=generator)
            mask = torch.ones_like(ids)
            mask[-1, max(2, length // 2) :] = 0
            labels = ids.masked_fill(mask == 0, -100)
            labels[:, : min(length // 4, 3)] = -100
            micro.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        items = max(1, sum(int((b["labels"][:, 1:] != -100).sum()) for b in micro))
        yield [{k: v.to(device) for k, v in b.items()} | {"num_items_in_batch": items} for b in micro]


def train(model, batches, evaluate=True, autocast=None, scaler=None):
    """Losses of each step and of an evaluation after it; the model is left trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    losses = []
    for micro in batches:
        model.train()
        total = 0.0
        for batch in micro:
            with torch.autocast(parameters[0].device.type, dtype=autocast, enabled=autocast is not None):
                loss = model(**batch).loss
            (loss if scaler is None else scaler.scale(loss)).backward()
            total += loss.item()
        if scaler is not None:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step() if scaler is None else (scaler.step(optimizer), scaler.update())
        optimizer.zero_grad()
        losses.append(total)
        if evaluate:
            model.eval()
            ids = torch.arange(3, 153, device=parameters[0].device).view(3, 50)
            with torch.no_grad(), torch.autocast(ids.device.type, dtype=autocast, enabled=autocast is not None):
                losses.append(model(input_ids=ids, labels=ids).loss.item())
    return losses


def restart(model, weights):
    for parameter, weight in zip((p for p in model.parameters() if p.requires_grad), weights, strict=True):
        parameter.data.copy_(weight)
        parameter.grad = None


def trainable(model):
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def checkpointing(model, on: bool):
    if on:  # as transformers' Trainer switches it on
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    else:
        model.gradient_checkpointing_disable()


@pytest.mark.parametrize(
    ("decoder", "checkpointed"), [("bitsandbytes", False), ("bitsandbytes", True), ("triton", True)]
)
def test_a_qlora_run_compiles_six_graphs_breaks_none_and_keeps_its_losses(decoder, checkpointed):
    interpreted = decoder == "triton"  # the kernel: slow, here
    model = qlora_model(layers=1 if interpreted else 2)
    checkpointing(model, checkpointed)
    weights = trainable(model)
    steps, evaluate = (1, False) if interpreted else (5, True)
    expected = train(model, batches(steps, 90), evaluate)
    reached = trainable(model)
    restart(model, weights)
    if decoder == "triton":
        from helpers.nf4_linear import triton_nf4

        decoding = triton_nf4(model)
    else:
        decoding = contextlib.nullcontext()
    with (
        CompileCounter() as counter,
        decoding,
        compile_model(model, backend="aot_eager_decomp_partition", pad_to=64 if interpreted else 1) as compiled,
    ):
        found = train(model, batches(steps, 90), evaluate)
    assert set(compiled.parts.values()) == {"compiled"}
    assert counter.graph_breaks == 0, str(counter)
    assert 3 <= counter.compiles <= 6, str(counter)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(trainable(model), reached, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-3)


def test_checkpointing_of_another_family_is_in_the_graph():
    """Not around it, where each saved tensor would pass through Python hooks."""
    model = family_model("gemma2").train()
    graphs: list[str] = []

    def record(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    ids = torch.arange(3, 43).view(2, 20)
    with compile_model(model, backend=record):
        for on in (False, True):
            checkpointing(model, on)
            model(input_ids=ids, labels=ids).loss.backward()
    marked = ["tag_activation_checkpoint" in code for code in graphs]
    assert marked[-1] and marked == sorted(marked), "checkpointing was switched on last, for all kinds of layer"


def test_what_a_checkpoint_did_is_all_marked_to_be_done_again():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    marked, unmarked, backward = (graph.call_function(torch.ops.aten.sin.default, (x,)) for _ in range(3))
    marked.meta |= {"recompute": 1, "ac_graph_id": 3}
    backward.meta["partitioner_tag"] = "is_backward"
    Recomputed()(graph)
    assert unmarked.meta["ac_graph_id"] == 3 and "recompute" in unmarked.meta
    assert "recompute" not in backward.meta and "recompute" not in x.meta
    del marked.meta["recompute"], unmarked.meta["recompute"]
    Recomputed()(graph)
    assert "recompute" not in unmarked.meta, "there is no checkpoint in this graph"


def test_attention_is_not_done_again_where_nothing_is_checkpointed():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    attention = graph.call_function(torch.ops.aten._scaled_dot_product_cudnn_attention.default, (x, x, x, None, True))
    backward = graph.call_function(torch.ops.aten._scaled_dot_product_cudnn_attention.default, (x, x, x, None, True))
    backward.meta["partitioner_tag"] = "is_backward"
    Recomputed()(graph)
    assert attention.meta["recompute"] is CheckpointPolicy.MUST_SAVE and "recompute" not in backward.meta


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_families_keep_their_losses(family):
    model = family_model(family)
    weights = trainable(model)
    expected = train(model, batches(3, 40))
    restart(model, weights)
    with CompileCounter() as counter, compile_model(model, backend="eager") as compiled:
        found = train(model, batches(3, 40))
    assert set(compiled.parts.values()) == {"compiled"}
    assert counter.graph_breaks == 0, str(counter)
    # Gemma 2 has two kinds of layer; a window shorter than some batches adds their mask.
    assert counter.compiles <= {"mistral": 8, "gemma2": 10}[family], str(counter)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def packed_batches(steps):
    draw = random.Random(3407)
    for _ in range(steps):
        lengths = [draw.randint(1, 90) for _ in range(draw.randint(1, 4))]
        total = sum(lengths)
        ids = torch.randint(3, 256, (1, total))
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        labels = ids.masked_fill(positions == 0, -100)
        yield [{"input_ids": ids, "position_ids": positions, "labels": labels, "use_cache": False}]


@pytest.mark.parametrize("pad_to", [1, 64])
def test_packed_rows_through_flex_at_any_length(monkeypatch, pad_to):
    from torch.nn.attention import flex_attention

    # PyTorch refuses a backward pass on the CPU; traced and run as written it has one, and its graphs are the GPU's.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    model = family_model("llama")
    micro = list(packed_batches(6))
    weights = trainable(model)
    model.set_attn_implementation("sdpa")
    expected = train(model, micro, evaluate=False)
    restart(model, weights)
    model.set_attn_implementation("qlora_flex")
    from helpers import attention

    monkeypatch.setattr(attention, "unsupported", lambda backend, case: None)
    with CompileCounter() as counter, compile_model(model, backend="eager", pad_to=pad_to):
        found = train(model, micro, evaluate=False)
    assert counter.graph_breaks == 0, str(counter)
    assert counter.compiles <= 4, str(counter)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_everything_is_undone_and_generation_works_within():
    model = family_model("llama").eval()
    ids = torch.randint(3, 256, (2, 7))
    layer = model.get_base_model().model.layers[0]
    kinds = {name: type(module) for name, module in model.named_modules()}
    before = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
    with compile_model(model, backend="eager"):
        assert type(layer).__name__ == "CompiledLlamaDecoderLayer"
        torch.testing.assert_close(model(ids).logits, before)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), tokens)
        assert model(input_ids=ids, labels=ids).loss.isfinite()
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert "forward" not in vars(model.get_base_model())
    assert torch.equal(model(ids).logits, before)


def test_rows_of_an_evaluation_do_not_change_those_of_training():
    model = family_model("llama")
    ids = torch.arange(3, 63).view(3, 20)
    with CompileCounter() as counter, compile_model(model, backend="eager"):
        for step in range(3):
            model.train()
            model(input_ids=ids[:1, : 9 + step], labels=ids[:1, : 9 + step]).loss.backward()
            model.eval()
            with torch.no_grad():
                model(input_ids=ids, labels=ids)
    assert counter.compiles <= 6, str(counter)


def test_a_trainer_trains_and_evaluates_within_and_logs_eagers_losses(tmp_path):
    """TRL's trainer, which replaces the forward itself and has accelerate wrap it, with evaluation between steps."""
    from helpers.instruction_data import load_instructions
    from helpers.train import QLoRATrainer
    from helpers.train_arguments import TrainArguments, decided, sft_config

    rows = load_instructions("random:2-40x24", vocab_size=256)
    logged, kept = {}, []
    for name in ("eager", "compiled"):
        model = family_model("llama")
        config = sft_config(decided(TrainArguments(
            output_dir=str(tmp_path), steps=4, batch_size=2, accumulation=2, max_length=32, dtype="bfloat16",
            learning_rate=1e-2,
        )))  # fmt: skip
        config.eval_strategy, config.eval_steps, config.per_device_eval_batch_size = "steps", 2, 3
        config.prediction_loss_only = True
        regions = compile_model(model, backend="eager") if name == "compiled" else contextlib.nullcontext()
        with CompileCounter() as counter, regions:
            trainer = QLoRATrainer(
                model,
                loss="full",
                args=config,
                train_dataset=rows,
                eval_dataset=rows.select(range(5)),
                processing_class=checkpoints.byte_tokenizer(),
            )
            trainer.train()
        losses = [row.get("loss", row.get("eval_loss")) for row in trainer.state.log_history]
        logged[name] = [loss for loss in losses if loss is not None]
        kept.append(trainer.model)
    assert counter.graph_breaks == 0 and counter.compiles <= 6, str(counter)
    assert len(logged["eager"]) == 6
    torch.testing.assert_close(logged["compiled"], logged["eager"], rtol=1e-3, atol=1e-3)
    assert not any("Compiled" in type(module).__name__ for module in kept[1].modules())


def test_a_trainer_that_wraps_the_forward_is_left_in_peace():
    model = family_model("llama")
    base, ids = model.get_base_model(), torch.randint(3, 256, (1, 7))
    with compile_model(model, backend="eager"):
        ours = base.forward
        base.forward = lambda *args, **kwargs: ours(*args, **kwargs)
        assert model(input_ids=ids, labels=ids).logits is None
    assert model(input_ids=ids, labels=ids).logits is not None


def test_what_cannot_be_compiled_is_said():
    with pytest.raises(ValueError, match="Linear has no list of decoder layers"), compile_model(nn.Linear(2, 2)):
        pass
    model = family_model("llama")
    model.get_base_model().get_input_embeddings().weight.requires_grad_()
    model.get_base_model().model.norm.weight.requires_grad_()
    ids = torch.randint(3, 256, (2, 9))
    expected = model(input_ids=ids, labels=ids).loss
    with compile_model(model, backend="eager") as compiled:
        assert "trained" in compiled.parts["norm and loss"]
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)


def test_the_counter_names_breaks_and_recompiles():
    @torch.compile(backend="eager", dynamic=False)
    def broken(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    with CompileCounter() as counter:
        broken(torch.ones(3))
        assert (counter.compiles, counter.graph_breaks, counter.recompiles) == (2, 1, 0)
        broken(torch.ones(4))
    assert (counter.compiles, counter.recompiles) == (4, 2)
    broken(torch.ones(5))
    assert counter.compiles == 4, "it goes on counting after its block"
    assert any("graph break" in reason for reason in counter.reasons)
    assert any("size mismatch" in reason for reason in counter.reasons)


def test_small_gpus_may_autotune_and_only_within():
    from torch._inductor import utils

    before = utils.is_big_gpu
    with triton_matmul_on_small_gpus():
        assert utils.is_big_gpu(torch.device("cuda", 0))
    assert utils.is_big_gpu is before


class OnTheCPU(StepGraphs):
    """What a recording does, done again at each replay."""

    def _recorded(self, inputs, mode):
        inputs = tuple(x.clone() for x in inputs)
        step = _Step(inputs, torch.ones(()), torch.ones(()), torch.zeros(()), None, None)

        def forward():
            with torch.enable_grad():
                step.made = self.loss(step.inputs, step.items, *mode)
            step.loss.copy_(step.made.detach())

        def backward():
            step.made.backward(step.upstream)
            step.made = None

        step.forward, step.backward = SimpleNamespace(replay=forward), SimpleNamespace(replay=backward)
        return step


def test_recording_a_step_leaves_gradients_as_they_were(monkeypatch):
    """With a GPU's streams and graphs played: what is called between them runs."""
    nothing = lambda *args, **kwargs: contextlib.nullcontext()  # noqa: E731
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, played in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": nothing, "graph": nothing,
        "CUDAGraph": SimpleNamespace, "graph_pool_handle": lambda: (0, 1),
        "memory_snapshot": lambda: [{"segment_pool_id": (0, i), "total_size": 10 + i} for i in (0, 1, 1)],
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, played)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    weight = nn.Parameter(torch.randn(5, 3))
    weight.grad = before = torch.ones(5, 3)
    warmed = []

    @contextlib.contextmanager
    def warm_up():
        yield warmed.append(weight.grad)

    graphs = StepGraphs(lambda inputs, items: (weight[inputs[0]].sum(-1) * inputs[1]).sum() / items, warm_up, [weight])
    ids, labels = torch.tensor([[0, 1]]), torch.tensor([[2.0, 3.0]])
    step = graphs._recorded((ids, labels), ())
    assert warmed == [None] and weight.grad is before and torch.equal(before, torch.ones(5, 3))
    assert graphs.recorded_bytes == 22, "of its own pool alone"
    # A real recording runs nothing; this one ran backward once, into the buffer.
    torch.testing.assert_close(graphs.buffers[0][:2], torch.tensor([[2.0], [3.0]]).expand(2, 3))
    assert torch.equal(step.inputs[0], ids) and step.inputs[0] is not ids and not step.loss.requires_grad


def test_replayed_steps_accumulate_as_eager_ones_and_one_at_a_time(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    weight = nn.Parameter(torch.randn(5, 3))

    def loss(inputs, items):
        return (weight[inputs[0]] * inputs[1][..., None]).square().sum() / items

    graphs = OnTheCPU(loss, contextlib.nullcontext, [weight])
    batches = [(torch.randint(5, (2, n)), torch.randn(2, n)) for n in (4, 7, 4, 7)]
    for zero in (True, False):  # as optimizers set gradients to None, and as they set them to zero
        expected = torch.autograd.grad(sum(3 * loss(batch, items=2) for batch in batches), weight)[0]
        for batch in batches:
            replayed = graphs(batch, 2)
            torch.testing.assert_close(replayed, loss(batch, items=2))
            (3 * replayed).backward()
        torch.testing.assert_close(weight.grad, expected)
        assert len(graphs.steps) == 2 and weight.grad is graphs.buffers[0]
        weight.grad = None if zero else weight.grad.zero_()
    loss(batches[0], items=1).backward()  # one that is not replayed adds to the same
    graphs(batches[0], torch.tensor(1)).backward()
    torch.testing.assert_close(weight.grad, 2 * torch.autograd.grad(loss(batches[0], items=1), weight)[0])
    first = graphs(batches[0], 1)
    graphs(batches[1], 1).backward()
    with pytest.raises(RuntimeError, match="without cuda_graphs"):
        first.backward()
    graphs((torch.randint(5, (2, 9)), torch.randn(2, 9)), 1)
    assert len(graphs.steps) == 1, "shorter ones are recorded anew, into a longer one's memory"


def test_packed_rows_are_recorded_where_flash_attention_takes_them(varlen_on_the_cpu, monkeypatch):
    from helpers import compiled_loss

    model = family_model("llama").train()
    weights, micro = trainable(model), [*packed_batches(6), *batches(2, 40)]
    model.set_attn_implementation("sdpa")
    expected = train(model, micro, evaluate=False)
    restart(model, weights)
    made = []
    monkeypatch.setattr(compiled_loss, "_on_a_gpu", lambda ids: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(compiled_loss, "StepGraphs", lambda *args: made.append(OnTheCPU(*args)) or made[0])
    for name, recorded in (("qlora_varlen", {2, 3}), ("qlora_sdpa", {2})):  # ids and labels; positions
        model.set_attn_implementation(name)
        with compile_model(model, backend="eager", cuda_graphs=True, pad_to=64):
            found = train(model, micro, evaluate=False)
            assert {len(step.inputs) for step in made[0].steps.values()} == recorded
        assert not made[0].steps, "NCCL could not be left before graphs that it is part of"
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        restart(model, weights)
        made.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("decoder", ["bitsandbytes", "triton"])
def test_gpu_sixty_steps_keep_their_losses(decoder, checkpointed, dtype):
    model = qlora_model("cuda", dtype)
    checkpointing(model, checkpointed)
    weights = trainable(model)

    def scaler():
        return torch.amp.GradScaler("cuda") if dtype == torch.float16 else None

    from helpers.nf4_linear import triton_nf4

    expected = train(model, batches(60, 1024, device="cuda"), autocast=dtype, scaler=scaler())
    restart(model, weights)
    decoding = triton_nf4(model) if decoder == "triton" else contextlib.nullcontext()
    with CompileCounter() as counter, decoding, compile_model(model):
        found = train(model, batches(60, 1024, device="cuda"), autocast=dtype, scaler=scaler())
    assert counter.graph_breaks == 0 and counter.compiles <= 6, str(counter)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_gpu_less_is_kept_for_backward():
    model = qlora_model("cuda", torch.bfloat16).train()
    ids = torch.randint(3, 256, (8, 1024), device="cuda")

    def kept(checkpointed: bool, save_less: bool) -> int:
        checkpointing(model, checkpointed)
        with compile_model(model, save_less=save_less), torch.autocast("cuda", dtype=torch.bfloat16):
            for _ in range(2):
                before = torch.cuda.memory_allocated()
                loss = model(input_ids=ids, labels=ids).loss
                found = torch.cuda.memory_allocated() - before
                loss.backward()
        return found

    everything, less, least = kept(False, False), kept(False, True), kept(True, True)
    assert less < 0.8 * everything
    assert least < 0.5 * less


@pytest.mark.gpu
def test_gpu_packed_flex_trains_at_any_length():
    model = family_model("llama").cuda()
    model.set_attn_implementation("qlora_flex")
    draw = random.Random(3407)
    with CompileCounter() as counter, compile_model(model):
        for _ in range(20):
            lengths = [draw.randint(1, 400) for _ in range(draw.randint(1, 4))]
            ids = torch.randint(3, 256, (1, sum(lengths)), device="cuda")
            positions = torch.cat([torch.arange(n, device="cuda") for n in lengths])[None]
            loss = model(input_ids=ids, position_ids=positions, labels=ids.masked_fill(positions == 0, -100)).loss
            loss.backward()
            apart = [model(input_ids=part, labels=part).loss * (part.shape[1] - 1)
                     for part in ids.split(lengths, 1) if part.shape[1] > 1]  # fmt: skip
            expected = sum(apart) / sum(n - 1 for n in lengths)
            torch.testing.assert_close(loss, expected, rtol=2e-3, atol=2e-3)
    assert counter.graph_breaks == 0 and counter.compiles <= 8, str(counter)


@pytest.mark.gpu
def test_gpu_max_autotune_recompiles_no_more():
    model = qlora_model("cuda", torch.float16)
    with CompileCounter() as counter, compile_model(model, max_autotune=True):
        losses = train(model, batches(6, 300, device="cuda"), autocast=torch.float16)
    assert all(loss == loss for loss in losses)
    assert counter.graph_breaks == 0 and counter.compiles <= 6, str(counter)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["", "checkpointed", "offloaded"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_replayed_steps_keep_their_losses_and_need_no_more_memory(dtype, how):
    model = qlora_model("cuda", dtype, layers=5)
    checkpointing(model, how != "")
    weights = trainable(model)
    found, peaks = [], []
    for cuda_graphs in (False, True):
        restart(model, weights)
        torch.cuda.empty_cache()
        reset_peak()
        scaler = torch.amp.GradScaler("cuda") if dtype == torch.float16 else None
        offload = how == "offloaded"
        with CompileCounter() as counter, compile_model(model, cuda_graphs=cuda_graphs, offload=offload):
            found.append(train(model, batches(20, 1024, device="cuda"), autocast=dtype, scaler=scaler))
        peaks.append(peak_gib()[0])
        assert counter.graph_breaks == 0 and counter.compiles <= 6, str(counter)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gpu_packed_rows_are_replayed(checkpointed, monkeypatch):
    from helpers import compiled_loss

    model = qlora_model("cuda", torch.bfloat16)
    checkpointing(model, checkpointed)
    model.set_attn_implementation("qlora_auto")
    micro = [[{k: v.cuda() if torch.is_tensor(v) else v for k, v in b.items()} for b in m] for m in packed_batches(12)]
    weights, made, found = trainable(model), [], []
    monkeypatch.setattr(compiled_loss, "StepGraphs", lambda *args: made.append(StepGraphs(*args)) or made[0])
    for cuda_graphs in (False, True):
        restart(model, weights)
        with CompileCounter() as counter, compile_model(model, cuda_graphs=cuda_graphs):
            found.append(train(model, micro, evaluate=False, autocast=torch.bfloat16))
            assert not made or {len(step.inputs) for step in made[0].steps.values()} == {3}
        assert counter.graph_breaks == 0 and counter.compiles <= 6, str(counter)
    assert made
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_gpu_a_replayed_loss_whose_activations_are_gone_says_so():
    model = family_model("llama").cuda().train()
    ids = torch.randint(3, 256, (2, 50), device="cuda")
    with compile_model(model, cuda_graphs=True):
        first = model(input_ids=ids, labels=ids).loss
        model(input_ids=ids, labels=ids).loss.backward()
        with pytest.raises(RuntimeError, match="without cuda_graphs"):
            first.backward()
