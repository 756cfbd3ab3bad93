"""Files, jobs and finished lines in a folder: contents as files, everything else in SQLite.

A finished line is in the database before it counts, so that a process which is killed loses none; a job's output is
written from there in one piece, in the order of its input, when the job ends. Every method blocks, and all are called
by one thread.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from server.batches.execute import Answer
from server.errors import InvalidRequest, NotFound
from server.keys import ADMIN

Status = Literal["validating", "in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled", "expired"]
IS_ACTIVE = "status IN ('validating', 'in_progress', 'finalizing', 'cancelling')"
EXPIRES_AFTER = 24 * 3600  # seconds; OpenAI's completion_window "24h" is the only one
FORMAT = 1  # of the database

TABLES = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, filename TEXT NOT NULL,
    purpose TEXT NOT NULL, bytes INTEGER NOT NULL, created_at INTEGER NOT NULL
);
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, status TEXT NOT NULL,
    total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
    document TEXT NOT NULL
);
CREATE TABLE lines (
    batch TEXT NOT NULL, line INTEGER NOT NULL, failed INTEGER NOT NULL, text TEXT NOT NULL,
    PRIMARY KEY (batch, line)
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Job:
    """A batch as the runner sees it."""

    id: str
    owner: str
    status: Status
    endpoint: str
    input_file_id: str
    expires_at: int


class Store:
    """A folder that one server owns."""

    def __init__(self, folder: Path) -> None:
        """Opens or creates it.

        Raises:
            ValueError: it cannot be used, is of another version, or another server has it.
        """
        self._folder = folder
        try:
            (folder / "files").mkdir(parents=True, exist_ok=True)
            self._lock = (folder / "lock").open("w")
        except OSError as error:
            raise ValueError(f"data_dir: {folder} cannot be used: {error.strerror}") from None
        try:
            self._open()
        except BaseException:
            self._lock.close()
            raise

    def _open(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"data_dir: another server uses {self._folder}") from None
        self._db = sqlite3.connect(self._folder / "batches.sqlite", check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._db.executescript(f"BEGIN;{TABLES}PRAGMA user_version={FORMAT};COMMIT;")
        elif version != FORMAT:
            self._db.close()
            raise ValueError(f"data_dir: {self._folder} is of version {version}; this server reads version {FORMAT}")
        known = {name for (name,) in self._db.execute("SELECT id FROM files")}
        for path in (self._folder / "files").iterdir():  # a server was killed between the file and its entry
            if path.name not in known:
                path.unlink()

    def close(self) -> None:
        """Another server may have the folder."""
        self._db.close()
        self._lock.close()

    # --- files -----------------------------------------------------------------------------------------------------

    def path(self, file_id: str) -> Path:
        """Where the content of a file is."""
        return self._folder / "files" / file_id

    def new_path(self) -> Path:
        """For a content that is being written; `add_file` takes it in."""
        return self._folder / "files" / f"new-{secrets.token_hex(12)}"

    def add_file(self, written: Path, owner: str, filename: str, purpose: str, file_id: str = "") -> dict[str, Any]:
        """Take in what was written to a `new_path`; returns its document. With an id, it replaces that file."""
        file_id = file_id or f"file-{secrets.token_hex(12)}"
        size = written.stat().st_size
        written.replace(self.path(file_id))
        self._db.execute(
            "INSERT OR REPLACE INTO files (id, owner, filename, purpose, bytes, created_at) VALUES (?, ?, ?, ?, ?, ?)",
            (file_id, owner, filename, purpose, size, int(time.time())),
        )
        return self.file(file_id, owner)

    def file(self, file_id: str, owner: str) -> dict[str, Any]:
        """OpenAI's document of a file. Raises NotFound."""
        return _file_document(self._find("file", FILE, file_id, owner))

    def files(
        self, owner: str, purpose: str | None, after: str | None, limit: int, order: Literal["asc", "desc"]
    ) -> tuple[list[dict[str, Any]], bool]:
        """A page of files, and whether there are more. Raises NotFound of `after`."""
        where, values = OWNED, [owner, owner == ADMIN]
        if purpose is not None:
            where, values = f"{where} AND purpose = ?", [*values, purpose]
        rows, more = self._page("files", FILE, where, values, after, limit, order)
        return [_file_document(row) for row in rows], more

    def delete_file(self, file_id: str, owner: str) -> None:
        """Raises NotFound, or InvalidRequest while a batch reads it."""
        self.file(file_id, owner)
        used = self._db.execute(
            f"SELECT id FROM batches WHERE {IS_ACTIVE} AND json_extract(document, '$.input_file_id') = ?", (file_id,)
        ).fetchone()
        if used:
            raise InvalidRequest(f"file_id: {used[0]} reads this file; cancel it first", param="file_id")
        self._db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.path(file_id).unlink(missing_ok=True)

    # --- batches ---------------------------------------------------------------------------------------------------

    def add_batch(self, owner: str, input_file_id: str, endpoint: str, metadata: dict[str, str] | None) -> str:
        """Queue a job over a file of the same owner; returns its id. Raises NotFound."""
        found = self.file(input_file_id, owner)
        if found["purpose"] != "batch":
            raise InvalidRequest("input_file_id: is no file with purpose batch", param="input_file_id")
        batch_id, now = f"batch_{secrets.token_hex(12)}", int(time.time())
        document = {
            "endpoint": endpoint,
            "input_file_id": input_file_id,
            "completion_window": "24h",
            "created_at": now,
            "expires_at": now + EXPIRES_AFTER,
            "metadata": metadata,
        }
        self._db.execute(
            "INSERT INTO batches (id, owner, status, document) VALUES (?, ?, 'validating', ?)",
            (batch_id, owner, json.dumps(document)),
        )
        return batch_id

    def batch(self, batch_id: str, owner: str) -> dict[str, Any]:
        """OpenAI's document of a batch. Raises NotFound."""
        return _batch_document(self._find("batch", BATCH, batch_id, owner))

    def batches(self, owner: str, after: str | None, limit: int) -> tuple[list[dict[str, Any]], bool]:
        """A page of batches, the newest first, and whether there are more. Raises NotFound of `after`."""
        rows, more = self._page("batches", BATCH, OWNED, [owner, owner == ADMIN], after, limit, "desc")
        return [_batch_document(row) for row in rows], more

    def _find(self, kind: Literal["file", "batch"], columns: str, name: str, owner: str) -> Any:
        """Raises NotFound where an owner has none of this id."""
        table = "files" if kind == "file" else "batches"
        row = self._db.execute(
            f"SELECT {columns} FROM {table} WHERE id = ? AND {OWNED}", (name, owner, owner == ADMIN)
        ).fetchone()
        if row is None:
            raise NotFound(f"there is no {kind} {name[:64]!r}", param=f"{kind}_id", code=f"{kind}_not_found")
        return row

    def _page(
        self, table: str, columns: str, where: str, values: Sequence[Any], after: str | None, limit: int, order: str
    ) -> tuple[list[Any], bool]:
        if after is not None:
            found = self._db.execute(f"SELECT number FROM {table} WHERE id = ? AND {OWNED}", (after, *values[:2]))
            if (row := found.fetchone()) is None:
                raise NotFound(f"after: there is no {after[:64]!r}", param="after")
            where, values = f"{where} AND number {'<' if order == 'desc' else '>'} ?", [*values, row[0]]
        rows = self._db.execute(
            f"SELECT {columns} FROM {table} WHERE {where} ORDER BY number {order} LIMIT ?", (*values, limit + 1)
        ).fetchall()
        return rows[:limit], len(rows) > limit

    def next_job(self) -> Job | None:
        """The oldest batch that is not done."""
        row = self._db.execute(
            f"SELECT id, owner, status, document FROM batches WHERE {IS_ACTIVE} ORDER BY number LIMIT 1"
        ).fetchone()
        if row is None:
            return None
        document = json.loads(row[3])
        return Job(row[0], row[1], row[2], document["endpoint"], document["input_file_id"], document["expires_at"])

    def status(self, batch_id: str) -> Status:
        """Of a batch that exists."""
        found: tuple[Status] = self._db.execute("SELECT status FROM batches WHERE id = ?", (batch_id,)).fetchone()
        return found[0]

    def cancel(self, batch_id: str, owner: str) -> dict[str, Any]:
        """Have a job end. Raises NotFound, or InvalidRequest if it has ended."""
        found = self.batch(batch_id, owner)
        if found["status"] not in ("validating", "in_progress", "cancelling"):
            raise InvalidRequest(f"batch_id: the batch is {found['status']}", param="batch_id")
        if found["status"] != "cancelling":
            self.set_status(batch_id, "cancelling")
        return self.batch(batch_id, owner)

    def set_status(self, batch_id: str, status: Status, *, total: int | None = None, **fields: Any) -> None:
        """Move a job on: its time is noted, its number of lines if that is known now, and more for its document."""
        patch = json.dumps({**fields, f"{status}_at": int(time.time())})
        self._db.execute(
            "UPDATE batches SET status = ?, total = coalesce(?, total), document = json_patch(document, ?) "
            "WHERE id = ?",
            (status, total, patch, batch_id),
        )

    def finished_lines(self, batch_id: str) -> set[int]:
        """Numbers of the lines that have their answers."""
        return {number for (number,) in self._db.execute("SELECT line FROM lines WHERE batch = ?", (batch_id,))}

    def counts(self) -> tuple[dict[str, int], int]:
        """Batches by status, and lines of those that are not done which have no answer yet."""
        statuses = dict(self._db.execute("SELECT status, count(*) FROM batches GROUP BY status").fetchall())
        (waiting,) = self._db.execute(
            f"SELECT coalesce(sum(total - completed - failed), 0) FROM batches WHERE {IS_ACTIVE}"
        ).fetchone()
        return {status: statuses.get(status, 0) for status in get_args(Status)}, waiting

    def add_answers(self, batch_id: str, answers: Iterable[tuple[int, Answer]]) -> tuple[int, int]:
        """Keep the answers of lines; the first answer of a line is the one that stays. Returns how many were new: those
        completed, and those failed."""
        counts = [0, 0]
        with self._together():
            for number, answer in answers:
                added = self._db.execute(
                    "INSERT OR IGNORE INTO lines VALUES (?, ?, ?, ?)", (batch_id, number, answer.failed, answer.text)
                ).rowcount
                column = "failed" if answer.failed else "completed"
                counts[answer.failed] += added
                if added:
                    self._db.execute(f"UPDATE batches SET {column} = {column} + 1 WHERE id = ?", (batch_id,))
        return counts[0], counts[1]

    @contextmanager
    def _together(self) -> Iterator[None]:
        """All of the changes, or none."""
        self._db.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def finish(self, job: Job, status: Status) -> None:
        """Write a job's output and error file, those that have a line, and set its last status. A process that is
        killed meanwhile leaves it to be done again."""
        fields: dict[str, Any] = {}
        for failed, name in ((0, "output"), (1, "error")):
            path = self.new_path()
            with path.open("w", encoding="utf-8") as file:
                rows = self._db.execute(
                    "SELECT text FROM lines WHERE batch = ? AND failed = ? ORDER BY line", (job.id, failed)
                )
                for (text,) in rows:
                    file.write(f"{text}\n")
                file.flush()
                os.fsync(file.fileno())
            if not path.stat().st_size:
                path.unlink()
                continue
            file_id = f"file-{name}-{job.id.removeprefix('batch_')}"
            self.add_file(path, job.owner, f"{job.id}_{name}.jsonl", "batch_output", file_id)
            fields[f"{name}_file_id"] = file_id
        with self._together():
            self.set_status(job.id, status, **fields)
            self._db.execute("DELETE FROM lines WHERE batch = ?", (job.id,))


OWNED = "(owner = ? OR ?)"
FILE = "id, filename, purpose, bytes, created_at"
BATCH = "id, status, total, completed, failed, document"
TIMES = ("created", "in_progress", "expires", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


def _file_document(row: Sequence[Any]) -> dict[str, Any]:
    file_id, filename, purpose, size, created_at = row
    return {
        "id": file_id,
        "object": "file",
        "bytes": size,
        "created_at": created_at,
        "filename": filename,
        "purpose": purpose,
        "status": "processed",
    }


def _batch_document(row: Sequence[Any]) -> dict[str, Any]:
    batch_id, status, total, completed, failed, text = row
    document = json.loads(text)
    times = {f"{name}_at": document.get(f"{name}_at") for name in TIMES}
    return {
        "id": batch_id,
        "object": "batch",
        "endpoint": document["endpoint"],
        "errors": document.get("errors"),
        "input_file_id": document["input_file_id"],
        "completion_window": document["completion_window"],
        "status": status,
        "output_file_id": document.get("output_file_id"),
        "error_file_id": document.get("error_file_id"),
        **times,
        "request_counts": {"total": total, "completed": completed, "failed": failed},
        "metadata": document.get("metadata"),
    }
