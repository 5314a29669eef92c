"""torch AO's NF4 tensor in place of ours under FSDP2, to compare with: same weights, its own scales and decoding.

It cannot load bitsandbytes' checkpoints: each weight is decoded and quantised again, which rounds once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn

from . import fsdp2
from .nf4_tensor import replace_linears


class TorchAOLinear(nn.Module):
    """A frozen ``Linear4bit`` whose weight is torch AO's ``NF4Tensor`` of [out, in]."""

    def __init__(self, linear: Linear4bit):
        from torchao.quantization import NF4Tensor

        super().__init__()
        weight = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        self.weight = nn.Parameter(NF4Tensor.from_tensor(weight, 64, 256), requires_grad=False)
        self.compute_dtype = linear.compute_dtype or weight.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.to(self.compute_dtype), self.weight).to(x.dtype)


@contextlib.contextmanager
def torchao_weights() -> Iterator[None]:
    """Within, ``helpers.fsdp2`` shards torch AO's tensors; what it checks of ours beforehand is left out."""

    def use_torchao(model: nn.Module, shards: int, decoder: str) -> int:
        return replace_linears(model, TorchAOLinear)

    with mock.patch.multiple(fsdp2, use_nf4_tensors=use_torchao, _check=lambda model: None):
        yield
