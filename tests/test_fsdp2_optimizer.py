"""bitsandbytes' optimizers extended: the same bits as its own step, of 8-bit and of 32-bit states, and no waiting."""

import bitsandbytes.optim.optimizer as theirs
import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import nn

from helpers.fsdp2_optimizer import step_without_waiting


def test_a_step_that_does_not_wait_is_bitsandbytes_own(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(64, 128, generator=generator), torch.randn(16, generator=generator)]
    gradients = [[torch.randn(p.shape, generator=generator) for p in start] for _ in range(3)]

    def trained(extend) -> list[torch.Tensor]:
        parameters = [nn.Parameter(p.clone()) for p in [*start, torch.ones(3)]]  # the last never has a gradient
        optimizer = AdamW8bit(parameters, lr=1e-2, weight_decay=0.1)
        extend(optimizer)
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=False):
                parameter.grad = gradient.clone()
            assert optimizer.step(lambda: 7.0) == 7.0
        assert [len(optimizer.state[p]) > 0 for p in parameters] == [True, True, False]
        assert optimizer.state[parameters[0]]["state1"].dtype == torch.uint8
        return [p.detach() for p in parameters]

    expected = trained(lambda optimizer: None)
    monkeypatch.setattr(theirs, "sync_gpu", lambda tensor: pytest.fail("waited for the GPU"))
    for got, wanted in zip(trained(step_without_waiting), expected, strict=True):
        assert torch.equal(got, wanted)
    assert not torch.equal(expected[0], start[0])
