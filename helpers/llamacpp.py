"""llama.cpp through its C interface, to check exports against the program they are made for.

The library comes out of the ``xllamacpp`` wheel (34 MB), which has llama.cpp with its multimodal half in it: where that
is installed, or fetched once by pip into the cache. Nothing is built.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .checkpoints import cache_folder

WHEEL = "xllamacpp==2026.10.11549"
MARKER = b"<__media__>"


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)), ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))), ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]  # fmt: skip


class _Params(ctypes.Structure):
    """A parameter structure that only its defaults fill; room to spare, since it is passed whole on the stack."""

    _fields_ = [("head", ctypes.c_uint32 * 3), ("rest", ctypes.c_uint8 * 500)]


class _VisionParams(ctypes.Structure):
    _fields_ = [
        ("use_gpu", ctypes.c_bool), ("device", ctypes.c_void_p), ("print_timings", ctypes.c_bool),
        ("n_threads", ctypes.c_int), ("image_marker", ctypes.c_char_p), ("media_marker", ctypes.c_char_p),
        ("flash_attn_type", ctypes.c_int), ("warmup", ctypes.c_bool), ("image_min_tokens", ctypes.c_int),
        ("rest", ctypes.c_uint8 * 256),
    ]  # fmt: skip


class _Text(ctypes.Structure):
    _fields_ = [
        ("text", ctypes.c_char_p), ("length", ctypes.c_size_t), ("add_special", ctypes.c_bool),
        ("parse_special", ctypes.c_bool),
    ]  # fmt: skip


def library_path(fetch: bool = False) -> Path | None:
    """The shared library with llama.cpp in it, or None.

    Args:
        fetch: let pip download the wheel into the cache where it is neither installed nor cached; None without network.
    """
    if spec := importlib.util.find_spec("xllamacpp"):
        return next(Path(spec.origin).parent.glob("xllamacpp*.so"), None)
    folder = cache_folder() / "llama.cpp"
    found = next(folder.glob("xllamacpp*.so"), None)
    if found or not fetch:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, WHEEL]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".so"))
            (Path(scratch) / "whole").write_bytes(wheel.read(name))
        os.replace(Path(scratch) / "whole", folder / Path(name).name)
    return folder / Path(name).name


class LlamaCpp:
    """A text GGUF and its mmproj, if it has one, loaded on the CPU in float32 arithmetic.

    Args:
        model: the text file.
        mmproj: the vision file, or None.
        context: tokens.
    """

    def __init__(self, model: str | Path, mmproj: str | Path | None = None, context: int = 1024):
        path = library_path()
        if path is None:
            raise ValueError(f"llama.cpp is not here; pip install {WHEEL}, or call library_path(fetch=True) once")
        self.lib = lib = ctypes.CDLL(str(path))
        for name, result in (
            ("llama_model_default_params", _Params), ("llama_context_default_params", _Params),
            ("mtmd_context_params_default", _VisionParams), ("llama_model_load_from_file", ctypes.c_void_p),
            ("llama_init_from_model", ctypes.c_void_p), ("mtmd_init_from_file", ctypes.c_void_p),
            ("mtmd_input_chunks_init", ctypes.c_void_p), ("mtmd_input_chunks_get", ctypes.c_void_p),
            ("mtmd_input_chunks_size", ctypes.c_size_t), ("mtmd_bitmap_init", ctypes.c_void_p),
            ("mtmd_input_chunk_get_n_tokens", ctypes.c_size_t), ("llama_batch_init", _Batch),
            ("mtmd_get_output_embd", ctypes.POINTER(ctypes.c_float)), ("llama_model_get_vocab", ctypes.c_void_p),
            ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float)), ("llama_get_memory", ctypes.c_void_p),
            ("mtmd_input_chunk_get_tokens_text", ctypes.POINTER(ctypes.c_int32)),
        ):  # fmt: skip
            getattr(lib, name).restype = result
        log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self.silent = log(lambda level, text, data: None)  # kept: the library holds no reference
        lib.llama_log_set(self.silent, None)
        lib.mtmd_log_set(self.silent, None)
        lib.mtmd_helper_log_set(self.silent, None)
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp refused {model}")
        params = lib.llama_context_default_params()
        params.head[0] = params.head[1] = params.head[2] = context
        self.context = lib.llama_init_from_model(ctypes.c_void_p(self.model), params)
        vision = lib.mtmd_context_params_default()
        vision.use_gpu, vision.warmup, vision.n_threads, vision.flash_attn_type = False, False, 1, 0
        vision.image_min_tokens = 1
        self.vision = mmproj and lib.mtmd_init_from_file(str(mmproj).encode(), ctypes.c_void_p(self.model), vision)
        if not self.context or (mmproj and not self.vision):
            raise ValueError(f"llama.cpp refused {mmproj or model}")
        self.vocab = ctypes.c_void_p(lib.llama_model_get_vocab(ctypes.c_void_p(self.model)))
        self.vocab_size = lib.llama_vocab_n_tokens(self.vocab)
        self.width = lib.llama_model_n_embd(ctypes.c_void_p(self.model))

    def read(self, prompt: str, images: Sequence[Image.Image]) -> tuple[list[int], list[np.ndarray], np.ndarray]:
        """Token ids of the prompt's text, each image's embeddings [tokens, width], and the last logits [vocabulary].

        Args:
            prompt: rendered text, with ``<__media__>`` for each image (which brings its own markers around it).
            images: in the order of their places, RGB; none without an mmproj.
        """
        if not self.vision:
            ids = self._tokens(prompt)
            self.lib.llama_memory_clear(ctypes.c_void_p(self.lib.llama_get_memory(ctypes.c_void_p(self.context))), True)
            self.position = 0
            return ids, [], self._next(*ids)
        lib, chunks = self.lib, ctypes.c_void_p(self.lib.mtmd_input_chunks_init())
        pixels = [np.ascontiguousarray(np.asarray(image.convert("RGB"))) for image in images]
        bitmaps = (ctypes.c_void_p * len(images))(
            *(lib.mtmd_bitmap_init(p.shape[1], p.shape[0], p.ctypes.data_as(ctypes.c_void_p)) for p in pixels)
        )
        text = prompt.encode()
        given = _Text(text, len(text), False, True)
        if lib.mtmd_tokenize(ctypes.c_void_p(self.vision), chunks, ctypes.byref(given), bitmaps, len(images)):
            raise ValueError(f"llama.cpp cannot fit {len(images)} images into {prompt!r}")
        ids, embeddings = [], []
        for i in range(lib.mtmd_input_chunks_size(chunks)):
            chunk = ctypes.c_void_p(lib.mtmd_input_chunks_get(chunks, ctypes.c_size_t(i)))
            if lib.mtmd_input_chunk_get_type(chunk) == 0:
                count = ctypes.c_size_t()
                tokens = lib.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                ids += tokens[: count.value]
            else:
                if lib.mtmd_encode_chunk(ctypes.c_void_p(self.vision), chunk):
                    raise ValueError("llama.cpp failed to encode an image")
                count = lib.mtmd_input_chunk_get_n_tokens(chunk)
                found = lib.mtmd_get_output_embd(ctypes.c_void_p(self.vision))
                embeddings.append(np.ctypeslib.as_array(found, (count, self.width)).copy())
        lib.llama_memory_clear(ctypes.c_void_p(lib.llama_get_memory(ctypes.c_void_p(self.context))), True)
        position = ctypes.c_int32()
        failed = lib.mtmd_helper_eval_chunks(
            ctypes.c_void_p(self.vision), ctypes.c_void_p(self.context), chunks, 0, 0, 512, True, ctypes.byref(position)
        )
        lib.mtmd_input_chunks_free(chunks)
        for bitmap in bitmaps:
            lib.mtmd_bitmap_free(ctypes.c_void_p(bitmap))
        if failed:
            raise ValueError(f"llama.cpp failed to read the prompt: {failed}")
        self.position = position.value
        return ids, embeddings, self._logits()

    def answer(self, prompt: str, images: Sequence[Image.Image], tokens: int, stop: int | None = None) -> list[int]:
        """The greedy answer's token ids, ``stop`` included where it comes."""
        logits, said = self.read(prompt, images)[2], []
        while len(said) < tokens:
            said.append(int(logits.argmax()))
            if said[-1] == stop:
                break
            logits = self._next(said[-1])
        return said

    def _tokens(self, text: str) -> list[int]:
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 8))()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), False, True)
        if count < 0:
            raise ValueError(f"llama.cpp cannot tokenize {text!r}")
        return list(ids[:count])

    def _next(self, *tokens: int) -> np.ndarray:
        """Read further tokens; the logits after the last."""
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self.position + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i == len(tokens) - 1
        failed = self.lib.llama_decode(ctypes.c_void_p(self.context), batch)
        self.lib.llama_batch_free(batch)
        if failed:
            raise ValueError(f"llama.cpp failed to read {len(tokens)} tokens: {failed}")
        self.position += len(tokens)
        return self._logits()

    def _logits(self) -> np.ndarray:
        found = self.lib.llama_get_logits_ith(ctypes.c_void_p(self.context), -1)
        return np.ctypeslib.as_array(found, (self.vocab_size,)).copy()

    def close(self) -> None:
        """Give the memory back."""
        if self.vision:
            self.lib.mtmd_free(ctypes.c_void_p(self.vision))
        self.lib.llama_free(ctypes.c_void_p(self.context))
        self.lib.llama_model_free(ctypes.c_void_p(self.model))
