"""Tiny vision models with random weights, and processors for them, that need neither the Hub nor a download.

They have every part of the real ones, so that batching, masking and export can be checked in seconds on a CPU. The
tokenizer works on bytes, with the special tokens of all the families; templates are TRL's where it ships them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .vision import VisionProcessor

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "mllama", "pixtral", "llava", "llava_siglip")
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>", "<s>", "</s>", "<unk>", "<image>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]",
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|image|>", "<|python_tag|>",
)  # fmt: skip
MERGES = ("t h", "th e", "i n", "a n", "e r", "o n", "Ġ t", "Ġ a")
LORA_TARGETS = {
    "qwen2_vl": ["q_proj", "o_proj", "down_proj", "qkv", "fc1", "merger.mlp.0"],
    "qwen2_5_vl": ["q_proj", "o_proj", "down_proj", "qkv", "gate_proj", "merger.mlp.2"],
    "llava": ["q_proj", "k_proj", "down_proj", "fc1", "linear_2"],
    "llava_siglip": ["q_proj", "k_proj", "down_proj", "fc1", "linear_2"],
}
IMAGE_TOKEN = {"mllama": "<|image|>", "pixtral": "[IMG]", "llava": "<image>", "llava_siglip": "<image>"}

# What Mistral's and Meta's own templates render for system, user and assistant turns, in fewer words.
PIXTRAL_TEMPLATE = """
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}
    {%- if message.role == 'user' %}
        {{- '[INST]' + (system + '\n\n' if loop.last and system is defined else '') }}
        {%- if message.content is string %}{{ message.content }}{% else %}
            {%- for part in message.content %}{{ '[IMG]' if part.type == 'image' else part.content }}{% endfor %}
        {%- endif %}
        {{- '[/INST]' }}
    {%- else %}{{ message.content + eos_token }}{% endif %}
{%- endfor %}"""
MLLAMA_TEMPLATE = """
{%- set images = namespace(any=false) %}
{%- for message in messages %}{% for part in message.content %}
    {%- if part.type == 'image' %}{% set images.any = true %}{% endif %}
{%- endfor %}{% endfor %}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- if images.any and system != '' %}{{ raise_exception('images do not go with a system message') }}{% endif %}
{%- if not images.any %}
    {{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}
    {{- 'Today Date: 26 Jul 2024\n\n' + system + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {%- if message.content is string %}{{ message.content }}{% else %}
        {%- for part in message.content %}{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
LLAVA_1_5_TEMPLATE = """
{%- for message in messages %}
    {%- if message.role != 'system' %}{{ message.role.upper() + ': ' }}{% endif %}
    {%- for part in message.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}
    {%- for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text + ' ' }}{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
# SmolLM2 sees no images: one of its special tokens that no conversation uses stands for them.
SMOLLM2_TEMPLATE = """
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.content is string %}{{ message.content }}{% else %}
        {%- for part in message.content %}{{ '<file_sep>' if part.type == 'image' else part.text }}{% endfor %}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
OWN_TEMPLATES = {
    "llava_1_5": LLAVA_1_5_TEMPLATE,
    "pixtral": PIXTRAL_TEMPLATE,
    "mllama": MLLAMA_TEMPLATE,
    "smollm2": SMOLLM2_TEMPLATE,
}
TRL_TEMPLATES = {
    "qwen2_vl": "qwen2_5_vl", "qwen2_5_vl": "qwen2_5_vl", "llava": "llava_next", "llava_siglip": "llava_next",
    "llama3": "llama3_2",
}  # fmt: skip


def chat_template(name: str) -> str:
    """The chat template of a family, of ``smollm2`` or of ``llama3`` (3.1 and 3.2, text)."""
    if name in OWN_TEMPLATES:
        return OWN_TEMPLATES[name]
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{TRL_TEMPLATES[name]}.jinja").read_text()


def tokenizer(template: str = "qwen2_vl"):
    """A byte-level BPE tokenizer, eight merges and every family's special tokens, with this chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    pairs = [tuple(merge.split(" ")) for merge in MERGES]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    begin, end = {
        "mllama": ("<|begin_of_text|>", "<|eot_id|>"), "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
        "pixtral": ("<s>", "</s>"), "llava": ("<s>", "</s>"), "llava_siglip": ("<s>", "</s>"),
    }.get(template, (None, "<|im_end|>"))  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=begin, eos_token=end, pad_token="<|endoftext|>",
        chat_template=chat_template(template), clean_up_tokenization_spaces=False,
    )  # fmt: skip


def processor(family: str, words: Any = None, image_token: str | None = None) -> VisionProcessor:
    """A processor of this family in PIL alone.

    Args:
        words: a tokenizer to use instead of :func:`tokenizer`'s.
        image_token: one that it knows, instead of the family's.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    square = {"height": 56, "width": 56}
    images, settings = {
        "qwen2_vl": (Qwen2VLImageProcessorPil, {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}),
        "qwen2_5_vl": (Qwen2VLImageProcessorPil, {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}),
        "mllama": (MllamaImageProcessorPil, {"size": {"height": 28, "width": 28}, "max_image_tiles": 4}),
        "pixtral": (PixtralImageProcessorPil, {"size": {"longest_edge": 64}}),
        "llava": (CLIPImageProcessorPil, {"size": {"shortest_edge": 56}, "crop_size": square}),
        "llava_siglip": (SiglipImageProcessorPil, {"size": square}),
    }[family]
    extra = {
        "pixtral": {"patch_size": 16},
        "llava": {"patch_size": 14, "num_additional_image_tokens": 1},
        "llava_siglip": {"patch_size": 14, "vision_feature_select_strategy": "full"},
    }.get(family, {})
    token = image_token or IMAGE_TOKEN.get(family, "<|image_pad|>")
    return VisionProcessor(images(**settings), words or tokenizer(family), image_token=token, **extra)


def model(
    family: str,
    processor: VisionProcessor,
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> torch.nn.Module:
    """A model of this family with random weights in float32, in eval mode, for the vocabulary of ``processor``.

    Args:
        text: values of the text model's config that replace the tiny ones.
        vision: the same of the vision tower's.
    """
    kind, config = _kind_and_config(family, processor, text or {}, vision or {})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = kind(config).eval()
        for name, parameter in made.named_parameters():
            # Gates start closed and norms at one: open them, so that nothing hides behind them.
            if "gate" in name and parameter.numel() == 1:
                parameter.data.fill_(0.7)
            elif parameter.dim() == 1:
                parameter.data += 0.05 * torch.randn_like(parameter)
            else:
                parameter.data = 0.08 * torch.randn_like(parameter)
    return made


def _kind_and_config(family: str, processor: VisionProcessor, text: dict, vision: dict) -> tuple[type, Any]:
    import transformers as hf

    words = processor.tokenizer
    text = {
        "vocab_size": -(-len(words) // 8) * 8, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id,
        **text,
    }  # fmt: skip
    tower = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
    token = processor.image_token_id
    if family in ("qwen2_vl", "qwen2_5_vl"):
        half = text["hidden_size"] // text["num_attention_heads"] // 2
        third = half // 3
        text |= {
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [half - 2 * third, third, third],
            },
        }  # fmt: skip
        convert = words.convert_tokens_to_ids
        marks = {
            "image_token_id": token, "video_token_id": convert("<|video_pad|>"),
            "vision_start_token_id": convert("<|vision_start|>"), "vision_end_token_id": convert("<|vision_end|>"),
        }  # fmt: skip
        if family == "qwen2_vl":
            tower = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": text["hidden_size"]}
            config = hf.Qwen2VLConfig(text_config=text, vision_config=tower, **marks)
            kind = hf.Qwen2VLForConditionalGeneration
        else:
            tower = {
                "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "window_size": 56,
                "fullatt_block_indexes": [1], "out_hidden_size": text["hidden_size"],
            }  # fmt: skip
            config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **marks)
            kind = hf.Qwen2_5_VLForConditionalGeneration
    elif family == "mllama":
        tower = {
            "hidden_size": 32, "image_size": 28, "patch_size": 14, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 2, "intermediate_size": 48, "max_num_tiles": 4, "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        }  # fmt: skip
        text |= {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
        config = hf.MllamaConfig(text_config=text, vision_config=tower, image_token_index=token)
        kind = hf.MllamaForConditionalGeneration
    else:
        tower = {
            "pixtral": hf.PixtralVisionConfig(**tower, patch_size=16, image_size=128),
            "llava": hf.CLIPVisionConfig(**tower, patch_size=14, image_size=56, projection_dim=32),
            "llava_siglip": hf.SiglipVisionConfig(**tower, patch_size=14, image_size=56),
        }[family]
        select = {
            "pixtral": {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
            "llava": {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
            "llava_siglip": {"vision_feature_layer": -2, "vision_feature_select_strategy": "full"},
        }[family]
        config = hf.LlavaConfig(
            text_config=hf.LlamaConfig(**text), vision_config=tower, image_token_index=token, **select
        )
        kind = hf.LlavaForConditionalGeneration
    for key, value in vision.items():
        setattr(config.vision_config, key, value)
    return kind, config


def tuned(family: str, made: torch.nn.Module | None = None, **settings: Any) -> tuple[VisionProcessor, torch.nn.Module]:
    """A processor, and a model with LoRA on text, tower and projector that changes what it says.

    Args:
        made: the model to adapt; by default :func:`model`'s, with ``settings``.
    """
    from peft import LoraConfig, get_peft_model

    words = processor(family)
    made = get_peft_model(
        made or model(family, words, **settings), LoraConfig(r=4, target_modules=LORA_TARGETS[family])
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn_like(parameter)
    return words, made.eval()
