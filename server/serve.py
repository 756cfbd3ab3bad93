"""The serving process: logging, signals, the line to try, and its end."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import logging
import os
import shlex
import socket
import sys
import threading
from concurrent.futures import Future
from types import FrameType

import uvicorn

from server.app import create_app
from server.connection import connection_class
from server.engine.async_engine import AsyncEngine
from server.engine.engine import build_engine
from server.engine.memory import release_code
from server.listen import LOOPBACK, explain, listeners, unix_listener, url_of
from server.logs import configure_logging
from server.metrics import Metrics
from server.settings import Settings
from server.tls import tls_options

logger = logging.getLogger(__name__)

FLUSH_TIMEOUT = 5  # seconds that the last answers get to reach slow readers
EXIT_TIMEOUT = 1.0  # seconds that threads get to end when all is served
SWITCH_INTERVAL = 0.001  # seconds that a thread keeps the GIL while the event loop waits for it
YOUNG = 10_000  # objects; the collector looks for garbage among the latest ones when there are so many more


def serve(settings: Settings, hashing: Future[str]) -> int:
    """Serve until a signal comes, or the engine dies; returns the process's exit status.

    `hashing`: the model's `weights_hash`, which is under way.

    Raises:
        CheckpointError, ValueError: the model or a setting cannot be used; the message names it.
    """
    gc.freeze()  # modules live as long as the process: collections while the model is loaded pass over them
    configure_logging(settings)
    server = Server(settings, hashing, owns_process=True)
    for line in settings.given():
        logger.info("setting: %s", line)
    server.run()
    return server.status


class Server(uvicorn.Server):
    """uvicorn that drains first: after the first signal /ready is 503, new requests are refused and those that have
    begun get `drain_timeout` seconds, all while the port is open. A second signal ends the process at once.

    The port is taken before the model is loaded. With `owns_process`, the server says on stdout where it is, and
    nothing keeps the process longer than the drain: a thread that tokenizes a huge text, or a step that hangs, ends
    with it.

    Raises:
        CheckpointError, ValueError: the model or a setting cannot be used; the message names it.
    """

    def __init__(self, settings: Settings, hashing: Future[str] | None = None, *, owns_process: bool = False) -> None:
        self._settings = settings
        self._tls = tls_options(settings)
        self._listeners = (
            listeners(settings.host, settings.port) if settings.uds is None else [unix_listener(settings.uds)]
        )
        self._owns_process = owns_process
        self._descriptors_left = True
        try:
            self._build(settings, hashing)
        except BaseException:
            self._remove_socket()
            for listener in self._listeners:
                listener.close()
            raise

    def _build(self, settings: Settings, hashing: Future[str] | None) -> None:
        self.metrics = Metrics(settings.model_name, settings.metrics_prefix)
        self.engine = AsyncEngine(
            build_engine(settings.model, settings.engine_options(), hashing),
            self.metrics.observe,
            max_queue=settings.max_queue,
            on_death=self._end,
        )
        config = uvicorn.Config(
            create_app(self.engine, settings, self.metrics),
            host=settings.host,
            port=settings.port,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=FLUSH_TIMEOUT,
            timeout_keep_alive=settings.keep_alive_timeout,  # type: ignore[arg-type]  # any number of seconds
            http=connection_class(settings),
            h11_max_incomplete_event_size=settings.max_header_bytes,
            ws="none",
            proxy_headers=settings.proxy_headers,
            forwarded_allow_ips=list(settings.forwarded_allow_ips or LOOPBACK.values()),
            **self._tls,
        )
        super().__init__(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    @property
    def status(self) -> int:
        """The process's exit status: 0 if it has served and no request was cut off."""
        clean = self.started and self.engine.alive and not self.engine.num_cut_off and not self.force_exit
        return 0 if clean else 1

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await super().serve(self._listeners)
        if self._owns_process:
            self._end_process(EXIT_TIMEOUT)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await super().startup(sockets)
        except OSError as error:  # another program was quicker
            await self.lifespan.shutdown()
            raise ValueError(explain(error, self._settings.host, self._settings.port)) from None
        if self.started and self._owns_process:
            own_process()
            print(greeting(self._settings, self.port), flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._remove_socket()
        await super().shutdown(sockets)

    def _remove_socket(self) -> None:
        """While it still listens: so it is no other server's, which would have found it taken."""
        if self._settings.uds is not None:
            self._settings.uds.unlink(missing_ok=True)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if counter % 10 == 0:
            self._check_descriptors()
        return await super().on_tick(counter)

    def _check_descriptors(self) -> None:
        """Log and count when none is left: the event loop then drops connections silently."""
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self.metrics.count_out_of_descriptors()
            if self._descriptors_left:
                logger.error("no file descriptor is left: new connections are dropped; raise the limit (ulimit -n)")
            self._descriptors_left = False
            return
        if not self._descriptors_left:
            logger.warning("there are file descriptors again")
        self._descriptors_left = True

    @property
    def port(self) -> int:
        """The port that is open; `port` 0 means any free one. Of a Unix socket 0."""
        address = self.servers[0].sockets[0].getsockname()
        return 0 if isinstance(address, str) else int(address[1])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the interpreter in the main thread, between any two instructions."""
        if self._loop is None:
            super().handle_exit(sig, frame)
        elif self._draining is not None or self.should_exit:
            logger.warning("a second signal: the process ends now, and requests are cut off")
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = asyncio.create_task(self._stop_engine())
        if self._owns_process:
            self._end_process(self._settings.drain_timeout + FLUSH_TIMEOUT + EXIT_TIMEOUT)

    def _end_process(self, seconds: float) -> None:
        """End the process after so many seconds if it has not ended by itself."""

        def end() -> None:
            logger.warning("threads are still running: the process ends without them")
            logging.shutdown()
            os._exit(self.status)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()

    async def _stop_engine(self) -> None:
        watching = asyncio.create_task(self._leave_stalled())
        try:
            await self.engine.stop(self._settings.drain_timeout)
        finally:
            watching.cancel()
        self._end()

    async def _leave_stalled(self) -> None:
        """Close connections that have taken nothing of what waits for them in FLUSH_TIMEOUT seconds: their clients have
        stopped reading, and the drain need not wait for them."""
        loop = asyncio.get_running_loop()
        unread: dict[asyncio.Transport, tuple[int, float]] = {}  # bytes, and since when
        while True:
            for transport in [connection.transport for connection in self.server_state.connections]:
                size, now = transport.get_write_buffer_size(), loop.time()
                if not size or unread.get(transport, (0, now))[0] != size:
                    unread[transport] = size, now
                elif now - unread[transport][1] > FLUSH_TIMEOUT:
                    logger.warning("a client has stopped reading: its request is cut off")
                    transport.abort()
            await asyncio.sleep(FLUSH_TIMEOUT / 10)

    def _end(self) -> None:
        """Leave the main loop."""
        self.should_exit = True


def own_process() -> None:
    """What a process does that has loaded its model and does nothing but serve it.

    The garbage collector passes over what lives as long as the process: modules, tables and the model. A full
    collection of them would hold every thread for a quarter of a second. Of the others it makes fewer, too.
    """
    release_code()
    sys.setswitchinterval(SWITCH_INTERVAL)
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])


def greeting(settings: Settings, port: int) -> str:
    """What a person who has just started the server wants to know."""
    key = ' -H "Authorization: Bearer $LPA_API_KEY"' if settings.client_keys else ""
    body = json.dumps({"model": settings.model_name, "prompt": "Once upon a time", "max_tokens": 64})
    scheme = "http" if settings.ssl_certfile is None else "https"
    if settings.uds is None:
        where, option = url_of(settings.host, port, scheme) + settings.root_path, ""
        place = f"open {where}/ in a browser; {where}/docs/ is the documentation"
    else:
        where, option = f"{scheme}://localhost{settings.root_path}", f" --unix-socket {shlex.quote(str(settings.uds))}"
        place = f"on the Unix socket {settings.uds}"
    return (
        f"{settings.model_name} is served: {place}. Try:\n\n"
        f"  curl{option} {where}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'\n"
    )
