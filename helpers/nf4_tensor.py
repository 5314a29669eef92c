"""NF4 weights that FSDP2 can shard: a traceable tensor subclass over bitsandbytes' packed bytes.

Stock ``fully_shard`` has two ways with a 4-bit weight and neither will do. Its uint8 bytes cannot become a sharded
parameter before torch 2.12; stored as float16 they can, but the all-gather then copies them as numbers and CUDA
rewrites every NaN pattern (pytorch#159333): weights change silently. :class:`NF4Tensor` looks like a frozen float
tensor, so any FSDP2 takes it as a parameter, and hands the all-gather its bytes as uint8 through the documented
``fsdp_pre_all_gather`` / ``fsdp_post_all_gather`` extension, so they arrive as they left.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

aten = torch.ops.aten
NESTED_BLOCKSIZE = 256  # absmax values that share one second-level absmax, fixed in bitsandbytes
SHARDED = ("packed", "absmax", "absmax2")
SHARED = ("code", "code2", "offset")  # 1 KiB a weight, the same on every rank


class NF4Encoding(NamedTuple):
    """What the bytes mean: ``shape`` (out, in) and ``dtype`` of the decoded weight, ``blocksize`` in weights."""

    shape: tuple[int, int]
    dtype: torch.dtype
    blocksize: int

    @property
    def row(self) -> int:
        """Weights a row of the tensor: one double-quantisation block, so that a shard never splits a block."""
        return self.blocksize * NESTED_BLOCKSIZE


class NF4Tensor(torch.Tensor):
    """A frozen NF4 weight as FSDP2 sees it: shape ``(rows, blocksize * 256)``, the dtype it decodes to, no gradient.

    A row is one double-quantisation block and dim 0 is what FSDP2 shards, so shards are whole blocks. ``rows`` is
    rounded up to a multiple of ``shards`` because an all-gather extension must be even; the rows past the last block
    are not stored until FSDP2 copies its shard. ``encoding.shape`` is the weight's own (out, in).

    Inner tensors, all 1-D and aliased, never copied: ``packed`` uint8, two weights a byte; ``absmax`` uint8 (float32
    without double quantisation), one per ``blocksize`` weights; ``absmax2`` float32, one per row; the 16 levels
    ``code``, the 256 levels ``code2`` and ``offset``. The last four follow bitsandbytes' ``QuantState``.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    absmax2: torch.Tensor | None
    code: torch.Tensor
    code2: torch.Tensor | None
    offset: torch.Tensor | None
    encoding: NF4Encoding

    @staticmethod
    def __new__(cls, rows: int, encoding: NF4Encoding, tensors: dict[str, torch.Tensor]) -> NF4Tensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, (rows, encoding.row), dtype=encoding.dtype, device=tensors["packed"].device, requires_grad=False
        )

    def __init__(self, rows: int, encoding: NF4Encoding, tensors: dict[str, torch.Tensor]):
        self.encoding = encoding
        self.sent: tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]] | None = None
        for name in SHARDED + SHARED:
            setattr(self, name, tensors.get(name))

    @classmethod
    def from_params4bit(cls, weight: Params4bit, shards: int = 1) -> NF4Tensor:
        """Wrap a quantised ``Params4bit`` (NF4, any ``quant_storage``) without copying its bytes.

        Raises:
            ValueError: it is not quantised yet, not NF4, or packed for bitsandbytes' CPU inference kernel.
        """
        state = weight.quant_state
        if state is None or state.quant_type != "nf4":
            kind = "not quantised" if state is None else state.quant_type
            raise ValueError(f"FSDP2 shards NF4 weights; this one of shape {tuple(weight.shape)} is {kind}")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError("the weight is packed for bitsandbytes' CPU inference; reload the model before sharding")
        tensors = {"packed": _bytes(weight.data), "absmax": state.absmax.view(-1), "code": state.code}
        if state.nested:
            if state.state2.blocksize != NESTED_BLOCKSIZE:
                raise ValueError(f"nested blocksize {state.state2.blocksize} is not bitsandbytes' {NESTED_BLOCKSIZE}")
            tensors |= {"absmax2": state.state2.absmax, "code2": state.state2.code, "offset": state.offset}
        encoding = NF4Encoding(tuple(state.shape), state.dtype, state.blocksize)
        blocks = -(-2 * tensors["packed"].numel() // encoding.row)
        return cls(-(-blocks // shards) * shards, encoding, tensors)

    def to_params4bit(self) -> Params4bit:
        """The same bytes as bitsandbytes' own parameter, aliased."""
        packed, state = unpack(self)
        return Params4bit(
            packed, quant_state=state, blocksize=state.blocksize, compress_statistics=state.nested, quant_type="nf4",
            bnb_quantized=True,
        )  # fmt: skip

    @property
    def frozen_bytes(self) -> int:
        """Bytes of weight and scales held here, of a shard or of the whole."""
        return sum(t.nbytes for _, t in self._present(SHARDED))

    def shard_bytes(self, shards: int) -> list[int]:
        """Of each inner tensor of a shard, one of ``shards``."""
        rows = self.shape[0] // shards
        return [rows * self._per_row(name) * t.itemsize for name, t in self._present(SHARDED)]

    def shard(self, rank: int, shards: int, take: Callable[[int, torch.dtype], torch.Tensor]) -> NF4Tensor:
        """A copy of one of ``shards`` shards, in memory that ``take(numel, dtype)`` gives."""
        rows = self.shape[0] // shards
        shard = self._with(rows, lambda name, t: take(rows * self._per_row(name), t.dtype).zero_())
        return _copy_(shard, self._rows(rank * rows, (rank + 1) * rows))

    def _present(self, names: tuple[str, ...] = SHARDED + SHARED) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, value) for name in names if (value := getattr(self, name)) is not None)

    def _per_row(self, name: str) -> int:
        return {"packed": self.encoding.row // 2, "absmax": NESTED_BLOCKSIZE, "absmax2": 1}[name]

    def _with(self, rows: int, change: Any) -> NF4Tensor:
        """A tensor of ``rows`` rows whose sharded inner tensors are ``change(name, tensor)``."""
        tensors = dict(self._present(SHARED)) | {name: change(name, t) for name, t in self._present(SHARDED)}
        return NF4Tensor(rows, self.encoding, tensors)

    def _rows(self, start: int, end: int) -> NF4Tensor:
        end = min(end, self.shape[0])
        # Past the last stored block a slice is shorter than its rows say, or empty: see the class docstring.
        return self._with(end - start, lambda name, t: t[start * self._per_row(name) : end * self._per_row(name)])

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        return [name for name, _ in self._present()], (self.shape[0], self.encoding)

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, torch.Tensor], context: tuple, outer_size, outer_stride) -> NF4Tensor:
        return NF4Tensor(context[0], context[1], tensors)

    def __repr__(self, **_: Any) -> str:
        return f"NF4Tensor({self.encoding.shape}, {self.encoding.dtype}, rows={self.shape[0]}, device={self.device})"

    # FSDP2's all-gather extension

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        """This rank's bytes, all as uint8 so that no copy on the way is numeric, and the tensors all ranks share."""
        if self.sent is None:  # a frozen shard sends the same every time
            # On one rank FSDP2 copies the first tensor and forgets the others, which are whole as they are.
            sharded = SHARDED if mesh.size() > 1 else ("packed",)
            shared = {name: t for name, t in self._present() if name not in sharded}
            self.sent = tuple(_bytes(t) for _, t in self._present(sharded)), shared
        return self.sent

    # FSDP2 asks for it at every gather, and to read it off the code takes inspect as long as all of the above.
    fsdp_pre_all_gather.__signature__ = inspect.signature(fsdp_pre_all_gather)

    def fsdp_post_all_gather(self, outputs, shared, param_dtype, *, out=None):
        """The whole weight over the gathered bytes. FSDP2 reuses their storage, so ``out`` is right already."""
        if out is not None:
            return None
        names = [name for name, _ in self._present(SHARDED) if name not in shared]
        gathered = {name: t.view(getattr(self, name).dtype) for name, t in zip(names, outputs, strict=True)}
        return self.with_tensors(gathered | shared), ()  # FSDP2 frees the outputs

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> NF4Tensor:
        """A tensor of the same encoding over other inner ``tensors``, by name; those not given are this one's."""
        rows = 2 * tensors["packed"].numel() // self.encoding.row
        return NF4Tensor(rows, self.encoding, dict(self._present()) | tensors)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in _OPS:
            return _OPS[func](*args, **(kwargs or {}))
        raise NotImplementedError(f"{func} is not defined on a frozen NF4 weight; decode it with unpack()")


def unpack(weight: NF4Tensor) -> tuple[torch.Tensor, QuantState]:
    """``(packed, quant_state)`` as bitsandbytes and this project's kernels take them: uint8 (n, 1), no copy.

    Only a whole (gathered) weight has them; a shard's bytes are not a matrix. A function, because torch.compile traces
    attributes of a tensor subclass and not its methods.
    """
    count = weight.encoding.shape[0] * weight.encoding.shape[1]
    blocks = -(-count // weight.encoding.blocksize)
    state2 = None
    if weight.absmax2 is not None:
        state2 = QuantState(
            weight.absmax2[: -(-blocks // NESTED_BLOCKSIZE)], code=weight.code2, blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )  # fmt: skip
    state = QuantState(
        weight.absmax[:blocks], torch.Size(weight.encoding.shape), weight.code, weight.encoding.blocksize, "nf4",
        weight.encoding.dtype, weight.offset, state2,
    )  # fmt: skip
    return weight.packed[: -(-count // 2)].unsqueeze(1), state


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


# The operations that nn.Parameter, DTensor and fully_shard perform on a parameter; anything else is a mistake.


def _alias(weight: NF4Tensor, *_: Any, **__: Any) -> NF4Tensor:
    return weight._with(weight.shape[0], lambda _name, t: t.detach())


def _reshape(weight: NF4Tensor, size: Any, *_: Any) -> NF4Tensor:
    # FSDP2 keeps `shard.view(-1)` to find its data and restores the shape by as_strided: both keep all the weights.
    if tuple(size) not in ((-1,), (weight.numel(),), tuple(weight.shape)):
        raise NotImplementedError(f"an NF4 weight of shape {tuple(weight.shape)} cannot be viewed as {tuple(size)}")
    return _alias(weight)


def _split(weight: NF4Tensor, size: int, dim: int = 0) -> list[NF4Tensor]:
    _only_rows(dim)
    return [weight._rows(start, start + size) for start in range(0, weight.shape[0], size)]


def _slice(weight: NF4Tensor, dim: int = 0, start: int | None = 0, end: int | None = None, step: int = 1) -> NF4Tensor:
    _only_rows(dim)
    return weight._rows(start or 0, weight.shape[0] if end is None else end)


def _only_rows(dim: int) -> None:
    if dim != 0:
        raise NotImplementedError(f"an NF4 weight is sharded in whole blocks along dim 0, not along dim {dim}")


def _new_zeros(weight: NF4Tensor, size: Any, dtype=None, layout=None, device=None, pin_memory=None) -> NF4Tensor:
    return weight._with(size[0], lambda name, t: t.new_zeros(size[0] * weight._per_row(name), device=device))


def _copy_(target: NF4Tensor, source: NF4Tensor, non_blocking: bool = False) -> NF4Tensor:
    for name, tensor in source._present(SHARDED):
        getattr(target, name)[: tensor.numel()].copy_(tensor, non_blocking=non_blocking)
    return target


def _to_copy(weight: NF4Tensor, *, dtype=None, device=None, non_blocking=False, **_: Any) -> NF4Tensor:
    # The dtype is the one it decodes to and stays; what all ranks share stays where the weight is decoded.
    return weight._with(weight.shape[0], lambda _name, t: t.to(device=device, non_blocking=non_blocking, copy=True))


def _clone(weight: NF4Tensor, **_: Any) -> NF4Tensor:
    return weight._with(weight.shape[0], lambda _name, t: t.clone())


def _pin_memory(weight: NF4Tensor, *_: Any, **__: Any) -> NF4Tensor:
    return weight._with(weight.shape[0], lambda _name, t: t.pin_memory())


_OPS = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.view.default: _reshape,
    aten.as_strided.default: _reshape,
    aten.split.Tensor: _split,
    aten.slice.Tensor: _slice,
    aten.new_zeros.default: _new_zeros,
    aten.copy_.default: _copy_,
    aten._to_copy.default: _to_copy,
    aten.clone.default: _clone,
    aten.is_pinned.default: lambda weight, *_: weight.packed.is_pinned(),
    aten._pin_memory.default: _pin_memory,
    aten.pin_memory.default: _pin_memory,
}


class NF4Linear(nn.Module):
    """A frozen ``Linear4bit`` whose weight is an :class:`NF4Tensor`; same name, place and result.

    bitsandbytes' module rebuilds its ``Params4bit`` in every forward, which breaks torch.compile graphs and takes the
    scales from a copy that is not sharded. Computes in ``compute_dtype`` and returns the input's dtype, as it does.
    """

    def __init__(self, linear: Linear4bit, shards: int = 1, decoder: str = "bitsandbytes"):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(NF4Tensor.from_params4bit(linear.weight, shards), requires_grad=False)
        self.bias = linear.bias
        self.compute_dtype = linear.compute_dtype or self.weight.dtype
        self.decoder = decoder
        if decoder == "triton":
            self.decoded: torch.Tensor | None = None  # by `decode`, where a caller uses it over and over

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed, state = unpack(self.weight)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        if self.decoder == "triton":
            from .nf4_linear import nf4_linear

            return nf4_linear(x.to(self.compute_dtype), packed, state, bias, self.decoded).to(x.dtype)
        from bitsandbytes import matmul_4bit

        return matmul_4bit(x.to(self.compute_dtype), packed, state, bias=bias).to(x.dtype)

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as ``forward`` decodes it; ``dtype`` is not asked for, the layer has its own."""
        from .nf4_linear import decoded_weight

        return decoded_weight(*unpack(self.weight), self.compute_dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, decoder={self.decoder}"


def use_nf4_tensors(model: nn.Module, shards: int = 1, decoder: str = "bitsandbytes") -> int:
    """Replace every ``Linear4bit`` of ``model`` by an :class:`NF4Linear`, in place; returns how many.

    One layer at a time and without copying bytes, so memory does not rise. ``decoder`` is ``triton`` or
    ``bitsandbytes``.
    """
    return replace_linears(model, lambda linear: NF4Linear(linear, shards, decoder))


def replace_linears(model: nn.Module, made_of: Callable[[Linear4bit], nn.Module]) -> int:
    """Replace every ``Linear4bit`` of ``model`` by what ``made_of`` makes of it, one at a time; returns how many."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Linear4bit)
    ]
    for parent, name, child in found:
        setattr(parent, name, made_of(child))
        child.weight.module = None  # which holds the weight in turn, so that its memory would wait for Python's gc
    return len(found)
