"""The CSV file with a line for each report of a run, which a resumed run continues without a gap or a repetition."""

from __future__ import annotations

import csv
import fcntl
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True)
class Row:
    """A line of the file.

    `tokens` seen so far; `loss` of the step, in nats per token; `grad_norm` before clipping; `validation_loss` in nats
    per token, and `bits_per_byte` of it, where the model was validated; the speed since the line before.
    """

    step: int
    tokens: int
    loss: float
    learning_rate: float
    grad_norm: float
    validation_loss: float | None
    bits_per_byte: float | None
    tokens_per_second: float


COLUMNS = tuple(field.name for field in fields(Row))


class Metrics:
    """The file while a run writes it; the bytes that it had when the state was written are kept with that state."""

    def __init__(self, path: Path, length: int | None) -> None:
        """Go on behind the first `length` bytes of a file; begin it anew for None, or if it is not there.

        Raises:
            ValueError: the file is shorter than that, or another run is writing it.
        """
        self.file: BinaryIO = path.open("ab")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise ValueError(f"{path.parent}: another run is writing there") from None
        size = os.fstat(self.file.fileno()).st_size
        if length is not None and 0 < size < length:
            self.file.close()
            raise ValueError(f"{path}: has lost lines since the state was written; move it away to begin another")
        self.file.truncate(length if length is not None and size else 0)
        if length is None or not size:
            self._write(",".join(COLUMNS))

    def _write(self, line: str) -> None:
        self.file.write(line.encode() + b"\n")
        self.file.flush()

    def add(self, row: Row) -> None:
        """Append a line; numbers are written so that reading them gives the same bits."""
        self._write(",".join("" if (value := getattr(row, name)) is None else repr(value) for name in COLUMNS))

    def length(self) -> int:
        """Bytes of the file, all on the disk."""
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[Row]:
    """The lines of a file that `Metrics` wrote.

    Raises:
        ValueError: it is not one of those; the message has the line.
    """
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        if tuple(next(lines, ())) != COLUMNS:
            raise ValueError(f"{path}: has not the columns {', '.join(COLUMNS)}")
        for line in lines:
            try:
                step, tokens, loss, rate, norm, nats, bits, speed = line
                validation = (float(nats) if nats else None, float(bits) if bits else None)
                rows.append(
                    Row(int(step), int(tokens), float(loss), float(rate), float(norm), *validation, float(speed))
                )
            except ValueError as error:
                raise ValueError(f"{path}, line {lines.line_num}: not a line of metrics") from error
    return rows
