"""What makes a committed notebook unfit: stale or unexecuted cells, widgets, tokens, home paths, Kaggle's refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
from nbformat import NotebookNode

MAX_BYTES = 1_000_000
SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|KGAT_\w+)")
HOME = re.compile(r"(/home/[a-z][\w-]*/|/root/|/Users/[A-Za-z]|[A-Z]:\\\\?Users\\)")


def own_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Its cells but the one in which papermill injects parameters."""
    return [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]


def differences(executed: NotebookNode, source: NotebookNode) -> Iterator[str]:
    """Where the cells of a notebook are not those of its source."""
    mine, theirs = own_cells(executed), source.cells
    if len(mine) != len(theirs):
        yield f"has {len(mine)} cells, its source {len(theirs)}"
    for i, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        if (a.cell_type, a.source) != (b.cell_type, b.source):
            yield f"cell {i} differs from its source: {(b.source.strip() or '(empty)').splitlines()[0][:60]!r}"


def never_executed(notebook: NotebookNode) -> bool:
    """Whether no code cell has run: no execution count and no output anywhere."""
    return not any(cell.execution_count or cell.outputs for cell in notebook.cells if cell.cell_type == "code")


def unexecuted(notebook: NotebookNode) -> Iterator[str]:
    """Why it does not count as executed: cells left out or run out of order, or an error among the outputs."""
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    if counts != list(range(1, len(counts) + 1)):
        yield "was not executed in order from its first cell to its last"
    for cell in notebook.cells:
        if any(output.output_type == "error" for output in cell.get("outputs", [])):
            yield f"has an error output in {cell.source.splitlines()[0][:60]!r}"


def unfit(notebook: NotebookNode) -> Iterator[str]:
    """Why it should not be committed: too large, not rendered by GitHub, or telling what is private."""
    text = nbformat.writes(notebook, version=4)
    if len(text.encode()) > MAX_BYTES:
        yield f"has {len(text.encode()):,} bytes, more than {MAX_BYTES:,}"
    if "widgets" in notebook.metadata or "application/vnd.jupyter.widget-view+json" in text:
        yield "holds widget state, which GitHub does not render"
    for pattern, name in ((SECRET, "a token"), (HOME, "a home path")):
        if match := pattern.search(text):
            yield f"holds {name}: {match[0][:12]}..."


def slugified(title: str) -> str:
    """The slug that Kaggle makes of a title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def kaggle_problems(folder: Path, wanted: dict[str, Any]) -> list[str]:
    """What the ``kaggle`` package's own client-side checks, and ours, find wrong with a kernel folder."""
    try:
        data = json.loads((folder / "kernel-metadata.json").read_text(encoding="utf-8"))
    except OSError:
        return ["kernel-metadata.json is missing"]
    problems = [f"{key} is {data.get(key)!r}, not {wanted[key]!r}" for key in wanted if data.get(key) != wanted[key]]
    title = data.get("title", "")
    if data.get("id", "").split("/")[-1] != slugified(title):
        problems.append(f"slug of {data.get('id')!r} does not match title {title!r}")
    if not 5 <= len(title) <= 50:
        problems.append(f"title {title!r} has {len(title)} characters; Kaggle takes 5 to 50")
    try:
        sent = pushed(folder)
    except Exception as error:
        return [*problems, f"kaggle refuses it: {error}"]
    if not (sent.machine_shape == "NvidiaTeslaT4" and sent.enable_internet and not sent.is_private):
        problems.append("kaggle would not run it publicly on two T4s with internet")
    return problems


def pushed(folder: Path) -> Any:
    """The request that ``kaggle kernels push`` would send for ``folder``, recorded by a stand-in client."""
    with mock.patch.dict("os.environ", {"KAGGLE_USERNAME": "nobody", "KAGGLE_KEY": "none"}):
        from kaggle.api.kaggle_api_extended import KaggleApi

        api = KaggleApi.__new__(KaggleApi)
        api.config_values = {"username": "nobody"}
        client = mock.MagicMock()
        client.__enter__.return_value = client
        with mock.patch.object(KaggleApi, "build_kaggle_client", lambda self: client), \
                mock.patch("builtins.print"):  # fmt: skip
            api.kernels_push(str(folder))
    return client.kernels.kernels_api_client.save_kernel.call_args[0][0]
