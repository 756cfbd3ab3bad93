"""The sockets of the server, which are taken before a model is loaded."""

from __future__ import annotations

import errno
import ipaddress
import socket
from pathlib import Path
from urllib.parse import quote

LOOPBACK = {4: "127.0.0.1", 6: "::1"}


def listeners(host: str, port: int) -> list[socket.socket]:
    """A bound socket for every address of a host, all of one port; port 0 takes a free one.

    Raises:
        ValueError: the port is taken, or the host is no address of this machine; the message names the setting.
    """
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host (LPA_HOST): {host!r} is no address: {error}") from None
    found: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(infos):
            listener = socket.socket(family, kind, protocol)
            found.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address[0], port, *address[2:]))
            port = listener.getsockname()[1]  # the others take the first one's
    except OSError as error:
        for listener in found:
            listener.close()
        raise ValueError(explain(error, host, port)) from None
    return found


def unix_listener(path: Path) -> socket.socket:
    """A Unix socket that is bound to `path`, and listens at once: so a second server sees that it is taken. A socket
    without a listener was left by a killed server, and is replaced.

    Raises:
        ValueError: the path is taken or cannot be used; the message names the setting.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket() and _is_left_over(path):
            path.unlink()
        listener.bind(str(path))
        listener.listen()
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            reason = "another program listens there" if path.is_socket() else "the file exists and is no socket"
        raise ValueError(f"--uds (LPA_UDS): cannot listen on {path}: {reason}") from None
    return listener


def _is_left_over(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)  # a server whose backlog is full would hold it
        return client.connect_ex(str(path)) == errno.ECONNREFUSED


def explain(error: OSError, host: str, port: int) -> str:
    """Why the server cannot listen, by the setting that would change it."""
    if error.errno == errno.EADDRINUSE:
        reason = f"{port} is taken on {host}: another program listens there; 0 takes a free one"
    elif error.errno == errno.EACCES:
        reason = f"{port} is not allowed to this user; take one above 1023"
    else:
        return f"--host (LPA_HOST): cannot listen on {host}: {error.strerror or error}"
    return f"--port (LPA_PORT): {reason}"


def url_of(host: str, port: int, scheme: str = "http") -> str:
    """What a browser on this machine is given for a server that listens on `host`."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a name
        return f"{scheme}://{host}:{port}"
    shown = LOOPBACK[address.version] if address.is_unspecified else str(address)
    return f"{scheme}://[{quote(shown, safe=':')}]:{port}" if address.version == 6 else f"{scheme}://{shown}:{port}"
