"""Text of files, piece by piece: memory holds a piece of a file of any size.

A file is UTF-8 text, or JSONL with a document in a field of each line; .gz of both. Pieces are paragraphs, so that
encoding them one by one gives the tokens of the whole text.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

BLOCK = 1 << 20
"""Bytes that are read at a time."""
LONGEST_PIECE = 1 << 20
"""Characters; a longer paragraph is cut behind a line, or else behind a space."""
LONGEST_LINE = 1 << 26
"""Bytes of a line of JSONL, which must be in memory as a whole to be read."""

Tick = Callable[[int], None]
"""Called with the bytes of the files that have been read; compressed ones, of a .gz."""


def is_jsonl(path: Path) -> bool:
    """By the file's name: .jsonl or .ndjson, .gz behind it or not."""
    return path.with_suffix("" if path.suffix == ".gz" else path.suffix).suffix in (".jsonl", ".ndjson")


def read_text(path: Path) -> str:
    """A whole UTF-8 text file, gzipped if its name ends in .gz.

    Raises:
        ValueError: it is not UTF-8; the message names the line.
        OSError: the file cannot be read.
    """
    return "".join(_blocks(path, lambda read: None))


def pieces(paths: Sequence[Path], end: str, field: str = "text", tick: Tick = lambda read: None) -> Iterator[str]:
    """The text of files one after another, piece by piece.

    Args:
        end: the end-of-text token, which is put behind every document of JSONL and between files. Documents of a text
            file have it between them already.
        field: of every object in a JSONL file, that has its text.

    Raises:
        ValueError: a file has no text, or some that is not UTF-8, not JSON or without the field; the message names the
            file and the line.
        OSError: a file cannot be read.
    """
    last, done = "", 0
    for path in paths:
        if last and not last.rstrip().endswith(end):
            yield end
        last, before = "", done

        def ticked(read: int, before: int = before) -> None:
            tick(before + read)

        if is_jsonl(path):
            for text in filter(None, _fields(path, field, ticked)):
                yield from paragraphs([text])
                yield end
                last = end or text
        else:
            for last in paragraphs(_blocks(path, ticked)):
                yield last
        if not last:
            raise ValueError(f"{path}: has no text")
        done += path.stat().st_size


def paragraphs(blocks: Iterable[str]) -> Iterator[str]:
    """Blocks of a text cut anew: behind its blank lines, and where a paragraph is longer than LONGEST_PIECE."""
    rest = ""
    for block in blocks:
        *whole, rest = (rest + block).split("\n\n")
        for paragraph in whole:
            yield from _cut(paragraph + "\n\n")
        if len(rest) > 2 * LONGEST_PIECE:
            *parts, rest = _cut(rest)
            yield from parts
    if rest:
        yield from _cut(rest)


def _cut(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > LONGEST_PIECE:
        end = start + LONGEST_PIECE
        cut = text.rfind("\n", start, end) + 1 or max(text.rfind(" ", start + 1, end), 0) or end
        yield text[start:cut]
        start = cut
    yield text[start:]


def _blocks(path: Path, tick: Tick) -> Iterator[str]:
    """A UTF-8 file without its byte order mark, line ends as \\n."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    line = 1
    with _opened(path) as (file, raw):
        last = False
        while not last:
            block = file.read(BLOCK)
            tick(raw.tell())
            last = not block
            try:
                text = decoder.decode(block, final=last)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise ValueError(f"{path}, line {line}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from error
            line += block.count(b"\n")
            if text:
                yield text


def _fields(path: Path, field: str, tick: Tick) -> Iterator[str]:
    """One field of every line of a JSONL file."""
    with _opened(path) as (file, raw):
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            tick(raw.tell())
            where = f"{path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{where}: is longer than {LONGEST_LINE} bytes")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                found = json.loads(line.decode())
                text = found[field] if isinstance(found, dict) and field in found else None
                if isinstance(text, str):
                    text.encode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from error
            except UnicodeEncodeError as error:
                raise ValueError(f"{where}: {field!r} has half of a surrogate pair") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON: {error}") from error
            if not isinstance(found, dict):
                raise ValueError(f"{where}: not a JSON object")
            if field not in found:
                raise ValueError(f"{where}: has no field {field!r}, but {', '.join(map(repr, found)) or 'none'}")
            if not isinstance(text, str):
                raise ValueError(f"{where}: {field!r} is not a string")
            yield text


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file to read from, unpacked if its name ends in .gz, and the file on the disk."""
    with path.open("rb") as raw:
        if path.suffix != ".gz":
            yield raw, raw
            return
        try:
            with gzip.GzipFile(fileobj=raw) as file:
                yield cast(BinaryIO, file), raw
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: truncated, or not a gzip file: {error}") from error
