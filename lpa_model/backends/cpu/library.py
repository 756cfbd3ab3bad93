"""The shared library of C kernels: loaded, checked against `args`, and called in the threads that torch runs in."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from lpa_model.backends.cpu.args import RECORDS
from lpa_model.backends.cpu.build import INSTRUCTION_SETS, LIBRARY, source_hash

Kernel = Callable[[int, int], None]
"""(address of the kernel's record, work items): returns when all work is done. One item runs in the calling thread."""


_Record = TypeVar("_Record", bound=ctypes.Structure)


class LibraryError(RuntimeError):
    """The library is missing, or another version than this package."""


class _Field(ctypes.Structure):
    _fields_ = (
        ("record", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
        ("offset", ctypes.c_int64),
        ("size", ctypes.c_int64),
    )


class _Entry(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("run", ctypes.c_void_p))


class Library:
    """Every kernel of every instruction set that the library holds."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            LibraryError: there is no library at `path`, it was compiled from other sources than those beside this file,
                or its records are not those of `args`.
        """
        if not path.exists():
            raise LibraryError(f"{path} is not there: `make kernels` compiles it")
        self.path = path
        self._library = ctypes.CDLL(str(path))
        made_of = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(self._library, "lpa_source"))).decode()
        if made_of != source_hash():
            raise LibraryError(f"{path} is older than its sources: `make kernels` compiles them")
        self._library.lpa_supports.restype = ctypes.c_int64
        check_records(self._layout())

    def supports(self, instruction_set: str) -> bool:
        """Whether this processor has an instruction set. If it is "amx", the process may use tiles from here on."""
        return bool(self._library.lpa_supports(instruction_set.encode()))

    def supported(self) -> tuple[str, ...]:
        """The instruction sets of this processor that there are kernels for, the best first."""
        names = [flavour.name for flavour in INSTRUCTION_SETS.get(platform.machine(), [])]
        return tuple(name for name in reversed(names) if self.supports(name))

    def kernels(self, instruction_set: str) -> Mapping[str, Kernel]:
        """The kernels of an instruction set, by their names in csrc/table.c.

        Raises:
            LibraryError: the library has none for this instruction set.
        """
        try:
            entries = _symbol(self._library, _Entry, f"lpa_kernels_{instruction_set}")
        except ValueError:
            raise LibraryError(f"{self.path} has no kernels for {instruction_set}") from None
        found: dict[str, Kernel] = {}
        for entry in entries:
            found[entry.name.decode()] = _in_threads(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(entry.run))
        return found

    def _layout(self) -> dict[str, dict[str, tuple[int, int]]]:
        """record -> field -> (offset, size); the record itself under ""."""
        layout: dict[str, dict[str, tuple[int, int]]] = {}
        for field in _symbol(self._library, _Field, "lpa_fields", key="record"):
            fields = layout.setdefault(field.record.decode(), {})
            fields[(field.name or b"").decode()] = (field.offset, field.size)
        return layout


def check_records(layout: Mapping[str, Mapping[str, tuple[int, int]]]) -> None:
    """
    Raises:
        LibraryError: a record that is not as `args` has it, with its name and what differs.
    """
    if layout.keys() != RECORDS.keys():
        raise LibraryError(f"the library has the records {sorted(layout)}, this package {sorted(RECORDS)}")
    for name, record in RECORDS.items():
        ours: dict[str, tuple[int, int]] = {"": (0, record.itemsize)}
        for field, (dtype, offset) in ((key, value[:2]) for key, value in (record.fields or {}).items()):
            ours[field] = (offset, dtype.itemsize)
        theirs = layout[name]
        for field in sorted(ours.keys() | theirs.keys()):
            if ours.get(field) != theirs.get(field):
                raise LibraryError(
                    f"record {name}, {f'field {field}' if field else 'its size'}: (offset, bytes) is"
                    f" {theirs.get(field)} in the library, {ours.get(field)} in this package: `make kernels` compiles"
                    " it anew"
                )


@cache
def load() -> Library:
    """This platform's library.

    Raises:
        LibraryError: see `Library`.
    """
    return Library(LIBRARY)


def address_of(record: np.ndarray[tuple[int, ...], np.dtype[np.void]]) -> int:
    """What a kernel takes: the address of an array of one record. The array has to live until the kernel returns."""
    return int(record.ctypes.data)


def _symbol(library: ctypes.CDLL, kind: type[_Record], symbol: str, key: str = "name") -> list[_Record]:
    """An exported array of records, up to the first one without `key`."""
    end = 1
    while getattr((kind * end).in_dll(library, symbol)[end - 1], key) is not None:
        end += 1
    return list((kind * end).in_dll(library, symbol))[:-1]


def _in_threads(function: Callable[[int], None]) -> Kernel:
    parallel = _openmp()

    def start(record: int, items: int) -> None:
        threads = torch.get_num_threads()
        if items == 1 or threads == 1 or parallel is None:
            function(record)
        else:
            parallel(function, ctypes.c_void_p(record), threads, 0)

    return start


@cache
def _openmp() -> Callable[..., None] | None:
    """The start of a parallel region in the OpenMP library that torch runs on; None if there is none to be found.

    Its threads are there already, and two libraries' threads would get into each other's way.
    """
    return getattr(ctypes.CDLL(None), "GOMP_parallel", None) if sys.platform == "linux" else None
