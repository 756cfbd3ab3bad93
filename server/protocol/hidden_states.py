"""POST /v1/hidden_states: request fields, which rows they mean, and the answer as JSON, lines or a safetensors file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, model_validator

from server.errors import InvalidRequest
from server.protocol.body import HARMLESS, RequestBody
from server.protocol.embeddings import PromptUsage
from server.protocol.inputs import ADD_SPECIAL_TOKENS, MODEL, Inputs
from server.protocol.safetensors import Tensor, header
from server.protocol.sampling import FINGERPRINT

Positions = Sequence[int]


class HiddenStatesRequest(RequestBody):
    """Texts, and which of their hidden states are wanted."""

    harmless: ClassVar[frozenset[str]] = HARMLESS

    model: str | None = MODEL
    input: Inputs = Field(
        description="The text or texts, or their token ids; none may be empty.", examples=[["The sea was calm."]]
    )
    layers: list[int] = Field(
        [-1],
        min_length=1,
        description="0: the embeddings, which the first layer reads. i: what layer i leaves. The number of layers: "
        "what the output head reads, after the final norm if there is one. Negative ones count from the end. As "
        "`output_hidden_states` of transformers.",
        examples=[[0, -1]],
    )
    positions: list[int] | None = Field(
        None,
        min_length=1,
        description="Of the tokens of every text, ascending, from 0; negative ones count from the end (default: all).",
        examples=[[-1]],
    )
    encoding_format: Literal["base64", "safetensors"] = Field(
        "base64",
        description="base64: JSON, with the bytes of float32 numbers, little-endian. safetensors: one file with the "
        "tensors `hidden_states.0`, `positions.0` and `token_ids.0` of the first text, and so on.",
    )
    stream: bool = Field(False, description="base64: answer with lines of JSON as they are computed.")
    add_special_tokens: bool = ADD_SPECIAL_TOKENS

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.stream and self.encoding_format == "safetensors":
            raise InvalidRequest("stream: is for base64; a safetensors file is always sent as it grows", param="stream")
        return self


class HiddenStatesEntry(BaseModel):
    """Of one text; a line of a stream has some of its positions."""

    object: Literal["hidden_states"] = "hidden_states"
    index: int = Field(ge=0, description="Of the text in `input`.")
    token_ids: list[int] = Field(description="All of the text's.")
    positions: list[int] = Field(description="Those of `shape`.")
    shape: list[int] = Field(description="[positions, layers, hidden_size].", examples=[[1, 2, 256]])
    dtype: Literal["float32"] = "float32"
    data: str = Field(description="The numbers' bytes in base64, the last axis fastest.")


class HiddenStatesResponse(BaseModel):
    """Hidden states in the order of the texts; a stream ends with this object without `data`."""

    object: Literal["list"] = "list"
    model: str
    system_fingerprint: str = FINGERPRINT
    layers: list[int] = Field(description="As numbers from 0.")
    data: list[HiddenStatesEntry]
    usage: PromptUsage


def layers_of(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The layers of a request as numbers from 0 to `num_layers`. Raises InvalidRequest."""
    found = []
    for i, layer in enumerate(layers):
        number = layer + num_layers + 1 if layer < 0 else layer
        if not 0 <= number <= num_layers:
            raise InvalidRequest(
                f"layers[{i}]: {layer} is not between {-num_layers - 1} and {num_layers}; the model has {num_layers} "
                "layers",
                param=f"layers[{i}]",
            )
        if number in found:
            raise InvalidRequest(f"layers[{i}]: layer {number} is given twice", param=f"layers[{i}]")
        found.append(number)
    return tuple(found)


def positions_of(positions: Sequence[int] | None, length: int, where: str) -> Positions:
    """The positions that are wanted of a text of so many tokens, which `where` names. Raises InvalidRequest."""
    if positions is None:
        return range(length)
    found = [position + length if position < 0 else position for position in positions]
    for i, position in enumerate(found):
        if not 0 <= position < length:
            raise InvalidRequest(
                f"positions[{i}]: {positions[i]} is no position of {where}, which has {length} tokens",
                param=f"positions[{i}]",
            )
    for i, (before, after) in enumerate(pairwise(found), 1):
        if before >= after:
            raise InvalidRequest(
                f"positions[{i}]: is {after} in {where}, and {before} before it; they must ascend",
                param=f"positions[{i}]",
            )
    return found


@dataclass(frozen=True)
class Wanted:
    """A text's tokens, and the positions that are wanted of it."""

    where: str
    token_ids: list[int]
    positions: Positions


@dataclass(frozen=True)
class Part:
    """Positions of a text that are computed as one sequence."""

    index: int  # of the text
    positions: Positions


def parts_of(wanted: Sequence[Wanted], most: int, block_size: int) -> Iterator[Part]:
    """The positions of all texts in order, at most `most` at a time: whole blocks where they fit, so that the later
    parts of a text find its earlier tokens in the prefix cache."""
    most = most // block_size * block_size or most
    for index, text in enumerate(wanted):
        for start in range(0, len(text.positions), most):
            yield Part(index, text.positions[start : start + most])


def entry_fields(part: Part, text: Wanted, shape: Sequence[int]) -> dict[str, Any]:
    """An entry of `data`, or a line, without its numbers."""
    return {
        "object": "hidden_states",
        "index": part.index,
        "token_ids": text.token_ids,
        "positions": list(part.positions),
        "shape": list(shape),
        "dtype": "float32",
    }


def answer_fields(model: str, fingerprint: str, layers: Sequence[int], prompt_tokens: int) -> dict[str, Any]:
    """The answer without `data`."""
    return {
        "object": "list",
        "model": model,
        "system_fingerprint": fingerprint,
        "layers": list(layers),
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }


def safetensors_head(wanted: Sequence[Wanted], layers: Sequence[int], width: int, metadata: dict[str, str]) -> bytes:
    """A safetensors file up to the first number of `hidden_states.0`: what follows is those of all texts, one after
    another."""
    tensors: dict[str, Tensor] = {}
    columns: list[npt.NDArray[np.int64]] = []
    for i, text in enumerate(wanted):
        for name, values in (("token_ids", text.token_ids), ("positions", text.positions)):
            tensors[f"{name}.{i}"] = ("I64", (len(values),))
            columns.append(np.array(values, dtype="<i8"))
    for i, text in enumerate(wanted):
        tensors[f"hidden_states.{i}"] = ("F32", (len(text.positions), len(layers), width))
    return b"".join((header(tensors, metadata), *(column.tobytes() for column in columns)))
