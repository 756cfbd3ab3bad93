"""Worker processes that compile clients' grammars first, so that a crash, a hang or a gigabyte costs one worker.

A forker without torch reads the vocabulary once. For each grammar it forks a worker, whose processor time, memory and
stack the kernel limits; the worker ends with its answer. A fork costs milliseconds and shares the vocabulary, so every
grammar has a fresh process and none is left to be cleaned. The forker is started by the first grammar and again when
it has died; it ends when its socket does, so also when the server is killed.

    server ── socket of a job ──> forker ── fork ──> supervisor ── fork ──> worker
       <───────────────── answer, or the signal that ended the worker ─────────┘
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from server.engine.grammar_source import try_out
from server.engine.request import GrammarSpec
from server.engine.vocabulary import Vocabulary
from server.errors import EngineError, InvalidRequest, Unavailable

SECONDS = 15  # of processor time for one grammar
MEMORY = 512 << 20  # bytes beyond the vocabulary's
STACK = 2 << 20  # bytes; the server's threads have more, so what has not run out here does not there
PATIENCE = 60.0  # seconds on the clock for the same, where the machine has other things to do
START_SECONDS = 30.0  # on the clock, of the forker
NICENESS = 10  # behind the engine

ROOT = str(Path(__file__).parents[2])  # of the package `server`
START = (
    "import sys; sys.path[:] = {path!r}; from server.engine.grammar_workers import fork_workers; fork_workers({args})"
)


class GrammarWorkers:
    """The forker and its jobs; `try_out` may be called from several threads."""

    def __init__(
        self, vocabulary: Vocabulary, *, seconds: float = SECONDS, memory: int = MEMORY, patience: float = PATIENCE
    ) -> None:
        """`seconds` of processor time, bytes of `memory` and seconds of `patience` are what a grammar may take."""
        self._vocabulary = vocabulary
        self._seconds, self._memory, self._patience = seconds, memory, patience
        self._lock = threading.Lock()
        self._forker: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[Any, Any] | None = None
        self._control: socket.socket | None = None
        self._closed = False

    def try_out(self, spec: GrammarSpec) -> tuple[str, int]:
        """Compile and follow a grammar in a worker.

        Returns:
            llguidance's form of the grammar, and the bytes that it took.

        Raises:
            InvalidRequest: it cannot be compiled within the limits; the message says why.
            Unavailable: the machine had too little time for it.
            EngineError: there is no process to be had.
        """
        answer = self._ask(spec)
        if "source" in answer:
            return answer["source"], answer["bytes"]
        if answer.get("signal") == signal.SIGALRM:
            raise Unavailable(
                f"{spec.param}: is not compiled after {self._patience:g} seconds: the machine is too busy"
            )
        if "signal" in answer:
            reason = self._reason(answer["signal"])
            raise InvalidRequest(f"{spec.param}: cannot be compiled: {reason}", param=spec.param)
        raise InvalidRequest(answer["refusal"], param=spec.param)

    def _ask(self, spec: GrammarSpec) -> dict[str, Any]:
        for _ in range(2):  # a forker that has died meanwhile is started again
            ours, theirs = socket.socketpair()
            with ours:
                with theirs:
                    self._hand_over(theirs)
                ours.settimeout(self._patience + START_SECONDS)
                try:
                    ours.sendall(json.dumps(asdict(spec)).encode())
                    ours.shutdown(socket.SHUT_WR)
                    if answer := _read_all(ours):
                        return cast(dict[str, Any], json.loads(answer))
                except TimeoutError:
                    return {"signal": signal.SIGALRM}
                except OSError:
                    pass
        raise EngineError("the process that compiles grammars cannot be reached")

    def _reason(self, died_of: int) -> str:
        if died_of == signal.SIGPROF:
            return f"it takes more than {self._seconds:g} seconds of processor time"
        if died_of in (signal.SIGABRT, signal.SIGKILL):
            return f"it takes more than {self._memory >> 20} MiB of memory, or breaks the compiler"
        return "the compiler crashes on it"

    def _hand_over(self, job: socket.socket) -> None:
        with self._lock:
            for _ in range(0 if self._closed else 2):
                try:
                    if self._control is None or self._forker is None or self._forker.poll() is not None:
                        self._control = self._start()
                    socket.send_fds(self._control, [b"j"], [job.fileno()])
                    return
                except OSError:  # it has just died
                    self._stop()
        raise EngineError("no process can be started to compile grammars")

    def _start(self) -> socket.socket:
        self._stop()
        ours, theirs = socket.socketpair()
        with theirs:
            args = f"{theirs.fileno()}, {self._seconds!r}, {self._memory}, {self._patience!r}"
            # an editable installation is found by a hook that is not there without `site`
            code = START.format(path=[ROOT, *sys.path], args=args)
            self._forker = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # ^C is for the server, which then closes the socket
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},  # threads and forks do not go together
            )
        self._end = weakref.finalize(self, _end, self._forker, ours)
        content = pickle.dumps(self._vocabulary)
        ours.sendall(len(content).to_bytes(8, "little") + content)
        return ours

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._forker = self._control = self._end = None

    @property
    def pid(self) -> int | None:
        """The forker's, if there is one."""
        return None if self._forker is None else self._forker.pid

    def close(self) -> None:
        """End the forker and all workers; jobs in progress end with EngineError."""
        with self._lock:
            self._closed = True
            self._stop()


def _end(forker: subprocess.Popen[bytes], control: socket.socket) -> None:
    control.close()
    with suppress(ProcessLookupError):
        os.killpg(forker.pid, signal.SIGKILL)  # its workers are in its session
    forker.wait()


def _read_all(connection: socket.socket) -> bytes:
    pieces = []
    while piece := connection.recv(1 << 16):
        pieces.append(piece)
    return b"".join(pieces)


def _read_exactly(connection: socket.socket, size: int) -> bytes:
    """No byte of what follows, which may carry a descriptor."""
    content = bytearray()
    while len(content) < size:
        if not (piece := connection.recv(size - len(content))):
            raise EOFError("the server is gone")
        content += piece
    return bytes(content)


def fork_workers(fd: int, seconds: float, memory: int, patience: float) -> None:
    """The forker's main loop: a fork for each socket that comes, until the other end closes."""
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    control = socket.socket(fileno=fd)
    size = int.from_bytes(_read_exactly(control, 8), "little")
    native = pickle.loads(_read_exactly(control, size)).native()
    gc.freeze()  # a collection in a worker would copy what it shares
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps supervisors
    while True:
        message, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        with socket.socket(fileno=fds[0]) as job:
            if os.fork() == 0:
                control.close()
                try:
                    _supervise(job, native, seconds, memory, patience)
                finally:
                    os._exit(0)


def _supervise(job: socket.socket, vocabulary: Any, seconds: float, memory: int, patience: float) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    worker = os.fork()
    if worker == 0:
        try:
            _work(job, vocabulary, seconds, memory, patience)
        finally:
            os._exit(0)
    _, status = os.waitpid(worker, 0)
    if os.WIFSIGNALED(status):
        job.sendall(json.dumps({"signal": os.WTERMSIG(status)}).encode())


def _work(job: socket.socket, vocabulary: Any, seconds: float, memory: int, patience: float) -> None:
    """One grammar, in a thread: its stack is smaller than the server's."""
    spec = GrammarSpec(**json.loads(_read_all(job)))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a library writes when it dies
    answer: Mapping[str, Any] = {}

    def run() -> None:
        nonlocal answer
        answer = _try_out(spec, vocabulary)

    threading.stack_size(STACK)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # the kernel ends the process when they ring
    signal.setitimer(signal.ITIMER_REAL, patience)
    if size := _memory()[0]:
        resource.setrlimit(resource.RLIMIT_AS, (size + memory,) * 2)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    job.sendall(json.dumps(answer).encode())


def _try_out(spec: GrammarSpec, vocabulary: Any) -> Mapping[str, Any]:
    before = _memory()[1]
    try:
        source = try_out(vocabulary, spec)
    except InvalidRequest as error:
        return {"refusal": error.message}
    except MemoryError:
        return {"signal": signal.SIGABRT}
    except BaseException as error:  # a panic of the library is one, too
        what = (str(error).strip().splitlines() or [""])[0][:200]
        return {"refusal": f"{spec.param}: cannot be compiled: {type(error).__name__}: {what}"}
    return {"source": source, "bytes": max(0, _memory()[1] - before)}


def _memory() -> tuple[int, int]:
    """Bytes of this process's addresses, and those that are resident; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            size, resident, *_ = map(int, file.read().split())
    except OSError:
        return 0, 0
    page = resource.getpagesize()
    return size * page, resident * page
