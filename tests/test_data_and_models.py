"""Models and data: the embedded default, random shapes, the user's own files, and clear refusals."""

from __future__ import annotations

import json
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch

from helpers import checkpoints
from helpers.instruction_data import load_instructions, resolve_data
from helpers.memory import measure_peak


def test_python_documentation_is_plentiful_ordered_and_conversational():
    rows = load_instructions("python-docs")
    assert len(rows) > 2000
    assert rows[:50] == load_instructions("python-docs")[:50] != load_instructions("python-docs", seed=1)[:50]
    question, answer = rows[0]["messages"]
    assert question["role"] == "user" and "standard library" in question["content"]
    assert answer["role"] == "assistant" and len(answer["content"]) >= 60


def test_random_rows_stay_within_their_bounds():
    rows = load_instructions("random:5-9x40", vocab_size=30)
    lengths = {len(row["input_ids"]) for row in rows}
    assert len(rows) == 40 and min(lengths) >= 5 and max(lengths) <= 9 and len(lengths) > 1
    assert max(token for row in rows for token in row["input_ids"]) < 30


def test_a_users_own_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"text": "hello"}) + "\n")
    assert load_instructions(str(path))[0] == {"text": "hello"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.jsonl", "does not exist"),
        ("random:9-5", "0 < LOW <= HIGH"),
        ("random:many", "not of the form"),
        ("no/such-set", "neither a .jsonl file nor reachable"),
        ("oig", "neither a .jsonl file nor reachable"),
    ],
)
def test_bad_data_is_named(name, said):
    with pytest.raises(ValueError, match=said):
        load_instructions(name)


@pytest.mark.parametrize(
    ("text", "said"), [('{"sentence": "hello"}', "has columns .*sentence"), ("{oops", "no JSON rows")]
)
def test_a_file_without_rows_of_a_known_column_is_refused(tmp_path, text, said):
    path = tmp_path / "odd.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(ValueError, match=said):
        load_instructions(str(path))


def test_random_shape_is_quantised_labelled_and_reproducible():
    first, second = (checkpoints.load_base("shape:tiny") for _ in range(2))
    assert first.random_weights and "RANDOM" in first.label
    layer = first.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, bnb.nn.Linear4bit) and layer.weight.quant_state.nested
    ids = torch.randint(3, 500, (1, 16))
    with torch.no_grad():
        a, b = first.model(ids).logits, second.model(ids).logits
    assert torch.equal(a, b) and torch.isfinite(a).all()


def test_byte_tokenizer_keeps_any_text():
    tokenizer = checkpoints.byte_tokenizer()
    text = "naïve → 日本\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_lora_is_float32_on_the_seven_projections():
    model = checkpoints.attach_lora(checkpoints.load_base("shape:tiny").model, rank=4)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 7 * 2
    assert all(p.dtype == torch.float32 for p in trainable.values())
    assert {name.split(".")[-4] for name in trainable} == set(checkpoints.LORA_TARGETS)


@pytest.mark.parametrize(("name", "said"), [("shape:llama-9", "unknown shape"), ("no/such-model", "neither a local")])
def test_bad_models_are_named(name, said):
    with pytest.raises(ValueError, match=said):
        checkpoints.load_base(name)


def test_the_embedded_model_is_a_pretrained_llama_that_answers():
    from helpers.train import answer

    base = checkpoints.load_base("embedded")
    assert base.model.config.model_type == "llama" and not base.random_weights
    assert "Paris" in answer(base.model, base.tokenizer, "What is the capital of France?", new_tokens=8)


def test_a_wrong_gguf_is_refused(tmp_path, monkeypatch):
    wrong = tmp_path / "model.gguf"
    wrong.write_bytes(b"GGUF")
    monkeypatch.setenv("QLORA_GGUF", str(wrong))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="sha256"):
        checkpoints.embedded_folder()
    assert list((tmp_path / "cache" / "qlora-helpers").iterdir()) == []


def test_a_users_folder_is_loaded_whether_quantised_or_not(tmp_path):
    """Saved again, the quantised model loads to the same answers, computing in the dtype that is asked for."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    plain = AutoModelForCausalLM.from_config(LlamaConfig(**checkpoints.SHAPES["tiny"]))
    plain.save_pretrained(tmp_path / "plain")
    checkpoints.byte_tokenizer().save_pretrained(tmp_path / "plain")
    first = checkpoints.load_base(str(tmp_path / "plain"), torch.bfloat16)
    first.model.save_pretrained(tmp_path / "quantised")
    first.tokenizer.save_pretrained(tmp_path / "quantised")
    again = checkpoints.load_base(str(tmp_path / "quantised"), torch.float32)
    layer, before = (base.model.model.layers[1].mlp.down_proj for base in (again, first))
    assert isinstance(layer, bnb.nn.Linear4bit) and torch.equal(layer.weight, before.weight)
    assert layer.compute_dtype == torch.float32 and again.label == str(tmp_path / "quantised")


@pytest.mark.parametrize(
    ("gpu_gib", "answers", "model", "data"),
    [
        (None, True, "embedded", "python-docs"), (8, True, "embedded", "python-docs"),
        (15, False, "embedded", "python-docs"), (15, True, checkpoints.CHALLENGE_8B, "oig"),
    ],
)  # fmt: skip
def test_what_auto_stands_for(monkeypatch, gpu_gib, answers, model, data):
    """The challenge's checkpoints and data where a GPU of 14 GiB and the Hub answer; never without a GPU."""
    properties = SimpleNamespace(total_memory=(gpu_gib or 0) * 1024**3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu_gib is not None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(checkpoints, "hub_answers", lambda: answers)
    assert checkpoints.resolve_model("auto", checkpoints.CHALLENGE_8B) == model
    assert checkpoints.resolve_model("mine") == "mine"
    assert resolve_data("auto") == data


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["llama-3.2-1b", "llama-3.1-8b"])
def test_a_shape_is_made_in_little_more_than_its_quantised_size(shape):
    base, peak = measure_peak(lambda: checkpoints.load_base(f"shape:{shape}"))
    kept = torch.cuda.memory_allocated()
    largest = checkpoints.SHAPES[shape]["intermediate_size"] * checkpoints.SHAPES[shape]["hidden_size"] * 2
    assert not any(parameter.is_meta for parameter in base.model.parameters())
    assert peak < kept + 3 * largest  # a matrix in 16 bits while it is quantised
