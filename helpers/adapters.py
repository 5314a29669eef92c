"""A trained adapter's folder: which base it belongs to, and both loaded together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .checkpoints import load_base

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def base_of(adapter: str | Path) -> str:
    """The Hub id or folder of the model that an adapter was trained on.

    Raises:
        ValueError: the folder holds no adapter, or one of a model with random weights, which is nowhere to be loaded.
    """
    from peft import PeftConfig

    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(f"{str(adapter)!r} holds no adapter_config.json; give the --output_dir of a training run")
    base = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    if not base:
        raise ValueError(f"{str(adapter)!r} was trained on random weights: there is no model that it could belong to")
    return base


def load_adapter(adapter: str | Path, dtype: torch.dtype | None = None) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The adapter on its base in 4 bits, in evaluation mode, and the tokenizer saved with it.

    Raises:
        ValueError: as `base_of` and `helpers.checkpoints.load_base`.
    """
    from peft import PeftModel
    from transformers import AutoTokenizer

    base = load_base(base_of(adapter), dtype).model
    return PeftModel.from_pretrained(base, str(adapter)).eval(), AutoTokenizer.from_pretrained(str(adapter))
