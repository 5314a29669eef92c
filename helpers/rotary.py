"""Rotary position embedding in one Triton launch for queries and keys together, for layers under torch.compile.

    y1 = x1 * cos1 - x2 * sin1        # x1, x2: the two halves of a head
    y2 = x2 * cos2 + x1 * sin2

`fused_rotary(model)` has the layers that torch.compile traces take it instead of transformers' `apply_rotary_pos_emb`.
With a dynamic length Inductor's kernel finds the token of each single element by a division by a run-time size (as in
pytorch#189940), and its partner in the other half through both branches of the `cat`; in backward slices, negations and
copies are kernels of their own. All that takes several times what the memory traffic would. Here a program knows its
token, and heads and their size are constants.

`python -m helpers.rotary` times both on a GPU.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from types import ModuleType
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.library import custom_op, triton_op, wrap_triton
from transformers.models.llama import modeling_llama

from .nf4_kernel import INTERPRETED

NAMES = ("apply_rotary_pos_emb", "rotate_half")  # the function of a modeling module, and what it calls
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILE = 2048  # elements of a half that a program holds at once: 16 a thread


@triton.jit
def _rotate_heads(
    x_ptr, head_stride, out_ptr, cos1, cos2, sin1, sin2,
    HEADS: tl.constexpr, SIZE: tl.constexpr, TILE_HEADS: tl.constexpr, TILE_HALF: tl.constexpr,
):  # fmt: skip
    """All heads of one token, from any layout to [HEADS, SIZE]."""
    lane = tl.arange(0, TILE_HALF)[None, :]
    for first in tl.static_range(0, HEADS, TILE_HEADS):
        head = first + tl.arange(0, TILE_HEADS)[:, None]
        inside = (head < HEADS) & (lane < SIZE // 2)
        source = x_ptr + head.to(tl.int64) * head_stride + lane
        target = out_ptr + head * SIZE + lane
        x1 = tl.load(source, inside).to(tl.float32)
        x2 = tl.load(source + SIZE // 2, inside).to(tl.float32)
        tl.store(target, x1 * cos1 - x2 * sin1, inside)
        tl.store(target + SIZE // 2, x2 * cos2 + x1 * sin2, inside)


@triton.jit(do_not_specialize=["length"])
def rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, length,
    q_batch, q_head, q_token, k_batch, k_head, k_token, cos_batch, sin_batch,  # strides; a token of cos is SIZE long
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, SIZE: tl.constexpr,
    Q_TILE: tl.constexpr, K_TILE: tl.constexpr, TILE_HALF: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # the rotation's transpose, which is its backward pass
):  # fmt: skip
    row = tl.program_id(0)
    batch, token = (row // length).to(tl.int64), (row % length).to(tl.int64)
    lane = tl.arange(0, TILE_HALF)[None, :]
    inside = lane < SIZE // 2
    cos_ptr += batch * cos_batch + token * SIZE + lane
    sin_ptr += batch * sin_batch + token * SIZE + lane
    cos1 = tl.load(cos_ptr, inside).to(tl.float32)
    cos2 = tl.load(cos_ptr + SIZE // 2, inside).to(tl.float32)
    sin1 = tl.load(sin_ptr, inside).to(tl.float32)
    sin2 = tl.load(sin_ptr + SIZE // 2, inside).to(tl.float32)
    if TRANSPOSED:
        sin1, sin2 = -sin2, -sin1
    q_ptr += batch * q_batch + token * q_token
    k_ptr += batch * k_batch + token * k_token
    q_out_ptr += row.to(tl.int64) * (Q_HEADS * SIZE)
    k_out_ptr += row.to(tl.int64) * (K_HEADS * SIZE)
    _rotate_heads(q_ptr, q_head, q_out_ptr, cos1, cos2, sin1, sin2, Q_HEADS, SIZE, Q_TILE, TILE_HALF)
    _rotate_heads(k_ptr, k_head, k_out_ptr, cos1, cos2, sin1, sin2, K_HEADS, SIZE, K_TILE, TILE_HALF)


def launch_options(q_heads: int, k_heads: int, size: int) -> dict[str, int]:
    """The kernel's constants and its ``num_warps`` for so many heads of ``size`` elements."""
    half = triton.next_power_of_2(size // 2)
    q_tile, k_tile = (min(triton.next_power_of_2(n), max(1, TILE // half)) for n in (q_heads, k_heads))
    return {
        "Q_HEADS": q_heads, "K_HEADS": k_heads, "SIZE": size, "Q_TILE": q_tile, "K_TILE": k_tile, "TILE_HALF": half,
        "num_warps": min(4, max(1, q_tile * half // 512)),
    }  # fmt: skip


def _by_token(x: Tensor) -> Tensor:
    """Empty [batch, length, heads, size] for ``x`` [batch, heads, length, size].

    Heads and size are numbers, as in the kernel: with symbols Inductor copies one row of it before it is written to.
    """
    return x.new_empty((x.shape[0], x.shape[2], int(x.shape[1]), int(x.shape[3])))


def _readable(x: Tensor) -> bool:
    """Whether ``x`` [batch, heads, length, size] has no gaps, by token or by head.

    Strides become constants of a graph, and Inductor may keep no more than the order of those of a view.
    """
    return x.transpose(1, 2).is_contiguous() or x.is_contiguous()


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    batch, q_heads, length, size = q.shape
    q, k = (x if _readable(x) else x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    q_out, k_out = _by_token(q), _by_token(k)
    cos, sin = ((x[:1] if x.stride(0) == 0 else x).contiguous() for x in (cos, sin))
    cos_batch, sin_batch = (0 if x.shape[0] == 1 else x.stride(0) for x in (cos, sin))
    kernel = rotate_kernel if INTERPRETED else wrap_triton(rotate_kernel)
    kernel[(batch * length,)](
        q, k, cos, sin, q_out, k_out, length, *q.stride()[:3], *k.stride()[:3], cos_batch, sin_batch,
        **launch_options(int(q_heads), int(k.shape[1]), int(size)), TRANSPOSED=transposed,
    )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


if INTERPRETED:  # an interpreted kernel cannot be traced, so torch.compile sees an opaque operator
    _op = custom_op("qlora::rotate", _rotate, mutates_args=())
    _op.register_fake(lambda q, k, *others: (_by_token(q).transpose(1, 2), _by_token(k).transpose(1, 2)))
else:
    _op = triton_op("qlora::rotate", _rotate, mutates_args=())


def _save(ctx, inputs: tuple, output: tuple) -> None:
    _, _, cos, sin, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, q_grad: Tensor, k_grad: Tensor):
    return *torch.ops.qlora.rotate(q_grad, k_grad, *ctx.saved_tensors, not ctx.transposed), None, None, None


_op.register_autograd(_backward, setup_context=_save)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What Llama's ``apply_rotary_pos_emb(q, k, cos, sin)`` in transformers returns, in float32 and rounded once.

    Args:
        q: [batch, heads, length, size]; k: [batch, key heads, length, size]. float16, bfloat16 or float32, alike; any
            strides. Read without a copy where they are contiguous, or are transposed views of what is.
        cos, sin: [batch or 1, length, size], of any of these dtypes. They get no gradient.

    Returns: q and k rotated, in their dtype, as transposed views of contiguous [batch, length, heads, size].

    Raises: ValueError where shapes, dtypes or devices do not fit, or cos or sin asks for a gradient.
    """
    if reason := _unfit(q, k, cos, sin):
        raise ValueError(f"{reason}: take transformers' apply_rotary_pos_emb")
    return torch.ops.qlora.rotate(q, k, cos, sin, False)


def _unfit(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Why the kernel cannot do it; None where it can. What it asks of sizes, broadcasting would ask too."""
    batch, _, length, size = q.shape
    if k.shape[0] != batch or k.shape[2] != length or k.shape[3] != size or size % 2:
        return f"q {tuple(q.shape)} and k {tuple(k.shape)} are not [batch, heads, length, even size]"
    for x in (cos, sin):
        if x.ndim != 3 or x.shape[1] != length or x.shape[2] != size or (x.shape[0] != 1 and x.shape[0] != batch):
            return f"cos or sin is {tuple(x.shape)}, not [batch or 1, length, size] of q {tuple(q.shape)}"
        if x.dtype not in DTYPES or x.device != q.device or x.requires_grad:
            return f"cos or sin is {x.dtype} on {x.device}, requires_grad: {x.requires_grad}"
    if q.dtype not in DTYPES or k.dtype != q.dtype or k.device != q.device or not (q.is_cuda or INTERPRETED):
        return f"q is {q.dtype} on {q.device} and k {k.dtype} on {k.device}"
    return None


def _takes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` gives, without a copy, what transformers' function gives."""
    if _unfit(q, k, cos, sin) or not (_readable(q) and _readable(k)):
        return False
    # From wider cos and sin that makes wider outputs, which attention rounds again under autocast and refuses without.
    return q.dtype in (torch.float32, cos.dtype) or torch.is_autocast_enabled(q.device.type)


@functools.cache  # the same for each context, or whatever had been compiled would be compiled again
def _fused(original: Callable) -> Callable:
    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        if torch.compiler.is_compiling() and unsqueeze_dim == 1 and _takes(q, k, cos, sin):
            return rotate(q, k, cos, sin)
        return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    return apply_rotary_pos_emb


def _syntax(function: Callable) -> str:
    """The code of a function as written, without decorators and docstring."""
    if hasattr(function, "__wrapped__"):
        raise TypeError("inspect would give the source of another function")
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    tree.decorator_list = []
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    return ast.dump(tree)


@functools.cache  # as it is before it is replaced
def _llamas() -> list[str]:
    return [_syntax(vars(modeling_llama)[name]) for name in NAMES]


def _as_in_llama(module: ModuleType) -> bool:
    """Whether a modeling module's function is Llama's, with the halves of a head that Llama takes."""
    try:
        return [_syntax(vars(module)[name]) for name in NAMES] == _llamas()
    except (KeyError, OSError, TypeError, SyntaxError):
        return False


@contextlib.contextmanager
def fused_rotary(model: nn.Module) -> Iterator[list[str]]:
    """Within, layers of ``model`` that torch.compile traces on a GPU rotate by `rotate`; yields the modules it is in.

    `apply_rotary_pos_emb` is replaced in the modules of transformers that define the model's classes, where it is
    Llama's to the letter (Llama, Mistral, Qwen2, Qwen3, Gemma, SmolLM3, ...). Others keep their own, as does what is
    not traced, and what the kernel cannot do: float64, part of a head, another ``unsqueeze_dim``.
    """
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    found = {name: sys.modules[name] for name in sorted({cls.__module__ for cls in classes}) if name in sys.modules}
    with contextlib.ExitStack() as stack:
        replaced = [name for name, module in found.items() if _as_in_llama(module)]
        for name in replaced:
            original = vars(found[name])[NAMES[0]]
            stack.enter_context(mock.patch.object(found[name], NAMES[0], _fused(original)))
        yield replaced


def _benchmark(
    batch: int = 2, q_heads: int = 32, k_heads: int = 8, length: int = 2048, size: int = 128, rounds: int = 50
) -> None:
    """Print GPU times of both, compiled as layers are: for any batch and length, from what the projections make."""
    from .attention import one_graph
    from .bench_nf4 import gpu_times
    from .checkpoints import default_dtype

    def compiled(function: Callable) -> Callable:
        def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            heads = [x.view(*x.shape[:2], n, size).transpose(1, 2) for x, n in ((q, q_heads), (k, k_heads))]
            return function(*heads, cos, sin)

        return torch.compile(run, dynamic=True, fullgraph=True)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=default_dtype())

    inputs = []
    for _ in range(4):  # more than the L2 cache holds
        made = [random(batch, length, n * size).requires_grad_() for n in (q_heads, k_heads)]
        angle = random(1, length, size)
        grads = [random(batch, length, n, size).transpose(1, 2) for n in (q_heads, k_heads)]
        inputs.append((*made, angle.cos(), angle.sin(), *grads))
    with one_graph(), torch._inductor.config.patch(emulate_precision_casts=True):
        forward = {"stock": compiled(modeling_llama.apply_rotary_pos_emb), "ours": compiled(rotate)}
        torch.testing.assert_close(*(run(*inputs[0][:4]) for run in forward.values()), rtol=2e-2, atol=6e-2)
        calls = {
            "forward": lambda run, q, k, cos, sin, *grads: run(q, k, cos, sin),
            "forward + backward": lambda run, q, k, cos, sin, *grads: torch.autograd.grad(
                run(q, k, cos, sin), (q, k), grads
            ),
        }
        shape = f"[{batch}, {q_heads} + {k_heads}, {length}, {size}] {default_dtype()}"
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {shape}, medians of {rounds}")
        for name, call in calls.items():
            times = gpu_times({who: functools.partial(call, run) for who, run in forward.items()}, inputs, rounds)
            stock, ours = times["stock"], times["ours"]
            print(f"{name}: stock {stock / 1e3:.3f} ms, ours {ours / 1e3:.3f} ms, {stock / ours:.2f}x")


if __name__ == "__main__":
    _benchmark()
