"""Set-up and the command line: what is wrong is said in one line, and nothing half-made is taken for good."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from helpers import __main__, catalogue, environment, latest
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


@pytest.mark.parametrize(("platform", "triton"), [("linux", "triton"), ("win32", "triton-windows"), ("darwin", None)])
def test_each_platform_gets_its_own_triton(monkeypatch, platform, triton):
    monkeypatch.setattr(sys, "platform", platform)
    names = {name for name, _, _ in environment.requirements(development=True)}
    assert names & {"triton", "triton-windows"} == ({triton} if triton else set())
    assert {"torch", "pytest"} <= names and "pytest" not in {
        n for n, _, _ in environment.requirements(development=False)
    }


def test_old_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(SetupError, match=r"Python 3\.9 runs this; 3\.11 to 3\.13"):
        environment.ready_python()


@pytest.fixture
def bare(monkeypatch, tmp_path) -> Path:
    """A clone without an environment, under a Python that satisfies nothing."""
    (tmp_path / "requirements.txt").write_text("no-such-package-anywhere==1.0\n")
    (tmp_path / "helpers").mkdir()
    for name in ("__init__.py", "environment.py"):
        shutil.copy(ROOT / "helpers" / name, tmp_path / "helpers")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "uses_running_python", lambda: False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path


def test_full_disk_is_named_before_anything_is_made(monkeypatch, bare):
    monkeypatch.setattr(environment, "FREE_GIB_NEEDED", 10**9)
    with pytest.raises(SetupError, match="GiB of disk are free"):
        environment.ready_python()
    assert not (bare / ".venv").exists()


def test_a_failed_install_is_one_line_and_a_half_made_venv_is_made_anew(monkeypatch, bare):
    def make(folder, unfinished):
        made.append(folder)
        venv.create(folder, with_pip=False, system_site_packages=True)
        unfinished.touch()

    made: list[Path] = []
    monkeypatch.setattr(environment, "_make_venv", make)
    for times in (1, 2):
        with pytest.raises(SetupError, match="could not install the requirements: .*") as failure:
            environment.ready_python()
        assert "\n" not in str(failure.value) and len(made) == times
    installs: list[list[str]] = []
    monkeypatch.setattr(environment, "_install", lambda python, lines: installs.append(lines))
    python = environment.ready_python()
    assert python.startswith(str(bare / ".venv")) and len(made) == 3 and not (bare / ".venv" / "unfinished").exists()
    monkeypatch.setattr(environment, "missing", lambda development: ["something"])  # of the Python that runs this
    (bare / "requirements.txt").write_text("")
    assert environment.ready_python() == python
    assert len(made) == 3 and installs == [["no-such-package-anywhere==1.0"]]  # whole: kept as it is


def test_nothing_is_made_or_installed_where_the_pins_are_satisfied(monkeypatch, bare):
    """An offline machine whose own Python has everything needs no .venv."""
    (bare / "requirements.txt").write_text("pytest>=8\n")
    monkeypatch.setattr(environment.subprocess, "run", lambda *a, **k: pytest.fail("started something"))
    assert environment.ready_python() == sys.executable
    assert not (bare / ".venv").exists()


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("WARNING: Retrying: NewConnectionError\nERROR: No matching distribution found for x", "is there a network?"),
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "No space left on device"),
    ],
)
def test_why_an_install_failed_is_said(monkeypatch, stderr, said):
    failed = subprocess.CompletedProcess([], 1, stderr=stderr)
    monkeypatch.setattr(environment.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(SetupError, match=re.escape(said)):
        environment._install("python3", ["x"])


def test_the_newest_packages_lie_over_the_pinned_ones_and_leave_them_alone(monkeypatch, bare, capsys):
    monkeypatch.setattr(latest, "ROOT", bare)
    monkeypatch.setattr(latest, "_upgrade", lambda python, torch: asked.append(torch))
    asked: list[str] = []
    python = latest.ready_python(sys.executable)
    assert python.startswith(str(bare / "runs" / "venv-latest")) and "transformers 5.17.0" in capsys.readouterr().out
    own, pinned = (latest._facts(each) for each in (python, sys.executable))
    assert own["of_own"] == {} and own["all"] == pinned["all"] and own["own"] != pinned["own"]
    made = Path(own["own"]) / "made"
    made.touch()
    assert latest.ready_python(sys.executable) == python and made.exists()
    monkeypatch.setattr(latest, "_facts", lambda each, real=latest._facts: real(each) | {"python": "another"})
    assert latest.ready_python(sys.executable) == python and not made.exists()
    assert asked == [f"torch=={pinned['all']['torch'].split('+')[0]}"] * 3


@pytest.mark.parametrize(
    ("code", "stderr", "error", "said"),
    [
        (0, "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken", latest.NoIndexError, "reached"),
        (1, "ERROR: NewConnectionError", latest.NoIndexError, "reached"),
        (1, "x\nERROR: ResolutionImpossible: torch", SetupError, "do not install beside torch==2.13.0: ERROR: Resol"),
    ],
)
def test_an_index_out_of_reach_is_told_from_packages_that_do_not_fit(monkeypatch, code, stderr, error, said):
    done = subprocess.CompletedProcess([], code, stderr=stderr)
    monkeypatch.setattr(latest.subprocess, "run", lambda *a, **k: done)
    with pytest.raises(error, match=said) as failure:
        latest._upgrade("python3", "torch==2.13.0")
    assert type(failure.value) is error


def test_latest_is_skipped_in_one_line_without_an_index(monkeypatch, capsys):
    def no_index(base):
        raise latest.NoIndexError("the package index cannot be reached")

    monkeypatch.setattr(environment, "ready_python", lambda development: sys.executable)
    monkeypatch.setattr(latest, "ready_python", no_index)
    monkeypatch.setattr(__main__, "_start", lambda command: pytest.fail("started something"))
    assert __main__.main(["test", "--latest"]) == 0
    assert re.fullmatch(r"SKIPPED  test --latest: .* cannot be reached.*\n", capsys.readouterr().out)


def test_a_whole_suite_is_spread_over_the_cores_and_a_chosen_test_is_not(monkeypatch):
    started = []
    monkeypatch.setattr(environment, "ready_python", lambda development: "python")
    monkeypatch.setattr(latest, "ready_python", lambda base: "newest")
    monkeypatch.setattr(__main__, "_start", started.append)
    for arguments in (["test"], ["test", "tests/test_nf4.py"], ["test", "--latest"]):
        __main__.main(arguments)
    whole, one, newest = started
    assert whole[:5] == ["python", "-m", "pytest", "-n", "auto"] and one[3:] == ["tests/test_nf4.py"]
    assert newest[0] == "newest" and "tests/test_train.py" in newest and newest[-5:] == whole[-5:]


def test_the_fast_tests_exist():
    for argument in latest.fast_tests():
        path, _, name = argument.removeprefix("--deselect=").partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8") if name else (ROOT / path).exists()


@pytest.mark.skipif(os.name == "nt", reason="signals of a POSIX terminal")
def test_ctrl_c_ends_the_children_too():
    """As a terminal sends it: to the whole group, whose last child ignores nothing and is waited for."""
    code = (
        "import signal, sys; from helpers import __main__ as m\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "sys.exit(m._start([sys.executable, '-c', 'import signal; print(1, flush=True); signal.pause()']))"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert started.stdout.readline() == "1\n"
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(timeout=30) == 130 and started.communicate()[1].endswith("interrupted\n")
    with pytest.raises(ProcessLookupError):
        os.killpg(started.pid, 0)  # nobody is left in the group


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "Q"], "there is no notebook 'Q'"),
        (["run", "A", "-p", "STEPZ", "3"], "no chosen notebook has a parameter 'STEPZ'; there are CASES"),
        (["run", "A", "-p", "STEPS", "many"], "a value of type int is needed, as 0"),
        (["build", "--promote", "runs/none"], "holds no executed notebook"),
        (["build", "--slug", "noslash"], "not of the form owner/name"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_two(arguments, said):
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1


def test_list_and_doctor():
    assert "A  NF4 to fp16" in command("list").stdout
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
