"""Bodies of the routes for operators."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from server.protocol.body import RequestBody


class LogLevelRequest(RequestBody):
    """What is to be logged."""

    level: Literal["debug", "info", "warning", "error"] = Field(description="Least level that is logged.")
