"""Sets up the Python environment of a bare clone. Standard library only: it runs before anything is installed.

Inside an active virtual environment, on Kaggle and on Colab the running Python is used; elsewhere ``.venv`` beside
this package is made and filled from requirements.txt. Where the pins are satisfied nothing is installed, so an
offline machine that has them works. torch and triton belong to the host: any version from 2.9 on is left alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST, NEWEST = (3, 11), (3, 13)
HOST_OWNED = {"torch": (2, 9), "triton": (3, 5), "triton-windows": (3, 5)}
FREE_GIB_NEEDED = 6
UNFINISHED = "unfinished"  # stands in .venv from before its first file until its last package is installed
REQUIREMENT = re.compile(r"^([A-Za-z0-9_.-]+)\s*([^;#]*)(?:;\s*sys_platform == \"(\w+)\")?")


class SetupError(Exception):
    """One line that names what is wrong and the way out."""


def requirements(development: bool) -> list[tuple[str, str, str]]:
    """``(name, specifier, line)`` of each requirement of this platform, the development part only when asked."""
    found = []
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# development") and not development:
            break
        match = REQUIREMENT.match(line)
        if match and (match[3] is None or match[3] == sys.platform):
            found.append((match[1], match[2].strip(), line.split("#")[0].strip()))
    return found


def numbers(version: str) -> tuple[int, ...]:
    """``'2.13.0+cpu'`` to ``(2, 13, 0)``."""
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0]))


def installed(name: str) -> str | None:
    """The version that the running Python has of a package, or None."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def satisfied(name: str, specifier: str) -> bool:
    """Whether the running Python has ``name`` as required; see HOST_OWNED for what any recent version satisfies."""
    if (have := installed(name)) is None:
        return False
    found = numbers(have)
    if name in HOST_OWNED:
        return found >= HOST_OWNED[name]
    for part in filter(None, (p.strip() for p in specifier.split(","))):
        wanted = numbers(part.lstrip("=<>"))
        if part.startswith("==") and found[: len(wanted)] != wanted:
            return False
        if part.startswith(">=") and found < wanted:
            return False
        if part.startswith("<") and found >= wanted:
            return False
    return True


def missing(development: bool) -> list[str]:
    """Requirement lines that the running Python does not satisfy."""
    return [line for name, spec, line in requirements(development) if not satisfied(name, spec)]


def uses_running_python() -> bool:
    """True in an active virtual environment and on hosts that bring their own (Kaggle, Colab)."""
    hosted = "KAGGLE_KERNEL_RUN_TYPE" in os.environ or "COLAB_RELEASE_TAG" in os.environ
    return hosted or sys.prefix != sys.base_prefix or os.environ.get("CONDA_PREFIX") == sys.prefix


def check_python() -> None:
    """Raise SetupError where the running Python is too old or too new."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        raise SetupError(
            "Python {}.{} runs this; 3.11 to 3.13 is needed. Start it as `python3.12 -m helpers ...`.".format(
                *sys.version_info[:2]
            )
        )


def ready_python(development: bool = False) -> str:
    """Path of a Python that satisfies the pins, set up on the way if need be.

    Raises:
        SetupError: Python out of range, no disk, no network, a failed install.
    """
    check_python()
    lines = missing(development)
    if not lines or uses_running_python():
        _install(sys.executable, lines)
        return sys.executable
    python, lines = venv_python(), missing_in_venv(development)
    unfinished = ROOT / ".venv" / UNFINISHED
    if lines is None:
        _make_venv(ROOT / ".venv", unfinished)
        lines = [line for _, _, line in requirements(development)]
    if lines:
        unfinished.touch()
        _install(python, lines)
        unfinished.unlink()
    return python


def venv_python(folder: str = ".venv") -> str:
    """Path of the Python of a virtual environment of this repository, whether it is there or not."""
    return str(ROOT / folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def missing_in_venv(development: bool = False) -> list[str] | None:
    """Requirement lines that ``.venv`` does not satisfy; None where it is not there, half-made, or does not start."""
    if (ROOT / ".venv" / UNFINISHED).exists():
        return None
    command = [venv_python(), "-m", "helpers.environment"] + ["--development"] * development
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else None


def _make_venv(folder: Path, unfinished: Path) -> None:
    _check_disk(folder.parent)
    print("making .venv", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    unfinished.touch()
    done = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        hint = "install the package python3-venv of your system" if "ensurepip" in said else said[-300:]
        raise SetupError(f"could not make .venv: {hint}")


def _check_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder).free / 1024**3
    if free < FREE_GIB_NEEDED:
        raise SetupError(f"{free:.1f} GiB of disk are free at {folder}; {FREE_GIB_NEEDED} GiB are needed to set up")


def is_network_error(stderr: str) -> bool:
    """Whether what pip said tells that it could not reach the package index."""
    return any(word in stderr for word in ("Connection", "resolve host", "Network", "timed out"))


def _install(python: str, lines: list[str]) -> None:
    """Have pip install requirement ``lines`` into ``python``'s environment; nothing happens for none."""
    if not lines:
        return
    print(f"installing {len(lines)} requirements (about 2 minutes from nothing)", flush=True)
    # Python compiles what it imports; compiling all of it now would be half of the installation's time.
    quick = ["-q", "--disable-pip-version-check", "--retries", "2", "--no-compile"]
    command = [python, "-m", "pip", "install", *quick]
    done = subprocess.run([*command, *lines], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines() or ["?"]
        by_hand = f"try it by hand: {python} -m pip install -r requirements.txt"
        hint = "is there a network?" if is_network_error(done.stderr) else by_hand
        raise SetupError(f"pip could not install the requirements: {errors[-1].strip()} ({hint})")


def install_for_notebook() -> None:
    """Install what the pins lack into the Python that runs a notebook; torch and triton stay the host's.

    Raises:
        SetupError: Python out of range, the host's torch is too old, or a failed install.
    """
    check_python()
    lines = missing(development=False)
    for name, oldest in HOST_OWNED.items():
        if any(line.startswith(f"{name}==") for line in lines) and (have := installed(name)):
            raise SetupError(
                f"{name} {have} is older than {oldest[0]}.{oldest[1]} and belongs to the host: choose a newer runtime"
            )
    _install(sys.executable, lines)


if __name__ == "__main__":
    if "--install" in sys.argv:
        try:
            install_for_notebook()
        except SetupError as error:
            sys.exit(f"error: {error}")
    else:
        for line in missing("--development" in sys.argv):
            print(line)
