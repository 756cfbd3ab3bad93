"""Bodies and answers of /v1/files and /v1/batches, as OpenAI's documents have them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from server.protocol.body import RequestBody

Endpoint = Literal[
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/perplexity",
    "/v1/loglikelihood",
]
"""Routes that a batch's lines may name."""


class FileObject(BaseModel):
    """A file that the server keeps."""

    id: str = Field(examples=["file-8d5fae2c1b7a4c90e3f1a2b4"])
    object: Literal["file"] = "file"
    bytes: int
    created_at: int = Field(description="Seconds since 1970.")
    filename: str = Field(examples=["requests.jsonl"])
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool = Field(description="Whether `after` the last one there are more.")


class FileDeleted(BaseModel):
    """A file that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class BatchRequest(RequestBody):
    """A file of requests, to be answered with idle capacity."""

    input_file_id: str = Field(description="A file with purpose batch.", examples=["file-8d5fae2c1b7a4c90e3f1a2b4"])
    endpoint: Endpoint = Field(description="What every line's url is.")
    completion_window: Literal["24h"] = Field(description="Lines that have no answer then are in the error file.")
    metadata: dict[str, str] | None = Field(None, max_length=16, description="Kept with the batch.")


class BatchError(BaseModel):
    """Why a batch failed."""

    code: str
    message: str
    line: int | None = Field(description="Of the input file, from 1.")
    param: str | None


class BatchErrors(BaseModel):
    """What is wrong with an input file."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    """Lines of a batch."""

    total: int
    completed: int
    failed: int


class BatchObject(BaseModel):
    """A batch, as far as it has come."""

    id: str = Field(examples=["batch_1f0d3c5b7a9e2468ace013579"])
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled", "expired"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(BaseModel):
    """A page of batches, the newest first."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
