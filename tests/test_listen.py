"""Where the server listens: a Unix socket, TLS, and behind proxies; with clients that are not ours."""

from __future__ import annotations

import json
import re
import shlex
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from lpa_model.config import Architecture
from server.listen import unix_listener
from server.openapi import openapi_document
from server.serve import Server, greeting
from server.settings import SettingsError, load_settings
from tests.serving import serving
from tests.test_docker import argument

PASSWORD = "correct horse"


@pytest.fixture
def folder(tiny_checkpoints: dict[Architecture, Path]) -> Path:
    return tiny_checkpoints["setting2"]


def write_certificates(folder: Path) -> Path:
    """Self-signed certificates of the server and of another, their keys, and one key encrypted; returns the folder."""
    for name in ("server", "other"):
        command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name}"
        command += f" -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout {name}.key -out {name}.pem"
        subprocess.run(shlex.split(command), cwd=folder, check=True, capture_output=True)
    encrypt = f"openssl pkcs8 -topk8 -in server.key -out locked.key -passout 'pass:{PASSWORD}'"
    subprocess.run(shlex.split(encrypt), cwd=folder, check=True, capture_output=True)
    (folder / "both.pem").write_text((folder / "server.key").read_text() + (folder / "server.pem").read_text())
    return folder


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_certificates(tmp_path_factory.mktemp("certificates"))


def completion(client: openai.OpenAI) -> str:
    answer = client.completions.create(model="tiny", prompt="the sea", max_tokens=4, temperature=0)
    stream = client.completions.create(model="tiny", prompt="the sea", max_tokens=4, temperature=0, stream=True)
    assert answer.choices[0].text == "".join(chunk.choices[0].text for chunk in stream)
    return answer.choices[0].text


def official(url: str, **transport: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(**transport))


def test_the_official_client_over_a_unix_socket(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "lpa socket"
    with serving(folder, uds=path) as served:
        with official("http://localhost", transport=httpx.HTTPTransport(uds=str(path))) as client:
            assert completion(client)
        printed = greeting(served.server._settings, served.server.port)
        command = printed.partition("Try:")[2].strip()
        assert shlex.split(command)[:3] == ["curl", "--unix-socket", str(path)]
        with pytest.raises(ValueError, match=r"--uds \(LPA_UDS\): cannot listen on .*another program listens there"):
            Server(load_settings(model=folder, uds=path))
        assert path.is_socket()
    assert not path.exists()


def test_the_socket_of_a_killed_server_is_replaced_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "lpa.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    with serving(folder, uds=path), httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
        assert client.get("http://localhost/health").status_code == 200
    path.write_text("precious")
    with pytest.raises(ValueError, match="the file exists and is no socket"):
        Server(load_settings(model=folder, uds=path))
    assert path.read_text() == "precious"


def test_a_socket_whose_backlog_is_full_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "lpa.sock"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(path))
        busy.listen(0)
        waiting.connect(str(path))  # the backlog is full
        with pytest.raises(ValueError, match="another program listens there"):
            unix_listener(path)


@pytest.mark.parametrize(
    ("name", "reason"), [("none/lpa.sock", "No such file or directory"), ("x" * 120, "path too long")]
)
def test_a_path_that_cannot_be_is_said_before_the_model_is_loaded(
    name: str, reason: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.serve.build_engine", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=rf"--uds \(LPA_UDS\): cannot listen on .*: .*{reason}"):
        Server(load_settings(model=folder, uds=tmp_path / name))


def test_the_socket_is_gone_when_the_model_cannot_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "lpa.sock"
    with pytest.raises(ValueError, match="no such model folder"):
        Server(load_settings(model=tmp_path / "none", uds=path))
    assert not path.exists()


@pytest.mark.parametrize("key", ["server.key", "locked.key", "both.pem"])
def test_the_official_client_over_tls(key: str, folder: Path, certificates: Path) -> None:
    flags: dict[str, Any] = {"ssl_certfile": certificates / "server.pem", "ssl_keyfile": certificates / key}
    if key == "locked.key":
        flags["ssl_keyfile_password"] = PASSWORD
    if key == "both.pem":
        flags = {"ssl_certfile": certificates / key}
    trusted = ssl.create_default_context(cafile=certificates / "server.pem")
    with serving(folder, **flags) as served:
        printed = greeting(served.server._settings, served.server.port)
        url = f"https://127.0.0.1:{served.server.port}"
        assert f"open {url}/ in a browser" in printed
        with official(url, verify=trusted) as client:
            assert completion(client)
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/health")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{served.server.port}/health")
        assert httpx.get(f"{url}/health", verify=trusted).status_code == 200


def test_clients_need_a_certificate_of_a_known_authority(folder: Path, certificates: Path) -> None:
    flags = {
        "ssl_certfile": certificates / "server.pem",
        "ssl_keyfile": certificates / "server.key",
        "ssl_ca_certs": certificates / "other.pem",
        "ssl_cert_reqs": "2",
    }
    with serving(folder, **flags) as served:
        url = f"https://localhost:{served.server.port}/health"

        def context(name: str | None) -> ssl.SSLContext:
            found = ssl.create_default_context(cafile=certificates / "server.pem")
            if name:
                found.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
            return found

        assert httpx.get(url, verify=context("other")).status_code == 200
        for name in (None, "server"):
            with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
                httpx.get(url, verify=context(name))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"ssl_keyfile": "server.key"}, "--ssl-keyfile (LPA_SSL_KEYFILE): has no effect without --ssl-certfile"),
        ({"ssl_cert_reqs": "2"}, "--ssl-cert-reqs (LPA_SSL_CERT_REQS): has no effect without --ssl-certfile"),
        ({"ssl_certfile": "none.pem"}, "--ssl-certfile (LPA_SSL_CERTFILE): none.pem: No such file or directory"),
        ({"ssl_certfile": "."}, "--ssl-certfile (LPA_SSL_CERTFILE): .: Is a directory"),
        ({"ssl_certfile": "server.key"}, "(LPA_SSL_CERTFILE): server.key has no certificate in PEM form"),
        ({"ssl_certfile": "server.pem"}, "(LPA_SSL_CERTFILE): server.pem has no key in PEM form"),
        ({"ssl_certfile": "server.pem", "ssl_keyfile": "none"}, "(LPA_SSL_KEYFILE): none: No such file or directory"),
        ({"ssl_certfile": "server.pem", "ssl_keyfile": "other.pem"}, "(LPA_SSL_KEYFILE): other.pem has no key in PEM"),
        ({"ssl_certfile": "server.pem", "ssl_keyfile": "other.key"}, "the key is not that of the certificate"),
        (
            {"ssl_certfile": "server.pem", "ssl_keyfile": "locked.key"},
            "(LPA_SSL_KEYFILE): the key is encrypted; --ssl-keyfile-password takes its password",
        ),
        (
            {"ssl_certfile": "server.pem", "ssl_keyfile": "locked.key", "ssl_keyfile_password": "battery staple"},
            "(LPA_SSL_KEYFILE_PASSWORD): the key cannot be read with it",
        ),
        (
            {"ssl_certfile": "server.pem", "ssl_keyfile": "other.pem", "ssl_keyfile_password": "battery staple"},
            "(LPA_SSL_KEYFILE): other.pem has no key in PEM form",
        ),
        (
            {"ssl_certfile": "both.pem", "ssl_keyfile_password": "battery staple"},
            "(LPA_SSL_KEYFILE_PASSWORD): has no effect: the key is not encrypted",
        ),
        (
            {"ssl_certfile": "both.pem", "ssl_ca_certs": "server.pem"},
            "(LPA_SSL_CA_CERTS): has no effect without --ssl-cert-reqs 1 or 2",
        ),
        ({"ssl_certfile": "both.pem", "ssl_cert_reqs": 1}, "(LPA_SSL_CERT_REQS): needs --ssl-ca-certs"),
        (
            {"ssl_certfile": "both.pem", "ssl_cert_reqs": 1, "ssl_ca_certs": "server.key"},
            "(LPA_SSL_CA_CERTS): server.key has no certificate",
        ),
    ],
)
def test_a_wrong_file_of_tls_is_said_before_the_model_is_loaded(
    flags: dict[str, Any], reason: str, folder: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.serve.build_engine", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.chdir(certificates)
    with pytest.raises(ValueError, match=re.escape(reason)) as refused:
        Server(load_settings(model=folder, port=0, **flags))
    assert "battery staple" not in str(refused.value)


def test_the_password_is_never_shown(certificates: Path) -> None:
    settings = load_settings(ssl_certfile=certificates / "server.pem", ssl_keyfile_password=PASSWORD)
    assert PASSWORD not in repr(settings) + "".join(settings.given())


def test_dockers_health_check_speaks_https(folder: Path, certificates: Path) -> None:
    check = json.loads(argument("HEALTHCHECK").partition("CMD ")[2])
    with serving(folder, ssl_certfile=certificates / "both.pem") as served:
        environment = {"LPA_PORT": str(served.server.port), "LPA_SSL_CERTFILE": "both.pem"}
        subprocess.run([sys.executable, *check[1:]], env=environment, check=True)
        del environment["LPA_SSL_CERTFILE"]
        plain = subprocess.run([sys.executable, *check[1:]], env=environment, capture_output=True)
        assert plain.returncode != 0


def test_under_a_prefix_paths_come_with_it_and_without_it(folder: Path) -> None:
    with serving(folder, root_path="/lpa", api_key="secret") as served:
        for prefix in ("", "/lpa"):
            assert served.client.get(f"{prefix}/health").status_code == 200
            assert served.client.get(f"{prefix}/").headers["content-type"].startswith("text/html")
            assert served.client.get(f"{prefix}/v1/models").status_code == 401
            page = served.client.get(f"{prefix}/docs/reference").text
            assert f"curl {served.url}/lpa/v1/completions" in page
        assert served.client.get("/lpa").headers["location"] == "/lpa/"
        assert served.client.get("/lpa/docs").headers["location"] == "docs/"
        assert served.client.get("/lpax/health").status_code == 401
        with openai.OpenAI(base_url=f"{served.url}/lpa/v1", api_key="secret", max_retries=0) as client:
            assert completion(client)
            document = served.client.get("/lpa/openapi.json", headers={"authorization": "Bearer secret"}).json()
        assert document["servers"] == [{"url": "/lpa"}]
        assert f"open {served.url}/lpa/ in a browser" in greeting(served.server._settings, served.server.port)
        assert (
            served.metric('lpa:http_requests_total{handler="/health",method="GET",model_name="tiny",status="200"}') == 2
        )


made: list[dict[str, Any]] = []


def the_document(*arguments: Any) -> dict[str, Any]:
    """That of the first server: half a second, for each of which only the page around it is looked at."""
    if not made:
        made.append(openapi_document(*arguments))
    return made[0]


@pytest.mark.parametrize(
    ("flags", "scheme"),
    [
        ({}, "https"),
        ({"proxy_headers": "false"}, "http"),
        ({"forwarded_allow_ips": "192.0.2.7"}, "http"),
        ({"forwarded_allow_ips": "192.0.2.7,127.0.0.0/8"}, "https"),
        ({"forwarded_allow_ips": "*"}, "https"),
    ],
)
def test_a_trusted_proxys_scheme_and_client_are_taken(
    flags: dict[str, str],
    scheme: str,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "192.0.2.7")  # uvicorn's own variable, which is no setting
    monkeypatch.setattr("server.app.openapi_document", the_document)
    caplog.set_level("INFO", "server.middleware")
    with serving(folder, **flags) as served:
        headers = {"x-forwarded-proto": "https", "x-forwarded-for": "203.0.113.9", "host": "lpa.example.org"}
        page = served.client.get("/docs/reference", headers=headers).text
        assert f"curl {scheme}://lpa.example.org/v1/completions" in page
    clients = [fields["client"] for record in caplog.records if (fields := getattr(record, "fields", None))]
    assert clients == ["203.0.113.9" if scheme == "https" else "127.0.0.1"]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("root_path", "lpa", "must begin with / and not end with it, as /lpa"),
        ("root_path", "/lpa/", "must begin with / and not end with it, as /lpa"),
        ("forwarded_allow_ips", "proxy.example.org", "does not appear to be an IPv4 or IPv6 network"),
        ("forwarded_allow_ips", "*,192.0.2.7", "* trusts all, and stands alone"),
        ("ssl_cert_reqs", "3", "input should be 0, 1 or 2"),
    ],
)
def test_a_wrong_value_is_said(name: str, value: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(reason)):
        load_settings(**{name: value})
