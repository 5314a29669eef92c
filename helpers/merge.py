"""Merge a trained adapter into its base: a plain transformers model that needs neither PEFT nor bitsandbytes.

    python3 -m helpers.merge --adapter runs/train --output_dir merged

The base is dequantised first and the adapter added to exactly the weights it was trained on, so the merged model
answers as the adapter did; merging in 4 bits would round the adapter away.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .train_arguments import DTYPES


@dataclass
class MergeArguments:
    """Command line of ``python3 -m helpers.merge``."""

    adapter: str = field(metadata={"help": "folder that training saved the adapter in"})
    output_dir: str = field(metadata={"help": "new folder for the merged model and its tokenizer"})
    dtype: str = field(default="float16", metadata={"help": "of the weights", "choices": list(DTYPES)})


def merge(adapter: str, output_dir: str, dtype: torch.dtype = torch.float16) -> Path:
    """Write the merged model and return its folder.

    Raises:
        ValueError: ``adapter`` holds no adapter, or ``output_dir`` exists already.
    """
    from peft import PeftModel
    from transformers import AutoTokenizer

    from .adapters import base_of
    from .checkpoints import load_base

    name = base_of(adapter)
    if Path(output_dir).exists():
        raise ValueError(f"{output_dir!r} exists; give a new folder")
    base = load_base(name, dtype).model
    base = base.dequantize(dtype=dtype)
    model = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(output_dir)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(output_dir)
    return Path(output_dir)


def main(argv: list[str] | None = None) -> int:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(MergeArguments, prog="python3 -m helpers.merge")
    args = MergeArguments(**vars(parser.parse_args(argv)))
    try:
        folder = merge(args.adapter, args.output_dir, DTYPES[args.dtype])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"merged model in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
