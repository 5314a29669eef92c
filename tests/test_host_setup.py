"""A notebook opened alone on Kaggle or Colab fetches the repository, leaves torch alone and knows where it is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import __version__, build, catalogue, environment, host
from helpers.environment import SetupError

ROOT = Path(__file__).parents[1]
HOSTS = {  # Kaggle's image is Colab's, and sets its variables too
    "kaggle": ("kaggle/working", {"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "COLAB_RELEASE_TAG": "release-colab"}),
    "colab": ("content", {"COLAB_RELEASE_TAG": "release-colab"}),
}
# Runs the first code cells of notebooks as their host would, each in an empty folder, and tells what they found.
RUNNER = """
import json, os, sys
import IPython

path, environment = list(sys.path), dict(os.environ)
for folder, variables, cells in json.load(sys.stdin):
    os.makedirs(folder), os.chdir(folder)
    sys.path[:] = path
    os.environ.clear(), os.environ.update(environment | variables)
    for name in [name for name in sys.modules if name.split(".")[0] == "helpers"]:
        del sys.modules[name]
    names = {}
    for cell in cells:
        exec(cell, names)
    print(json.dumps([names["host"].name(), sys.modules["helpers"].__file__, names["host"].commit()]))
"""


def first_cells(path: Path) -> list[str]:
    """Source of the set-up and environment cells, marks filled in."""
    return [cell.source for cell in build.from_source(path).cells if cell.cell_type == "code"][:2]


def test_one_set_up_cell_for_all():
    """So that what is shown for one notebook holds for each."""
    assert len({first_cells(item.path)[0] for item in catalogue.notebooks()}) == 1


def test_every_notebook_starts_from_an_empty_folder(tmp_path):
    """On Kaggle from the tag of this version; on Colab from the main branch, as where that tag is not there yet."""
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("this folder is not a git checkout")
    work = []
    for where, (folder, variables) in HOSTS.items():
        served = tmp_path / "served" / where
        subprocess.run(["git", "clone", "-q", "--bare", "--no-tags", str(ROOT), str(served)], check=True)
        if where == "kaggle":
            subprocess.run(["git", "tag", f"v{__version__}"], cwd=served, check=True)
        variables = variables | {"QLORA_REPOSITORY": f"file://{served}", "PIP_NO_INDEX": "1"}
        for item in catalogue.notebooks():
            work.append((str(tmp_path / item.letter / folder), variables, first_cells(item.path)))
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(work), capture_output=True, text=True, cwd=tmp_path,
        env=inherited,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    found = [json.loads(line) for line in lines if line.startswith("[")]
    for (place, variables, _), (name, package, commit) in zip(work, found, strict=True):
        assert name == ("kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in variables else "colab")
        assert package == f"{place}/qlora/helpers/__init__.py"
        assert commit and head.startswith(commit)
    without_tag = [
        line for line in lines if re.fullmatch(r"file://.*colab has no tag v.*: taking its main branch", line)
    ]
    assert len(without_tag) == len(work) / 2 == sum("has no tag" in line for line in lines)


def test_the_hosts_torch_is_kept_or_named_but_never_replaced(monkeypatch):
    calls = []
    versions = {name: "99" for name, _, _ in environment.requirements(development=False)}
    versions |= {"torch": "2.10.0+cu128", "triton": "3.6.0"}
    monkeypatch.setattr(environment, "installed", versions.get)
    monkeypatch.setattr(environment, "_install", lambda python, lines: calls.append(lines))
    environment.install_for_notebook()
    assert "transformers==5.17.0" in calls[0] and not any(line.startswith(("torch", "triton")) for line in calls[0])
    versions["torch"] = "2.8.0"
    with pytest.raises(SetupError, match=r"torch 2\.8\.0 is older than 2\.9 and belongs to the host"):
        environment.install_for_notebook()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("where", "gpu", "asked"), [("kaggle", True, True), ("colab", False, False), ("local", True, False)]
)
def test_unsloth_is_fetched_on_a_hosts_gpu_alone_and_without_dependencies(monkeypatch, where, gpu, asked):
    ran = []
    monkeypatch.setattr(host, "name", lambda: where)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(subprocess, "run", lambda command: ran.append(command) or done)
    assert host.add_unsloth() is asked and len(ran) == asked
    if asked:
        assert "--no-deps" in ran[0] and "unsloth==2026.10.9" in ran[0]
