"""A tokenizer of transformers in the keys that GGUF files hold it by."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

# What splits text before BPE -> llama.cpp's name for it.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
SPLITS = {
    (QWEN2_SPLIT, False): "qwen2",
    (LLAMA3_SPLIT, False): "llama-bpe",
    (None, True): "smollm",
    (None, False): "gpt-2",
}


def tokenizer_values(processor: Any, vocab_size: int) -> dict[str, Any]:
    """The tokenizer, given or a processor's, as llama.cpp's keys: byte-level BPE (Qwen, Llama 3, SmolLM2) or
    sentencepiece's (Llama 2)."""
    from gguf import TokenType

    tokenizer = getattr(processor, "tokenizer", processor)
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe, added = description["model"], tokenizer.added_tokens_decoder
    if bpe["type"] != "BPE":
        raise ValueError(f"a {bpe['type']} tokenizer cannot be exported; byte-level and sentencepiece BPE can")
    steps = list(_steps(description["pre_tokenizer"]))
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    if not byte_level and "<0x00>" not in tokenizer.get_vocab():
        raise ValueError("the tokenizer is neither byte-level BPE nor sentencepiece BPE with bytes to fall back on")
    pieces = {i: token for token, i in tokenizer.get_vocab().items()}
    if max(pieces) >= vocab_size:
        raise ValueError(f"the tokenizer has token {max(pieces)}, the model only {vocab_size}; resize its embeddings")
    tokens, kinds = [], []
    for i in range(vocab_size):
        tokens.append(pieces.get(i, f"[PAD{i}]"))
        if i not in pieces:
            kind = TokenType.UNUSED
        elif i in added:
            kind = TokenType.CONTROL if added[i].special else TokenType.USER_DEFINED
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", tokens[-1]) and not byte_level:
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        kinds.append(int(kind))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    values: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    if not byte_level:
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):  # sentencepiece's scores only rank: the earliest merge wins
            ranks.setdefault(pair.replace(" ", ""), rank)
        values |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": [-float(ranks.get(token, len(merges))) for token in tokens],
        }
    else:
        values |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _split_name(steps)}
        values["tokenizer.ggml.merges"] = merges
    for key, token in (
        ("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id), ("padding", tokenizer.pad_token_id)
    ):  # fmt: skip
        if token is not None:
            values[f"tokenizer.ggml.{key}_token_id"] = token
    values["tokenizer.ggml.add_bos_token"] = False  # chat templates write it
    if template := getattr(processor, "chat_template", None) or tokenizer.chat_template:
        values["tokenizer.chat_template"] = template
    return values


def _steps(pre_tokenizer: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if pre_tokenizer:
        yield pre_tokenizer
        for step in pre_tokenizer.get("pretokenizers", ()):
            yield from _steps(step)


def _split_name(steps: list[dict[str, Any]]) -> str:
    regex = next((step["pattern"].get("Regex") for step in steps if step["type"] == "Split"), None)
    digits = any(step["type"] == "Digits" for step in steps)
    if (regex, digits) not in SPLITS:
        raise ValueError(f"llama.cpp has no name that we know for a tokenizer that splits text by {regex!r}")
    return SPLITS[regex, digits]
