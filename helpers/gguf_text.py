"""Export a finetuned text model to the GGUF file that llama.cpp reads: Llama (SmolLM2 too), Mistral and Qwen2.

    python3 -m helpers.gguf_text --adapter runs/train --output_dir exported --dtype q8_0

LoRA is added to the weights it was trained on, 4-bit ones decoded first; no merged copy of the model is made. Written
with the ``gguf`` package; `helpers.gguf_vision` writes the text half of vision models by the same functions.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .gguf_tokenizer import tokenizer_values
from .lora_tensors import Tensors, merged_tensors

TYPES = ("f32", "f16", "q8_0")

DECODER = r"(?:(?:model\.)?language_model\.(?:model\.)?|model\.)"  # of a vision model, or a text model's own
BLOCK = DECODER + r"layers\.(\d+)\."
TEXT_NAMES = (
    (DECODER + r"embed_tokens\.weight", "token_embd.weight"),
    (DECODER + r"norm\.weight", "output_norm.weight"),
    (r"(?:language_model\.)?lm_head\.weight", "output.weight"),
    (BLOCK + r"input_layernorm\.weight", r"blk.\1.attn_norm.weight"),
    (BLOCK + r"post_attention_layernorm\.weight", r"blk.\1.ffn_norm.weight"),
    (BLOCK + r"self_attn\.([qkv])_proj\.(weight|bias)", r"blk.\1.attn_\2.\3"),
    (BLOCK + r"self_attn\.o_proj\.(weight|bias)", r"blk.\1.attn_output.\2"),
    (BLOCK + r"mlp\.(gate|up|down)_proj\.(weight|bias)", r"blk.\1.ffn_\2.\3"),
)
TEXT_KINDS = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen2_vl_text": "qwen2vl", "qwen2_5_vl_text": "qwen2vl"
}  # fmt: skip


def export_gguf_text(
    model: torch.nn.Module, tokenizer: Any, folder: str | Path, dtype: str = "f16", quantize: str | None = None
) -> Path:
    """Write ``model-<type>.gguf`` and return its path; the model stays as it is.

    Args:
        model: a causal language model of transformers, or PEFT's around one; 16-bit, 32-bit or bitsandbytes 4-bit.
        tokenizer: its tokenizer, chat template included.
        folder: made where missing; the file appears whole or not at all.
        dtype: of matrices, ``f32``, ``f16`` or ``q8_0``. Vectors stay f32.
        quantize: another type, such as ``Q4_K_M``, made by llama.cpp's ``llama-quantize`` on the PATH from f16.

    Raises: ValueError, before any file appears, for a model of another kind, one with missing or unknown tensors, a
        tokenizer or a setting that llama.cpp cannot express, or a missing ``llama-quantize``.
    """
    tool = quantizer(dtype, quantize)
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind, values = text_values(plain.config)
    (text,) = renamed(merged_tensors(plain), TEXT_NAMES)
    text, missing = finished_text(text, plain.config)
    if missing:
        raise ValueError(f"the model is incomplete: {len(missing)} tensors are missing, such as {sorted(missing)[:3]}")
    values |= tokenizer_values(tokenizer, plain.config.vocab_size)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"model-{(quantize or dtype).lower()}.gguf"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
        made = Path(scratch) / "text.gguf"
        write_gguf(made, kind, values, text, "f16" if quantize else dtype)
        os.replace(quantize_gguf(tool, made, quantize) if quantize else made, final)
    return final


def quantizer(dtype: str, quantize: str | None) -> str | None:
    """Where ``llama-quantize`` is; ValueError for an unknown ``dtype``, or where it is needed and cannot be found."""
    if dtype not in TYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(TYPES)}; other types of text go in quantize")
    tool = shutil.which("llama-quantize")
    if quantize and not tool:
        raise ValueError(f"quantize={quantize!r} needs llama.cpp's llama-quantize on the PATH; dtype='q8_0' does not")
    return tool


def quantize_gguf(tool: str, whole: Path, kind: str) -> Path:
    """The file that ``llama-quantize`` makes of ``whole``, beside it."""
    made = whole.with_name("quantized.gguf")
    done = subprocess.run([tool, whole, made, kind], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"llama-quantize refused {kind!r}: {done.stderr.strip()[-300:]}")
    return made


def renamed(state: Tensors, *tables: Iterable[tuple[str, str]]) -> list[Tensors]:
    """For each table of patterns the tensors whose names it knows, by llama.cpp's names ("": left out).

    Raises: ValueError where a tensor is in no table.
    """
    found: list[Tensors] = [{} for _ in tables]
    unknown = []
    for name, read in state.items():
        for names, target in zip(tables, found, strict=True):
            hits = [(re.fullmatch(pattern, name), new) for pattern, new in names]
            hit = next(((match, new) for match, new in hits if match), None)
            if hit:
                if hit[1]:
                    target[hit[0].expand(hit[1])] = read
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{len(unknown)} tensors have no place in llama.cpp's files, such as {unknown[:3]}")
    return found


def finished_text(text: Tensors, config: Any, tied: bool = False) -> tuple[Tensors, set[str]]:
    """The tensors in llama.cpp's order of channels, a tied head left out; and the names of those that are missing."""
    text = dict(text)
    wanted = {"token_embd.weight", "output_norm.weight", "output.weight"}
    if tied or config.tie_word_embeddings:
        text.pop("output.weight", None)
        wanted.remove("output.weight")
    parts = ("attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    wanted |= {f"blk.{i}.{part}.weight" for i in range(config.num_hidden_layers) for part in parts}
    if config.model_type in ("llama", "mistral"):
        _interleave_rope(text, config)
    if (frequencies := _rope_factors(config)) is not None:
        text["rope_freqs.weight"] = lambda: frequencies
    return text, wanted - text.keys()


def _interleave_rope(text: Tensors, config: Any) -> None:
    """llama.cpp's Llama rotates neighbouring channels, transformers' rotates halves: reorder q and k to match."""

    def reorder(read: Callable[[], torch.Tensor], heads: int) -> Callable[[], torch.Tensor]:
        def read_reordered() -> torch.Tensor:
            weight = read()
            halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
            return halves.transpose(1, 2).reshape(weight.shape)

        return read_reordered

    for name in text:
        if match := re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name):
            heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
            text[name] = reorder(text[name], heads)


def text_values(config: Any) -> tuple[str, dict[str, Any]]:
    """llama.cpp's name for the text model, and its hyperparameters."""
    if config.model_type not in TEXT_KINDS:
        raise ValueError(f"text model {config.model_type!r} cannot be exported; known: {', '.join(TEXT_KINDS)}")
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act={config.hidden_act!r} of the text model is not silu, all that llama.cpp has here")
    kind, rope = TEXT_KINDS[config.model_type], config.rope_parameters
    heads = config.num_attention_heads
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if kind == "qwen2vl":
        values["rope.dimension_sections"] = [*rope["mrope_section"], 0]
    elif rope["rope_type"] not in ("default", "llama3"):
        raise ValueError(f"rope_type={rope['rope_type']!r} cannot be exported; default and llama3 can")
    return kind, {f"{kind}.{key}": value for key, value in values.items()}


def _rope_factors(config: Any) -> torch.Tensor | None:
    """What llama.cpp divides each rotation's frequency by, for Llama 3's stretched context."""
    if config.rope_parameters.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
    return plain / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]


def write_gguf(path: Path, kind: str, values: dict[str, Any], tensors: Tensors, dtype: str) -> None:
    """One GGUF file; tensors pass through a temporary file, so that memory holds one of them at a time."""
    import gguf

    writer = gguf.GGUFWriter(path, kind, use_temp_file=True)
    file_type = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
                 "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[dtype]  # fmt: skip
    writer.add_file_type(file_type)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, read in tensors.items():
        array = np.ascontiguousarray(read().float().numpy())
        if array.ndim == 1 or dtype == "f32" or "position_embd" in name:
            writer.add_tensor(name, array)
        elif dtype == "q8_0" and array.shape[-1] % 32 == 0:
            quantised = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, array.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass
class ExportArguments:
    """What the command can be told."""

    adapter: str = field(metadata={"help": "folder that training saved the adapter in"})
    output_dir: str = field(metadata={"help": "folder for the GGUF file"})
    dtype: str = field(default="f16", metadata={"help": "of matrices: f32, f16 or q8_0"})
    quantize: str | None = field(default=None, metadata={"help": "another type, as Q4_K_M, by llama-quantize"})


def main(argv: list[str] | None = None) -> int:
    from transformers import HfArgumentParser

    from .adapters import load_adapter

    parser = HfArgumentParser(ExportArguments, prog="python3 -m helpers.gguf_text", description=__doc__.split("\n")[0])
    args = ExportArguments(**vars(parser.parse_args(argv)))
    try:
        quantizer(args.dtype, args.quantize)
        model, tokenizer = load_adapter(args.adapter)
        path = export_gguf_text(model, tokenizer, args.output_dir, args.dtype, args.quantize)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {path.stat().st_size / 1024**3:.2f} GiB; run it with: llama-cli -m {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
