"""A linear layer over a packed 4-bit weight, and a switch that makes bitsandbytes' layers use it.

The weight is decoded in the forward pass and again in the backward pass, by `dequantize_nf4`, and dropped after each
product: what autograd keeps for a frozen layer is the packed weight alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import MethodType

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

from .nf4 import INTERPRETED, dequantize_nf4

# Up to this many rows bitsandbytes' fused 4-bit product, which never writes the decoded weight, is faster on a GPU. An
# H100's forward: 1 row 31 us against 110 (4096 x 14336) and 12 against 27 (2048 x 8192), 16 rows 69 against 110 and
# equal, 32 rows 71 against 108 and 40 against 27. Backward has no such product: with gradients decoding wins.
FEW_ROWS = 16


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, quant_state) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.quant_state = quant_state
        return F.linear(x, dequantize_nf4(weight, quant_state, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (weight,) = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dequantize_nf4(weight, ctx.quant_state, dtype=grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, None, grad_bias, None


def nf4_linear(
    x: torch.Tensor, weight: torch.Tensor, quant_state, bias: torch.Tensor | None = None,
    decoded: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`F.linear(x, dequantize_nf4(weight, quant_state, dtype=x.dtype), bias)`, keeping only the packed weight.

    Args:
        x: [..., in_features], float16, bfloat16 or float32; under autocast it is cast to autocast's dtype first.
        weight: packed codes, [bytes, 1], any storage dtype; gets no gradient.
        quant_state: bitsandbytes QuantState of shape [out_features, in_features].
        bias: [out_features] or None; gets a gradient.
        decoded: the weight as `decoded_weight` gives it, where that was done before.

    Returns: [..., out_features] of x's (or autocast's) dtype.

    Raises: ValueError where the last dimension of x is not in_features; what `dequantize_nf4` raises.
    """
    if x.shape[-1] != quant_state.shape[1]:
        raise ValueError(
            f"x has {x.shape[-1]} features, but the weight of shape {tuple(quant_state.shape)} takes others"
        )
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if bias is not None:
        bias = bias.to(x.dtype)
    if decoded is not None:
        return F.linear(x, decoded, bias)
    return _NF4Linear.apply(x, _packed(weight), bias, quant_state)


def _packed(weight: torch.Tensor) -> torch.Tensor:
    """[bytes, 1]: [1, bytes], bitsandbytes' sign for a transposed weight, is not for who multiplies by [in, out]."""
    return weight.t() if weight.shape[0] == 1 else weight


def decoded_weight(weight: torch.Tensor, quant_state, compute_dtype: torch.dtype) -> torch.Tensor:
    """[out_features, in_features] in autocast's dtype, or else in ``compute_dtype``: for `nf4_linear`'s ``decoded``."""
    return dequantize_nf4(_packed(weight), quant_state, dtype=autocast_dtype(weight.device.type, compute_dtype))


def autocast_dtype(kind: str, otherwise: torch.dtype) -> torch.dtype:
    """What autocast computes in on devices of ``kind``, where it is on."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else otherwise


def _decode(module: Linear4bit, dtype: torch.dtype) -> torch.Tensor:
    return decoded_weight(module.weight, module.weight.quant_state, module.compute_dtype or dtype)


def _forward(module: Linear4bit, x: torch.Tensor) -> torch.Tensor:
    """`Linear4bit.forward` with the decoding and the products replaced; dtypes are chosen as there."""
    if x.is_cuda and x.numel() <= FEW_ROWS * x.shape[-1] and not (x.requires_grad and torch.is_grad_enabled()):
        return type(module).forward(module, x)
    fix_4bit_weight_quant_state_from_module(module)  # FSDP replaces the parameter, and its state with it
    if not module.compute_type_is_set:
        module.set_compute_type(x)
        module.compute_type_is_set = True
    compute_dtype = x.dtype if module.compute_dtype is None else module.compute_dtype
    y = nf4_linear(x.to(compute_dtype), module.weight, module.weight.quant_state, module.bias, module.decoded)
    return y.to(x.dtype)


@contextlib.contextmanager
def triton_nf4(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Within the context every `bitsandbytes.nn.Linear4bit` of `model` computes through `nf4_linear`.

    PEFT's LoRA layers call the quantized layer inside them, so they need no change. Each layer's forward is replaced on
    the instance and put back on exit. Where accelerate's hooks wrap the forward, what they wrap is replaced.

    Args:
        model: module on one or more GPUs, or on a CPU under Triton's interpreter.

    Raises: ValueError where no layer is 4-bit, or a layer is where the kernel cannot run.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if not layers:
        raise ValueError("the model has no bitsandbytes Linear4bit layer: load it with load_in_4bit=True")
    if not INTERPRETED and (off := {str(layer.weight.device) for layer in layers if layer.weight.device.type == "cpu"}):
        raise ValueError(f"4-bit layers are on {off.pop()}: move the model to a GPU, or set TRITON_INTERPRET=1")
    replaced = []
    try:
        for layer in layers:
            name = "_old_forward" if "_old_forward" in vars(layer) else "forward"
            replaced.append((layer, name, vars(layer).get(name)))
            layer.decoded, layer.decode = None, MethodType(_decode, layer)
            setattr(layer, name, MethodType(_forward, layer))
        yield model
    finally:
        for layer, name, previous in replaced:
            del layer.decoded, layer.decode
            if previous is None:
                delattr(layer, name)
            else:
                setattr(layer, name, previous)
