"""The version of the installed package."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def package_version() -> str:
    """As the wheel says; "0" when the code runs without being installed."""
    try:
        return version("lpa-server")
    except PackageNotFoundError:
        return "0"
