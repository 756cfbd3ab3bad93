"""A server in this process, for benchmarks that look at its inside or compare two settings of it."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from server.serve import Server
from server.settings import Settings

START_TIMEOUT = 60.0  # seconds


@dataclass(frozen=True)
class LocalServer:
    """A running server, and the identifier of the thread of its event loop."""

    server: Server
    url: str
    loop_thread: int


@contextlib.contextmanager
def local_server(settings: Settings) -> Iterator[LocalServer]:
    """Serve on a free port of 127.0.0.1; ValueError if it does not start. What it prints goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        server = Server(settings.model_copy(update={"host": "127.0.0.1", "port": 0}))
        thread = threading.Thread(target=server.run, name="event loop")
        thread.start()
        try:
            deadline = time.monotonic() + START_TIMEOUT
            while not server.started:
                if not thread.is_alive() or time.monotonic() > deadline:
                    raise ValueError("the server did not start")
                time.sleep(0.01)
            assert thread.ident is not None
            yield LocalServer(server, f"http://127.0.0.1:{server.port}", thread.ident)
        finally:
            server.should_exit = True
            thread.join()
