"""Routes that replicas refuse: what they serve is in one place, and the next request may reach another replica."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter

from server.errors import InvalidRequest
from server.protocol.responses import ItemReference, ResponsesRequest
from server.routes.batches import BATCHES
from server.routes.files import FILES

CODE = "not_with_replicas"
BATCHES_ARE_OFF = (
    "this server has replicas (--ray-replicas), and files and batches need one place: send them to a server that was "
    "started with --data-dir and without --ray-replicas, or use `lpa run-batch`"
)
NOTHING_IS_KEPT = (
    "this server has replicas (--ray-replicas) and keeps no responses: send the conversation as `input`, or ask a "
    "server without --ray-replicas"
)


def one_place_router() -> APIRouter:
    """Refusals of files, batches, and responses by id; to be included before the routers that serve them."""
    router = APIRouter(include_in_schema=False)
    for path in (FILES, BATCHES):
        router.add_api_route(path, _refusal(BATCHES_ARE_OFF), methods=["GET", "POST"])
        router.add_api_route(path + "/{rest:path}", _refusal(BATCHES_ARE_OFF), methods=["GET", "POST", "DELETE"])
    router.add_api_route("/v1/responses/{rest:path}", _refusal(NOTHING_IS_KEPT), methods=["GET", "POST", "DELETE"])
    return router


def _refusal(reason: str) -> Callable[[], Awaitable[None]]:
    async def refuse() -> None:
        raise InvalidRequest(reason, code=CODE)

    return refuse


def check_stateless(body: ResponsesRequest) -> None:
    """Raises InvalidRequest for what needs a memory that all replicas share."""
    param = None
    if body.previous_response_id is not None:
        param = "previous_response_id"
    elif body.store and "store" in body.model_fields_set:
        param = "store"
    else:
        references = (i for i, item in enumerate(body.input) if isinstance(item, ItemReference))
        if (first := next(references, None)) is not None:
            param = f"input[{first}].id"
    if param is not None:
        raise InvalidRequest(f"{param}: {NOTHING_IS_KEPT}", param=param, code=CODE)
