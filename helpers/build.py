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
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbformat import NotebookNode

from . import __version__, catalogue
from .environment import ROOT, SetupError
from .results import criteria_table, write_atomically

HOSTS = ("kaggle", "colab")
MAX_BYTES = 1_000_000
SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|KGAT_\w+)")
HOME = re.compile(r"(/home/[a-z][\w-]*/|/root/|/Users/[A-Za-z]|[A-Z]:\\\\?Users\\)")
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
          "language_info": {"name": "python"}}  # fmt: skip
HOST_METADATA: dict[str, dict[str, Any]] = {
    "kaggle": {"kaggle": {"accelerator": "nvidiaTeslaT4", "isGpuEnabled": True, "isInternetEnabled": True}},
    "colab": {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []}},
}


def slug() -> str:
    """``owner/name`` of the repository; it stands in pyproject.toml alone."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["tool"]["qlora"]["slug"]


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


def badges(stem: str) -> str:
    """Links that open a notebook in Kaggle and Colab."""
    blob = f"https://github.com/{slug()}/blob/main"
    kaggle = f"https://www.kaggle.com/notebooks/welcome?src={blob}/kaggle/{stem}/{stem}.ipynb&accelerator=nvidiaTeslaT4"
    colab = f"https://colab.research.google.com/github/{slug()}/blob/main/colab/{stem}.ipynb"
    return (
        f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]({kaggle}) "
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})"
    )


def write_notebook(notebook: NotebookNode, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, nbformat.writes(notebook, version=4) + "\n")


def copies(stem: str) -> dict[str, Path]:
    """Where the committed copies of a notebook stand: native, kaggle, colab."""
    return {
        "native": ROOT / "notebooks" / f"{stem}.ipynb",
        "kaggle": ROOT / "kaggle" / stem / f"{stem}.ipynb",
        "colab": ROOT / "colab" / f"{stem}.ipynb",
    }


def kernel_metadata(stem: str) -> dict[str, Any]:
    """``kernel-metadata.json`` for Kaggle: a public notebook on two T4s with internet."""
    title = "QLoRA " + stem.replace("_", " ")
    return {
        "id": f"{slug().split('/')[0]}/{slugified(title)}", "title": title, "code_file": f"{stem}.ipynb",
        "language": "python", "kernel_type": "notebook", "is_private": False, "enable_gpu": True, "enable_tpu": False,
        "enable_internet": True, "machine_shape": "NvidiaTeslaT4", "docker_image_pinning_type": "original",
        "dataset_sources": [], "competition_sources": [], "kernel_sources": [], "model_sources": [],
    }  # fmt: skip


def slugified(title: str) -> str:
    """The slug that Kaggle makes of a title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def for_host(notebook: NotebookNode, host: str) -> NotebookNode:
    """The same cells with the metadata that a host reads."""
    made = copy.deepcopy(notebook)
    made.metadata.update(copy.deepcopy(HOST_METADATA[host]))
    return made


def build() -> None:
    """Write the Kaggle and Colab copies that have no executed one, their metadata, and README's tables."""
    for item in catalogue.notebooks():
        source, places = from_source(item.path), copies(item.path.stem)
        for host in HOSTS:
            if not places[host].exists() or list(_differences(_read(places[host]), source)):
                write_notebook(for_host(source, host), places[host])
        metadata = json.dumps(kernel_metadata(item.path.stem), indent=1) + "\n"
        write_atomically(places["kaggle"].with_name("kernel-metadata.json"), metadata)
    write_atomically(ROOT / "README.md", with_tables((ROOT / "README.md").read_text(encoding="utf-8")))


def promote(run: Path) -> list[Path]:
    """Take the notebooks, figures and results of an executed run as the committed copies.

    Raises:
        SetupError: no executed notebook in ``run``, one whose cells differ from its source, or an incomplete one.
    """
    stems = {item.path.stem: item for item in catalogue.notebooks()}
    executed = [path for path in sorted(run.glob("*.ipynb")) if path.stem in stems]
    if not executed:
        raise SetupError(f"{run} holds no executed notebook of {', '.join(stems)}")
    taken: list[tuple[NotebookNode, Path]] = []
    for path in executed:
        item, notebook = stems[path.stem], _read(path)
        problems = list(_differences(notebook, from_source(item.path))) + list(_unexecuted(notebook))
        if problems:
            raise SetupError(f"{path} is not taken: {problems[0]}")
        found = sorted(run.glob(f"{item.letter}_results*.json"))
        if not found:
            raise SetupError(f"{path} is not taken: its run left no {item.letter}_results.json")
        results = json.loads(found[0].read_text(encoding="utf-8"))
        notebook.metadata.pop("papermill", None)  # it holds paths of the machine that ran it
        notebook.metadata["executed_on"] = {"rehearsal": results["rehearsal"], "date": results["date"],
                                            "parameters": results["parameters"]} | results["environment"]  # fmt: skip
        for cell in notebook.cells:
            cell.metadata.pop("papermill", None), cell.metadata.pop("execution", None)
        places = copies(path.stem)
        if results["rehearsal"]:
            taken += [(for_host(notebook, host), places[host]) for host in HOSTS]
        else:
            taken.append((notebook, places["native"]))
    for notebook, place in taken:
        write_notebook(notebook, place)
    for path in sorted(run.iterdir()):
        if re.match(r"[A-Z]_.*\.(png|csv|json)$", path.name):
            (ROOT / "figures").mkdir(exist_ok=True)
            shutil.copyfile(path, ROOT / "figures" / path.name)
    return [place for _, place in taken]


def check() -> list[str]:
    """Everything that is stale or unfit among the committed copies; empty when all is well."""
    problems = []
    for item in catalogue.notebooks():
        source = from_source(item.path)
        for place in copies(item.path.stem).values():
            where = place.relative_to(ROOT).as_posix()
            if not place.exists():
                problems.append(f"{where} is missing")
                continue
            notebook = _read(place)
            found = [*_differences(notebook, source), *_unexecuted(notebook), *_unfit(place)]
            problems += [f"{where}: {problem}" for problem in found]
        problems += [f"kaggle/{item.path.stem}: {problem}" for problem in kaggle_problems(item.path.stem)]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if with_tables(readme) != readme:
        problems.append("README.md: its tables differ from figures/*_results.json; run `python3 -m helpers build`")
    return problems


def _read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def _own_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]


def _differences(executed: NotebookNode, source: NotebookNode) -> Iterator[str]:
    mine, theirs = _own_cells(executed), source.cells
    if len(mine) != len(theirs):
        yield f"has {len(mine)} cells, its source {len(theirs)}"
    for i, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        if (a.cell_type, a.source) != (b.cell_type, b.source):
            yield f"cell {i} differs from its source: {(b.source.strip() or '(empty)').splitlines()[0][:60]!r}"


def _unexecuted(notebook: NotebookNode) -> Iterator[str]:
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    if counts != list(range(1, len(counts) + 1)):
        yield "was not executed in order from its first cell to its last"
    for cell in notebook.cells:
        if any(output.output_type == "error" for output in cell.get("outputs", [])):
            yield f"has an error output in {cell.source.splitlines()[0][:60]!r}"


def _unfit(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if len(text.encode()) > MAX_BYTES:
        yield f"has {len(text.encode()):,} bytes, more than {MAX_BYTES:,}"
    notebook = nbformat.reads(text, as_version=4)
    if "widgets" in notebook.metadata or "application/vnd.jupyter.widget-view+json" in text:
        yield "holds widget state, which GitHub does not render"
    for pattern, name in ((SECRET, "a token"), (HOME, "a home path")):
        if match := pattern.search(text):
            yield f"holds {name}: {match[0][:12]}..."


def kaggle_problems(stem: str) -> list[str]:
    """What the ``kaggle`` package's own client-side checks, and ours, find wrong with a kernel folder."""
    folder = ROOT / "kaggle" / stem
    try:
        data = json.loads((folder / "kernel-metadata.json").read_text(encoding="utf-8"))
    except OSError:
        return ["kernel-metadata.json is missing"]
    wanted = kernel_metadata(stem)
    problems = [f"{key} is {data.get(key)!r}, not {wanted[key]!r}" for key in wanted if data.get(key) != wanted[key]]
    if data.get("id", "").split("/")[-1] != slugified(data.get("title", "")):
        problems.append(f"slug of {data.get('id')!r} does not match title {data.get('title')!r}")
    try:
        sent = pushed(folder)
    except Exception as error:
        return [*problems, f"kaggle refuses it: {error}"]
    if not (sent.machine_shape == "NvidiaTeslaT4" and sent.enable_internet and not sent.is_private):
        problems.append("kaggle would not run it publicly on two T4s with internet")
    return problems


def pushed(folder: Path) -> Any:
    """The request that ``kaggle kernels push`` would send for ``folder``, recorded by a stand-in client."""
    from unittest import mock

    with mock.patch.dict("os.environ", {"KAGGLE_USERNAME": slug().split("/")[0], "KAGGLE_KEY": "none"}):
        from kaggle.api.kaggle_api_extended import KaggleApi

        api = KaggleApi.__new__(KaggleApi)
        api.config_values = {"username": slug().split("/")[0]}
        client = mock.MagicMock()
        client.__enter__.return_value = client
        with mock.patch.object(KaggleApi, "build_kaggle_client", lambda self: client), \
                mock.patch("builtins.print"):  # fmt: skip
            api.kernels_push(str(folder))
    return client.kernels.kernels_api_client.save_kernel.call_args[0][0]


def with_tables(readme: str) -> str:
    """README with what stands between its ``<!-- results X -->`` marks made anew from the results files."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- results {match[1]} -->\n{_results_table(match[1])}\n<!-- end -->"

    return re.sub(r"<!-- results (\w+) -->\n.*?<!-- end -->", table, readme, flags=re.S)


def _results_table(which: str) -> str:
    if which != "overview":
        results = catalogue.last_results(which)
        if not results:
            return "No run of this notebook is committed yet."
        return f"On {_ran_on(results)}:\n\n{criteria_table(results['criteria'])}"
    lines = ["| notebook | machine | minutes | peak GiB | PASS | FAIL | NOT RUN |", "|---|---|---|---|---|---|---|"]
    for item in catalogue.notebooks():
        for rehearsal in (False, True):
            if results := catalogue.last_results(item.letter, rehearsal):
                counts = [sum(row["status"] == status for row in results["criteria"])
                          for status in ("PASS", "FAIL", "NOT RUN")]  # fmt: skip
                link = copies(item.path.stem)["kaggle" if rehearsal else "native"].relative_to(ROOT).as_posix()
                lines.append(
                    f"| [{item.title}]({link}) | {_ran_on(results)} | {results['minutes']:.1f} "
                    f"| {results['peak_gib']:.1f} | " + " | ".join(map(str, counts)) + " |"
                )
    return "\n".join(lines)


def _ran_on(results: dict[str, Any]) -> str:
    where = results["environment"]
    return f"{where['machine']}, torch {where['versions']['torch']}, {results['date']}"


def set_slug(value: str) -> None:
    """Write the repository's name into pyproject.toml."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
        raise SetupError(f"--slug {value!r} is not of the form owner/name")
    path = ROOT / "pyproject.toml"
    text = re.sub(r'^slug = "[^"]*"', f'slug = "{value}"', path.read_text(encoding="utf-8"), flags=re.M)
    write_atomically(path, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m helpers build")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--promote", type=Path)
    parser.add_argument("--slug")
    args = parser.parse_args(argv)
    if args.check:
        problems = check()
        print("\n".join(problems) or "all committed copies are executed, current and fit")
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
