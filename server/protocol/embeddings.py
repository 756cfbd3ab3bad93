"""POST /v1/embeddings: request fields, and a vector as the answer has it."""

from __future__ import annotations

import base64
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, Field

from server.engine.hidden_states import Floats, HiddenSpec
from server.protocol.body import HARMLESS, RequestBody
from server.protocol.inputs import ADD_SPECIAL_TOKENS, MODEL, Inputs

Encoding = Literal["float", "base64"]
Pooling = Literal["mean", "last"]


class EmbeddingsRequest(RequestBody):
    """Texts, and which of the model's hidden states stands for each."""

    harmless: ClassVar[frozenset[str]] = HARMLESS

    model: str | None = MODEL
    input: Inputs = Field(
        description="The text or texts, or their token ids; none may be empty.", examples=[["The sea was calm."]]
    )
    encoding_format: Encoding = Field(
        "float", description="float: a list of numbers. base64: the bytes of float32 numbers, little-endian."
    )
    dimensions: int | None = Field(
        None, ge=1, description="Only so many of the first numbers, at most the model's hidden_size (default: all)."
    )
    pooling: Pooling = Field(
        "mean", description="Which hidden state: the mean over the text's tokens, or that of its last token."
    )
    normalize: bool = Field(True, description="Divide by the length, so that a dot product is the cosine.")
    add_special_tokens: bool = ADD_SPECIAL_TOKENS


class Embedding(BaseModel):
    """The vector of one text."""

    object: Literal["embedding"] = "embedding"
    index: int = Field(ge=0, description="Of the text in `input`.")
    embedding: list[float] | str = Field(description="As `encoding_format` says.", examples=[[0.0212, -0.0518]])


class PromptUsage(BaseModel):
    """Tokens of the request."""

    prompt_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0, description="The same: nothing is generated.")


class EmbeddingsResponse(BaseModel):
    """Vectors in the order of the texts."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: PromptUsage


def embedding_spec(pooling: Pooling, num_tokens: int, last_layer: int) -> HiddenSpec:
    """The hidden state of which a text's vector is made."""
    first = 0 if pooling == "mean" else num_tokens - 1
    return HiddenSpec(layers=(last_layer,), positions=range(first, num_tokens), mean=pooling == "mean")


def embedding_of(hidden: Floats, dimensions: int | None, *, normalize: bool) -> Floats:
    """hidden [d] -> its first `dimensions` numbers, of length 1 if `normalize`; zeros stay zeros."""
    vector = hidden[:dimensions]
    if not normalize:
        return vector
    exact = vector.astype(np.float64)
    length = float(np.sqrt(np.square(exact).sum()))
    return (exact / length).astype(np.float32) if length else vector


def encoded(numbers: Floats) -> str:
    """The bytes of float32 numbers, little-endian, in base64."""
    return base64.b64encode(numbers.astype("<f4").tobytes()).decode()


def embeddings_fields(model: str, vectors: list[Floats], encoding: Encoding, prompt_tokens: int) -> dict[str, Any]:
    """The answer."""
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": encoded(vector) if encoding == "base64" else vector.tolist(),
        }
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return {"object": "list", "model": model, "data": data, "usage": usage}
