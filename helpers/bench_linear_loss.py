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
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from . import host
from .linear_loss import IGNORED, linear_forward
from .loss_functions import cross_entropy, log_probs
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
    """Random hidden states, head and labels on the GPU, if there is one; one label in seven is ignored."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(3407)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    head = nn.Linear(hidden, vocabulary, bias=False, device="meta", dtype=dtype)
    head.weight = nn.Parameter(randn(vocabulary, hidden).mul_(hidden**-0.5), requires_grad=trained)
    labels = torch.randint(vocabulary, (rows,), generator=generator, device=device)
    labels[::7] = IGNORED
    return Case(randn(rows, hidden).requires_grad_(), head, labels, int((labels != IGNORED).sum()))


def full_logits(case: Case) -> Tensor:
    """PyTorch's own: all logits, in float32."""
    return F.cross_entropy(case.head(case.x).float(), case.labels, ignore_index=IGNORED)


def ours(case: Case, **options) -> Tensor:
    """`linear_forward`, for which cross entropy is any function."""
    return linear_forward(
        case.x, case.head, case.labels, forward_function=cross_entropy, ignore_index=IGNORED, denominator=case.items,
        **options,
    )  # fmt: skip


def liger(case: Case) -> Tensor:
    """Liger's fused kernel."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(case.x, case.head.weight, case.labels, ignore_index=IGNORED)


def apple_cce(case: Case) -> Tensor:
    """Apple's cut cross entropy."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(case.x, case.head.weight, case.labels, ignore_index=IGNORED)


def trl_chunked(case: Case) -> Tensor:
    """TRL's chunked log-probabilities."""
    from trl.kernels import ChunkedLogProbFunction

    mask = case.labels != IGNORED
    logp = ChunkedLogProbFunction.apply(
        case.x[mask], case.head.weight, None, case.labels[mask], 1.0, 32768, None, 1.0, ("log_probs",)
    )[0]
    return -logp.sum() / case.items


def torch_linear_cross_entropy(case: Case) -> Tensor:
    """PyTorch's own fused loss, in releases that have one."""
    return F.linear_cross_entropy(case.x, case.head.weight, case.labels, ignore_index=IGNORED)


def paths(trained: bool) -> dict[str, Callable[[Case], Tensor]]:
    """What can be run here, by name."""
    found = {"full logits": full_logits, "ours": ours}
    if trained and torch.cuda.get_device_capability() >= (8, 0):
        found["ours, bf16 sum"] = functools.partial(ours, sum_dtype=None)
    if host.rehearsing_t4():
        return found  # it says nothing of speed
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
    """One row a path: loss, median ms of forward + backward, peak GiB above the case; in turns, after a warm-up.

    A path that cannot run here, or not in this memory, has nan ms, and ``error`` says why.
    """

    def step(function: Callable[[Case], Tensor]) -> Tensor:
        case.clear()
        loss = function(case)
        loss.backward()
        return loss.detach()

    rows = {}
    for name, function in functions.items():
        row = {"path": name, "ms": float("nan"), "peak_gib": float("nan"), "loss": float("nan"), "error": ""}
        rows[name] = row
        try:
            step(function)  # compiles
            gc.collect()
            case.clear()
            loss, peak = measure_peak(lambda function=function: step(function))
            row |= {"peak_gib": peak / GIB, "loss": loss.item()}
        except Exception as error:  # another library's path need not run on every card
            if name.startswith("ours"):
                raise
            row["error"] = f"{type(error).__name__}: {error}".split("\n")[0][:120]
        case.clear()
        torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name, row in rows.items() if not row["error"]}
    for _ in range(repeats):
        for name, measured in times.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            case.clear()
            torch.cuda.synchronize()
            start.record()
            functions[name](case).backward()
            stop.record()
            torch.cuda.synchronize()
            measured.append(start.elapsed_time(stop))
    case.clear()
    for name, measured in times.items():
        rows[name]["ms"] = float(np.median(measured))
    return list(rows.values())


def table(rows: list[dict]) -> str:
    lines = [f"{'path':34s} {'ms':>8s} {'peak GiB':>9s} {'loss':>10s}"]
    return "\n".join(
        lines + [f"{r['path']:34s} {r['ms']:8.1f} {r['peak_gib']:9.2f} {r['loss']:10.5f} {r['error']}" for r in rows]
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that live, at each operation, on any device: ``rows`` of {"event", "gib"}.

    A stand-in for the CUDA allocator's history where there is no GPU; what an operation uses inside it does not see.
    """

    def __init__(self):
        super().__init__()
        self.rows: list[dict[str, float]] = []
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: kept for key, kept in self._live.items() if not kept[0].expired()}
        total = sum(size for _, size in self._live.values())
        self.rows.append({"event": len(self.rows), "gib": total / GIB})
        return result


def memory_curve(step: Callable[[], None]) -> list[dict[str, float]]:
    """Bytes allocated above those at the start, after each allocation and release while ``step`` runs."""
    if not torch.cuda.is_available():
        with LiveBytes() as live:
            step()
        return live.rows
    torch.cuda.memory._record_memory_history(context=None, stacks="python")
    step()
    torch.cuda.synchronize()
    trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    torch.cuda.memory._record_memory_history(enabled=None)
    rows, total = [], 0
    for entry in trace:
        if entry["action"] in ("alloc", "free_completed"):
            total += entry["size"] if entry["action"] == "alloc" else -entry["size"]
            rows.append({"event": len(rows), "gib": total / GIB})
    return rows


def grpo_paths(case: Case, sequences: int, beta: float = 0.04) -> dict[str, Callable[[Case], Tensor]]:
    """GRPO (clipped, with KL, a mean over tokens) of ``sequences`` completions of the case, scored in several ways."""
    mask = (case.labels != IGNORED).view(sequences, -1)
    labels = case.labels.clamp(min=0)
    generator = torch.Generator("cuda").manual_seed(3407)
    advantages = torch.randn(sequences, generator=generator, device="cuda")
    with torch.no_grad():
        old = linear_forward(case.x, case.head, labels, forward_function=log_probs).view(sequences, -1)
        reference = old + 0.05 * torch.randn(old.shape, generator=generator, device="cuda")

    def loss_of(logp: Tensor) -> Tensor:
        ratio, gap = torch.exp(logp - old), reference - logp
        gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
        return ((beta * (gap.exp() - gap - 1) - gain) * mask).sum() / mask.sum()

    def rows(scores: Tensor) -> Tensor:
        return loss_of(torch.zeros(mask.shape, device="cuda").masked_scatter(mask, scores))

    def full(case: Case) -> Tensor:
        return loss_of(log_probs(case.x, case.head, labels).view(sequences, -1))

    def ours_(case: Case) -> Tensor:
        scores = linear_forward(case.x, case.head, case.labels, forward_function=log_probs, ignore_index=IGNORED)
        return loss_of(scores.view(sequences, -1))

    def trl(case: Case) -> Tensor:
        from trl.kernels import ChunkedLogProbFunction

        kept, weight = mask.view(-1), case.head.weight
        return rows(
            ChunkedLogProbFunction.apply(
                case.x[kept], weight, None, labels[kept], 1.0, 32768, None, 1.0, ("log_probs",)
            )[0]
        )

    def liger_(case: Case) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        function = LigerFusedLinearGRPOLoss(beta=beta, epsilon_low=0.2, epsilon_high=0.2, loss_type="bnpo")
        return function(
            case.x.view(sequences, -1, case.x.shape[1]), case.head.weight, labels.view(sequences, -1), mask, advantages,
            ref_per_token_logps=reference, old_per_token_logps=old,
        )[0]  # fmt: skip

    return {"full logits": full, "ours": ours_, "TRL chunked": trl, "Liger": liger_}


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
