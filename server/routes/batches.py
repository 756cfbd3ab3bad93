"""/v1/batches: files of requests that are answered with idle capacity."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request

from server.batches.runner import Runner
from server.protocol.batches import BatchList, BatchObject, BatchRequest
from server.routes.body import JsonRoute
from server.routes.described import WITH_BODY, responses
from server.routes.files import After, enabled, page

BATCHES = "/v1/batches"
Id = Annotated[str, Path(description="Of a batch.", examples=["batch_1f0d3c5b7a9e2468ace013579"])]


def batches_router(runner: Runner | None) -> APIRouter:
    """The routes; without a runner they say how to get one."""
    router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)

    @router.post(BATCHES, summary="Start a batch", responses=responses(None, *WITH_BODY))
    async def start(body: BatchRequest, request: Request) -> BatchObject:
        """Every line of the file is a request; answers come in a file, errors in another, both in the order of the
        lines. Lines run while the engine has no other request, and a few at a time beside streams."""
        jobs, owner = enabled(runner), request.state.owner
        add = jobs.store.add_batch
        batch_id = await jobs.call(add, owner, body.input_file_id, body.endpoint, body.metadata)
        jobs.wake()
        return BatchObject.model_validate(await jobs.call(jobs.store.batch, batch_id, owner))

    @router.get(BATCHES, summary="Batches", responses=responses(None, 400, 404))
    async def batches(
        request: Request, after: After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> BatchList:
        """Those of the key that asks, the newest first."""
        jobs = enabled(runner)
        return page(BatchList, *await jobs.call(jobs.store.batches, request.state.owner, after, limit))

    @router.get(BATCHES + "/{batch_id}", summary="One batch", responses=responses(None, 404))
    async def batch(request: Request, batch_id: Id) -> BatchObject:
        """How far it has come."""
        jobs = enabled(runner)
        return BatchObject.model_validate(await jobs.call(jobs.store.batch, batch_id, request.state.owner))

    @router.post(BATCHES + "/{batch_id}/cancel", summary="Cancel a batch", responses=responses(None, 400, 404))
    async def cancel(request: Request, batch_id: Id) -> BatchObject:
        """Lines that are answered stay so; they are in the output file when the batch is `cancelled`."""
        jobs = enabled(runner)
        return BatchObject.model_validate(await jobs.call(jobs.store.cancel, batch_id, request.state.owner))

    return router
