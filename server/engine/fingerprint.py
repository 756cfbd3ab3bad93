"""`system_fingerprint`: what a seed's validity hangs on, in one word."""

from __future__ import annotations

import re
from typing import NamedTuple

from server.version import package_version


class Identity(NamedTuple):
    """What scores depend on, beside the texts and how they are cut."""

    weights: str  # hash of config.json and the weights
    tokenizer: str  # hash of its description
    backend: str  # its name


def fingerprint(weights: str, backend: str) -> str:
    """Version, hash of the weights, and the backend's name with its dtype: lpa-0.1.0-3f2a9c1be07d-cpu-avx2-float32."""
    return f"lpa-{package_version()}-{weights}-{re.sub('[^a-z0-9]+', '-', backend.lower()).strip('-')}"
