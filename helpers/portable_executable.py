"""What a 64-bit Windows binary imports and exports, read from its tables (Microsoft's "PE Format")."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field


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
