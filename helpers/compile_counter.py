"""What torch.compile did: compiles, graph breaks and recompiles, with their reasons, as Dynamo itself counts them."""

from __future__ import annotations

from typing import Any

from torch._dynamo.utils import counters, get_compilation_metrics


class CompileCounter:
    """Counts what torch.compile does within a ``with`` block; read it during or after. It resets nothing.

    ``compiles``: graphs compiled. ``graph_breaks``: where Python had to take over. ``recompiles``: how many of the
    compiles were of code compiled before, because a guard did not hold. ``reasons`` and ``rows`` name them.
    """

    def __enter__(self) -> CompileCounter:
        self._graphs = counters["stats"]["unique_graphs"]
        self._breaks = dict(counters["graph_break"])
        self._first = (get_compilation_metrics() or [None])[-1]
        self._frozen: tuple | None = None
        return self

    def __exit__(self, *_: object) -> None:
        self._frozen = self._read()

    def _read(self) -> tuple[int, dict[str, int], list[dict[str, Any]]]:
        breaks = {
            reason: count - self._breaks.get(reason, 0)
            for reason, count in counters["graph_break"].items()
            if count > self._breaks.get(reason, 0)
        }
        metrics = get_compilation_metrics()
        if self._first is not None and any(m is self._first for m in metrics):
            metrics = metrics[next(i for i, m in enumerate(metrics) if m is self._first) + 1 :]
        rows = [
            {
                "compile_id": m.compile_id,
                "function": m.co_name,
                "operations": m.graph_op_count,
                "seconds": round(m.entire_frame_compile_time_s or 0.0, 2),
                "recompiled_because": (getattr(m, "recompile_reason", None) or "").split("\n")[0],
            }
            for m in metrics
            if m.co_name is not None and getattr(m, "is_forward", True) is not False
        ]
        return counters["stats"]["unique_graphs"] - self._graphs, breaks, rows

    def _now(self) -> tuple[int, dict[str, int], list[dict[str, Any]]]:
        return self._frozen or self._read()

    @property
    def compiles(self) -> int:
        """Graphs compiled."""
        return self._now()[0]

    @property
    def graph_breaks(self) -> int:
        """Breaks, each as often as it occurred."""
        return sum(self._now()[1].values())

    @property
    def recompiles(self) -> int:
        """Compiles of a function that had been compiled before and whose guards failed."""
        return sum(bool(row["recompiled_because"]) for row in self.rows)

    @property
    def reasons(self) -> list[str]:
        """Of every graph break and recompile."""
        breaks = [f"graph break ({count}x): {reason}" for reason, count in self._now()[1].items()]
        return breaks + [
            f"recompile of {row['function']}: {row['recompiled_because']}"
            for row in self.rows
            if row["recompiled_because"]
        ]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One a compile: its id, function, operations, seconds, and why it was a recompile, if it was."""
        return self._now()[2]

    def __str__(self) -> str:
        head = f"{self.compiles} compiles, {self.graph_breaks} graph breaks, {self.recompiles} recompiles"
        return "\n  ".join([head, *self.reasons])
