"""The OpenAPI document of one server: FastAPI's, with this server's keys and the names of its model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from server.keys import Keys
from server.protocol.answers import ErrorResponse
from server.protocol.body import HARMLESS
from server.protocol.sampling import SamplingBody
from server.routes.requests import CONTROL

LISTED = ", ".join(f"`{name}`" for name in sorted(HARMLESS))
RENAMED = ", ".join(f"`{name}` is `{ours}`" for name, ours in sorted(SamplingBody.aliases.items()))

DESCRIPTION = f"""\
Text from LPA language models (low-dimensional projected attention), in OpenAI's API, with vLLM's names for what goes
beyond it, and exact perplexities.

A request's body is a JSON object in UTF-8. A field that is null has its default. One that the server does not know is
refused (or ignored, with --ignore-unknown-fields). Taken and not used, since they change nothing: {LISTED}.

Other servers' names that mean exactly one of ours: {RENAMED}.

Every error has the shape of `ErrorResponse`; unknown routes are 404, wrong methods 405 with an Allow
header. Every answer has an `x-request-id` header: the request's own, if it sent one of up to 128 letters, digits and
`_.:-`, or a new one. Where the server has keys, send one as `Authorization: Bearer KEY`.
"""
TAGS = [
    {"name": "OpenAI", "description": "What OpenAI's clients use."},
    {"name": "Scoring", "description": "How well the model predicts texts."},
    {"name": "Tokens", "description": "Text to tokens and back, as vLLM has it."},
    {"name": "Operations", "description": "For load balancers and monitoring."},
    {"name": "Control", "description": "For operators; needs an admin key."},
]
LIMITS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
SCHEMES = {
    "ApiKey": {"type": "http", "scheme": "bearer", "description": "A key of --api-key or --api-key-file."},
    "AdminKey": {"type": "http", "scheme": "bearer", "description": "A key of --admin-api-key."},
}


def openapi_document(app: FastAPI, names: Sequence[str], keys: Keys, root_path: str = "") -> dict[str, Any]:
    """The document of an application whose routes are all there; `names` of the model may be told."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary="An inference server for LPA language models.",
        description=DESCRIPTION,
        license_info={"name": "MIT"},
        tags=TAGS,
        routes=app.routes,
        servers=[{"url": root_path}] if root_path else None,
    )
    schemas: dict[str, Any] = document["components"]["schemas"]
    _, errors = models_json_schema([(ErrorResponse, "serialization")], ref_template="#/components/schemas/{model}")
    schemas.update(errors["$defs"])
    _restore_integers(document)
    document["components"]["securitySchemes"] = SCHEMES
    for path, operation in _operations(document):
        operation["responses"].pop("422", None)  # FastAPI's own form of a refusal, which this server has as 400
        if CONTROL in operation["tags"] and keys.admin:
            operation["security"] = [{"AdminKey": []}]
        elif keys.client and path not in keys.open_paths:
            operation["security"] = [{"ApiKey": []}]
        content = operation.get("requestBody", {}).get("content", {})
        if names and "application/json" in content:
            _name_model(schemas[_name_of(content["application/json"]["schema"])], names)
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    return document


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for operation in item.values():
            yield path, operation


def _restore_integers(schema: Any) -> None:
    """FastAPI reads every limit as a float; these are integers where they were."""
    if isinstance(schema, list):
        for entry in schema:
            _restore_integers(entry)
    elif isinstance(schema, dict):
        for name, value in schema.items():
            if name in LIMITS and isinstance(value, float) and value.is_integer():
                schema[name] = int(value)
            else:
                _restore_integers(value)


def _name_of(reference: dict[str, str]) -> str:
    return reference["$ref"].rpartition("/")[2]


def _name_model(schema: dict[str, Any], names: Sequence[str]) -> None:
    """A request's `model` is one of the names that this server has."""
    if (model := schema["properties"].get("model")) is None:
        return
    for kind in model.get("anyOf", [model]):
        if kind.get("type") == "string":
            kind["enum"] = list(names)
    model["examples"] = [names[0]]
