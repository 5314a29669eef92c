"""The two GGUF files: every tensor there, LoRA in it, nothing written on error; and llama.cpp's answer beside ours."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import gguf_text, gguf_tokenizer, gguf_vision, llamacpp, tiny_vision, vision_digits
from helpers.gguf_vision import export_gguf
from helpers.image_resize import ImageSize
from helpers.lora_tensors import merged_tensors
from helpers.vision_checks import beside_llamacpp

SETTINGS = {"qwen2_5_vl": {"vision": {"window_size": 112}}}  # the only one llama.cpp has


def read(path) -> dict[str, np.ndarray]:
    from gguf import GGUFReader

    return {tensor.name: tensor.data.copy() for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("family", tiny_vision.LORA_TARGETS)
def test_lora_is_merged_in_both_files_and_the_model_stays(family, tmp_path):
    settings = SETTINGS.get(family, {})
    processor, model = tiny_vision.tuned(family, **settings)
    before = {name: p.clone() for name, p in model.named_parameters()}
    text, vision = export_gguf(model, processor, tmp_path, "f32")
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    merged = copy.deepcopy(model).merge_and_unload()
    state = dict(merged.named_parameters())
    for name, value in merged_tensors(model.get_base_model()).items():
        torch.testing.assert_close(value(), state[name], rtol=0, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mmproj-f32.gguf", "model-f32.gguf"]
    merged_text, merged_vision = export_gguf(merged, processor, tmp_path / "merged", "f32")
    for path, other in ((text, merged_text), (vision, merged_vision)):
        ours, theirs = read(path), read(other)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6)
    untuned = tiny_vision.model(family, processor, **settings)
    plain = read(export_gguf(untuned, processor, tmp_path / "plain", "f32")[1])
    assert any(not np.array_equal(plain[name], value) for name, value in read(vision).items())  # vision LoRA counts


def test_four_bit_weights_are_decoded_before_lora_is_added(tmp_path):
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

    processor = tiny_vision.processor("llava_siglip")
    tiny_vision.model("llava_siglip", processor).save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantised = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base", quantization_config=settings)
    _, model = tiny_vision.tuned("llava_siglip", quantised)
    text, vision = (read(path) for path in export_gguf(model, processor, tmp_path / "out", "f32"))
    plain = copy.deepcopy(model.get_base_model())
    layer = plain.model.language_model.layers[1].mlp.down_proj
    import bitsandbytes.functional as bnb

    weight = bnb.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state).float()
    expected = weight + layer.get_delta_weight("default")
    np.testing.assert_allclose(text["blk.1.ffn_down.weight"], expected.numpy(force=True), rtol=0, atol=1e-6)
    fc1 = plain.model.vision_tower.encoder.layers[0].mlp.fc1
    assert vision["v.blk.0.ffn_up.weight"].shape == (48, 32) and hasattr(fc1.base_layer.weight, "quant_state")


def test_types_and_tokens(tmp_path):
    from gguf import GGUFReader

    processor = tiny_vision.processor("qwen2_vl")
    model = tiny_vision.model("qwen2_vl", processor)
    text, vision = export_gguf(model, processor, tmp_path, "q8_0")
    assert (text.name, vision.name) == ("model-q8_0.gguf", "mmproj-f16.gguf")
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(text).tensors}
    assert (
        kinds["blk.0.ffn_down.weight"] == "Q8_0" and kinds["blk.0.attn_q.bias"] == kinds["output_norm.weight"] == "F32"
    )
    assert {t.tensor_type.name for t in GGUFReader(vision).tensors if t.data.ndim > 1} == {"F16"}
    fields = GGUFReader(text).fields
    assert fields["qwen2vl.rope.dimension_sections"].contents() == [4, 2, 2, 0]
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[processor.image_token_id] == "<|image_pad|>" and len(tokens) == model.config.text_config.vocab_size
    assert fields["tokenizer.chat_template"].contents() == processor.chat_template


def test_nothing_is_written_for_what_cannot_be_exported(tmp_path, monkeypatch):
    processor = tiny_vision.processor("llava")

    def model(**changes):
        made = tiny_vision.model("llava", processor)
        for key, value in changes.items():
            setattr(made.config, key, value)
        return made

    incomplete, unknown = model(), model()
    del incomplete.model.language_model.layers[1].mlp.up_proj
    unknown.model.extra = torch.nn.Linear(2, 2)
    mllama = tiny_vision.processor("mllama")
    for bad, message in (
        (incomplete, r"incomplete: 1 tensors are missing, such as \['blk.1.ffn_up.weight'\]"),
        (unknown, "2 tensors have no place"),
        (model(vision_feature_select_strategy="full"), "vision_feature_select_strategy='full'"),
        (model(vision_feature_layer=[-2, -3]), "a single layer can"),
        (tiny_vision.model("pixtral", tiny_vision.processor("pixtral")), "vision tower 'pixtral'"),
        (tiny_vision.model("mllama", mllama), "model type 'mllama' cannot be exported"),
        (tiny_vision.model("llava", processor, vision={"intermediate_size": 32}), "mistakes a tower"),
    ):
        with pytest.raises(ValueError, match=message):
            export_gguf(bad, processor, tmp_path / "out")
    with pytest.raises(ValueError, match="dtype='q4'"):
        export_gguf(model(), processor, tmp_path / "out", "q4")
    monkeypatch.setattr(gguf_text.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs llama.cpp's llama-quantize"):
        export_gguf(model(), processor, tmp_path / "out", quantize="Q4_K_M")
    assert not (tmp_path / "out").exists()
    write = gguf_vision.write_gguf

    def breaks(path, kind, *rest):
        write(path, kind, *rest)
        if kind == "clip":
            raise OSError("disk full")

    monkeypatch.setattr(gguf_vision, "write_gguf", breaks)
    with pytest.raises(OSError, match="disk full"):
        export_gguf(model(), processor, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_llama_quantize_is_used_where_it_is(tmp_path, monkeypatch):
    tool = tmp_path / "llama-quantize"
    tool.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] && cp "$1" "$2" || { echo "no such type" >&2; exit 1; }\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    processor = tiny_vision.processor("llava_siglip")
    model = tiny_vision.model("llava_siglip", processor)
    files = export_gguf(model, processor, tmp_path / "out", quantize="Q4_K_M")
    assert [path.name for path in files] == ["model-q4_k_m.gguf", "mmproj-f16.gguf"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mmproj-f16.gguf", "model-q4_k_m.gguf"]
    with pytest.raises(ValueError, match="refused 'Q4': no such type"):
        export_gguf(model, processor, tmp_path / "bad", quantize="Q4")
    assert list((tmp_path / "bad").iterdir()) == []


def asked(processor, sizes):
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    parts = [{"type": "text", "text": "What's in the 12 pictures? "}, *({"type": "image"} for _ in images)]
    return {"messages": [{"role": "user", "content": parts}], "images": images}


@pytest.fixture(scope="module")
def library():
    return llamacpp.library_path(fetch=True)


@pytest.mark.llamacpp
@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "llava_siglip"])
def test_llamacpp_sees_and_says_the_same(family, dtype, tmp_path, library):
    processor, model = tiny_vision.tuned(family, **SETTINGS.get(family, {}))
    if family.startswith("qwen"):  # sizes that neither side resizes, over several windows
        processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 512 * 512}
    row = asked(processor, [(196, 140), (112, 84)] if family.startswith("qwen") else [(56, 56)] * 2)
    found = beside_llamacpp(model, processor, export_gguf(model, processor, tmp_path, dtype), row)
    loose = 4 if dtype == "f16" else 1
    assert found["ids"] and found["answer"]
    assert found["embeddings"] <= 2e-3 * loose and found["logits"] <= 5e-3 * loose
    assert found["top20"] or dtype == "f16"


@pytest.mark.llamacpp
def test_llamacpp_puts_clips_class_token_last(tmp_path, library):
    """The export is right, the graph is not: transformers with the class token moved behind says what llama.cpp says.

    https://github.com/ggml-org/llama.cpp/issues/25814; when this fails because the plain model agrees, it is fixed.
    """
    processor, model = tiny_vision.tuned("llava")
    row = asked(processor, [(56, 56)])
    files = export_gguf(model, processor, tmp_path, "f32")
    assert beside_llamacpp(model, processor, files, row)["embeddings"] > 0.05
    embeddings = model.get_base_model().model.vision_tower.embeddings

    def class_last(module, args, kwargs, out):
        positions = module.position_embedding.weight
        tokens = out - positions  # class first, without positions
        return torch.cat([tokens[:, 1:], tokens[:, :1]], 1) + positions

    embeddings.register_forward_hook(class_last, with_kwargs=True)
    assert beside_llamacpp(model, processor, files, row)["embeddings"] <= 2e-3


@pytest.mark.llamacpp
def test_digits_from_training_to_llamacpp(tmp_path, library):
    """QLoRA on pictures through collator, resizing and completions; llama.cpp answers as transformers do."""
    size, pictures = ImageSize(max_side=56), vision_digits.digits(48)
    model, processor = vision_digits.quantised_llava("tiny")
    model, losses = vision_digits.finetune(model, processor, vision_digits.rows(pictures), tmp_path / "o", 60, size)
    assert losses[-1] < losses[0] / 3
    files = export_gguf(model, processor, tmp_path / "gguf", "f32")
    answers = set()
    for row in vision_digits.rows([(size(picture), name) for picture, name in pictures[:10]]):
        row["messages"].pop()
        found = beside_llamacpp(model, processor, files, row)
        assert found["answer"] and found["logits"] <= 1e-2
        answers.add(tuple(found["ours"]))
    assert len(answers) > 3  # the pictures do matter


@pytest.mark.llamacpp
@pytest.mark.parametrize("split", ["qwen2", "llama-bpe", "smollm", "gpt-2"])
def test_llamacpp_splits_text_the_same(split, tmp_path, library):
    from tokenizers import Regex, pre_tokenizers

    processor = tiny_vision.processor("llava_siglip")
    regex, digits = next(key for key, name in gguf_tokenizer.SPLITS.items() if name == split)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    first = pre_tokenizers.Split(Regex(regex), "isolated") if regex else pre_tokenizers.Digits(individual_digits=True)
    steps = [first, level] if regex or digits else [level]
    processor.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    engine = llamacpp.LlamaCpp(*export_gguf(tiny_vision.model("llava_siglip", processor), processor, tmp_path))
    text = "It's  the\n\n thing: 1234 the-then,\tIn an öl 日本 tin!! [INST]ann</s> the\n"
    ids, _, _ = engine.read(text, [])
    engine.close()
    assert ids == processor.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.llamacpp
def test_llamacpp_reads_a_sentencepiece_tokenizer(tmp_path, library):
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("▁", "a"), ("n", "n")]
    specials = ["<unk>", "<s>", "</s>", "<image>"]
    octets = [f"<0x{i:02X}>" for i in range(256)]
    words = [*specials, *octets, *("".join(pair) for pair in merges), *"▁abcdefghijklmnopqrstuvwxyz:'"]
    backend = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    tokenizer.chat_template = tiny_vision.chat_template("llava")
    processor = tiny_vision.processor("llava_siglip", tokenizer)
    engine = llamacpp.LlamaCpp(*export_gguf(tiny_vision.model("llava_siglip", processor), processor, tmp_path))
    text = "the inn: a 7 thing Öl"
    ids, _, _ = engine.read(text, [])
    engine.close()
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
