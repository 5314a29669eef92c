"""bitsandbytes' optimizers, without waiting for the GPU, and on sharded parameters: each rank updates its own rows.

bitsandbytes synchronises after every parameter, which only its paged states need and costs 448 waits a step of an 8B
model's LoRA. Its kernels take plain tensors and its states are plain tensors, so with FSDP2's DTensors a step raises,
and a checkpoint would hold one rank's 8-bit states as everyone's. An 8-bit state is cut into blocks of 256 values that
share a scale, counted from the start of a rank's shard: for another number of ranks the blocks lie elsewhere. So a
sharded checkpoint holds what the states decode to, in float32 and sharded as the parameter is, and loading encodes it
again, which rounds once more, as every step does.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch.distributed.tensor import DTensor

BLOCK = 256  # values that share one absmax of an 8-bit state, fixed in bitsandbytes
CODES = {"state1": "dynamic", "state2": "udynamic"}  # the map that bitsandbytes decodes each state by
WRAPPED = Optimizer8bit._FSDP_WRAPPED_QUANT_STATE_KEY


def step_without_waiting(optimizer: Optimizer8bit) -> None:
    """Let ``optimizer``, of bitsandbytes, step without waiting for the GPU; in place, with the same results."""
    _extend(optimizer, _Unwaiting)


def step_on_shards(optimizer: Optimizer8bit) -> None:
    """The same over DTensors sharded along dim 0, of which it updates the local shards."""
    _extend(optimizer, _Sharded)


def _extend(optimizer: Optimizer8bit, mixin: type) -> None:
    cls = type(optimizer)
    optimizer.__class__ = type(f"{mixin.__name__[1:]}{cls.__name__}", (mixin, cls), {})


class _Unwaiting:
    """Mixin before a bitsandbytes optimizer class: its step, which leaves the order of kernels to the stream."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for gindex, group in enumerate(self.param_groups):
            for pindex, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, gindex, pindex)
                self.prefetch_state(parameter)
                self.update_step(group, parameter, gindex, pindex)
        if self.is_paged and torch.cuda.is_available():
            torch.cuda.synchronize()
        return loss


class _Sharded(_Unwaiting):
    """Mixin before a bitsandbytes optimizer class, for parameters that are DTensors."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        with self._local():
            return super().step(closure)

    @contextlib.contextmanager
    def _local(self) -> Iterator[None]:
        """Within, parameters, gradients and the keys of the state are the local shards."""
        groups = [group["params"] for group in self.param_groups]
        shards = {p: p.to_local() if isinstance(p, DTensor) else p for params in groups for p in params}
        for parameter, shard in shards.items():
            if isinstance(parameter, DTensor):
                # A rank whose shard is empty has nothing to update.
                shard.grad = parameter.grad.to_local() if parameter.grad is not None and shard.numel() else None
        self.state = defaultdict(dict, {shards[p]: state for p, state in self.state.items()})
        for group, params in zip(self.param_groups, groups, strict=True):
            group["params"] = [shards[p] for p in params]
        try:
            yield
        finally:
            state = self.state
            self.state = defaultdict(dict, {p: state[s] for p, s in shards.items() if s in state})
            for group, params in zip(self.param_groups, groups, strict=True):
                group["params"] = params
            for parameter, shard in shards.items():
                if isinstance(parameter, DTensor):
                    shard.grad = None

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, state in saved["state"].items():
            state |= state.pop(WRAPPED, {})
            for name in CODES:
                code, absmax = (state.pop(f"{part}{name[-1]}", None) for part in ("qmap", "absmax"))
                if name in state:
                    state[name] = _decoded(parameters[i], state[name], code, absmax)
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any], **more: Any) -> None:
        states = {
            i: {name: value.to_local() if isinstance(value, DTensor) else value for name, value in state.items()}
            for i, state in state_dict["state"].items()
        }
        super().load_state_dict(state_dict | {"state": states}, **more)
        for gindex, group in enumerate(self.param_groups):
            for pindex, parameter in enumerate(group["params"]):
                config, state = self.get_config(gindex, pindex, group), self.state.get(parameter, {})
                # bitsandbytes' own rule, by the size of what it is given: this rank's shard.
                large = "state1" in state and state["state1"].numel() >= config["min_8bit_size"]
                if large and config["optim_bits"] == 8:
                    self._encode(state)

    def _encode(self, state: dict[str, Any]) -> None:
        if not self.name2qmap:
            self.fill_qmap()
        for name, kind in CODES.items():
            if name in state:
                code = self.name2qmap[kind] = self.name2qmap[kind].to(state[name].device)
                state[name], found = functional.quantize_blockwise(state[name], code=code, blocksize=BLOCK)
                state[f"qmap{name[-1]}"], state[f"absmax{name[-1]}"] = code, found.absmax


def _decoded(parameter: torch.Tensor, value: torch.Tensor, code: torch.Tensor | None, absmax: torch.Tensor | None):
    """A state in float32, of the parameter's shape and sharded as it is."""
    if value.dtype == torch.uint8:
        value = functional.dequantize_blockwise(value, absmax=absmax, code=code, blocksize=BLOCK)
    if not isinstance(parameter, DTensor):
        return value
    return DTensor.from_local(
        value, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip
