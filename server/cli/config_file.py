"""Options of a command from a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}


def read_options(path: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    """The options of a TOML file without tables.

    Args:
        kinds: of every option that there may be: int, float, bool, str or Path. A str may be a whole number, too.

    Raises:
        ValueError: it is not TOML, or has an unknown key or a value of another kind; the message names the file and
            the key.
        OSError: it cannot be read.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # also of bytes that are not UTF-8
        raise ValueError(f"{path}: not TOML: {error}") from error
    for key in found:
        if key not in kinds:
            near = get_close_matches(key.replace("-", "_"), kinds, n=1)
            meant = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(kinds)}"
            raise ValueError(f"{path}: unknown key {key}{meant}")
    return {key: _as(kinds[key], value, f"{path}: {key}") for key, value in found.items()}


def _as(kind: type, value: Any, where: str) -> Any:
    accepted = {float: (int, float), str: (str, int), Path: (str,)}.get(kind, (kind,))
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: {value!r} is not {NAMES[kind]}")
    return kind(value)
