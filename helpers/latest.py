"""``python3 -m helpers test --latest``: the fast tests with the newest transformers, TRL, PEFT and accelerate.

``runs/venv-latest`` sees the pinned environment's packages behind its own and holds only what is newer, so torch and
triton are the pinned ones and the pinned environment is not touched. It is made anew when the pins or the Python
change, and upgraded when the package index has something newer. Standard library only.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tomllib
from pathlib import Path

from .environment import ROOT, SetupError, is_network_error, venv_python

NEWEST = ("transformers", "trl", "peft", "accelerate")
FOLDER = "runs/venv-latest"
FACTS = """
import json, sys, sysconfig
from importlib.metadata import distributions

folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
own = sysconfig.get_path("purelib")
versions = [{d.name.lower(): d.version for d in distributions(path=where)} for where in (folders[::-1], [own])]
print(json.dumps({"python": sys.version, "folders": folders, "own": own, "all": versions[0], "of_own": versions[1]}))
"""


class NoIndexError(SetupError):
    """The package index cannot be reached, so what is newest is not known."""


def fast_tests() -> list[str]:
    """What pytest is given: tests that touch those packages and end in about two minutes, as pyproject.toml lists."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["tool"]["qlora"]["fast_tests"]


def ready_python(base: str) -> str:
    """Path of a Python with the newest packages over those of the Python at ``base``; prints what it found.

    Raises:
        NoIndexError: the package index cannot be reached.
        SetupError: the environment cannot be made, or the newest packages do not go with the pinned torch.
    """
    below, python, folder = _facts(base), venv_python(FOLDER), ROOT / FOLDER
    made_over, over = folder / "made_over.json", json.dumps(below, indent=1)
    if not made_over.exists() or made_over.read_text(encoding="utf-8") != over:
        shutil.rmtree(folder, ignore_errors=True)
        done = subprocess.run([base, "-m", "venv", "--without-pip", str(folder)], capture_output=True, text=True)
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())
            raise SetupError(f"could not make {FOLDER}: {said[-300:]}")
        (Path(_facts(python)["own"]) / "pinned.pth").write_text("\n".join(below["folders"]) + "\n", encoding="utf-8")
        made_over.write_text(over, encoding="utf-8")
    _upgrade(python, f"torch=={below['all']['torch'].split('+')[0]}")
    above = _facts(python)
    print("newest: " + ", ".join(f"{name} {above['all'][name]}" for name in (*NEWEST, "torch")))
    if others := [f"{name} {version}" for name, version in sorted(above["of_own"].items()) if name not in NEWEST]:
        print("with them: " + ", ".join(others), flush=True)
    return python


def _facts(python: str) -> dict:
    return json.loads(subprocess.run([python, "-c", FACTS], check=True, capture_output=True, text=True).stdout)


def _upgrade(python: str, torch: str) -> None:
    """Have pip bring NEWEST, and of what they need only what is too old; ``torch`` is held."""
    options = ["-q", "--disable-pip-version-check", "--retries", "2", "--no-compile", "--upgrade"]
    done = subprocess.run([python, "-m", "pip", "install", *options, *NEWEST, torch], capture_output=True, text=True)
    if "Retry(total=0" in done.stderr or (done.returncode and is_network_error(done.stderr)):
        # pip ends well where it cannot ask and finds an older one installed
        raise NoIndexError("the package index cannot be reached")
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["pip said nothing"]
        raise SetupError(f"the newest {', '.join(NEWEST)} do not install beside {torch}: {said[-1].strip()}")
