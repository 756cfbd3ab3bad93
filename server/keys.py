"""API keys: who may call what."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import SecretStr

from server.errors import Forbidden, Unauthorized
from server.settings import Settings

Role = Literal["anonymous", "client", "admin"]
"""Who sent a request, by the key that came with it."""

PROBES = frozenset({"/health", "/ready"})
METRICS = "/metrics"
ADMIN = "admin"
"""The owner that sees what all others have."""
INTERNAL = "lpa.internal"
"""Key of an ASGI scope: the request is the server's own, a line of a batch, and comes from no client."""


@dataclass(frozen=True)
class Keys:
    """The keys of a server, as digests: equally long, so that comparing them does not leak a key's length."""

    client: tuple[bytes, ...]
    admin: tuple[bytes, ...]
    open_paths: frozenset[str]

    def role(self, authorization: str) -> Role:
        """Whose key an Authorization header carries. All keys are compared, in constant time."""
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip().encode("latin-1")) if scheme.lower() == "bearer" else b""
        client, admin = _is_among(given, self.client), _is_among(given, self.admin)
        return "admin" if admin else "client" if client else "anonymous"

    def owner(self, authorization: str) -> str:
        """Whose a file or a batch is: a name for each client key, ADMIN for all admin keys, "" without keys."""
        role = self.role(authorization)
        if role == "client":
            return _digest(authorization.partition(" ")[2].strip().encode("latin-1")).hex()[:32]
        return ADMIN if role == "admin" else ""

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
    return Keys(
        client=_digests(settings.api_keys),
        admin=_digests(settings.admin_api_key),
        open_paths=PROBES | pages | (frozenset() if settings.metrics_key else {METRICS}),
    )


def _digests(keys: Iterable[SecretStr]) -> tuple[bytes, ...]:
    return tuple(_digest(key.get_secret_value().encode()) for key in keys)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_among(given: bytes, keys: Sequence[bytes]) -> bool:
    found = False
    for key in keys:
        found |= hmac.compare_digest(given, key)
    return found
