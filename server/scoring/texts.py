"""Texts from files, folders and standard input, one at a time: read lazily."""

from __future__ import annotations

import gzip
import json
import os
import sys
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

TEXT_SUFFIXES = (".txt", ".md")
LINES_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Source:
    """Where a text is from. `line` counts from 1 in a file of lines, None in a file that is one text."""

    file: str
    line: int | None
    size: int  # bytes of the file on disk that it takes

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"

    def fields(self) -> dict[str, Any]:
        """The fields that identify the text in an answer."""
        return {"file": self.file, "line": self.line}


Advance = Callable[[float, int], None]
"""Told of progress: bytes of the files, scored tokens."""

OnTokens = Callable[[Source, list[dict[str, Any]]], None]
"""Given the entries of a text's tokens in order, run by run."""


def find_files(names: Sequence[str], field: str | None) -> list[str]:
    """The files that are named, and those in folders that are named, at any depth, in the order of their paths.

    Of a folder .txt and .md files are taken, or .jsonl and .ndjson ones with `field`; .gz may follow. What is hidden
    is left out.

    Raises:
        ValueError: there is no such file or folder, a folder has none, or a file of JSON lines is to be one text.
    """
    found: list[str] = []
    for name in names:
        path = Path(name)
        if name != "-" and path.is_dir():
            found += _in_folder(path, LINES_SUFFIXES if field is not None else TEXT_SUFFIXES)
        elif name != "-" and not path.exists():
            raise ValueError(f"{name}: No such file or directory")
        elif field is None and _has_suffix(path, LINES_SUFFIXES):
            raise ValueError(f"{name}: is a file of JSON lines; --field says which field of theirs is the text")
        else:
            found.append(name)
    return found


def _in_folder(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    found = sorted(
        path
        for path in folder.rglob("*")
        if _has_suffix(path, suffixes)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise ValueError(f"{folder}: has no {' or '.join(suffixes)} file")
    return [str(path) for path in found]


def _has_suffix(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(suffixes)


def total_size(files: Sequence[str]) -> int | None:
    """Bytes of all files as they are stored; None if one is a pipe, whose length is unknown."""
    paths = [Path(name) for name in files]
    if not all(name != "-" and path.is_file() for name, path in zip(files, paths, strict=True)):
        return None
    return sum(path.stat().st_size for path in paths)


def read_texts(files: Sequence[str], field: str | None) -> Iterator[tuple[Source, str]]:
    """The texts of files in order: a file each, or with `field` that field of every line, in JSON.

    Nothing of a text is changed, line ends neither; a byte order mark at the beginning of a file is none of it. Blank
    lines among JSON are skipped; a name that ends in .gz is unpacked; - is standard input.

    Raises:
        ValueError: a file cannot be read, is not UTF-8 or not as it is said to be; the message names file and line.
    """
    for name in files:
        with _naming(name), _open(name) as (stored, file):
            if field is None:
                content = file.read().removeprefix(BOM_UTF8)
                yield Source(name, None, stored.tell() if stored.seekable() else 0), _decode(content, name)
            else:
                yield from _read_lines(name, stored, file, field)


def _read_lines(name: str, stored: IO[bytes], file: IO[bytes], field: str) -> Iterator[tuple[Source, str]]:
    before = 0
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(BOM_UTF8)
        if line.isspace():
            continue
        position = stored.tell() if stored.seekable() else 0
        source = Source(name, number, position - before)
        before = position
        yield source, _field(line, field, str(source))


def _field(line: bytes, field: str, where: str) -> str:
    try:
        value: Any = json.loads(_decode(line, where))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict) or field not in value:
        raise ValueError(f"{where}: not an object with a field {field!r}")
    text = value[field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} is not a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half a surrogate pair at character {error.start} is no Unicode text") from None
    return text


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start}") from None


@contextmanager
def _open(name: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The file as it is stored, whose position shows how much of it has been read, and as it is unpacked."""
    if name == "-":
        yield sys.stdin.buffer, sys.stdin.buffer
        return
    with open(name, "rb") as stored:
        if os.path.splitext(name)[1] == ".gz":
            with gzip.open(stored) as file:
                yield stored, file  # type: ignore[misc]  # typeshed: a GzipFile is no IO
        else:
            yield stored, stored


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name}: {getattr(error, 'strerror', None) or error}") from error
