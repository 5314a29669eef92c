"""bitsandbytes' optimizers on sharded parameters: each rank updates its own rows, and states are saved as DTensors.

bitsandbytes' kernels take plain tensors and its states are plain tensors, so with FSDP2's DTensors a step raises, and a
checkpoint would hold one rank's 8-bit states as everyone's.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch.distributed.tensor import DTensor

BLOCK = 256  # values that share one absmax of an 8-bit state, fixed in bitsandbytes
CODES = "_8bit"  # marks the name of an 8-bit state in a checkpoint
WRAPPED = Optimizer8bit._FSDP_WRAPPED_QUANT_STATE_KEY


def step_on_shards(optimizer: Optimizer8bit) -> None:
    """Let ``optimizer``, of bitsandbytes and over DTensors sharded along dim 0, step on the local shards; in place."""
    cls = type(optimizer)
    optimizer.__class__ = type(f"Sharded{cls.__name__}", (_Sharded, cls), {})


class _Sharded:
    """Mixin before a bitsandbytes optimizer class."""

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
        self._whole_blocks = {id(s): _whole_blocks(p) for p, s in shards.items()}
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

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        config = super().get_config(gindex, pindex, group)
        # Blocks that a shard's edge would cut could not be given to another number of ranks: such a state is float32.
        if not self._whole_blocks[id(group["params"][pindex])]:
            config["optim_bits"] = 32
        return config

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        for parameter, state in self._with_parameters(saved["state"]):
            for values in (state, state.get(WRAPPED, {})):
                for name, value in list(values.items()):
                    if not isinstance(value, torch.Tensor):
                        continue
                    if name.startswith("absmax") or value.ndim == parameter.ndim:
                        values[name] = _sharded_like(parameter, value, name.startswith("absmax"))
                    if value.dtype == torch.uint8:  # or codes would be loaded as if they were a float32 state's values
                        values[name + CODES] = values.pop(name)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any], **more: Any) -> None:
        state_dict = state_dict | {"state": {i: _plain(state) for i, state in state_dict["state"].items()}}
        super().load_state_dict(state_dict, **more)

    def _with_parameters(self, states: dict[int, dict]) -> Iterator[tuple[DTensor, dict]]:
        parameters = [p for group in self.param_groups for p in group["params"]]
        return ((p, states[i]) for i, p in enumerate(parameters) if i in states and isinstance(p, DTensor))


def _whole_blocks(parameter: torch.Tensor) -> bool:
    """Whether every shard of ``parameter`` is whole blocks of `BLOCK` values, laid out as another world size would."""
    if not isinstance(parameter, DTensor):
        return True
    rows, ranks = parameter.shape[0], parameter.device_mesh.size()
    columns = parameter.numel() // rows
    return columns % BLOCK == 0 or (rows % ranks == 0 and (rows // ranks * columns) % BLOCK == 0)


def _sharded_like(parameter: DTensor, value: torch.Tensor, absmax: bool) -> DTensor:
    shape = parameter.shape
    if absmax:
        columns = parameter.numel() // shape[0]
        # One row of absmax a row of the parameter, so that both are cut at the same place; else one absmax a block.
        shape = torch.Size(
            (shape[0], columns // BLOCK) if columns % BLOCK == 0 else (parameter.numel() // BLOCK,)
        )
        value = value.view(-1, *shape[1:])
    return DTensor.from_local(
        value, parameter.device_mesh, parameter.placements, run_check=False, shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )  # fmt: skip


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    plain = {}
    for name, value in state.items():
        if isinstance(value, dict):
            value = _plain(value)
        elif isinstance(value, DTensor):
            value = value.to_local()
            value = value.reshape(-1) if name.startswith("absmax") else value
        plain[name.removesuffix(CODES)] = value
    return plain
