"""Set-up and the command line: what is wrong is said in one line, and nothing half-made is taken for good."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from helpers import catalogue, environment
from helpers.environment import SetupError

ROOT = Path(__file__).parents[1]


def command(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "helpers", *arguments], cwd=ROOT, env=os.environ | env, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("installed", "specifier", "right"),
    [
        ("5.17.0", "==5.17.0", True), ("5.17.1", "==5.17.0", False), ("2.7.0", ">=2.7,<3", True),
        ("3.0", ">=2.7,<3", False), ("2.6.9", ">=2.7,<3", False), ("1.0", "", True),
    ],
)  # fmt: skip
def test_pins_are_compared(monkeypatch, installed, specifier, right):
    monkeypatch.setattr("importlib.metadata.version", lambda name: installed)
    assert environment.satisfied("transformers", specifier) is right


@pytest.mark.parametrize(("installed", "right"), [("2.9.1", True), ("2.11.0+cu130", True), ("2.8.0", False)])
def test_the_hosts_torch_is_left_alone_from_2_9_on(monkeypatch, installed, right):
    monkeypatch.setattr("importlib.metadata.version", lambda name: installed)
    assert environment.satisfied("torch", "==2.13.0") is right


def test_this_environment_satisfies_the_pins():
    assert environment.missing(development=False) == []


def test_old_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(SetupError, match=r"Python 3\.9 runs this; 3\.11 to 3\.13"):
        environment.ready_python()


def test_full_disk_is_named_before_anything_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "FREE_GIB_NEEDED", 10**9)
    with pytest.raises(SetupError, match="GiB of disk are free"):
        environment._make_venv()
    assert not (tmp_path / ".venv").exists()


def test_a_failed_install_is_one_line_and_is_tried_again(monkeypatch, tmp_path):
    """An empty .venv, as an interrupted install leaves it, is found wanting rather than taken for a good one."""
    (tmp_path / "requirements.txt").write_text("no-such-package-anywhere==1.0\n")
    (tmp_path / "helpers").mkdir()
    for name in ("__init__.py", "environment.py"):
        (tmp_path / "helpers" / name).write_text((ROOT / "helpers" / name).read_text())
    venv.create(tmp_path / ".venv", with_pip=True)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "uses_running_python", lambda: False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SetupError, match="could not install no-such-package-anywhere"):
        environment.ready_python()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "Q"], "there is no notebook 'Q'"),
        (["run", "A", "-p", "STEPZ", "3"], "no chosen notebook has a parameter 'STEPZ'; there are CASES"),
        (["build", "--promote", "runs/none"], "holds no executed notebook"),
        (["build", "--slug", "noslash"], "not of the form owner/name"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_two(arguments, said):
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1


def test_list_and_doctor():
    assert "A  A. NF4" in command("list").stdout
    doctor = command("doctor")
    assert "transformers 5.17.0" in doctor.stdout and doctor.returncode == 0


def test_parameters_are_read_from_the_source_and_typed():
    among = catalogue.chosen(["a"])
    assert {"STEPS", "MODEL"} <= among[0].parameters.keys()
    assert catalogue.checked_parameters([["STEPS", "3"], ["MODEL", "embedded"]], among) == {
        "STEPS": 3, "MODEL": "embedded",
    }  # fmt: skip


def test_only_the_environment_module_runs_before_set_up():
    """``helpers.__main__`` must start on a Python that has nothing installed."""
    code = "import sys; sys.path.insert(0, '.'); import helpers.__main__, helpers.doctor, helpers.catalogue"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, check=True, env={"PATH": os.environ["PATH"]})
