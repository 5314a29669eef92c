"""Would the pinned set work on Windows? Asked without one: resolve it, unpack its wheels, and follow every import.

    python3 -m helpers.windows [--python 3.12] [--cuda]

For each Python the requirements are resolved for win_amd64 from wheels alone, beside ``unsloth`` and ``xformers``; the
wheels are unpacked (uv does both, as it would on Windows); each requirement's own requirements must be there; and each
DLL that a ``.pyd`` or ``.dll`` imports must come from a wheel of the set, from Python, from Windows or from a
prerequisite that is named, and must export the very functions that are imported from it. The same set with one of the
`NEEDED` wheels taken out must be refused. Nothing is executed. PyPI's torch for Windows is a CPU build: what the CUDA
build adds is taken on its word, unless ``--cuda`` fetches that build (2.5 GB) from PyTorch's own index.
"""

from __future__ import annotations

import argparse
import fnmatch
import mmap
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distributions
from pathlib import Path

from .environment import ROOT

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


class NotAPortableExecutable(ValueError):
    """The file is no 64-bit Windows binary, or is cut off."""


@dataclass
class Binary:
    """What a Windows binary imports and exports; DLL names in lower case, functions by name or as ``#ordinal``."""

    imports: dict[str, list[str]] = field(default_factory=dict)
    exports: set[str] = field(default_factory=set)


def read_binary(data: bytes | mmap.mmap) -> Binary:
    """Read the import, delayed import and export tables of a PE32+ file (Microsoft's PE format, optional header 0x20b).

    Raises:
        NotAPortableExecutable: it is something else, or a table points outside the file.
    """
    try:
        return _Reader(data).read()
    except (struct.error, IndexError) as error:
        raise NotAPortableExecutable(f"a table points outside the file ({error})") from error


class _Reader:
    def __init__(self, data: bytes | mmap.mmap):
        self.data = data
        (header,) = struct.unpack_from("<I", data, 0x3C)
        if data[:2] != b"MZ" or data[header : header + 4] != b"PE\0\0":
            raise NotAPortableExecutable("no PE header")
        machine, sections = struct.unpack_from("<HH", data, header + 4)
        (optional_size,) = struct.unpack_from("<H", data, header + 20)
        optional = header + 24
        if machine != 0x8664 or struct.unpack_from("<H", data, optional)[0] != 0x20B:
            raise NotAPortableExecutable(f"machine {machine:#x} is not x64")
        (directories,) = struct.unpack_from("<I", data, optional + 108)
        self.directories = [struct.unpack_from("<II", data, optional + 112 + 8 * i) for i in range(directories)]
        table = optional + optional_size
        self.sections = [struct.unpack_from("<IIII", data, table + 40 * i + 8) for i in range(sections)]

    def read(self) -> Binary:
        found = Binary()
        for at in self._table(1, 20):
            lookup, _, _, name, address = struct.unpack_from("<5I", self.data, at)
            if not name:
                break
            found.imports.setdefault(self._text(name).lower(), []).extend(self._functions(lookup or address))
        for at in self._table(13, 32):  # looked up at the first call
            _, name, _, _, lookup = struct.unpack_from("<5I", self.data, at)
            if not name:
                break
            found.imports.setdefault(self._text(name).lower(), []).extend(self._functions(lookup))
        for at in self._table(0, 40):
            base, functions, names, _, name_table, ordinals = struct.unpack_from("<6I", self.data, at + 16)
            found.exports.update(f"#{base + i}" for i in range(functions))
            if names:
                start = self._offset(name_table)
                found.exports.update(self._text(rva) for rva in struct.unpack_from(f"<{names}I", self.data, start))
            break
        return found

    def _table(self, directory: int, size: int) -> Iterator[int]:
        """File offsets of a directory's rows; the caller stops at the row of zeros."""
        if directory >= len(self.directories) or not self.directories[directory][0]:
            return
        at = self._offset(self.directories[directory][0])
        while True:
            yield at
            at += size

    def _functions(self, rva: int) -> Iterator[str]:
        at = self._offset(rva)
        while (entry := struct.unpack_from("<Q", self.data, at)[0]) != 0:
            yield f"#{entry & 0xFFFF}" if entry >> 63 else self._text((entry & 0x7FFFFFFF) + 2)
            at += 8

    def _offset(self, rva: int) -> int:
        for size, address, raw_size, raw in self.sections:
            if address <= rva < address + max(size, raw_size):
                return rva - address + raw
        raise IndexError(f"address {rva:#x} is in no section")

    def _text(self, rva: int) -> str:
        start = self._offset(rva)
        end = self.data.find(b"\0", start)
        if end < 0:
            raise IndexError("a name has no end")
        return self.data[start:end].decode("ascii", "replace")


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


def unmet_requirements(installed: Iterable[Distribution], needed: Iterable[str], python: str) -> list[str]:
    """Packages of ``needed``, and requirements of the ``installed`` ones as Windows reads them, that are not there."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    installed = list(installed)
    versions = {canonicalize_name(d.name): d.version for d in installed}
    machine = {
        "os_name": "nt", "sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64",
        "python_version": python, "python_full_version": f"{python}.0", "extra": "",
    }  # fmt: skip
    faults = [f"{name} is needed, and there is no wheel of it" for name in needed if name not in versions]
    for distribution in installed:
        for line in distribution.requires or ():
            want = Requirement(line)
            if want.marker is not None and not want.marker.evaluate(machine):
                continue
            version = versions.get(canonicalize_name(want.name))
            if version is None or not want.specifier.contains(version, prereleases=True):
                faults.append(f"{distribution.name} {distribution.version} needs {want}, and there is {version}")
    return faults


@dataclass
class WheelSet:
    """An unpacked set: its packages, its binaries by path, and what could not be read."""

    packages: list[Distribution]
    binaries: dict[str, Binary]
    unreadable: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> WheelSet:
        """Read every ``.pyd`` and ``.dll`` below ``folder`` that this kind of machine could load."""
        found = cls(list(distributions(path=[str(folder)])), {})
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
        gone = {file.as_posix() for d in self.packages if d.name.lower() == package for file in d.files or ()}
        kept = {name: binary for name, binary in self.binaries.items() if name not in gone}
        return WheelSet([d for d in self.packages if d.name.lower() != package], kept, self.unreadable)

    def check(
        self, python: str, needed: Iterable[str] = NEEDED, promised: Iterable[str] = CUDA_TORCH
    ) -> tuple[list[str], dict[str, set[str]]]:
        """Faults (none: the set is whole), and the prerequisites outside it with the files that want them."""
        unmet, wanted = unmet_imports(self.binaries, promised)
        return self.unreadable + unmet_requirements(self.packages, needed, python) + unmet, wanted


def unpack(folder: Path, python: str, cuda: bool = False) -> None:
    """Resolve requirements.txt and `BESIDE` for Windows and ``python`` from wheels alone, and unpack them.

    Args:
        cuda: take torch from `CUDA_INDEX` instead of PyPI.

    Raises:
        ValueError: there is no such set of wheels, or the registry does not answer.
    """
    command = [
        *_uv(), "pip", "install", "-q", "--target", str(folder), "--python-platform", "x86_64-pc-windows-msvc",
        "--python-version", python, "--only-binary", ":all:", "-r", str(ROOT / "requirements.txt"), *BESIDE,
        *(["--torch-backend", CUDA] if cuda else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"no set of wheels for Windows and Python {python}: {done.stderr.strip()[-800:]}")


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
                raise ValueError(f"pip could not fetch {UV}: {done.stderr.strip()[-300:]}")
            shutil.move(f"{scratch}/uv", folder)
    return [str(folder / "bin" / ("uv.exe" if os.name == "nt" else "uv"))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m helpers.windows", description=__doc__.split("\n")[0])
    parser.add_argument("--python", choices=PYTHONS, action="append", help="all of them by default")
    parser.add_argument("--cuda", action="store_true", help=f"with torch from {CUDA_INDEX}, nothing taken on its word")
    args = parser.parse_args(argv)
    failed = False
    for python in args.python or PYTHONS:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            try:
                unpack(Path(scratch), python, args.cuda)
            except ValueError as error:
                print(f"FAIL  Python {python}: {error}")
                failed = True
                continue
            wheels = WheelSet.of(Path(scratch))
            versions = {d.name.lower(): d.version for d in wheels.packages}
            promised = () if args.cuda else CUDA_TORCH
            faults, wanted = wheels.check(python, promised=promised)
            refused = {name: wheels.without(name).check(python, promised=promised)[0] for name in NEEDED}
        faults += [f"the set without {name} is accepted too" for name, found in refused.items() if not found]
        failed |= bool(faults)
        pieces = ", ".join(f"{name} {versions.get(name, 'MISSING')}" for name in NEEDED)
        count = f"{len(versions)} wheels, {len(wheels.binaries)} binaries"
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
