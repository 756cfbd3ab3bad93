"""Connections: heads and bodies that are too large, too many, too slow or of another HTTP, on real sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lpa_model.config import Architecture
from server.settings import load_settings
from tests.serving import Served, serving, until

GET = b"GET /health HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture(scope="module")
def served(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    with serving(tiny_checkpoints["setting2"]) as server:
        yield server


@pytest.fixture(scope="module")
def hasty(tiny_checkpoints: dict[Architecture, Path]) -> Iterator[Served]:
    limits = {"header_timeout": 0.3, "body_timeout": 0.3, "keep_alive_timeout": 0.6}
    with serving(tiny_checkpoints["setting2"], **limits) as server:
        yield server


def connect(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.server.port), timeout=600)


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes."""
    pieces = []
    try:
        while piece := connection.recv(1 << 16):
            pieces.append(piece)
    except ConnectionResetError:  # it closes with bytes of ours unread
        pass
    return b"".join(pieces)


def ask(served: Served, request: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body of the answer to a request after which the connection ends."""
    with connect(served) as connection:
        connection.sendall(request)
        return parse(read_all(connection))


def parse(answer: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    return int(status.split()[1]), dict(line.lower().split(b": ", 1) for line in lines), body


def error_of(answer: tuple[int, dict[bytes, bytes], bytes], status: int) -> str:
    found, headers, body = answer
    assert found == status, answer
    assert headers[b"content-type"] == b"application/json"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message: str = error["message"]
    return message


def test_large_headers_are_a_431(served: Served) -> None:
    end = b"\r\nconnection: close\r\n\r\n"
    assert "16384" in error_of(ask(served, GET + b"x: " + b"y" * 20_000 + end), 431)
    assert "16384" in error_of(ask(served, b"GET /" + b"y" * 20_000 + b" HTTP/1.1\r\nhost: x" + end), 431)
    many = b"".join(b"x-%d: y\r\n" % i for i in range(101))
    assert "max_header_fields" in error_of(ask(served, GET + many + b"connection: close\r\n\r\n"), 431)
    some = b"".join(b"x-%d: y\r\n" % i for i in range(90))
    assert ask(served, GET + some + b"connection: close\r\n\r\n")[0] == 200


def test_a_header_without_an_end_takes_no_memory(served: Served) -> None:
    sent = 0
    with connect(served) as connection:
        connection.sendall(GET + b"x: ")
        try:
            for _ in range(1000):
                sent += connection.send(b"y" * (1 << 16))
        except OSError:
            pass
    assert sent < 32 << 20  # what the sockets' buffers took before the server had closed


def test_half_a_head_ends_with_a_408(hasty: Served) -> None:
    assert "0.3 seconds" in error_of(ask(hasty, GET + b"x: y"), 408)


def test_a_head_that_comes_byte_by_byte_ends_with_a_408(hasty: Served) -> None:
    with connect(hasty) as connection:
        stop = threading.Event()

        def drip() -> None:
            try:
                connection.sendall(GET)
                while not stop.wait(0.05):
                    connection.send(b"x")
            except OSError:
                pass

        thread = threading.Thread(target=drip)
        thread.start()
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408")
        stop.set()
        thread.join()


def test_a_connection_that_says_nothing_is_closed(hasty: Served) -> None:
    with connect(hasty) as connection:
        assert read_all(connection) == b""


@pytest.mark.parametrize("sent", [b"", b'{"model": "tiny", '])
def test_half_a_body_ends_with_a_408(hasty: Served, sent: bytes) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n"
    assert "body" in error_of(ask(hasty, head + sent), 408)
    assert hasty.client.get("/health").status_code == 200


def test_a_body_of_lines_may_stand_still(hasty: Served) -> None:
    head = b"POST /v1/perplexity?model=tiny HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-ndjson\r\n"
    with connect(hasty) as connection:
        connection.sendall(head + b'content-length: 15\r\nconnection: close\r\n\r\n"the sea')
        time.sleep(0.8)
        connection.sendall(b' side"\n')
        assert parse(read_all(connection))[0] == 200


def test_an_idle_connection_lives_for_the_time_set(hasty: Served) -> None:
    with connect(hasty) as connection:
        for _ in range(2):
            connection.sendall(GET + b"\r\n")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
            time.sleep(0.35)  # longer than a head may take
        assert read_all(connection) == b""
    assert load_settings().keep_alive_timeout > 60


def test_the_next_head_of_a_connection_has_its_time_too(hasty: Served) -> None:
    with connect(hasty) as connection:
        connection.sendall(GET + b"\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        connection.sendall(GET)
        error_of(parse(read_all(connection)), 408)


def test_connections_are_bounded_and_idle_ones_give_way(tiny_checkpoints: dict[Architecture, Path]) -> None:
    with serving(tiny_checkpoints["setting2"], max_connections=3) as server:
        server.client.close()
        idle = connect(server)
        idle.sendall(GET + b"\r\n")
        answer = b""
        while not answer.endswith(b"}"):  # head and body may come one after the other
            answer += idle.recv(1 << 16)
        half = [connect(server) for _ in range(3)]
        for connection in half:
            connection.sendall(GET)
        assert read_all(idle) == b""
        until(lambda: len(server.server.server_state.connections) == 3)
        assert "max_connections" in error_of(ask(server, b""), 503)
        half[0].sendall(b"\r\n")
        assert half[0].recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert ask(server, GET + b"connection: close\r\n\r\n")[0] == 200  # the first one is idle now
        for connection in (idle, *half):
            connection.close()


BODY = json.dumps({"model": "tiny", "prompt": "the sea", "max_tokens": 3, "temperature": 0}).encode()


def completion(extra: bytes, version: bytes = b"1.1", body: bytes = BODY) -> bytes:
    head = b"POST /v1/completions HTTP/%b\r\ncontent-type: application/json\r\n" % version
    return head + b"content-length: %d\r\n" % len(body) + extra + b"\r\n" + body


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket", b"x, h2c"])
def test_an_offer_to_upgrade_is_passed_over(served: Served, upgrade: bytes) -> None:
    """As curl --http2 and Java's HttpClient make it."""
    extra = b"host: x\r\nhttp2-settings: AAMAAABkAAQAAP__\r\nupgrade: " + upgrade
    with connect(served) as connection:
        connection.sendall(completion(extra + b"\r\nconnection: Upgrade, HTTP2-Settings\r\n"))
        answer = connection.recv(1 << 16)
        while not answer.endswith(b"}"):
            answer += connection.recv(1 << 16)
        status, _, body = parse(answer)
        assert status == 200 and json.loads(body)["choices"][0]["text"]
        connection.sendall(GET + b"\r\n")  # the connection goes on
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_a_missing_host_is_a_400_and_http_1_0_needs_none(served: Served) -> None:
    assert "Host" in error_of(ask(served, b"GET /health HTTP/1.1\r\n\r\n"), 400)
    assert ask(served, b"GET /health HTTP/1.0\r\n\r\n")[0] == 200


def test_http_1_0_streams_end_with_the_connection(served: Served) -> None:
    body = json.dumps({**json.loads(BODY), "stream": True}).encode()
    status, headers, content = ask(served, completion(b"", b"1.0", body))
    assert status == 200 and b"transfer-encoding" not in headers
    events = content.split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    assert all(event.startswith(b"data: ") for event in events[:-1])


@pytest.mark.parametrize(
    "junk", [b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nx y\r\n\r\n"]
)
def test_what_is_no_http_is_a_400(served: Served, junk: bytes) -> None:
    error_of(ask(served, junk), 400)


def test_many_slow_connections_leave_the_server_to_others(served: Served) -> None:
    slow = [connect(served) for _ in range(100)]
    for connection in slow:
        connection.sendall(GET + b"x: ")
    answers: list[Any] = [served.client.get("/health").status_code for _ in range(5)]
    assert answers == [200] * 5
    for connection in slow:
        connection.close()
    until(lambda: len(served.server.server_state.connections) <= 2)
