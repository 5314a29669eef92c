"""A finetuned model's weights as they count: LoRA added to the weights it was trained on, 4-bit ones decoded first.

Unlike PEFT's ``merge_and_unload`` this changes nothing in the model, holds one tensor at a time, and rounds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensors = dict[str, Callable[[], torch.Tensor]]  # a name -> its value in float32, made when asked for


def merged_tensors(model: torch.nn.Module) -> Tensors:
    """Every parameter of ``model`` by its plain name, as a function that gives it in float32 on the CPU, LoRA added.

    Raises: ValueError for adapters other than LoRA, DoRA, or 8-bit weights.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    found: Tensors = {}
    inside: tuple[str, ...] = ()  # what belongs to a module that is already dealt with
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        if isinstance(module, BaseTunerLayer):
            if not isinstance(module, LoraLayer) or any(module.use_dora.values()) or any(module.lora_bias.values()):
                raise ValueError(f"{name} carries an adapter other than plain LoRA; merge it with PEFT first")
            inside = (*inside, f"{name}.")
            for key, value in module.get_base_layer().named_parameters(recurse=False):
                found[f"{name}.{key}"] = _reader(module, value, key == "weight")
        elif isinstance(module, ModulesToSaveWrapper):
            inside = (*inside, f"{name}.")
            trained = module.modules_to_save[module.active_adapters[0]]
            found |= {f"{name}.{key}": _reader(None, value) for key, value in trained.named_parameters()}
        else:
            for key, value in module.named_parameters(recurse=False):
                found[f"{name}.{key}" if name else key] = _reader(None, value)
    return found


def _reader(lora: Any, value: torch.Tensor, weight: bool = False) -> Callable[[], torch.Tensor]:
    if value.dtype == torch.int8:
        raise ValueError("8-bit weights cannot be exported; load the model in 4 or 16 bits")

    def read() -> torch.Tensor:
        whole = value.detach()
        if (state := getattr(value, "quant_state", None)) is not None:
            if getattr(state, "packing_format_for_cpu", False):
                raise ValueError(
                    "bitsandbytes has rounded these 4-bit weights for this CPU's AVX512 when the model answered; save "
                    "the adapter, load the model again, and export before it answers"
                )
            import bitsandbytes.functional as bnb

            whole = bnb.dequantize_4bit(value.data, state)
        whole = whole.float()
        if weight and lora is not None and not lora.merged:
            for adapter in lora.active_adapters:
                if adapter in lora.scaling:
                    whole = whole + lora.get_delta_weight(adapter).detach().float().reshape(whole.shape)
        return whole.cpu()

    return read
