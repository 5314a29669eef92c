"""Makes everything that is generated: notebooks from their sources, Kaggle and Colab copies, README's tables.

``notebooks/X_name.py`` is the only hand-edited source. Executed copies come from runs (``--promote``) and are never
edited; ``--check`` fails where a committed copy was not executed as its source now stands.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbformat import NotebookNode

from . import __version__, catalogue, checks, readme
from .catalogue import badges, copies, slug
from .environment import ROOT, SetupError
from .results import read_rows, write_atomically, write_rows

HOSTS = ("kaggle", "colab")
REHEARSED = "_t4rehearsal"  # ends the names of a rehearsal's figures
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
          "language_info": {"name": "python"}}  # fmt: skip
HOST_METADATA: dict[str, dict[str, Any]] = {
    "kaggle": {"kaggle": {"accelerator": "nvidiaTeslaT4", "isGpuEnabled": True, "isInternetEnabled": True}},
    "colab": {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []}},
}


def from_source(path: Path) -> NotebookNode:
    """The notebook of a percent-format source, with ids that depend on the cells alone."""
    text = path.read_text(encoding="utf-8").replace("{{BADGES}}", badges(path.stem))
    notebook = jupytext.reads(text.replace("{{SLUG}}", slug()).replace("{{TAG}}", f"v{__version__}"), fmt="py:percent")
    for i, cell in enumerate(notebook.cells):
        cell.id = hashlib.sha256(f"{i}:{cell.cell_type}:{cell.source}".encode()).hexdigest()[:8]
        if cell.cell_type == "code":
            cell.metadata.pop("lines_to_next_cell", None)
    notebook.metadata = nbformat.from_dict(copy.deepcopy(KERNEL))
    return notebook


def write_notebook(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook whole or not at all, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, nbformat.writes(notebook, version=4) + "\n")


def kernel_metadata(stem: str) -> dict[str, Any]:
    """``kernel-metadata.json`` for Kaggle: a public notebook on two T4s with internet."""
    title = "QLoRA " + stem.replace("_", " ")
    return {
        "id": f"{slug().split('/')[0]}/{checks.slugified(title)}", "title": title, "code_file": f"{stem}.ipynb",
        "language": "python", "kernel_type": "notebook", "is_private": False, "enable_gpu": True, "enable_tpu": False,
        "enable_internet": True, "machine_shape": "NvidiaTeslaT4", "docker_image_pinning_type": "original",
        "dataset_sources": [], "competition_sources": [], "kernel_sources": [], "model_sources": [],
    }  # fmt: skip


def for_host(notebook: NotebookNode, host: str) -> NotebookNode:
    """The same cells with the metadata that a host reads."""
    made = copy.deepcopy(notebook)
    made.metadata.update(copy.deepcopy(HOST_METADATA[host]))
    return made


def build() -> None:
    """Write Kaggle and Colab copies where no executed ones stand, Kaggle's metadata, and README's generated parts."""
    for item in catalogue.notebooks():
        source, places = from_source(item.path), copies(item.path.stem)
        for host in HOSTS:
            if not places[host].exists() or checks.never_executed(_read(places[host])):
                write_notebook(for_host(source, host), places[host])
        metadata = json.dumps(kernel_metadata(item.path.stem), indent=1) + "\n"
        write_atomically(places["kaggle"].with_name("kernel-metadata.json"), metadata)
    readme.write()


def promote(run: Path) -> list[Path]:
    """Take the notebooks, figures and results of an executed run as the committed copies; all of them or none.

    A folder that `helpers.bench_trainer`, `bench_context`, `bench_nf4` or `step_costs` wrote gives README a table; of
    `bench_nf4`'s rows those of other machines stay.

    Raises:
        SetupError: no executed notebook in ``run``, one whose cells differ from its source, or one unfit to commit.
    """
    stems = {item.path.stem: item for item in catalogue.notebooks()}
    executed = [path for path in sorted(run.glob("*.ipynb")) if path.stem in stems]
    files = [path for name in readme.PROMOTED if (path := run / name).exists()]
    if not executed and not files:
        raise SetupError(f"{run} holds no executed notebook of {', '.join(stems)}")
    taken: dict[Path, NotebookNode] = {}
    for path in executed:
        item, notebook = stems[path.stem], _read(path)
        try:
            (found,) = run.glob(f"{item.letter}_results*.json")
            results = json.loads(found.read_text(encoding="utf-8"))
            ran = {key: results[key] for key in ("rehearsal", "date", "minutes", "peak_gib", "parameters")}
        except (ValueError, KeyError):
            raise SetupError(
                f"{path} is not taken: no {item.letter}_results.json as `python3 -m helpers run` leaves it is beside it"
            ) from None
        notebook.metadata.pop("papermill", None)  # it holds paths of the machine that ran it
        notebook.metadata["executed_on"] = ran | results["environment"]
        for cell in notebook.cells:
            cell.metadata.pop("papermill", None), cell.metadata.pop("execution", None)
        source = from_source(item.path)
        problems = [*checks.differences(notebook, source), *checks.unexecuted(notebook), *checks.unfit(notebook)]
        if problems:
            raise SetupError(f"{path} is not taken: {problems[0]}")
        places = copies(path.stem)
        if results["rehearsal"]:
            taken |= {places[host]: for_host(notebook, host) for host in HOSTS}
        else:
            taken[places["native"]] = notebook
        files += figures_of(item.letter, results["rehearsal"], run)
    for place, notebook in taken.items():
        write_notebook(notebook, place)
    (ROOT / "figures").mkdir(exist_ok=True)
    for kind in {(path.name[0], REHEARSED in path.stem) for path in files if path.name not in readme.PROMOTED}:
        for old in figures_of(*kind, ROOT / "figures"):
            old.unlink()
    others = _of_other_machines(readme.bench_rows(readme.DECODE), read_rows(run / readme.DECODE))
    for path in files:
        shutil.copyfile(path, ROOT / "figures" / path.name)
    if others:
        write_rows([*readme.bench_rows(readme.DECODE), *others], ROOT / "figures" / readme.DECODE)
    return [*taken, *(ROOT / "figures" / path.name for path in files)]


def _of_other_machines(kept: readme.Rows, taken: readme.Rows) -> readme.Rows:
    """Those of ``kept`` that ``taken`` does not measure anew; none if nothing is taken: then all stay as they lie."""
    machines = {row["machine"] for row in taken}
    return [row for row in kept if row["machine"] not in machines] if machines else []


def figures_of(letter: str, rehearsal: bool, folder: Path) -> list[Path]:
    """Plots, their rows and results of one notebook's native run, or of its T4 rehearsal, in ``folder``."""
    found = [path for path in sorted(folder.glob(f"{letter}*_*")) if path.suffix in {".png", ".csv"}]
    found += sorted(folder.glob(f"{letter}_results*.json"))
    return [path for path in found if (REHEARSED in path.stem) == rehearsal]


def check() -> tuple[list[str], list[str]]:
    """What is stale or unfit among the committed copies, and which notebooks have no executed copy yet."""
    problems, notes = [], []
    for item in catalogue.notebooks():
        source = from_source(item.path)
        for kind, place in copies(item.path.stem).items():
            where = place.relative_to(ROOT).as_posix()
            if not place.exists():
                notes.append(f"{where}: not executed yet")
                continue
            notebook = _read(place)
            found = [*checks.differences(notebook, source), *checks.unfit(notebook)]
            if checks.never_executed(notebook) and not found:
                notes.append(f"{where}: not executed yet")
                continue
            results = catalogue.last_results(item.letter, rehearsal=kind != "native") or {}
            if results.get("date") != notebook.metadata.get("executed_on", {}).get("date"):
                found.append("its results in figures/ are of another run")
            problems += [f"{where}: {problem}" for problem in [*found, *checks.unexecuted(notebook)]]
        folder = copies(item.path.stem)["kaggle"].parent
        if folder.exists():
            wrong = checks.kaggle_problems(folder, kernel_metadata(item.path.stem))
            problems += [f"kaggle/{item.path.stem}: {problem}" for problem in wrong]
    lonely = [plot.name for plot in (ROOT / "figures").glob("*.png") if not plot.with_suffix(".csv").exists()]
    problems += [f"figures/{name}: the rows it is drawn from are not beside it" for name in sorted(lonely)]
    return problems + readme.problems(), notes


def _read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def set_slug(value: str) -> None:
    """Write the repository's name into pyproject.toml and into the copies executed under its old name.

    Raises:
        SetupError: ``value`` is not of the form owner/name.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
        raise SetupError(f"--slug {value!r} is not of the form owner/name")
    before = {item.path: from_source(item.path) for item in catalogue.notebooks()}
    path = ROOT / "pyproject.toml"
    text = re.sub(r'^slug = "[^"]*"', f'slug = "{value}"', path.read_text(encoding="utf-8"), flags=re.M)
    write_atomically(path, text)
    for source, old in before.items():
        for place in filter(Path.exists, copies(source.stem).values()):
            notebook = _read(place)
            if list(checks.differences(notebook, old)):
                continue  # stale already, and left so
            for cell, renamed in zip(checks.own_cells(notebook), from_source(source).cells, strict=True):
                cell.source, cell.id = renamed.source, renamed.id
            write_notebook(notebook, place)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m helpers build")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--promote", type=Path)
    parser.add_argument("--slug")
    args = parser.parse_args(argv)
    if args.check:
        problems, notes = check()
        print("\n".join([*notes, *problems]))
        print(f"{len(problems)} problems" if problems else "every executed copy is current and fit")
        return 1 if problems else 0
    if args.slug:
        set_slug(args.slug)
    if args.promote:
        for place in promote(args.promote):
            print(f"took {place.relative_to(ROOT)}")
    build()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
