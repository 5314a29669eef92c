"""TRL's trainers through the chunked head: on the same completions, loss, KL and gradient norm of the full logits."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig

from helpers import checkpoints
from helpers.chunked_head import chunked_head
from helpers.grpo import ChunkedGRPOTrainer

PROMPTS = [[{"role": "user", "content": text}] for text in ("Count", "Name a colour", "Say hello", "Write a line")] * 2


def letters(completions, **kwargs):
    """Verifiable: how many letters the completion has."""
    return [float(sum(c.isalpha() for c in completion[0]["content"])) for completion in completions]


def trainer(folder, base, **options):
    torch.manual_seed(0)
    config = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=4, num_generations=4,
        max_completion_length=16, max_steps=2, learning_rate=1e-2, beta=0.1, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, bf16=False, use_cpu=True, gradient_checkpointing=True,
        **{k: options.pop(k) for k in ("entropy_coef", "loss_type") if k in options},
    )  # fmt: skip
    return ChunkedGRPOTrainer(
        base, reward_funcs=letters, args=config, train_dataset=Dataset.from_list([{"prompt": p} for p in PROMPTS]),
        processing_class=checkpoints.byte_tokenizer(), **options,
    )  # fmt: skip


def logged(run):
    run.train()
    return [row for row in run.state.log_history if "grad_norm" in row]


ENDS = list(range(1, 60))  # so many tokens end a completion that their lengths differ


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tied head, saved: TRL loads its reference model by name."""
    path = tmp_path_factory.mktemp("model")
    whole().save_pretrained(path)
    checkpoints.byte_tokenizer().save_pretrained(path)
    return path


def whole():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=300, tie_word_embeddings=True, eos_token_id=1, pad_token_id=2,
        )
    )  # fmt: skip


def models(folder, kind):
    torch.manual_seed(0)
    if kind == "lora":
        model = checkpoints.load_base("shape:tiny", torch.float32).model
        model.generation_config.eos_token_id = ENDS
        return checkpoints.attach_lora(model, 4)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = ENDS
    return model


@pytest.mark.parametrize(("kind", "more"), [("lora", {}), ("whole", {"entropy_coef": 0.05, "loss_type": "grpo"})])
def test_loss_kl_and_gradient_norm_equal_full_logits_on_the_same_completions(tmp_path, folder, kind, more):
    """LoRA over a frozen head; and every weight trained, head tied, with an entropy bonus that needs its gradient."""
    first = trainer(tmp_path, models(folder, kind), head_options={"chunk_size": 7}, **dict(more))
    chunked = logged(first)
    full = logged(trainer(tmp_path, models(folder, kind), head="full", recorded=first.recorded, **dict(more)))
    assert len(chunked) == len(full) == 2
    assert any(row["completions/min_length"] < row["completions/max_length"] for row in chunked), "uneven completions"
    assert chunked[1]["kl"] > 0 and chunked[0]["reward_std"] > 0
    for a, b in zip(chunked, full, strict=True):
        for name in ("loss", "kl", "grad_norm", "entropy"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=2e-6), name


def test_replay_refuses_other_prompts(tmp_path, folder):
    run = trainer(tmp_path, models(folder, "whole"), recorded=[([[1, 2]], None, None)])
    with pytest.raises(ValueError, match="recorded are of other prompts"):
        run.train()
    with pytest.raises(ValueError, match="head 'magic' is not one of"):
        trainer(tmp_path, models(folder, "whole"), head="magic")


@pytest.mark.parametrize("cap", [None, 2.0])
def test_fused_output_equals_the_models_own_logits(cap):
    """With a soft cap, a temperature, ignored labels, and a batch without any; undone at the end."""
    model = whole()
    model.config.final_logit_softcapping = cap
    ids = torch.randint(3, 300, (2, 9))
    labels = ids.clone()
    labels[0, :4] = labels[1, 7:] = -100
    logits = model(ids).logits[:, :-1]
    logits = (logits if cap is None else cap * torch.tanh(logits / cap)) / 0.7
    logp = logits.log_softmax(-1)
    mask = labels[:, 1:] != -100
    forward = model.forward
    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    with chunked_head(model, 0.7, outputs=outputs, chunk_size=4):
        out = model(ids, labels=labels, fused_lm_head=True)
        none = model(ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
        assert model(ids).logits is not None, "without the flag the forward pass is the model's own"
    assert model.forward == forward and "forward" not in vars(model)
    wanted = logp.gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(out.log_probs, wanted * mask)
    torch.testing.assert_close(out.entropy, -(logp.exp() * logp).sum(-1) * mask)
    torch.testing.assert_close(out.log_sum_sq_probs, (logp.exp() ** 2).sum(-1).log() * mask)
    torch.testing.assert_close(out.mean_logits, logits.mean(-1) * mask)
    assert (out.is_top1 == ((logits.argmax(-1) == ids[:, 1:]) & mask)).all()
    torch.testing.assert_close(out.loss, -(wanted * mask).sum() / mask.sum())
    gradients = [
        torch.autograd.grad(loss, model.lm_head.weight)[0] for loss in (out.loss, -(wanted * mask).sum() / mask.sum())
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    none.loss.backward()
    assert none.loss == 0
