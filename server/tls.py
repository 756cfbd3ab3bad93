"""The server's certificate and key, tried before the model is loaded."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from server.settings import Settings, named


def tls_options(settings: Settings) -> dict[str, Any]:
    """uvicorn's options for TLS; none without a certificate.

    Raises:
        ValueError: a file cannot be used, or a setting has no effect without another; the message names it.
    """
    if settings.ssl_certfile is None:
        for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs", "ssl_cert_reqs"):
            if getattr(settings, name):
                raise ValueError(f"{named(name)}: has no effect without --ssl-certfile")
        return {}
    if settings.ssl_ca_certs is not None and not settings.ssl_cert_reqs:
        raise ValueError(f"{named('ssl_ca_certs')}: has no effect without --ssl-cert-reqs 1 or 2")
    if settings.ssl_ca_certs is None and settings.ssl_cert_reqs:
        raise ValueError(f"{named('ssl_cert_reqs')}: needs --ssl-ca-certs, whose authorities clients are checked by")
    _check_certificates("ssl_certfile", settings.ssl_certfile)
    if settings.ssl_ca_certs is not None:
        _check_certificates("ssl_ca_certs", settings.ssl_ca_certs)
    secret = settings.ssl_keyfile_password
    password = None if secret is None else secret.get_secret_value()
    _check_key(settings.ssl_certfile, settings.ssl_keyfile, password)
    return {
        "ssl_certfile": settings.ssl_certfile,
        "ssl_keyfile": settings.ssl_keyfile,
        "ssl_keyfile_password": password,
        "ssl_ca_certs": settings.ssl_ca_certs,
        "ssl_cert_reqs": settings.ssl_cert_reqs,
    }


def _check_certificates(name: str, path: Path) -> None:
    _check_readable(name, path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        raise ValueError(f"{named(name)}: {path} has no certificate in PEM form") from None


def _check_key(certificate: Path, key: Path | None, password: str | None) -> None:
    name = "ssl_certfile" if key is None else "ssl_keyfile"
    if key is not None:
        _check_readable(name, key)
    encrypted = False

    def ask() -> str:  # without it OpenSSL asks at the terminal
        nonlocal encrypted
        encrypted = True
        if not password:
            raise ValueError(f"{named(name)}: the key is encrypted; --ssl-keyfile-password takes its password")
        return password

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, ask)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"{named(name)}: the key is not that of the certificate") from None
        if encrypted:
            raise ValueError(f"{named('ssl_keyfile_password')}: the key cannot be read with it") from None
        raise ValueError(f"{named(name)}: {key or certificate} has no key in PEM form") from None
    if password and not encrypted:
        raise ValueError(f"{named('ssl_keyfile_password')}: has no effect: the key is not encrypted")


def _check_readable(name: str, path: Path) -> None:
    try:
        path.read_bytes()
    except OSError as error:
        raise ValueError(f"{named(name)}: {path}: {error.strerror}") from None
