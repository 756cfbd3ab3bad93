"""Keys of clients, with what each may do: those of a file, a line for each, and those of flags.

sk-3f9a...                                             a key without limits
sha256:9f86d081884c... name=alice                      its digest, and what metrics call it
sk-77b1... name=bob requests_per_minute=60 concurrent_sequences=8
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)
LIMITS = ("requests_per_minute", "concurrent_sequences")


@dataclass(frozen=True)
class ClientKey:
    """A key as its SHA-256: equally long for all, so that comparing them does not leak a key's length."""

    digest: bytes
    name: str = ""  # in metrics and logs; empty: its number in the server's list
    requests_per_minute: int | None = None
    concurrent_sequences: int | None = None


def client_key(text: str) -> ClientKey:
    """A key as a client sends it."""
    return ClientKey(hashlib.sha256(text.encode()).digest())


def read_key_file(path: Path) -> list[ClientKey]:
    """The keys of a file; empty lines and those that begin with # are none.

    Raises:
        ValueError: a line is wrong; the message has its number, and never the key.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    numbered = ((number, line.split()) for number, line in enumerate(lines, 1))
    return [_parse(words, number) for number, words in numbered if words and not words[0].startswith("#")]


def _parse(words: Sequence[str], number: int) -> ClientKey:
    key, *options = words
    found: dict[str, str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or name not in ("name", *LIMITS) or name in found:
            raise ValueError(f"line {number}: behind a key come name=, requests_per_minute= and concurrent_sequences=")
        if name in LIMITS and not (value.isdecimal() and int(value) > 0):
            raise ValueError(f"line {number}: {name} must be a whole number above 0")
        if name == "name" and not NAME.fullmatch(value):
            raise ValueError(f"line {number}: a name has up to 64 letters, digits and ._@-")
        found[name] = value
    hashed = DIGEST.fullmatch(key)
    if key.startswith("sha256:") and not hashed:
        raise ValueError(f"line {number}: behind sha256: come 64 hexadecimal digits")
    limits = {name: int(found[name]) for name in LIMITS if name in found}
    digest = bytes.fromhex(hashed[1]) if hashed else client_key(key).digest
    return ClientKey(digest, found.get("name", ""), **limits)
