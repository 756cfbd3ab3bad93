"""What tests of clients that call functions share: SmolLM2 served, questions for it, and a type that it fills in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel

from tests.extra.test_smollm2 import folder, source
from tests.serving import serving

__all__ = ["folder", "source"]  # fixtures
NAME = "SmolLM2"
ASKED = "What is the weather in Paris?"
BUSY = "Paris is a busy city."


class City(BaseModel):
    """A city."""

    name: str
    mood: Literal["calm", "busy"]


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """Where the API's routes begin."""
    with serving(folder, kv_cache_memory=1 << 29, served_model_name=NAME, threads=2) as server:
        yield f"{server.url}/v1"
