"""After training, one command each: chat, merge, text GGUF, push; on one adapter of a small model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import adapters, chat, checkpoints, gguf_text, llamacpp, merge, push
from helpers.train import TrainArguments, train

MESSAGES = [{"role": "user", "content": "Which module wraps text?"}]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder of an adapter whose base is a tiny untied Llama with grouped heads, on disk."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(0)
    config = LlamaConfig(**checkpoints.SHAPES["tiny-untied"], eos_token_id=1, bos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    checkpoints.byte_tokenizer().save_pretrained(folder / "base")
    train(TrainArguments(model=str(folder / "base"), dataset="random:20-30x40", steps=4, max_length=32, prompt="",
                         learning_rate=3e-2, output_dir=str(folder / "run")))  # fmt: skip
    return folder / "run"


def read(path) -> dict[str, np.ndarray]:
    from gguf import GGUFReader

    return {tensor.name: tensor.data.copy() for tensor in GGUFReader(path).tensors}


def test_chat_asks_once_or_holds_a_conversation(tuned, monkeypatch):
    typed, seen, real = iter(["Hi", "And?"]), [], chat.reply

    def type_in(prompt):
        for line in typed:
            return line
        raise EOFError

    def noted(model, tokenizer, messages, *more):
        seen.append([message["content"] for message in messages])
        return real(model, tokenizer, messages, *more)

    monkeypatch.setattr("builtins.input", type_in)
    monkeypatch.setattr(chat, "reply", noted)
    given = ["--adapter", str(tuned), "--max_new_tokens", "3"]
    assert chat.main([*given, "--prompt", "Who?", "--temperature", "0.5"]) == 0 and seen == [["Who?"]]
    assert chat.main(given) == 0
    assert [len(turns) for turns in seen] == [1, 1, 3] and seen[2][::2] == ["Hi", "And?"]


def test_reply_is_the_adapters(tuned):
    model, tokenizer = adapters.load_adapter(tuned)
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        first = int(model(**inputs).logits[0, -1].argmax())
        with model.disable_adapter():
            untuned = model(**inputs).logits
        assert (model(**inputs).logits - untuned).abs().max() > 0.1
    assert chat.reply(model, tokenizer, MESSAGES, max_new_tokens=1) == tokenizer.decode([first]).strip()


def test_gguf_holds_the_merged_weights_and_nothing_is_left_behind(tuned, tmp_path, capsys):
    out = tmp_path / "gguf"
    assert gguf_text.main(["--adapter", str(tuned), "--output_dir", str(out), "--dtype", "f32"]) == 0
    assert str(out / "model-f32.gguf") in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ["model-f32.gguf"]
    found = read(out / "model-f32.gguf")
    merged = load_file(merge.merge(str(tuned), str(tmp_path / "merged"), torch.float32) / "model.safetensors")
    np.testing.assert_allclose(
        found["blk.1.ffn_down.weight"], merged["model.layers.1.mlp.down_proj.weight"].numpy(), atol=1e-5
    )
    np.testing.assert_array_equal(found["output.weight"], merged["lm_head.weight"].numpy())
    heads = 4  # llama.cpp rotates neighbours where transformers rotates halves
    q = merged["model.layers.0.self_attn.q_proj.weight"].numpy()
    q = q.reshape(heads, 2, q.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(q.shape)
    np.testing.assert_allclose(found["blk.0.attn_q.weight"], q, atol=1e-5)


def test_gguf_refuses_before_it_writes(tuned, tmp_path, capsys):
    for more, said in (
        (["--adapter", str(tuned), "--dtype", "q4"], "dtype='q4' is not one of"),
        (["--adapter", str(tmp_path)], "holds no adapter_config.json"),
    ):
        assert gguf_text.main(["--output_dir", str(tmp_path / "out"), *more]) == 2
        assert said in capsys.readouterr().err
    from transformers import GemmaConfig, GemmaForCausalLM

    gemma = GemmaForCausalLM(GemmaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    ))  # fmt: skip
    with pytest.raises(ValueError, match="text model 'gemma' cannot be exported"):
        gguf_text.export_gguf_text(gemma, checkpoints.byte_tokenizer(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_what_would_be_pushed(tuned, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: pytest.fail("the Hub was asked"))
    given = ["--adapter", str(tuned), "--repo_id", "me/tiny-lora"]
    assert push.main([*given, "--dry-run"]) == 2  # the base is a folder of this machine
    assert "give its Hub id, --base_model" in capsys.readouterr().err
    assert push.main([*given, "--dry-run", "--base_model", "me/tiny"]) == 0
    said = capsys.readouterr().out
    for part in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "MiB", "base_model: me/tiny",
                 "library_name: peft", "Loss ", "would be: https://huggingface.co/me/tiny-lora"):  # fmt: skip
        assert part in said
    assert str(tuned.parent) not in said and "training_args" not in said


def test_nothing_is_pushed_without_a_token_or_a_good_name(tuned, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: pytest.fail("the Hub was asked"))
    given = ["--adapter", str(tuned), "--base_model", "me/tiny", "--repo_id"]
    assert push.main([*given, "me/tiny-lora"]) == 2
    assert "no token for the Hub" in capsys.readouterr().err
    assert push.main([*given, "me/tiny lora/x", "--dry-run"]) == 2
    assert "me/tiny lora/x" in capsys.readouterr().err


def test_what_is_pushed_is_the_staged_folder(tuned, monkeypatch):
    sent = {}

    class Api:
        def create_repo(self, repo_id, **more):
            from huggingface_hub import RepoUrl

            return RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, folder_path, repo_id, **more):
            from pathlib import Path

            sent[repo_id] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_none")
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert push.push(str(tuned), "me/tiny-lora", "me/tiny") == "https://huggingface.co/me/tiny-lora"
    files = sent["me/tiny-lora"]
    assert files["adapter_model.safetensors"] == (tuned / "adapter_model.safetensors").read_bytes()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/tiny"
    assert "me/tiny" not in (tuned / "adapter_config.json").read_text()  # the run's own folder stays


def test_an_adapter_of_random_weights_has_no_base(tmp_path):
    train(TrainArguments(model="shape:tiny", dataset="random:8-40x64", steps=1, output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="random weights"):
        adapters.base_of(tmp_path)


@pytest.mark.llamacpp
@pytest.mark.parametrize(("dtype", "difference"), [("f32", 0.02), ("f16", 0.1), ("q8_0", 1.5)])
def test_llamacpp_answers_as_smollm2_tuned(dtype, difference, tmp_path):
    """A few steps at a high rate, so that the adapter counts; then the same top tokens and logits in llama.cpp."""
    llamacpp.library_path(fetch=True)
    train(TrainArguments(model="embedded", dataset="python-docs", steps=2, max_length=64, learning_rate=2e-3, prompt="",
                         output_dir=str(tmp_path / "run")))  # fmt: skip
    model, tokenizer = adapters.load_adapter(tmp_path / "run")
    path = gguf_text.export_gguf_text(model, tokenizer, tmp_path, dtype)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        ours = model(**inputs).logits[0, -1].float().numpy()
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :].tolist()
        with model.disable_adapter():
            untuned = model(**inputs).logits[0, -1].float().numpy()
    engine = llamacpp.LlamaCpp(path)
    ids, _, theirs = engine.read(prompt, [])
    said = engine.answer(prompt, [], 8, tokenizer.eos_token_id)
    engine.close()
    assert ids == inputs["input_ids"][0].tolist()
    assert abs(theirs - ours).max() < difference < abs(theirs - untuned).max()
    assert set(np.argsort(theirs)[-3:]) == set(np.argsort(ours)[-3:])
    assert said == answer or dtype == "q8_0"
