"""API keys: who may call what."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from server.errors import Forbidden, Unauthorized
from server.key_file import ClientKey
from server.quota import RequestRate, Sequences
from server.settings import Settings

Role = Literal["anonymous", "client", "admin"]
"""Who sent a request, by the key that came with it."""

PROBES = frozenset({"/health", "/ready"})
METRICS = "/metrics"
ADMIN = "admin"
"""The owner of what admin keys have sent; it sees what all others have."""
INTERNAL = "lpa.internal"
"""Key of an ASGI scope: the request is the server's own, a line of a batch, and comes from no client."""


class Caller:
    """A client's key: its name in metrics and logs, what its files and batches are owned by, and its limits."""

    def __init__(self, key: ClientKey, name: str) -> None:
        self.name = name
        self.owner = key.digest.hex()[:32]
        self.rate = None if key.requests_per_minute is None else RequestRate(key.requests_per_minute)
        self.sequences = None if key.concurrent_sequences is None else Sequences(key.concurrent_sequences)


@dataclass(frozen=True)
class Keys:
    """The keys of a server, as digests."""

    client: tuple[bytes, ...]
    admin: tuple[bytes, ...]
    open_paths: frozenset[str]
    callers: tuple[Caller, ...] = ()  # of `client`

    def role(self, authorization: str) -> Role:
        """Whose key an Authorization header carries."""
        return self.identify(authorization)[0]

    def identify(self, authorization: str) -> tuple[Role, Caller | None]:
        """Whose key an Authorization header carries, and the client's. All keys are compared, in constant time."""
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip().encode("latin-1")) if scheme.lower() == "bearer" else b""
        client, admin = _find(given, self.client), _find(given, self.admin)
        if admin is not None:
            return "admin", None
        return ("anonymous", None) if client is None else ("client", self.callers[client])

    def check(self, path: str, role: Role) -> None:
        """Raises Unauthorized unless `role` may ask for `path`."""
        if role == "anonymous" and self.client and path not in self.open_paths:
            raise Unauthorized("send an API key of this server as 'Authorization: Bearer KEY'")

    def check_admin(self, role: Role) -> None:
        """Raises Unauthorized or Forbidden unless `role` may use the control routes."""
        if not self.admin:
            raise Forbidden("control routes are shut: the server was started without --admin-api-key")
        if role == "anonymous":
            raise Unauthorized("send an admin key of this server as 'Authorization: Bearer KEY'")
        if role != "admin":
            raise Forbidden("this key is no admin key")


def keys_of(settings: Settings, pages: frozenset[str]) -> Keys:
    """The keys that settings name; `pages` are paths that need none, beside the probes'."""
    keys = settings.client_keys
    names = [key.name or f"key-{number}" for number, key in enumerate(keys, 1)]
    return Keys(
        client=tuple(key.digest for key in keys),
        admin=tuple(_digest(key.get_secret_value().encode()) for key in settings.admin_api_key),
        open_paths=PROBES | pages | (frozenset() if settings.metrics_key else {METRICS}),
        callers=tuple(Caller(key, name) for key, name in zip(keys, names, strict=True)),
    )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _find(given: bytes, keys: Sequence[bytes]) -> int | None:
    found = None
    for number, key in enumerate(keys):
        if hmac.compare_digest(given, key):
            found = number
    return found
