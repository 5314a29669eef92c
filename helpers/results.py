"""What a notebook leaves behind: figures with the rows they are drawn from, and one JSON of metrics and criteria.

Everything is written into the folder of the run (``$QLORA_OUT``, which ``python3 -m helpers run`` sets, else
``runs/interactive``), never over committed files; ``build --promote`` takes a run as the committed copy.
"""

from __future__ import annotations

import csv
import datetime
import json
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import host

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PASS, FAIL, NOT_RUN = "PASS", "FAIL", "NOT RUN"
REHEARSED = "rehearsed, not run on a T4"
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


def output_folder() -> Path:
    """Where this run writes; made on first use."""
    folder = Path(os.environ.get("QLORA_OUT") or Path(__file__).parents[1] / "runs" / "interactive")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def rehearsal_suffix() -> str:
    """``_t4rehearsal`` under a T4 rehearsal, else nothing: keeps its figures apart from native ones."""
    return "_t4rehearsal" if host.rehearsing_t4() else ""


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` whole or not at all."""
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text(text, encoding="utf-8", newline="\n")
    os.replace(scratch, path)


def save_rows(stem: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write ``rows`` as ``<stem>.csv`` in the run's folder."""
    return write_rows(list(rows), output_folder() / f"{stem}{rehearsal_suffix()}.csv")


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write ``rows`` (one mapping each; the union of their keys are the columns) to ``path``."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows that `write_rows` wrote to ``path``; none where there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def save_figure(fig: Figure, stem: str, rows: Iterable[Mapping[str, Any]]) -> Figure:
    """Save ``fig`` as ``<stem>.png`` and the rows it is drawn from as ``<stem>.csv``; return it for inline display."""
    import matplotlib.pyplot as plt

    save_rows(stem, rows)
    fig.savefig(output_folder() / f"{stem}{rehearsal_suffix()}.png", dpi=150, bbox_inches="tight")
    plt.close(fig)
    return fig


def worst(values: Iterable[float]) -> float:
    """The largest of ``values``: NaN where one of them is, which Python's ``max`` may lose, and where there is none."""
    found = [float(value) for value in values]
    return float(np.max(found)) if found else math.nan


class Results:
    """Metrics and criteria of one notebook.

    Args:
        notebook: its letter, ``A`` to ``E``.
    """

    def __init__(self, notebook: str):
        self.notebook = notebook
        self.folder = output_folder()
        self.metrics: dict[str, dict[str, Any]] = {}
        self.criteria: dict[str, dict[str, Any]] = {}

    def metric(self, name: str, value: float, unit: str) -> None:
        """Record one measured number."""
        self.metrics[name] = {"value": _plain(value), "unit": unit}

    def criterion(
        self, id: str, text: str, measured: Any, bound: str = "== True", unit: str = "", speed: bool = False
    ) -> None:
        """Record a criterion and judge it: ``measured`` against ``bound``, an operator and a number or True.

        One of ``speed`` is not judged under a T4 rehearsal, whose times are another card's.

        Raises:
            ValueError: ``bound`` is not of the form ``">= 1.15"``.
        """
        sign, _, limit = bound.partition(" ")
        if sign not in COMPARE or not limit:
            raise ValueError(f"bound {bound!r} is not an operator of {list(COMPARE)} and a value, as in '>= 1.15'")
        if speed and host.rehearsing_t4():
            self.not_run(id, text, "a rehearsal says nothing of a T4's speed")
            return
        target = limit == "True" if limit in {"True", "False"} else float(limit)
        measured = _plain(measured)
        status = PASS if COMPARE[sign](measured, target) else FAIL  # nothing compares true with NaN
        self.criteria[id] = {
            "id": id, "text": text, "measured": measured, "unit": unit, "bound": "" if target is True else bound,
            "status": status, "reason": REHEARSED if host.rehearsing_t4() else "",
        }  # fmt: skip

    def not_run(self, id: str, text: str, reason: str) -> None:
        """Record a criterion that could not be run here, and why, or what was rehearsed instead."""
        self.criteria[id] = {
            "id": id, "text": text, "measured": None, "unit": "", "bound": "", "status": NOT_RUN, "reason": reason,
        }  # fmt: skip

    def table(self):
        """The criteria as a Markdown table that a notebook displays."""
        from IPython.display import Markdown

        return Markdown(criteria_table(self.criteria.values()))

    def save(self) -> Path:
        """Write ``<letter>_results.json``: machine, versions, commit, date, metrics, criteria.

        Under a T4 rehearsal one criterion more says that every kernel compiled so far was a T4's.
        """
        if host.rehearsing_t4():
            from . import t4

            seen = t4.targets()
            others = sum(count for target, count in seen.items() if ".target sm_75" not in target)
            text = f"of {seen.total()} kernels compiled in this rehearsal, not for a T4's sm_75"
            self.criterion(f"{self.notebook}.sm_75", text, others, "== 0")
        path = output_folder() / f"{self.notebook}_results{rehearsal_suffix()}.json"
        document = {
            "notebook": self.notebook,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "rehearsal": host.rehearsing_t4(),
            "environment": host.environment(),
            "metrics": self.metrics,
            "criteria": list(self.criteria.values()),
        }
        write_atomically(path, json.dumps(document, indent=1) + "\n")
        return path


def criteria_table(criteria: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: one row a criterion with its measured value, bound and status."""
    lines = ["| | criterion | measured | bound | status |", "|---|---|---|---|---|"]
    for row in criteria:
        status = row["status"] + (f": {row['reason']}" if row["reason"] else "")
        bound = row["bound"].replace(" ", "\u00a0").replace("-", "\u2011")  # not to be broken over two lines
        cells = (row["id"], row["text"], _shown(row), bound, status)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _shown(row: Mapping[str, Any]) -> str:
    value = row["measured"]
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        value = f"{value:.4g}"
    return f"{value} {row['unit']}".strip()


def _plain(value: Any) -> Any:
    """A value JSON can hold: numpy and torch scalars become Python's."""
    return value.item() if hasattr(value, "item") else value
