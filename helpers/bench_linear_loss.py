"""Time and memory of linear + loss, forward and backward, against the specialised kernels, on one GPU.

    python3 -m helpers.bench_linear_loss [--rows 16384] [--hidden 4096] [--vocabulary 131072]

One label in seven is ignored. All paths get the same random bfloat16 data in one process, in turns, and are timed by
CUDA events around forward and backward; peaks are above what x, weight and labels hold, gradients included.
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear_loss import IGNORED, linear_forward
from .loss_functions import cross_entropy
from .memory import GIB, measure_peak

ROWS, HIDDEN, VOCABULARY = 16384, 4096, 131072


@dataclass
class Case:
    x: Tensor
    head: nn.Linear
    labels: Tensor
    items: int

    def clear(self) -> None:
        self.x.grad = self.head.weight.grad = None


def make_case(rows=ROWS, hidden=HIDDEN, vocabulary=VOCABULARY, trained=True, dtype=torch.bfloat16) -> Case:
    """Random hidden states, head and labels on the GPU, one label in seven ignored."""
    generator = torch.Generator("cuda").manual_seed(3407)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    head = nn.Linear(hidden, vocabulary, bias=False, device="meta", dtype=dtype)
    head.weight = nn.Parameter(randn(vocabulary, hidden).mul_(hidden**-0.5), requires_grad=trained)
    labels = torch.randint(vocabulary, (rows,), generator=generator, device="cuda")
    labels[::7] = IGNORED
    return Case(randn(rows, hidden).requires_grad_(), head, labels, int((labels != IGNORED).sum()))


def full_logits(case: Case) -> Tensor:
    return F.cross_entropy(case.head(case.x).float(), case.labels, ignore_index=IGNORED)


def ours(case: Case, **options) -> Tensor:
    return linear_forward(
        case.x, case.head, case.labels, forward_function=cross_entropy, ignore_index=IGNORED, denominator=case.items,
        **options,
    )  # fmt: skip


def liger(case: Case) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(case.x, case.head.weight, case.labels, ignore_index=IGNORED)


def apple_cce(case: Case) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(case.x, case.head.weight, case.labels, ignore_index=IGNORED)


def trl_chunked(case: Case) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    mask = case.labels != IGNORED
    logp = ChunkedLogProbFunction.apply(
        case.x[mask], case.head.weight, None, case.labels[mask], 1.0, 32768, None, 1.0, ("log_probs",)
    )[0]
    return -logp.sum() / case.items


def torch_linear_cross_entropy(case: Case) -> Tensor:
    return F.linear_cross_entropy(case.x, case.head.weight, case.labels, ignore_index=IGNORED)


def paths(trained: bool) -> dict[str, Callable[[Case], Tensor]]:
    """What can be run here, by name."""
    found = {"full logits": full_logits, "ours": ours}
    if trained:
        found["ours, bf16 sum"] = functools.partial(ours, sum_dtype=None, chunk_size=512)
    for name, function, module in (
        ("Liger", liger, "liger_kernel"),
        ("Apple CCE", apple_cce, "cut_cross_entropy"),
        ("TRL chunked", trl_chunked, "trl"),
    ):
        try:
            __import__(module)
        except ImportError:
            continue
        found[name] = function
    if hasattr(F, "linear_cross_entropy"):
        found["torch linear_cross_entropy"] = torch_linear_cross_entropy
    return found


def measure(functions: dict[str, Callable[[Case], Tensor]], case: Case, repeats: int = 7) -> list[dict]:
    """One row a path: loss, median and best ms of forward + backward, peak GiB above the case; in turns."""

    def step(function: Callable[[Case], Tensor]) -> Tensor:
        case.clear()
        loss = function(case)
        loss.backward()
        return loss.detach()

    rows = []
    for name, function in list(functions.items()):
        try:
            case.clear()
            step(function)  # compiles
            gc.collect()
            case.clear()
            loss, peak = measure_peak(lambda function=function: step(function))
        except torch.OutOfMemoryError:
            rows.append({"path": name, "loss": float("nan"), "ms": float("nan"), "best_ms": float("nan"),
                         "peak_gib": float("inf")})  # fmt: skip
            functions = {k: v for k, v in functions.items() if k != name}
            case.clear()
            torch.cuda.empty_cache()
            continue
        rows.append({"path": name, "loss": loss.item(), "peak_gib": peak / GIB})
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            case.clear()
            torch.cuda.synchronize()
            start.record()
            function(case).backward()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop))
    case.clear()
    for row in rows:
        if row["path"] in times:
            row |= {"ms": float(np.median(times[row["path"]])), "best_ms": min(times[row["path"]])}
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"{'path':34s} {'ms':>8s} {'peak GiB':>9s} {'loss':>10s}"]
    return "\n".join(lines + [f"{r['path']:34s} {r['ms']:8.1f} {r['peak_gib']:9.2f} {r['loss']:10.5f}" for r in rows])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m helpers.bench_linear_loss", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    args = parser.parse_args()
    for trained in (False, True):
        case = make_case(args.rows, args.hidden, args.vocabulary, trained)
        print(f"{'trained' if trained else 'frozen'} weight, {args.rows} x {args.hidden} x {args.vocabulary} bf16")
        print(table(measure(paths(trained), case)), flush=True)
        del case
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
