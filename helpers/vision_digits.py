"""A small vision model learns to read digits with QLoRA: the road from pictures to a file for llama.cpp, end to end.

The vision tower starts from random weights; the text model is SmolLM2-135M (real) or a tiny random one.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from . import tiny_vision
from .completions import train_on_responses_only
from .image_resize import ImageSize
from .vision import VisionCollator, VisionProcessor

QUESTION = "Which digit?"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LORA_TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2",
    "linear_1", "linear_2",
)  # fmt: skip


def digits(count: int, side: int = 112) -> list[tuple[Image.Image, str]]:
    """Pictures of digits and their names: scikit-learn's 1797 handwritten ones where it is installed, else drawn.

    Args:
        side: pixels, enlarged from 8.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        draw, found = random.Random(0), []
        for i in range(count):
            picture = Image.new("L", (8, 8))
            where = draw.randint(0, 2), draw.randint(-3, -1)
            ImageDraw.Draw(picture).text(where, str(i % 10), fill=255, font=ImageFont.load_default(10))
            found.append((picture, i % 10))
    else:
        data = load_digits()
        pictures = (data.images[:count] * 15.9).astype("uint8")
        found = [(Image.fromarray(p), int(t)) for p, t in zip(pictures, data.target[:count], strict=True)]
    return [(picture.resize((side, side)).convert("RGB"), NAMES[digit]) for picture, digit in found]


def rows(pictures: list[tuple[Image.Image, str]]) -> list[dict[str, Any]]:
    """One conversation a picture."""
    return [
        {
            "messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": name}],
            "images": [picture],
        }
        for picture, name in pictures
    ]


def quantised_llava(text: str = "tiny") -> tuple[torch.nn.Module, VisionProcessor]:
    """Llava in NF4 with a random SigLIP tower, and its processor.

    Args:
        text: ``tiny`` (random, 0.3 M parameters) or ``smollm2`` (SmolLM2-135M-Instruct, real).
    """
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlavaForConditionalGeneration

    from .checkpoints import embedded_folder

    vision = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes wants blocks of 64
    if text == "smollm2":
        words = AutoTokenizer.from_pretrained(embedded_folder())
        words.chat_template = tiny_vision.chat_template("smollm2")
        words.eos_token, words.pad_token = "<|im_end|>", "<|endoftext|>"  # what the conversations end with
        # A special token of SmolLM2's that no conversation uses stands for images.
        processor = tiny_vision.processor("llava_siglip", words, image_token="<file_sep>")
        real = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32)
        config = real.config.to_dict()
        model = tiny_vision.model("llava_siglip", processor, text=config, vision=vision)
        model.model.language_model.load_state_dict(real.model.state_dict())
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
    elif text == "tiny":
        processor = tiny_vision.processor("llava_siglip")
        sizes = {"hidden_size": 128, "intermediate_size": 256}
        model = tiny_vision.model("llava_siglip", processor, text=sizes, vision=vision)
    else:
        raise ValueError(f"text={text!r} is not one of tiny, smollm2")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = LlavaForConditionalGeneration.from_pretrained(
            folder, quantization_config=settings, dtype=torch.float32,
            device_map={"": "cuda" if torch.cuda.is_available() else "cpu"},
        )  # fmt: skip
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # it rounds the weights for good when the model answers
    return model, processor


def finetune(
    model: torch.nn.Module,
    processor: VisionProcessor,
    data: list[dict[str, Any]],
    output_dir: str | Path,
    steps: int = 100,
    image_size: ImageSize | None = None,
) -> tuple[torch.nn.Module, list[float]]:
    """QLoRA on text, tower and projector through TRL's trainer, completions only; the model and each step's loss."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from trl import SFTConfig

    from .qlora_trainer import QLoRATrainer

    gpu = torch.cuda.is_available()
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=list(LORA_TARGETS), exclude_modules=r".*\.head\..*")
    torch.manual_seed(0)
    model = get_peft_model(model, lora)
    config = SFTConfig(
        output_dir=str(output_dir), max_steps=steps, per_device_train_batch_size=16, learning_rate=3e-3, warmup_steps=3,
        lr_scheduler_type="cosine", logging_steps=1, report_to="none", use_cpu=not gpu, bf16=False, fp16=False,
        disable_tqdm=True, save_strategy="no", gradient_checkpointing=False, log_level="error",
        dataloader_pin_memory=gpu, remove_unused_columns=False,
    )  # fmt: skip
    config._n_gpu = 1  # on a second card Trainer would double the batch and the loss, though 4-bit models stay on one
    trainer = QLoRATrainer(
        model, loss="full", args=config, train_dataset=Dataset.from_list(data), processing_class=processor,
        data_collator=VisionCollator(processor, image_size=image_size),
    )  # fmt: skip
    train_on_responses_only(trainer)
    trainer.train()
    return trainer.model.eval(), [log["loss"] for log in trainer.state.log_history if "loss" in log]


@torch.no_grad()
def answers(
    model: torch.nn.Module, processor: VisionProcessor, pictures: list[Image.Image], image_size: ImageSize | None = None
) -> list[str]:
    """The model's greedy answer to each picture, all in one batch."""
    asked = [{"messages": [{"role": "user", "content": QUESTION}], "images": [picture]} for picture in pictures]
    batch = VisionCollator(processor, image_size=image_size).prompts(asked)
    batch = {key: value.to(model.device) for key, value in batch.items()}
    tokenizer = processor.tokenizer
    out = model.generate(
        **batch,
        do_sample=False,
        max_new_tokens=8,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    said = out[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]
