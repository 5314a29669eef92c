"""The notebooks that exist: letters, titles, parameters, where their copies stand, what their committed runs took."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .environment import ROOT, SetupError


@dataclass
class Notebook:
    """One source ``notebooks/<letter>_<name>.py`` in jupytext's percent format."""

    letter: str
    path: Path
    title: str
    needs: str
    parameters: dict[str, Any]


def notebooks() -> list[Notebook]:
    """Every notebook source, by letter."""
    return [_read(path) for path in sorted((ROOT / "notebooks").glob("[A-Z]_*.py"))]


def chosen(letters: list[str]) -> list[Notebook]:
    """The notebooks of these letters, all of them for none.

    Raises:
        SetupError: a letter that no notebook has.
    """
    known = {notebook.letter: notebook for notebook in notebooks()}
    wanted = [letter.upper() for letter in letters] or list(known)
    for letter in wanted:
        if letter not in known:
            raise SetupError(f"there is no notebook {letter!r}; there are {', '.join(known)}")
    return [known[letter] for letter in wanted]


def checked_parameters(pairs: list[list[str]], among: list[Notebook]) -> dict[str, Any]:
    """``-p NAME VALUE`` pairs as Python values of the types of their defaults.

    Raises:
        SetupError: a name that none of the notebooks has as a parameter, or a value of another type.
    """
    known = {name: default for notebook in among for name, default in notebook.parameters.items()}
    values = {}
    for name, text in pairs:
        if name not in known:
            raise SetupError(f"no chosen notebook has a parameter {name!r}; there are {', '.join(sorted(known))}")
        values[name] = _typed(name, text, known[name])
    return values


def _typed(name: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    wanted = {bool: bool, float: (int, float)}.get(type(default), type(default))
    if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
        raise SetupError(f"-p {name} {text}: a value of type {type(default).__name__} is needed, as {default!r}")
    return value


def last_results(letter: str, rehearsal: bool = False) -> dict[str, Any] | None:
    """The committed results of a notebook's last promoted run."""
    path = ROOT / "figures" / f"{letter}_results{'_t4rehearsal' if rehearsal else ''}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def slug() -> str:
    """``owner/name`` of the repository; it stands in pyproject.toml alone."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["tool"]["qlora"]["slug"]


def copies(stem: str) -> dict[str, Path]:
    """Where the committed copies of a notebook stand: native, kaggle, colab."""
    return {
        "native": ROOT / "notebooks" / f"{stem}.ipynb",
        "kaggle": ROOT / "kaggle" / stem / f"{stem}.ipynb",
        "colab": ROOT / "colab" / f"{stem}.ipynb",
    }


def badges(stem: str) -> str:
    """Links that open a notebook in Kaggle and Colab."""
    blob = f"https://github.com/{slug()}/blob/main"
    kaggle = f"https://www.kaggle.com/notebooks/welcome?src={blob}/kaggle/{stem}/{stem}.ipynb&accelerator=nvidiaTeslaT4"
    colab = f"https://colab.research.google.com/github/{slug()}/blob/main/colab/{stem}.ipynb"
    return (
        f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]({kaggle}) "
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})"
    )


def main() -> int:
    for notebook in notebooks():
        print(f"{notebook.letter}  {notebook.title}\n   needs: {notebook.needs}")
        print(f"   parameters: {', '.join(f'{k}={v!r}' for k, v in notebook.parameters.items())}")
        for rehearsal in (False, True):
            if done := last_results(notebook.letter, rehearsal):
                machine = done["environment"]["machine"]
                print(f"   took {done['minutes']:.1f} min, {done['peak_gib']:.1f} GiB on {machine}")
    return 0


def _read(path: Path) -> Notebook:
    text = path.read_text(encoding="utf-8")
    title = re.search(r"^# # (?:[A-Z]\. )?(.+)$", text, re.M)
    needs = re.search(r"^# \*\*Needs:\*\* (.+)$", text, re.M)
    cell = re.search(r'^# %% tags=\["parameters"\]\n(.*?)(?=^# %%|\Z)', text, re.M | re.S)
    parameters = {}
    for node in ast.parse(cell[1]).body if cell else []:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            parameters[node.targets[0].id] = ast.literal_eval(node.value)
    return Notebook(path.name[0], path, title[1] if title else path.stem, needs[1] if needs else "", parameters)
