"""Answers of the small routes, and the error object of all."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str = Field(description="For people.", examples=["max_tokens: must be at least 0"])
    type: str = Field(
        description="invalid_request_error, authentication_error, permission_error, rate_limit_error, "
        "request_cancelled or server_error.",
        examples=["invalid_request_error"],
    )
    param: str | None = Field(description="The field at fault.", examples=["max_tokens"])
    code: str | None = Field(description="For programs, such as context_length_exceeded or model_not_found.")


class ErrorResponse(BaseModel):
    """Every error of any status; in a stream that has begun, the last event."""

    error: ErrorBody


class ModelCard(BaseModel):
    """A name under which the model is served."""

    id: str = Field(description="What requests give as `model`.", examples=["lpa-tiny"])
    object: Literal["model"] = "model"
    created: int = Field(description="When the server started, in seconds since 1970.")
    owned_by: str = "lpa"
    root: str = Field(description="The first of the model's names, which answers carry.")
    max_model_len: int = Field(description="Longest prompt and completion together, in tokens.")
    description: str | None = Field(
        description="The first paragraph of the README.md in the model's folder; null where there is none.",
        examples=["A small model, trained on story books."],
    )
    chat: bool = Field(description="Whether the model has a chat template; one without is given a plain one.")
    cache_bytes_per_token: int = Field(description="What a token takes in the cache.", examples=[3072])
    dense_cache_bytes_per_token: int = Field(
        description="What it would take if every matrix of the model were dense.", examples=[20480]
    )


class ModelList(BaseModel):
    """The model, by each of its names."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class HealthResponse(BaseModel):
    """The engine lives."""

    status: Literal["ok"] = "ok"


class ReadyResponse(BaseModel):
    """Requests are taken."""

    status: Literal["ready"] = "ready"


class RefusedBackend(BaseModel):
    """A faster backend that does not compute this model."""

    backend: str = Field(examples=["cpu"])
    reason: str = Field(description="Why not, and what would help.", examples=["block_size 5 is odd"])


class VersionResponse(BaseModel):
    """Of the server, and what computes."""

    version: str = Field(examples=["0.1.0"])
    backend: str = Field(description="Kernels and dtype.", examples=["cpu (avx2, float32)"])
    batch_invariant: bool = Field(description="Results do not depend on what else is in the batch, to the bit.")
    refused_backends: list[RefusedBackend] = Field(description="Faster ones that cannot be used here, and why.")


class CancelResponse(BaseModel):
    """Requests that were ended."""

    id: str = Field(description="The name that was requested.")
    object: Literal["request.cancelled"] = "request.cancelled"
    cancelled: int = Field(ge=1, description="HTTP requests that were running under this id.")


class ResetResponse(BaseModel):
    """The prefix cache is empty."""

    object: Literal["prefix_cache.reset"] = "prefix_cache.reset"
    freed_blocks: int = Field(ge=0, description="Blocks that were cached and that no request held.")


class LogLevelResponse(BaseModel):
    """The log level that holds now."""

    object: Literal["log_level"] = "log_level"
    level: str = Field(description="Least level that is logged.")
    before: str = Field(description="The one before.")
