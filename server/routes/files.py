"""/v1/files: what batches read and write."""

from __future__ import annotations

import shutil
from pathlib import Path as FilePath
from typing import Annotated, Any, BinaryIO, Literal, TypeVar

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel
from starlette.datastructures import UploadFile

from server.batches.runner import Runner
from server.errors import InvalidRequest, NotFound
from server.protocol.batches import FileDeleted, FileList, FileObject
from server.routes.described import WITH_BODY, responses

FILES = "/v1/files"
MAX_NAME = 512  # characters
UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "JSON lines."},
                        "purpose": {"type": "string", "enum": ["batch"]},
                    },
                }
            }
        },
    }
}
Id = Annotated[str, Path(description="Of a file.", examples=["file-8d5fae2c1b7a4c90e3f1a2b4"])]
After = Annotated[str | None, Query(description="The id behind which the page begins.")]

Page = TypeVar("Page", bound=BaseModel)


def files_router(runner: Runner | None) -> APIRouter:
    """The routes; without a runner they say how to get one."""
    router = APIRouter(tags=["OpenAI"])

    @router.post(FILES, summary="Keep a file", responses=responses(None, *WITH_BODY), openapi_extra=UPLOAD)
    async def upload(request: Request) -> FileObject:
        """A file of JSON lines for a batch, at most the server's max_file_bytes."""
        jobs = enabled(runner)
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise InvalidRequest("the body must be a form with a file: Content-Type: multipart/form-data")
        async with request.form(max_files=1, max_fields=8) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if unknown := set(form) - {"file", "purpose"}:
                raise InvalidRequest(f"{min(unknown)[:64]}: is not supported here", param=min(unknown)[:64])
            if not isinstance(file, UploadFile):
                raise InvalidRequest("file: is required", param="file")
            if purpose != "batch":
                raise InvalidRequest("purpose: must be batch", param="purpose")
            name = (file.filename or "upload")[:MAX_NAME]
            path = jobs.store.new_path()
            found = await jobs.call(_take, jobs, file.file, path, request.state.owner, name)
        return FileObject.model_validate(found)

    @router.get(FILES, summary="Files", responses=responses(None, 400, 404))
    async def files(
        request: Request,
        purpose: Annotated[str | None, Query(description="Only files with this purpose.")] = None,
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
    ) -> FileList:
        """Those of the key that asks."""
        jobs = enabled(runner)
        rows, more = await jobs.call(jobs.store.files, request.state.owner, purpose, after, limit, order)
        return page(FileList, rows, more)

    @router.get(FILES + "/{file_id}", summary="One file", responses=responses(None, 404))
    async def file(request: Request, file_id: Id) -> FileObject:
        """What is known of it."""
        jobs = enabled(runner)
        return FileObject.model_validate(await jobs.call(jobs.store.file, file_id, request.state.owner))

    described = responses(None, 404, description="The file's bytes.")
    described[200]["content"] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

    @router.get(
        FILES + "/{file_id}/content", summary="What is in a file", response_class=FileResponse, responses=described
    )
    async def content(request: Request, file_id: Id) -> FileResponse:
        """Its bytes."""
        jobs = enabled(runner)
        found = await jobs.call(jobs.store.file, file_id, request.state.owner)
        name = found["filename"]
        return FileResponse(jobs.store.path(file_id), media_type="application/octet-stream", filename=name)

    @router.delete(FILES + "/{file_id}", summary="Delete a file", responses=responses(None, 400, 404))
    async def delete(request: Request, file_id: Id) -> FileDeleted:
        """A file that a batch still reads stays."""
        jobs = enabled(runner)
        await jobs.call(jobs.store.delete_file, file_id, request.state.owner)
        return FileDeleted(id=file_id)

    return router


def enabled(runner: Runner | None) -> Runner:
    """Raises NotFound, with what would help, where the server keeps no files."""
    if runner is None:
        raise NotFound(
            "this server keeps no files and batches: start it with --data-dir FOLDER (LPA_DATA_DIR)",
            code="batches_are_off",
        )
    return runner


def page(kind: type[Page], rows: list[dict[str, Any]], more: bool) -> Page:
    """A page of a list, as OpenAI's clients go through it."""
    first, last = (rows[0]["id"], rows[-1]["id"]) if rows else (None, None)
    return kind.model_validate({"data": rows, "first_id": first, "last_id": last, "has_more": more})


def _take(jobs: Runner, content: BinaryIO, path: FilePath, owner: str, name: str) -> dict[str, Any]:
    try:
        with path.open("wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
        return jobs.store.add_file(path, owner, name, "batch")
    except BaseException:
        path.unlink(missing_ok=True)
        raise
