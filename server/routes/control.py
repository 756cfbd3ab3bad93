"""POST /reset_prefix_cache and POST /log_level."""

from __future__ import annotations

import logging

from fastapi import APIRouter, Request

from server.engine.async_engine import AsyncEngine
from server.keys import Keys
from server.protocol.answers import LogLevelResponse, ResetResponse
from server.protocol.control import LogLevelRequest
from server.replicas import Others
from server.routes.body import JsonRoute
from server.routes.described import WITH_BODY, responses
from server.routes.requests import CONTROL

logger = logging.getLogger(__name__)


def control_router(engine: AsyncEngine, keys: Keys, others: Others) -> APIRouter:
    """The routes over one engine and the process's log, and those of its other replicas."""
    router = APIRouter(tags=[CONTROL], route_class=JsonRoute)

    @router.post("/reset_prefix_cache", summary="Empty the prefix cache", responses=responses(None, 403, 503))
    async def reset_prefix_cache(request: Request) -> ResetResponse:
        """Forget every cached beginning of a prompt; requests that run keep their blocks."""
        keys.check_admin(request.state.role)
        freed = await engine.reset_prefix_cache()
        return ResetResponse(freed_blocks=freed + sum(await others("reset_prefix_cache")))

    @router.post("/log_level", summary="Change the log level", responses=responses(None, 403, *WITH_BODY))
    async def log_level(body: LogLevelRequest, request: Request) -> LogLevelResponse:
        """Log from this level on, as --log-level does, until the server ends."""
        keys.check_admin(request.state.role)
        before = set_log_level(body.level)
        await others("set_log_level", body.level)
        return LogLevelResponse(level=body.level, before=before)

    return router


def set_log_level(level: str) -> str:
    """Log from a level on in this process; the level before."""
    root = logging.getLogger()
    before = logging.getLevelName(root.level).lower()
    root.setLevel(level.upper())
    logger.warning("the log level is %s now, and was %s", level, before)
    return before
