"""Dequantize bitsandbytes' 4-bit weights in one launch, eager or traced, bit for bit as bitsandbytes' CUDA kernels do.

The kernel is in `helpers.nf4_kernel`. Here: the operator that torch.compile sees, and the eager call, whose cost on the
CPU matters because a decode takes no more than 6 to 60 us on the GPU.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._C._dynamo.guards import _empty_strided_cuda as empty_strided  # Inductor's: no dispatcher
from torch.library import custom_op, triton_op, wrap_triton
from triton import knobs

from .nf4_kernel import FP4_TABLE, INTERPRETED, NF4_TABLE, dequantize_kernel, launch_grid, launch_options

__all__ = ["FP4_TABLE", "INTERPRETED", "NF4_TABLE", "dequantize_kernel", "dequantize_nf4", "launch_options"]

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # absent from CPU builds


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code2: torch.Tensor | None,
    absmax2: torch.Tensor | None,
    offset: torch.Tensor | None,
    blocksize: int,
    blocksize2: int | None,
    fp4: bool,
    shape: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    options = launch_options(
        n := out.numel(),
        dtype,
        _capability(packed.device),
        int(blocksize),
        None if blocksize2 is None else int(blocksize2),
        fp4,
        words=packed.storage_offset() % 4 == 0,
    )
    kernel = dequantize_kernel if INTERPRETED else wrap_triton(dequantize_kernel)
    statistics = (absmax, absmax, absmax, absmax) if blocksize2 is None else (absmax, code2, absmax2, offset)
    kernel[launch_grid(n, options)](packed, *statistics, out, n, **options)
    return out


if INTERPRETED:  # an interpreted kernel cannot be traced, so torch.compile sees an opaque operator
    _op = custom_op("qlora::dequantize_nf4", _dequantize, mutates_args=())
    _op.register_fake(lambda packed, *args: torch.empty(args[-2], dtype=args[-1], device=packed.device))
else:
    _op = triton_op("qlora::dequantize_nf4", _dequantize, mutates_args=())


def _check(weight: torch.Tensor, quant_state, dtype: torch.dtype) -> None:
    if not hasattr(quant_state, "quant_type"):
        raise TypeError(
            f"quant_state is a {type(quant_state).__name__}, but dequantize_nf4 needs a bitsandbytes QuantState: "
            "quantize the weight again, or load it with QuantState.from_dict"
        )
    if quant_state.quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type {quant_state.quant_type!r} is not 'nf4' or 'fp4': decode it with bitsandbytes")
    if quant_state.blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize {quant_state.blocksize} is not one of bitsandbytes' {BLOCKSIZES}")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype {dtype} is not float16, bfloat16 or float32: pass one of them as dtype")
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise ValueError("the weight is packed for bitsandbytes' CPU inference: move it to a GPU, or reload the model")
    if weight.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"the weight is on {weight.device}: move the model to a GPU, or set TRITON_INTERPRET=1 before triton is "
            "imported to run the kernel on a CPU"
        )
    if quant_state.absmax.device != weight.device:
        raise ValueError(
            f"the weight is on {weight.device} but its statistics are on {quant_state.absmax.device}: "
            "call quant_state.to(weight.device)"
        )
    shape, held = tuple(quant_state.shape), weight.numel() * weight.itemsize
    needed = (math.prod(shape) + 1) // 2
    if held < needed:
        raise ValueError(f"the weight holds {held} bytes, but shape {shape} in 4 bits needs {needed}")


def _check_out(out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if out.shape != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}, contiguous: {out.is_contiguous()}; "
            f"it must be contiguous {shape} {dtype} on {device}"
        )


class _Launch(NamedTuple):
    """A compiled kernel and what its launches share: all that does not move from call to call."""

    run: Callable
    grid: tuple[int, int, int]
    function: int
    metadata: Any
    constants: tuple
    stride: tuple[int, ...]

    def __call__(self, stream: int, *pointers: int) -> None:
        self.run(*self.grid, stream, self.function, self.metadata, None, None, None, *pointers, *self.constants)


# Three ways to the same launch, each for what the one above does not know (times on an H100's host, with the output):
# - a plan of a parameter's own state: reads pointers, stream and hooks, and compares the rest.
# - a launch of the like, by everything that the compilation and the checks depend on: 12 us.
# - `kernel[grid](...)`, which binds and specializes 19 arguments and asks the driver about each pointer: 33 us.
_PLANS: dict[int, Callable[[torch.Tensor, Any], torch.Tensor | None]] = {}
_LAUNCHES: dict[tuple, _Launch] = {}


def _hooked() -> bool:
    """Whether a profiler (Proton) or the user listens to launches: then Triton's own way is taken, which tells them."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(enter.calls or leave.calls)


def statistics_of(quant_state) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A QuantState's absmax, code2, absmax2, offset; without double quantization the kernel reads the first alone."""
    absmax, state2 = quant_state.absmax, quant_state.state2
    if state2 is None:
        return absmax, absmax, absmax, absmax
    return absmax, state2.code, state2.absmax, quant_state.offset


def _plan(launch: _Launch, weight: torch.Tensor, quant_state) -> None:
    """Have the next decode of this parameter go straight to `launch`, until anything it depends on is another."""
    run, (grid, _, _), function, metadata, constants, stride = launch
    shape, dtype, blocksize, kind = quant_state.shape, quant_state.dtype, quant_state.blocksize, quant_state.quant_type
    size, device, held, index = tuple(shape), weight.device, weight.shape, weight.device.index
    key, one_gpu = id(quant_state), torch.cuda.device_count() < 2
    absmax_, code2_, absmax2_, offset_ = map(weakref.ref, statistics_of(quant_state))
    owner = weakref.ref(quant_state, lambda _, plans=_PLANS: plans.pop(key, None))

    def plan(weight: torch.Tensor, state) -> torch.Tensor | None:
        absmax, code2, absmax2, offset = statistics_of(state)
        if (
            owner() is not state
            or absmax_() is not absmax or code2_() is not code2 or absmax2_() is not absmax2 or offset_() is not offset
            or state.dtype is not dtype or state.shape is not shape
            or state.blocksize != blocksize or state.quant_type != kind
            or weight.device != device or weight.shape != held or not weight.is_contiguous()
            or _hooked()
            or not (one_gpu or torch.cuda.current_device() == index)
        ):  # fmt: skip
            return None
        out = empty_strided(size, stride, dtype)
        source, target = weight.data_ptr(), out.data_ptr()
        if (source | target) % 16:
            return None
        run(
            grid, 1, 1, current_stream(index), function, metadata, None, None, None,
            source, absmax.data_ptr(), code2.data_ptr(), absmax2.data_ptr(), offset.data_ptr(), target, *constants,
        )  # fmt: skip
        return out

    _PLANS[key] = plan


def _on(device: torch.device):
    """The context in which `device` is the current one."""
    return contextlib.nullcontext() if device.index is None else torch.cuda.device(device)


def _launch_jit(
    weight: torch.Tensor, statistics: tuple, quant_state, blocksize2: int | None, out: torch.Tensor | None, dtype
) -> tuple[torch.Tensor, _Launch | None]:
    """Check, compile where needed and launch, whatever the input; and how to launch the like of it directly."""
    _check(weight, quant_state, dtype)
    packed = weight.contiguous().view(torch.uint8)
    if out is None:
        out = torch.empty(quant_state.shape, dtype=dtype, device=packed.device)
    options = launch_options(
        n := out.numel(),
        dtype,
        _capability(packed.device),
        quant_state.blocksize,
        blocksize2,
        quant_state.quant_type == "fp4",
        words=(packed.data_ptr() | out.data_ptr()) % 4 == 0,
    )
    grid = launch_grid(n, options)
    compiled = dequantize_kernel[grid](packed, *statistics, out, n, **options)
    if compiled is None or (packed.data_ptr() | out.data_ptr()) % 16:  # interpreted, or compiled for odd pointers
        return out, None
    del options["num_warps"]
    launch = _Launch(
        compiled.run, grid, compiled.function, compiled.packed_metadata, (n, *options.values()), out.stride()
    )
    return out, launch


def _dequantize_eager(weight: torch.Tensor, quant_state, out: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """`_dequantize` without the dispatcher, which would cost about as much as the kernel of a small weight."""
    statistics = absmax, code2, absmax2, offset = statistics_of(quant_state)
    blocksize2 = None if quant_state.state2 is None else quant_state.state2.blocksize
    shape, device = tuple(quant_state.shape), weight.device
    key = (
        shape, dtype, device, weight.shape, weight.dtype, quant_state.blocksize, quant_state.quant_type,
        blocksize2, absmax.device, absmax.dtype, code2.dtype, absmax2.dtype, offset.dtype,
    )  # fmt: skip
    if out is not None:
        _check_out(out, shape, dtype, device)
    launch = _LAUNCHES.get(key)
    if launch is not None and weight.is_contiguous() and not _hooked():
        result = empty_strided(shape, launch.stride, dtype) if out is None else out
        source, target = weight.data_ptr(), result.data_ptr()
        if (source | target) % 16 == 0:
            launch(current_stream(device.index), source, *[x.data_ptr() for x in statistics], target)
            if dtype is quant_state.dtype and getattr(weight, "quant_state", None) is quant_state:
                _plan(launch, weight, quant_state)
            return result
    result, launch = _launch_jit(weight, statistics, quant_state, blocksize2, out, dtype)
    if launch is not None:
        _LAUNCHES[key] = launch
    return result


def dequantize_nf4(
    weight: torch.Tensor, quant_state, out: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """What `bitsandbytes.functional.dequantize_4bit(weight, quant_state, out=out)` returns, bit for bit, in one launch.

    Args:
        weight: packed 4-bit codes of any storage dtype, [bytes, 1]; as bitsandbytes does, [1, bytes] asks for the
            transposed result.
        quant_state: bitsandbytes QuantState of type "nf4" or "fp4", nested (double quantization) or not.
        out: optional contiguous tensor to write to, [*quant_state.shape] of the output dtype.
        dtype: float16, bfloat16 or float32; `quant_state.dtype` where not given.

    Returns: [*quant_state.shape]. Allocates nothing else.

    Raises: TypeError or ValueError where state, weight and `out` do not fit, before anything is launched.
    """
    if not hasattr(quant_state, "state2"):
        _check(weight, quant_state, dtype)
    dtype = quant_state.dtype if dtype is None else dtype
    # torch.compile and dispatch modes (fake tensors, selective checkpointing, ...) must see an operator.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        _check(weight, quant_state, dtype)
        state2 = quant_state.state2
        result = torch.ops.qlora.dequantize_nf4(
            weight.contiguous().view(torch.uint8),
            quant_state.absmax,
            None if state2 is None else state2.code,
            None if state2 is None else state2.absmax,
            None if state2 is None else quant_state.offset,
            quant_state.blocksize,
            None if state2 is None else state2.blocksize,
            quant_state.quant_type == "fp4",
            list(quant_state.shape),
            dtype,
        )
        if out is not None:
            _check_out(out, tuple(quant_state.shape), dtype, weight.device)
            result = out.copy_(result)
        return result.t() if weight.shape[0] == 1 else result
    # Params4bit overrides __torch_function__: without this every attribute read below costs 2 us.
    with torch._C.DisableTorchFunctionSubclass():
        plan = _PLANS.get(id(quant_state)) if out is None and dtype is quant_state.dtype else None
        if plan is None or (result := plan(weight, quant_state)) is None:
            with _on(weight.device):
                result = _dequantize_eager(weight, quant_state, out, dtype)
        return result.t() if weight.shape[0] == 1 else result
