"""Export a finetuned vision model to the two GGUF files that llama.cpp reads: the text model and the vision tower.

Qwen2-VL, Qwen2.5-VL, and Llava 1.5 on CLIP or SigLIP over a Llama, Mistral or Qwen2 text model. LoRA is added to the
weights it was trained on, in text and vision layers alike, 4-bit ones decoded first; the model itself stays as it is.
Written with the ``gguf`` package. Two things are llama.cpp's own: it resizes images by its own rule (Llava: padded to a
square; Qwen: at least 8 tokens), and its Llava graph puts CLIP's class token behind the patches, where training had
it in front, so that Llava 1.5 on CLIP answers a little differently there until
https://github.com/ggml-org/llama.cpp/pull/25844 lands (SigLIP has no class token and is exact).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .gguf_text import TEXT_NAMES, finished_text, quantize_gguf, quantizer, renamed, text_values, write_gguf
from .gguf_tokenizer import tokenizer_values
from .lora_tensors import Tensors, merged_tensors

TOWER = r"(?:model\.)?vision_tower\.(?:vision_model\.)?"
LAYER = TOWER + r"encoder\.layers\.(\d+)\."
LLAVA_NAMES = (
    (TOWER + r"embeddings\.class_embedding", "v.class_embd"),
    (TOWER + r"embeddings\.patch_embedding\.(weight|bias)", r"v.patch_embd.\1"),
    (TOWER + r"embeddings\.position_embedding\.weight", "v.position_embd.weight"),
    (TOWER + r"pre_layrnorm\.(weight|bias)", r"v.pre_ln.\1"),
    (TOWER + r"(?:post_layernorm|head)\..*", ""),  # behind the layers that Llava reads
    (LAYER + r"self_attn\.([qkv])_proj\.(weight|bias)", r"v.blk.\1.attn_\2.\3"),
    (LAYER + r"self_attn\.out_proj\.(weight|bias)", r"v.blk.\1.attn_out.\2"),
    (LAYER + r"layer_norm([12])\.(weight|bias)", r"v.blk.\1.ln\2.\3"),
    (LAYER + r"mlp\.fc1\.(weight|bias)", r"v.blk.\1.ffn_up.\2"),
    (LAYER + r"mlp\.fc2\.(weight|bias)", r"v.blk.\1.ffn_down.\2"),
    (r"(?:model\.)?multi_modal_projector\.linear_1\.(weight|bias)", r"mm.0.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.(weight|bias)", r"mm.2.\1"),
)
VISUAL = r"(?:model\.)?visual\."
QWEN_BLOCK = VISUAL + r"blocks\.(\d+)\."
QWEN_NAMES = (
    (VISUAL + r"patch_embed\.proj\.weight", "v.patch_embd.weight"),
    (QWEN_BLOCK + r"norm([12])\.(weight|bias)", r"v.blk.\1.ln\2.\3"),
    (QWEN_BLOCK + r"attn\.qkv\.(weight|bias)", r"v.blk.\1.attn_qkv.\2"),
    (QWEN_BLOCK + r"attn\.proj\.(weight|bias)", r"v.blk.\1.attn_out.\2"),
    (QWEN_BLOCK + r"mlp\.(?:fc1|up_proj)\.(weight|bias)", r"v.blk.\1.ffn_up.\2"),
    (QWEN_BLOCK + r"mlp\.(?:fc2|down_proj)\.(weight|bias)", r"v.blk.\1.ffn_down.\2"),
    (QWEN_BLOCK + r"mlp\.gate_proj\.(weight|bias)", r"v.blk.\1.ffn_gate.\2"),
    (VISUAL + r"merger\.ln_q\.(weight|bias)", r"v.post_ln.\1"),
    (VISUAL + r"merger\.mlp\.([02])\.(weight|bias)", r"mm.\1.\2"),
)


def export_gguf(
    model: torch.nn.Module, processor: Any, folder: str | Path, dtype: str = "f16", quantize: str | None = None
) -> tuple[Path, Path]:
    """Write ``model-<type>.gguf`` (text) and ``mmproj-<type>.gguf`` (vision) and return their paths.

    Args:
        model: of transformers, or PEFT's around one; 16-bit, 32-bit or bitsandbytes 4-bit weights.
        processor: its processor (image mean and deviation, tokenizer, chat template).
        folder: made where missing; both files appear whole, or neither does.
        dtype: of matrices, ``f32``, ``f16`` or ``q8_0`` (text only; the vision tower is then f16). Vectors stay f32.
        quantize: a further type of the text file, such as ``Q4_K_M``, made by llama.cpp's ``llama-quantize`` on the
            PATH from f16.

    Raises: ValueError, before any file appears, for a model of another kind, one with missing or unknown tensors, a
        tokenizer or a setting that llama.cpp cannot express, or a missing ``llama-quantize``.
    """
    tool = quantizer(dtype, quantize)
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, state = plain.config, merged_tensors(plain)
    if config.model_type not in ("qwen2_vl", "qwen2_5_vl", "llava"):
        raise ValueError(
            f"model type {config.model_type!r} cannot be exported; Qwen2-VL, Qwen2.5-VL and Llava 1.5 can "
            "(llama.cpp reads no Mllama)"
        )
    text_kind, hyperparameters = text_values(config.get_text_config())
    vision = _qwen_vision if config.model_type.startswith("qwen") else _llava_vision
    vision_values, vision_names = vision(config, processor.image_processor)
    text, tower = _named(state, vision_names, config)
    words = tokenizer_values(processor, config.get_text_config().vocab_size)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mmproj_type = "f16" if dtype == "q8_0" else dtype
    final = folder / f"model-{(quantize or dtype).lower()}.gguf", folder / f"mmproj-{mmproj_type}.gguf"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
        made = Path(scratch) / "text.gguf", Path(scratch) / "mmproj.gguf"
        write_gguf(made[0], text_kind, {**hyperparameters, **words}, text, "f16" if quantize else dtype)
        write_gguf(made[1], "clip", vision_values, tower, mmproj_type)
        if quantize:
            made = quantize_gguf(tool, made[0], quantize), made[1]
        for source, target in zip(made, final, strict=True):
            os.replace(source, target)
    return final


def _named(state: Tensors, vision_names: Iterable[tuple[str, str]], config: Any) -> tuple[Tensors, Tensors]:
    """The tensors of both files by llama.cpp's names; raises where one is unknown or missing."""
    text_config = config.get_text_config()
    text, tower = renamed(state, TEXT_NAMES, vision_names)
    text, missing = finished_text(text, text_config, tied=getattr(config, "tie_word_embeddings", False))
    vision = config.vision_config
    layers = getattr(vision, "depth", None) or vision.num_hidden_layers
    attention = ("attn_qkv",) if config.model_type.startswith("qwen") else ("attn_q", "attn_k", "attn_v")
    parts = (*attention, "attn_out", "ln1", "ln2", "ffn_up", "ffn_down")
    wanted_tower = {f"v.blk.{i}.{part}.weight" for i in range(layers) for part in parts}
    wanted_tower |= {"v.patch_embd.weight", "mm.0.weight", "mm.2.weight"}
    if missing := sorted(missing | (wanted_tower - tower.keys())):
        raise ValueError(f"the model is incomplete: {len(missing)} tensors are missing, such as {missing[:3]}")
    if config.model_type.startswith("qwen"):
        tower = _split_qwen(tower)
    return text, tower


def _split_qwen(tower: Tensors) -> Tensors:
    """q, k and v apart, and the patch embedding's two frames."""
    split: Tensors = {}
    for name, read in tower.items():
        if ".attn_qkv." in name:
            for i, part in enumerate("qkv"):
                split[name.replace("attn_qkv", f"attn_{part}")] = lambda read=read, i=i: read().chunk(3)[i]
        elif name == "v.patch_embd.weight":
            for i, new in enumerate((name, f"{name}.1")):
                split[new] = lambda read=read, i=i: read()[:, :, i]
        else:
            split[name] = read
    return split


def _qwen_vision(config: Any, image_processor: Any) -> tuple[dict[str, Any], Iterable[tuple[str, str]]]:
    vision = config.vision_config
    second = config.model_type == "qwen2_vl"
    width = vision.embed_dim if second else vision.hidden_size
    feed_forward = int(width * vision.mlp_ratio) if second else vision.intermediate_size
    if (vision.temporal_patch_size, vision.spatial_merge_size) != (2, 2):
        raise ValueError("llama.cpp wants Qwen's temporal_patch_size and spatial_merge_size to be 2")
    if vision.hidden_act != ("quick_gelu" if second else "silu"):
        raise ValueError(f"hidden_act={vision.hidden_act!r} of the vision tower is not what llama.cpp has for it")
    values = _vision_values(
        "qwen2vl_merger" if second else "qwen2.5vl_merger", image_processor, embedding_length=width,
        feed_forward_length=feed_forward, block_count=vision.depth, head_count=vision.num_heads, eps=1e-6,
        projection_dim=vision.hidden_size if second else vision.out_hidden_size, image_size=560,
        patch_size=vision.patch_size,
    )  # fmt: skip
    values["clip.vision.spatial_merge_size"] = 2
    if not second:
        every = vision.fullatt_block_indexes[0] + 1
        if (
            list(vision.fullatt_block_indexes) != list(range(every - 1, vision.depth, every))
            or vision.window_size != 112
        ):
            raise ValueError("llama.cpp wants Qwen2.5-VL's full attention in every n-th block, and windows of 112")
        values |= {"clip.use_silu": True, "clip.vision.n_wa_pattern": every}
    return values, QWEN_NAMES


def _llava_vision(config: Any, image_processor: Any) -> tuple[dict[str, Any], Iterable[tuple[str, str]]]:
    vision = config.vision_config
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise ValueError(f"vision tower {vision.model_type!r} cannot be exported with Llava; CLIP and SigLIP can")
    drops_class = config.vision_feature_select_strategy == "default"
    if drops_class != (vision.model_type == "clip_vision_model"):
        raise ValueError(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} with {vision.model_type} cannot "
            "be exported: llama.cpp drops CLIP's class token, and no patch of SigLIP"
        )
    layers, chosen = vision.num_hidden_layers, config.vision_feature_layer
    if not isinstance(chosen, int):
        raise ValueError(f"vision_feature_layer={chosen} cannot be exported; a single layer can")
    if vision.intermediate_size == vision.hidden_size:
        raise ValueError("llama.cpp mistakes a tower whose intermediate_size is its hidden_size for an old export")
    if config.projector_hidden_act != "gelu" or vision.hidden_act not in ("quick_gelu", "gelu", "gelu_pytorch_tanh"):
        raise ValueError(f"activations {config.projector_hidden_act!r}, {vision.hidden_act!r} are not llama.cpp's")
    values = _vision_values(
        "mlp", image_processor, embedding_length=vision.hidden_size, feed_forward_length=vision.intermediate_size,
        block_count=layers, head_count=vision.num_attention_heads, eps=float(vision.layer_norm_eps),
        projection_dim=config.get_text_config().hidden_size, image_size=vision.image_size, patch_size=vision.patch_size,
    )  # fmt: skip
    if vision.hidden_act != "quick_gelu":
        values["clip.use_gelu"] = True
    reached = chosen if chosen >= 0 else layers + 1 + chosen  # layers run before the features are read
    if reached != layers - 1:
        values["clip.vision.feature_layer"] = [reached]
    return values, LLAVA_NAMES


def _vision_values(projector: str, image_processor: Any, head_count: int, eps: float, **sizes: int) -> dict[str, Any]:
    return {
        "general.type": "mmproj",
        "clip.projector_type": projector,
        "clip.has_vision_encoder": True,
        **{f"clip.vision.{key}": value for key, value in sizes.items()},
        "clip.vision.attention.head_count": head_count,
        "clip.vision.attention.layer_norm_epsilon": eps,
        "clip.vision.image_mean": [float(x) for x in image_processor.image_mean],
        "clip.vision.image_std": [float(x) for x in image_processor.image_std],
    }
