"""POST /v1/requests/{id}/cancel, and the HTTP requests that it can find."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import APIRouter, Path, Request

from server.errors import NotFound
from server.keys import Keys
from server.protocol.answers import CancelResponse
from server.replicas import Others
from server.routes.described import responses

CONTROL = "Control"  # the tag of routes that need an admin key
PREFIXES = ("cmpl-", "chatcmpl-")  # of the ids in answers


class Running:
    """The HTTP requests in progress, by request id, which clients may use for several at once; and the responses of
    /v1/responses, by the ids of the answers."""

    def __init__(self) -> None:
        self._entries: dict[str, list[asyncio.Future[None]]] = {}

    @contextmanager
    def entry(self, request_id: str) -> Iterator[asyncio.Future[None]]:
        """A future that is done when the request, or the response, is cancelled."""
        cancelled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._entries.setdefault(request_id, []).append(cancelled)
        try:
            yield cancelled
        finally:
            self._entries[request_id].remove(cancelled)
            if not self._entries[request_id]:
                del self._entries[request_id]

    def cancel(self, request_id: str, *, but: asyncio.Future[None] | None = None) -> int:
        """End the requests of an id, as clients or as answers write it, all but one; their number."""
        for name in (request_id, *(request_id.removeprefix(p) for p in PREFIXES if request_id.startswith(p))):
            found = [entry for entry in self._entries.get(name, ()) if entry is not but and not entry.done()]
            for entry in found:
                entry.set_result(None)
            if found:
                return len(found)
        return 0


def requests_router(running: Running, keys: Keys, others: Others) -> APIRouter:
    """The route over one server's requests, and those of its other replicas."""
    router = APIRouter(tags=[CONTROL])

    @router.post(
        "/v1/requests/{request_id}/cancel",
        summary="Cancel a request",
        responses=responses(None, 403, 404),
    )
    async def cancel(
        request: Request, request_id: str = Path(description="The x-request-id, or an answer's `id`.")
    ) -> CancelResponse:
        """End the running requests of this x-request-id (or `id` of an answer), with all of their sequences.

        Their clients get an error with status 499 and the code request_cancelled; in a stream it is the last event. By
        the `id` of an answer of /v1/responses, that response ends as by its own route.
        """
        keys.check_admin(request.state.role)
        number = running.cancel(request_id, but=request.state.cancelled)
        number += sum(await others("cancel", request_id))
        if not number:
            raise NotFound(f"no request {request_id!r} is running", param="id", code="request_not_found")
        return CancelResponse(id=request_id, cancelled=number)

    return router
