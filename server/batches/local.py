"""A batch's file on the command line: the server's application in this process, without a socket."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path

from server.app import create_app
from server.batches.lines import Line, LineError, read_lines
from server.batches.runner import answer_all, check_file
from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from server.metrics import Metrics
from server.settings import Settings


class Part:
    """Answers that are there, in the order in which they came, until all are: a file beside the output.

    A process that was killed leaves at most half a line at its end, which does not count.
    """

    def __init__(self, output: Path) -> None:
        self._path = output.with_name(f"{output.name}.part")
        self._output = output
        self._places: dict[str, tuple[int, int]] = {}  # by custom_id: offset and bytes
        self._file = self._path.open("a+b")
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            self._places[json.loads(line)["custom_id"]] = (end, len(line))
            end += len(line)
        self._file.truncate(end)
        self._end = end

    def __contains__(self, custom_id: str) -> bool:
        return custom_id in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, custom_id: str, text: str) -> None:
        """The answer of a line; it is on its way to the disk when this returns."""
        data = f"{text}\n".encode()
        self._file.write(data)
        self._file.flush()
        self._places[custom_id] = (self._end, len(data))
        self._end += len(data)

    def finish(self, custom_ids: Iterator[str]) -> None:
        """Write the output, in this order, and remove the file."""
        new = self._output.with_name(f"{self._output.name}.new")
        with new.open("wb") as file:
            for name in custom_ids:
                offset, size = self._places[name]
                self._file.seek(offset)
                file.write(self._file.read(size))
        new.replace(self._output)
        self.close()
        self._path.unlink()

    def close(self) -> None:
        """What is there stays for the next time."""
        self._file.close()


def check(source: Path, settings: Settings) -> int:
    """The number of lines.

    Raises:
        ValueError: a line is wrong; the message names the first, and says how many are.
        OSError: the file cannot be read.
    """
    total, errors = check_file(_lines(source, settings), settings)
    if errors:
        others = f"; {len(errors) - 1} more lines are wrong" if len(errors) > 1 else ""
        raise ValueError(f"{source}:{errors[0].number}: {errors[0].message}{others}")
    return total


async def run(
    source: Path, output: Path, engine: Engine, settings: Settings, progress: Callable[[int, int], None]
) -> int:
    """Answer every line of `source` into `output`, in its order; returns how many failed in this run.

    What an earlier run of the same files has answered stays; `progress` is told of lines answered and failed.
    """
    settings = settings.model_copy(update={"data_dir": None})  # its batches are a server's
    app = create_app(AsyncEngine(engine, lambda _: None, max_queue=settings.max_queue), settings, Metrics("batch"))
    part, failed = Part(output), 0
    try:
        progress(len(part), failed)
        left = (line for line in _requests(source, settings) if line.custom_id not in part)
        with ThreadPoolExecutor(1) as reading:
            async with (
                app.router.lifespan_context(app),
                aclosing(answer_all(app, left, reading, settings.max_num_seqs)) as answers,
            ):
                async for found in answers:
                    for line, answer in found:
                        part.add(line.custom_id, answer.text)
                        failed += answer.failed
                    progress(len(part), failed)
        part.finish(line.custom_id for line in _requests(source, settings))
    finally:
        part.close()
    return failed


def _lines(source: Path, settings: Settings) -> Iterator[Line | LineError]:
    return read_lines(source, None, settings.max_body_bytes, settings.max_body_values)


def _requests(source: Path, settings: Settings) -> Iterator[Line]:
    return (line for line in _lines(source, settings) if isinstance(line, Line))
