"""Which names are models of the Hugging Face hub, and whether such a one can be had at all.

Nothing heavy is imported here: a folder's name that is mistyped is to be answered at once.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

HUB = re.compile(r"(?:https?:/+(?:huggingface\.co|hf\.co)/)?(\w[\w.-]*/\w[\w.-]*)/?")
REACHED = 2.0
"""Seconds in which the hub has to take a connection; else its cache alone is looked into."""


def hub_name(name: str) -> str | None:
    """OWNER/NAME of what may be a model of the hub; None for a path, be it that only its folder exists."""
    match = HUB.fullmatch(name)
    path = Path(name)
    if match is None or path.exists() or (path.parent.is_dir() and path.parent != Path()):
        return None
    return match[1]


def check_available(name: str) -> None:
    """ValueError for a name that is no path, if it is not in the hub's cache and the hub cannot be reached."""
    if (repository := hub_name(name)) is None:
        return
    from huggingface_hub import constants

    if (Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}").is_dir():
        return
    if constants.HF_HUB_OFFLINE:
        raise ValueError(no_model(repository, "HF_HUB_OFFLINE is set, and it is not in the cache"))
    if (away := unreachable(constants.ENDPOINT)) is not None:
        raise ValueError(no_model(repository, away))


def no_model(name: str, reason: str) -> str:
    """What is said of a name that is no folder, and could not be fetched for a reason."""
    return f"{name}: no such folder; as a name of the Hugging Face hub it could not be fetched: {reason}"


def unreachable(url: str) -> str | None:
    """Why a host takes no connection within REACHED seconds, or those of HF_HUB_ETAG_TIMEOUT; None if it does.

    Whether a proxy reaches it is not found out. A name server that does not answer would be waited for much longer, and
    by no time-out of the hub's library.
    """
    parts = urlsplit(url)
    if parts.hostname is None or parts.scheme in getproxies() or "all" in getproxies():
        return None
    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or REACHED)
    address = (parts.hostname, parts.port or (80 if parts.scheme == "http" else 443))
    found: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection(address, seconds).close()
            found.append(None)
        except OSError as error:
            found.append(f"{parts.hostname} cannot be reached: {error.strerror or error}")

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else f"{parts.hostname} does not answer within {seconds:g} s (HF_HUB_ETAG_TIMEOUT)"
