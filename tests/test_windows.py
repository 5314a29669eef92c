"""The Windows check on small binaries made here: what is missing is found, and a whole set passes."""

from __future__ import annotations

import re
import shutil
import struct

import pytest
import torch  # noqa: F401  before a test says that this is Windows

from helpers import doctor, environment, windows
from helpers.portable_executable import Binary, NotAPortableExecutable, read_binary

BASE = 0x1000  # one section: its address and its place in the file are the same


def binary(imports: dict[str, list[str]] | None = None, exports: list[str] = (), machine: int = 0x8664) -> bytes:
    """A PE32+ file with these tables and nothing else."""
    body = bytearray()

    def put(data: bytes) -> int:
        body.extend(data)
        body.extend(b"\0" * (-len(body) % 8))
        return BASE + len(body) - len(data) - (-len(data) % 8)

    def name_of(text: str) -> int:
        return put(text.encode() + b"\0")

    rows = []
    for dll, functions in (imports or {}).items():
        entries = [1 << 63 | int(f[1:]) if f[0] == "#" else put(b"\0\0" + f.encode() + b"\0") for f in functions]
        table = put(struct.pack(f"<{len(entries) + 1}Q", *entries, 0))
        rows.append(struct.pack("<5I", table, 0, 0, name_of(dll), table))
    import_table = put(b"".join(rows) + bytes(20)) if rows else 0
    export_table = 0
    if exports:
        names = put(struct.pack(f"<{len(exports)}I", *[name_of(f) for f in exports]))
        export_table = put(bytes(16) + struct.pack("<6I", 7, len(exports), len(exports), 0, names, 0))
    directories = [(export_table, 40), (import_table, 20), *[(0, 0)] * 14]
    optional = struct.pack("<H106xI", 0x20B, 16) + b"".join(struct.pack("<II", *d) for d in directories)
    header = b"MZ" + bytes(0x3A) + struct.pack("<I", 0x40)
    header += b"PE\0\0" + struct.pack("<HH12xHH", machine, 1, len(optional), 0) + optional
    header += b".all\0\0\0\0" + struct.pack("<IIII", len(body), BASE, len(body), BASE) + bytes(16)
    return header + bytes(BASE - len(header)) + bytes(body)


def read(**binaries: bytes) -> dict[str, Binary]:
    return {name.replace("__", "/").replace("_dll", ".dll"): read_binary(b) for name, b in binaries.items()}


def test_tables_are_read():
    found = read_binary(binary({"KERNEL32.dll": ["Sleep", "#12"], "a.dll": ["f"]}, ["g", "h"]))
    assert found.imports == {"kernel32.dll": ["Sleep", "#12"], "a.dll": ["f"]}
    assert found.exports == {"g", "h", "#7", "#8"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (binary(machine=0x14C), "not x64"),
        (b"\x7fELF" + bytes(200), "no PE header"),
        (b"MZ", "outside the file"),
        (binary({"a.dll": ["f"]})[:-40], "outside the file|has no end"),
    ],
)
def test_other_files_are_refused(data, said):
    with pytest.raises(NotAPortableExecutable, match=said):
        read_binary(data)


def test_a_whole_set_is_accepted_and_its_prerequisites_named():
    faults, wanted = windows.unmet_imports(
        read(
            torch__lib__torch_cpu_dll=binary({"api-ms-win-crt-heap-l1-1-0.dll": ["malloc"]}, ["add"]),
            x___C_dll=binary({"torch_cpu.dll": ["add"], "MSVCP140.dll": ["x"], "torch_cuda.dll": ["stream"]}),
        ),
        windows.CUDA_TORCH,
    )
    assert faults == []
    assert {source.split(" ")[0] for source in wanted} == {"Microsoft", "torch"}


@pytest.mark.parametrize(
    ("imports", "said"),
    [
        ({"torch_cpu.dll": ["gone"]}, "imports gone from torch_cpu.dll, which exports no such function"),
        ({"torch_cpu.dll": ["#99"]}, "imports #99"),
        ({"cudart64_13.dll": ["f"]}, "cudart64_13.dll, which no wheel"),
    ],
)
def test_what_nobody_provides_is_named(imports, said):
    faults, _ = windows.unmet_imports(
        read(torch_cpu_dll=binary(exports=["add"]), x_dll=binary(imports)), windows.CUDA_TORCH
    )
    assert len(faults) == 1 and said in faults[0] and faults[0].startswith("x.dll")


@pytest.fixture
def unpacked(tmp_path):
    """A set of three wheels: ``fast`` needs ``torch`` and its DLL, and on Windows ``triton-windows``."""

    def wheel(name: str, requires: list[str] = (), files: dict[str, bytes] | None = None) -> None:
        info = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *[f"Requires-Dist: {r}" for r in requires]]
        (info / "METADATA").write_text("\n".join(lines))
        for path, data in (files or {}).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(data)
        (info / "RECORD").write_text("".join(f"{path},,\n" for path in files or {}))

    wheel("torch", files={"torch/lib/torch_cpu.dll": binary(exports=["add"])})
    wheel("triton-windows", files={"triton/_C/libtriton.pyd": binary({"python312.dll": ["PyInit"]})})
    wheel(
        "fast",
        ["torch>=1", 'triton; sys_platform == "linux"', 'triton-windows; sys_platform == "win32"', "x; extra == 'y'"],
        {"fast/_C.pyd": binary({"torch_cpu.dll": ["add"]}), "fast/helper_x86.dll": binary(machine=0x14C)},
    )
    return tmp_path


def test_a_set_with_one_wheel_taken_out_is_refused(unpacked):
    needed = ("fast", "triton-windows")
    wheels = windows.WheelSet.of(unpacked)
    faults, wanted = wheels.check("3.12", needed)
    assert (faults, list(wanted), len(wheels.binaries)) == ([], ["Python"], 3)
    faults, _ = wheels.without("torch").check("3.12", needed)
    assert any("fast 1.0 needs torch" in fault for fault in faults)
    assert any("fast/_C.pyd imports torch_cpu.dll, which no wheel" in fault for fault in faults)
    faults, _ = wheels.without("triton-windows").check("3.12", needed)
    assert any("triton-windows is needed, and there is no wheel" in fault for fault in faults)
    assert any(re.search(r"fast 1.0 needs triton-windows.* there is None", fault) for fault in faults)
    (unpacked / "torch/lib/torch_cpu.dll").write_bytes(b"not a binary" * 20)
    assert any("no PE header" in fault for fault in windows.WheelSet.of(unpacked).check("3.12", needed)[0])


def test_a_record_stands_in_where_the_registry_does_not_answer(unpacked, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def unpack(folder, python, cuda):
        if not answers:
            raise windows.NoAnswerError("the package registry does not answer")
        shutil.copytree(unpacked, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cache"))

    monkeypatch.setattr(windows, "unpack", unpack)
    answers = False
    with pytest.raises(windows.NoAnswerError):
        windows.wheel_set("3.12")
    answers = True
    read_now = windows.wheel_set("3.12")
    answers = False
    recorded = windows.wheel_set("3.12")
    assert recorded.recorded and not read_now.recorded
    for change in (lambda w: w, lambda w: w.without("torch"), lambda w: w.without("triton-windows")):
        assert change(recorded).check("3.12", ("fast",)) == change(read_now).check("3.12", ("fast",))


def test_pins_say_triton_for_each_system():
    text = (environment.ROOT / "requirements.txt").read_text()
    assert re.search(r'^triton==[\d.]+; sys_platform == "linux"$', text, re.M)
    assert re.search(r'^triton-windows==[\w.]+; sys_platform == "win32"$', text, re.M)
    project = (environment.ROOT / "pyproject.toml").read_text()
    assert windows.CUDA_INDEX in project, "the documented index and the checked one differ"


def test_doctor_names_what_windows_lacks(monkeypatch):
    monkeypatch.setattr(doctor.sys, "platform", "win32")
    monkeypatch.setattr(windows, "missing_here", lambda: [("nvcuda.dll", "install NVIDIA's driver")])
    monkeypatch.setattr(environment, "installed", lambda name: "0.0.35")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    (_, first, step), (_, second, index) = doctor._windows()
    assert (first, step) == ("nvcuda.dll", "install NVIDIA's driver")
    assert "xformers is built for CUDA 12, torch for 13.0" in second and windows.CUDA_INDEX in index


def test_the_package_has_no_posix_only_code():
    only = re.compile(
        r"\bimport (fcntl|pwd|grp|resource|termios)\b|os\.(fork|getuid|killpg|setsid|mkfifo)\b|['\"]/tmp\b"
        r"|signal\.(SIGKILL|SIGALRM|alarm)|get_context\([\"']fork|start_method=[\"']fork"
    )
    found = [
        f"{path.name}: {line.strip()}"
        for path in sorted((environment.ROOT / "helpers").glob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if path.name not in ("fsdp2.py", "ranks.py") and only.search(line)  # they need NCCL, which is Linux's
    ]
    assert found == []
