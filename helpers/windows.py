"""Would the pinned set work on Windows? Asked without one: resolve it, unpack its wheels, and follow every import.

    python3 -m helpers.windows [--python 3.12] [--cuda]

For each Python the requirements are resolved for win_amd64 from wheels alone, beside ``unsloth`` and ``xformers``; the
wheels are unpacked (uv does both, as it would on Windows); each requirement's own requirements must be there; and each
DLL that a ``.pyd`` or ``.dll`` imports must come from a wheel of the set, from Python, from Windows or from a
prerequisite that is named, and must export the very functions that are imported from it. The same set with one of the
`NEEDED` wheels taken out must be refused. Nothing is executed. PyPI's torch for Windows is a CPU build: what the CUDA
build adds is taken on its word, unless ``--cuda`` fetches that build (2.5 GB) from PyTorch's own index. What was read
of a set is kept in the cache folder; where the registry does not answer, the check runs on that, and says so.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import hashlib
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import distributions
from pathlib import Path

from .environment import ROOT
from .portable_executable import Binary, NotAPortableExecutable, read_binary

PYTHONS = ("3.11", "3.12", "3.13")
BESIDE = ("unsloth", "xformers")  # not pinned by us, and promised to work beside what is
NEEDED = ("torch", "triton-windows", "bitsandbytes", "xformers", "unsloth")
UV = "uv==0.13.9"
# xFormers' wheel is built for CUDA 12; of that torch 2.12 and later have cu126 alone (pytorch#178665).
CUDA = "cu126"
CUDA_INDEX = f"https://download.pytorch.org/whl/{CUDA}"
CUDA_TORCH = ("torch_cuda.dll", "c10_cuda.dll", "cudart64_12.dll", "cublas64_12.dll", "cublaslt64_12.dll",
              "cusparse64_12.dll", "cusolver64_11.dll", "nvrtc64_120_0.dll", "cudnn64_9.dll")  # fmt: skip

# One of these is loaded, for the torch at hand; the x86 ones serve 32-bit programs.
OTHER_MACHINES = ("bitsandbytes/libbitsandbytes_*", "*_x86.dll")
THIS_MACHINE = ("bitsandbytes/libbitsandbytes_cpu.dll", "bitsandbytes/libbitsandbytes_cuda126.dll")

# Windows' own, as far as these wheels import them.
WINDOWS = {
    "advapi32.dll", "bcrypt.dll", "bcryptprimitives.dll", "combase.dll", "comctl32.dll", "crypt32.dll", "dbghelp.dll",
    "gdi32.dll", "imagehlp.dll", "iphlpapi.dll", "kernel32.dll", "msvcrt.dll", "ncrypt.dll", "ntdll.dll", "ole32.dll",
    "oleaut32.dll", "pdh.dll", "powrprof.dll", "psapi.dll", "secur32.dll", "shell32.dll", "user32.dll", "userenv.dll",
    "version.dll", "webservices.dll", "winhttp.dll", "wininet.dll", "wintrust.dll", "ws2_32.dll", "wsock32.dll",
}  # fmt: skip
OF_WINDOWS = ("api-ms-win-", "ext-ms-")
PREREQUISITES = {  # by the beginning of a DLL's name
    "vcruntime140": "Python",
    "msvcp140": "Microsoft Visual C++ Redistributable 2015-2022 (vc_redist.x64.exe)",
    "concrt140": "Microsoft Visual C++ Redistributable 2015-2022 (vc_redist.x64.exe)",
    "vcomp140": "Microsoft Visual C++ Redistributable 2015-2022 (vc_redist.x64.exe)",
    "nvcuda": "NVIDIA driver",
    "nvml": "NVIDIA driver",
}


def unmet_imports(binaries: dict[str, Binary], promised: Iterable[str] = ()) -> tuple[list[str], dict[str, set[str]]]:
    """What cannot be loaded, and which prerequisites outside the set (by name) which files want.

    Args:
        binaries: the set's ``.pyd`` and ``.dll`` files by path.
        promised: DLLs that another source provides; they are taken on its word, functions and all.
    """
    promised = frozenset(promised)
    provided: dict[str, set[str]] = {}
    for path, binary in binaries.items():
        provided.setdefault(path.rpartition("/")[2].lower(), set()).update(binary.exports)
    faults, wanted = [], {}
    for path, binary in sorted(binaries.items()):
        for dll, functions in binary.imports.items():
            if dll in provided:
                if lacking := sorted(set(functions) - provided[dll]):
                    more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
                    faults.append(f"{path} imports {lacking[0]}{more} from {dll}, which exports no such function")
            elif dll in promised:
                wanted.setdefault(f"torch for CUDA 12 ({CUDA_INDEX})", set()).add(path)
            elif (source := _outside(dll)) is None:
                faults.append(f"{path} imports {dll}, which no wheel of the set, Python or Windows has")
            elif source != "Windows":
                wanted.setdefault(source, set()).add(path)
    return faults, wanted


@dataclass
class Package:
    """What a wheel's metadata says of it; ``files``: its binaries."""

    name: str
    version: str
    requires: list[str]
    files: list[str]


def unmet_requirements(installed: list[Package], needed: Iterable[str], python: str) -> list[str]:
    """Packages of ``needed``, and requirements of the ``installed`` ones as Windows reads them, that are not there."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    versions = {canonicalize_name(d.name): d.version for d in installed}
    machine = {
        "os_name": "nt", "sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64",
        "python_version": python, "python_full_version": f"{python}.0", "extra": "",
    }  # fmt: skip
    faults = [f"{name} is needed, and there is no wheel of it" for name in needed if name not in versions]
    for package in installed:
        for line in package.requires:
            want = Requirement(line)
            if want.marker is not None and not want.marker.evaluate(machine):
                continue
            version = versions.get(canonicalize_name(want.name))
            if version is None or not want.specifier.contains(version, prereleases=True):
                faults.append(f"{package.name} {package.version} needs {want}, and there is {version}")
    return faults


@dataclass
class WheelSet:
    """An unpacked set: its packages, its binaries by path, and what could not be read."""

    packages: list[Package]
    binaries: dict[str, Binary]
    unreadable: list[str] = field(default_factory=list)
    recorded: str = ""  # the day, where it was read from a record

    @classmethod
    def of(cls, folder: Path) -> WheelSet:
        """Read every ``.pyd`` and ``.dll`` below ``folder`` that this kind of machine could load."""
        found = cls([], {})
        for each in distributions(path=[str(folder)]):
            files = [f.as_posix() for f in each.files or () if f.suffix.lower() in (".pyd", ".dll")]
            found.packages.append(Package(each.name, each.version, list(each.requires or ()), files))
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            other = name not in THIS_MACHINE and any(fnmatch.fnmatch(name, pattern) for pattern in OTHER_MACHINES)
            if path.suffix.lower() not in (".pyd", ".dll") or other:
                continue
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                try:
                    found.binaries[name] = read_binary(data)
                except NotAPortableExecutable as error:
                    found.unreadable.append(f"{name}: {error}")
        return found

    def without(self, package: str) -> WheelSet:
        """The set with one wheel taken out."""
        gone = {file for each in self.packages if each.name.lower() == package for file in each.files}
        kept = {name: binary for name, binary in self.binaries.items() if name not in gone}
        return WheelSet([each for each in self.packages if each.name.lower() != package], kept, self.unreadable)

    def check(
        self, python: str, needed: Iterable[str] = NEEDED, promised: Iterable[str] = CUDA_TORCH
    ) -> tuple[list[str], dict[str, set[str]]]:
        """Faults (none: the set is whole), and the prerequisites outside it with the files that want them."""
        unmet, wanted = unmet_imports(self.binaries, promised)
        return self.unreadable + unmet_requirements(self.packages, needed, python) + unmet, wanted

    def save(self, path: Path) -> None:
        """Record it, but for functions that nobody in the set imports."""
        from .results import write_atomically

        inside = {name.rpartition("/")[2].lower() for name in self.binaries}
        asked = {(dll, f) for b in self.binaries.values() for dll, functions in b.imports.items() for f in functions}
        binaries = {}
        for name, binary in self.binaries.items():
            own = name.rpartition("/")[2].lower()
            imports = {dll: functions if dll in inside else [] for dll, functions in binary.imports.items()}
            binaries[name] = {"imports": imports, "exports": sorted(f for f in binary.exports if (own, f) in asked)}
        document = {
            "day": datetime.date.today().isoformat(), "packages": [asdict(each) for each in self.packages],
            "binaries": binaries, "unreadable": self.unreadable,
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(document))

    @classmethod
    def load(cls, path: Path) -> WheelSet:
        """The set as `save` recorded it."""
        document = json.loads(path.read_text(encoding="utf-8"))
        binaries = {name: Binary(b["imports"], set(b["exports"])) for name, b in document["binaries"].items()}
        return cls(
            [Package(**each) for each in document["packages"]], binaries, document["unreadable"], document["day"]
        )


def wheel_set(python: str, cuda: bool = False) -> WheelSet:
    """The set for Windows and ``python``, resolved now, or as it was recorded where the registry does not answer.

    Raises:
        ValueError: there is no such set of wheels; or no answer and no record.
    """
    from .checkpoints import cache_folder

    pins = hashlib.sha256((ROOT / "requirements.txt").read_bytes() + repr((BESIDE, cuda)).encode()).hexdigest()[:12]
    record = cache_folder() / f"windows-{python}-{pins}.json"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        try:
            unpack(Path(scratch), python, cuda)
        except NoAnswerError:
            if record.exists():
                return WheelSet.load(record)
            raise
        wheels = WheelSet.of(Path(scratch))
    wheels.save(record)
    return wheels


class NoAnswerError(ValueError):
    """The package registry cannot be reached."""


def unpack(folder: Path, python: str, cuda: bool = False) -> None:
    """Resolve requirements.txt and `BESIDE` for Windows and ``python`` from wheels alone, and unpack them.

    Args:
        cuda: take torch from `CUDA_INDEX` instead of PyPI.

    Raises:
        NoAnswerError: the registry does not answer.
        ValueError: there is no such set of wheels.
    """
    command = [
        *_uv(), "pip", "install", "-q", "--target", str(folder), "--python-platform", "x86_64-pc-windows-msvc",
        "--python-version", python, "--only-binary", ":all:", "-r", str(ROOT / "requirements.txt"), *BESIDE,
        *(["--torch-backend", CUDA] if cuda else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "No solution found" in done.stderr:
        raise ValueError(f"no set of wheels for Windows and Python {python}: {done.stderr.strip()[-800:]}")
    if done.returncode:
        raise NoAnswerError(f"the package registry does not answer: {done.stderr.strip()[-300:]}")


def missing_here() -> list[tuple[str, str]]:
    """On Windows: what torch's CUDA build and Triton want of the machine and do not find, with the next step."""
    import ctypes

    wanted = [
        ("msvcp140.dll", "install https://aka.ms/vs/17/release/vc_redist.x64.exe"),
        ("vcruntime140_1.dll", "install https://aka.ms/vs/17/release/vc_redist.x64.exe"),
        ("nvcuda.dll", "install NVIDIA's driver for this GPU"),
    ]
    missing = []
    for name, step in wanted:
        try:
            ctypes.WinDLL(name)
        except OSError:
            missing.append((name, step))
    return missing


def _outside(dll: str) -> str | None:
    """Who provides a DLL that no wheel has; None: nobody."""
    if dll in WINDOWS or dll.startswith(OF_WINDOWS):
        return "Windows"
    if dll.startswith("python3"):
        return "Python"
    return next((source for start, source in PREREQUISITES.items() if dll.startswith(start)), None)


def _uv() -> list[str]:
    """The command uv: the one on PATH, else the pinned wheel in the cache folder."""
    from .checkpoints import cache_folder

    if found := shutil.which("uv"):
        return [found]
    folder = cache_folder() / UV.replace("==", "-")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:"]
            done = subprocess.run([*pip, "--target", f"{scratch}/uv", UV], capture_output=True, text=True)
            if done.returncode:
                raise NoAnswerError(f"pip could not fetch {UV}: {done.stderr.strip()[-300:]}")
            shutil.move(f"{scratch}/uv", folder)
    return [str(folder / "bin" / ("uv.exe" if os.name == "nt" else "uv"))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m helpers.windows", description=__doc__.split("\n")[0])
    parser.add_argument("--python", choices=PYTHONS, action="append", help="all of them by default")
    parser.add_argument("--cuda", action="store_true", help=f"with torch from {CUDA_INDEX}, nothing taken on its word")
    args = parser.parse_args(argv)
    failed = False
    for python in args.python or PYTHONS:
        try:
            wheels = wheel_set(python, args.cuda)
        except ValueError as error:
            print(f"FAIL  Python {python}: {error}")
            failed = True
            continue
        versions = {each.name.lower(): each.version for each in wheels.packages}
        promised = () if args.cuda else CUDA_TORCH
        faults, wanted = wheels.check(python, promised=promised)
        refused = {name: wheels.without(name).check(python, promised=promised)[0] for name in NEEDED}
        faults += [f"the set without {name} is accepted too" for name, found in refused.items() if not found]
        failed |= bool(faults)
        pieces = ", ".join(f"{name} {versions.get(name, 'MISSING')}" for name in NEEDED)
        when = f" as recorded on {wheels.recorded}" if wheels.recorded else ""
        count = f"{len(versions)} wheels{when}, {len(wheels.binaries)} binaries"
        print(f"{'FAIL' if faults else 'PASS'}  Python {python}: {count}; {pieces}")
        for fault in faults:
            print(f"      {fault}")
        for name, found in refused.items():
            print(f"      without {name} refused for {len(found)} reasons, as: {(found or [''])[-1]}")
        for source, paths in sorted(wanted.items()):
            print(f"      from {source}: wanted by {len(paths)}, as {min(paths)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
