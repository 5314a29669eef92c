"""Classification through the stock call: equal to transformers where that is right, and undone whole."""

from __future__ import annotations

import functools

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from helpers import classification, compiling
from helpers.checkpoints import LORA_TARGETS, nf4_config
from helpers.compile_counter import CompileCounter

PAD, EOS = 0, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {
    "single": {"num_labels": 3},
    "multi": {"num_labels": 3, "problem_type": "multi_label_classification"},
    "regression": {"num_labels": 1},
}
LABELS = {
    "single": torch.tensor([2, 0, 1]),
    "multi": torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]]),
    "regression": torch.tensor([0.5, -1.0, 2.0]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def rows(side: str = "right", lengths=(9, 4, 6), end: int = EOS, pad: int = PAD):
    """Texts that end in ``end``, padded with ``pad`` on ``side``."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((len(lengths), max(lengths)), pad)
    mask = torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        text = torch.randint(5, 90, (n,), generator=generator)
        text[-1] = end
        at = slice(0, n) if side == "right" else slice(max(lengths) - n, None)
        ids[i, at], mask[i, at] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def load(folder, auto=AutoModelForSequenceClassification, seed=3, **kwargs):
    torch.manual_seed(seed)  # the head is drawn anew
    return auto.from_pretrained(folder, **{"dtype": torch.float32, "device_map": {"": DEVICE}} | kwargs)


def on_device(batch):
    return {key: value.to(DEVICE) for key, value in batch.items()}


def lora(model, task=TaskType.SEQ_CLS):
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=list(LORA_TARGETS), task_type=task, lora_dropout=0.0)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours, stock, batch, labels, tolerance, real=slice(None)):
    batch = on_device(batch | {"labels": labels})
    a, b = ours(**batch), stock(**batch)
    torch.testing.assert_close(a.loss, b.loss.float(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(a.logits[real], b.logits[real].float(), atol=tolerance, rtol=tolerance)
    a.loss.backward(), b.loss.backward()
    mine, theirs = gradients(ours), gradients(stock)
    assert mine.keys() == theirs.keys() and len(mine) > 10
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_stock(folder, kind, side):
    stock = load(folder, **KINDS[kind])
    with classification.patch(quantize=False):
        ours = load(folder, **KINDS[kind])
        assert_same_step(ours, stock, rows(side), LABELS[kind], 2e-6)
        assert ours.config.problem_type == stock.config.problem_type


def test_nf4_through_the_kernel_trains_like_stock_bitsandbytes(folder):
    stock = lora(load(folder, num_labels=3, quantization_config=nf4_config(torch.float32)))
    with classification.patch(nf4="triton"):
        ours = lora(load(folder, num_labels=3))
        assert classification.parts(ours) == {
            "NF4": "14 layers, 14 decoded by the Triton kernel", "attention": "qlora_auto", "compiled": "0 modules",
            "head": "float32", "pooling": "attention mask",
        }  # fmt: skip
        for model in (ours, stock):  # else bitsandbytes takes another product on a CPU, right to 1e-4
            model.enable_input_require_grads()
        assert_same_step(ours, stock, rows("left"), LABELS["single"], 1e-5)


def test_a_text_that_ends_in_the_padding_token_is_pooled_at_its_end(folder):
    batch = rows(end=EOS, pad=EOS)
    lengths = batch["attention_mask"].sum(1)
    stock = load(folder, num_labels=3, pad_token_id=EOS).eval()
    with torch.no_grad(), classification.patch(quantize=False):
        ours = load(folder, num_labels=3, pad_token_id=EOS).eval()
        for side in ("right", "left"):
            batch = on_device(rows(side, end=EOS, pad=EOS))
            pooled, stock_pooled = ours(**batch).logits, stock(**batch).logits
            for i, n in enumerate(lengths):
                text = batch["input_ids"][i][batch["attention_mask"][i] == 1][None]
                every = stock.score(stock.model(text).last_hidden_state)[0]
                torch.testing.assert_close(pooled[i], every[n - 1], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(stock_pooled[i], every[n - 2], atol=1e-5, rtol=1e-5)  # the fault
        with pytest.raises(ValueError, match="give attention_mask"):
            ours(input_ids=batch["input_ids"])


def test_packed_texts_give_one_result_each(folder):
    batch = on_device(rows())
    real = batch["attention_mask"].bool()
    with torch.no_grad(), classification.patch(quantize=False):
        model = load(folder, num_labels=3).eval()
        alone = model(**batch).logits
        position_ids = torch.cat([torch.arange(n, device=DEVICE) for n in real.sum(1)])[None]
        packed = model(input_ids=batch["input_ids"][real][None], position_ids=position_ids).logits
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


class RowsOf(torch.utils.data.Dataset):
    def __init__(self, batch, labels):
        self.rows = [{k: v[i] for k, v in batch.items()} | {"labels": labels[i]} for i in range(len(labels))]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def norm_of_first_step(model, data, accumulation, folder):
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation,
        max_steps=1, logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=DEVICE == "cpu", learning_rate=0.0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    return next(row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_do_not_grow(folder, tmp_path, kind):
    batch = rows(lengths=(9, 4, 6, 9))
    data = RowsOf(batch, torch.cat([LABELS[kind], LABELS[kind][:1]]))
    with classification.patch(quantize=False):
        whole, halves = (norm_of_first_step(load(folder, **KINDS[kind]), data, n, tmp_path) for n in (1, 2))
    assert halves == pytest.approx(whole, rel=1e-3)
    stock = norm_of_first_step(load(folder, **KINDS[kind]), data, 2, tmp_path)
    assert stock == pytest.approx(2 * whole, rel=1e-3), "transformers has mended it: say so in the notebook"


def test_the_head_of_a_quantised_checkpoint_stays_float(folder, tmp_path):
    quantised = load(folder, AutoModelForCausalLM, quantization_config=nf4_config(torch.float32))
    quantised.config.quantization_config.llm_int8_skip_modules = ["lm_head"]  # as published checkpoints have it
    quantised.save_pretrained(tmp_path)
    with classification.patch(nf4="triton"):
        for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
            model = load(tmp_path, auto, num_labels=5)
            assert type(model.score) is classification.FloatLinear and model.score.weight.shape == (5, 64)
            assert classification.parts(model)["NF4"].startswith("14 layers, 14 decoded")


def test_trained_saved_and_loaded_by_plain_transformers(folder, tmp_path):
    data = RowsOf(rows(), LABELS["single"])
    batch = on_device(rows())
    with classification.patch(nf4="triton"):
        model = lora(load(folder, num_labels=3))
        head = model.get_base_model().score.modules_to_save["default"].weight.clone()
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, report_to="none", disable_tqdm=True,
            use_cpu=DEVICE == "cpu", save_strategy="no",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data).train()
        assert not torch.equal(head, model.get_base_model().score.modules_to_save["default"].weight)
        model.eval().save_pretrained(tmp_path / "adapter")
        model.enable_input_require_grads()  # else bitsandbytes takes another product on a CPU, right to 1e-4
        trained = model(**batch).logits
    base = load(folder, seed=99, num_labels=3, quantization_config=nf4_config(torch.float32))  # another fresh head
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    plain.enable_input_require_grads()
    torch.testing.assert_close(plain(**batch).logits, trained, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        # Merged, the float model is stock through and through, and gives the same bits after a save and a load.
        whole = load(folder, seed=98, num_labels=3)
        merged = PeftModel.from_pretrained(whole, tmp_path / "adapter").merge_and_unload().eval()
        merged.save_pretrained(tmp_path / "merged")
        again = load(tmp_path / "merged").eval()
        assert again.config.architectures == ["LlamaForSequenceClassification"]
        assert torch.equal(again(**batch).logits, merged(**batch).logits)


def test_patched_and_plain_give_the_same_bits_after_saving(folder, tmp_path):
    batch = on_device(rows())
    with torch.no_grad(), classification.patch(quantize=False, attention="sdpa"):
        ours = load(folder, num_labels=3).eval()
        ours.save_pretrained(tmp_path)
        logits = ours(**batch).logits
    plain = load(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, logits)


def test_token_classification_is_stock_with_a_float_head(folder):
    batch = rows()
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"] % 4, -100)
    stock = load(folder, AutoModelForTokenClassification, num_labels=4)
    stock.dropout.p = 0.0
    with classification.patch(quantize=False):
        ours = load(folder, AutoModelForTokenClassification, num_labels=4)
        ours.dropout.p = 0.0
        assert_same_step(ours, stock, batch, labels, 2e-6, batch["attention_mask"] == 1)
    with classification.patch(nf4="triton"):
        model = lora(load(folder, AutoModelForTokenClassification, num_labels=4), TaskType.TOKEN_CLS)
        model(**on_device(batch | {"labels": labels})).loss.backward()
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_layers_compile_at_the_first_training_step(folder, monkeypatch):
    monkeypatch.setattr(compiling, "compile_model", functools.partial(compiling.compile_model, backend="eager"))
    stock = lora(load(folder, num_labels=3))
    with classification.patch(quantize=False, compile=True) as stack, CompileCounter() as counter:
        ours = lora(load(folder, num_labels=3))
        ours.train(), stock.train()
        assert_same_step(ours, stock, rows(), LABELS["single"], 1e-5)
        assert classification.parts(ours)["compiled"] == "3 modules"  # two layers and the frequencies
        assert counter.compiles >= 2 and counter.graph_breaks == 0, str(counter)
        for length in (5, 12, 17):
            ours(**on_device(rows(lengths=(length, 4, 3)) | {"labels": LABELS["single"]})).loss.backward()
        assert counter.compiles <= 6, str(counter)
        stack.close()
        assert classification.parts(ours)["compiled"] == "0 modules"
    torch._dynamo.reset()


def test_undone_whole(folder):
    before = AutoModelForSequenceClassification.from_pretrained.__func__
    stack = classification.patch(nf4="triton")
    model = load(folder, num_labels=3)
    kind = type(model)
    assert AutoModelForSequenceClassification.from_pretrained.__func__ is not before
    stack.close()
    assert AutoModelForSequenceClassification.from_pretrained.__func__ is before
    assert type(model) is not kind and type(model.score) is torch.nn.Linear
    assert not any("forward" in vars(module) for module in model.modules())
    assert type(load(folder, num_labels=3).model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.parametrize(
    ("labels", "problem", "said"),
    [
        (torch.tensor([0, 5]), None, "reach from 0 to 5, but num_labels is 3"),
        (torch.tensor([0, -1]), None, "reach from -1"),
        (torch.tensor([0]), None, "1 labels for 2 texts"),
        (torch.tensor([[1.0, 0.0]]), None, "do not fit logits"),
        (torch.tensor([0, 1]), "ranking", "'ranking' is not one of"),
    ],
)
def test_bad_labels_are_named(labels, problem, said):
    with pytest.raises(ValueError, match=said):
        classification.classification_loss(torch.zeros(2, 3), labels, problem)


def test_bad_masks_and_choices_are_named():
    ids = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"shape \(2, 1, 4, 4\)"):
        classification.last_tokens(torch.ones(2, 1, 4, 4), None, ids, None)
    with pytest.raises(ValueError, match="'cuda' is not one of"):
        classification.patch(nf4="cuda")
