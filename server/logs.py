"""The log: its lines as text or JSON, and warnings that repeat themselves held back."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from threading import Lock, Timer
from time import gmtime, monotonic, strftime

from server.settings import Settings

logger = logging.getLogger(__name__)

MOST_REPEATS = 5  # equal warnings in
WINDOW = 10.0  # seconds


class JsonFormatter(logging.Formatter):
    """A JSON object per line; `extra={"fields": {...}}` become its keys."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": strftime("%Y-%m-%dT%H:%M:%S", gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


@dataclass
class _Window:
    began: float
    passed: int = 0
    held_back: int = 0


class Repeats(logging.Filter):
    """Holds warnings and errors back after `most` of the same text (before its values are filled in) in `window`
    seconds, and says at the end of that time how many there were. Other lines pass."""

    def __init__(self, most: int = MOST_REPEATS, window: float = WINDOW) -> None:
        super().__init__()
        self._most = most
        self._window = window
        self._lock = Lock()
        self._windows: dict[tuple[str, int, str], _Window] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or record.name == __name__:
            return True
        key, now = (record.name, record.levelno, str(record.msg)), monotonic()
        with self._lock:
            found = self._windows.get(key)
            if found is None or (now - found.began >= self._window and not found.held_back):
                self._drop_old(now)
                found = self._windows[key] = _Window(now)
            if found.passed < self._most:
                found.passed += 1
                return True
            found.held_back += 1
            if found.held_back == 1:
                timer = Timer(max(0.0, found.began + self._window - now), self._tell, (key,))
                timer.daemon = True
                timer.start()
        return False

    def _drop_old(self, now: float) -> None:
        old = [key for key, of in self._windows.items() if now - of.began >= self._window and not of.held_back]
        for key in old:
            del self._windows[key]

    def _tell(self, key: tuple[str, int, str]) -> None:
        with self._lock:
            held_back = self._windows.pop(key).held_back
        name, level, text = key
        fields = {"repeated": held_back, "of_logger": name}
        message = "%d more lines like %r of %s were left out in %g seconds"
        logger.log(level, message, held_back, text, name, self._window, extra={"fields": fields})


def configure_logging(settings: Settings) -> None:
    """Everything to stderr, in one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Repeats())
    handler.setFormatter(
        JsonFormatter()
        if settings.log_format == "json"
        else logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    )
    logging.basicConfig(handlers=[handler], level=settings.log_level.upper(), force=True)
