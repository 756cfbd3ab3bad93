"""The server against requests that schemathesis makes from its OpenAPI document."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lpa_model.config import Architecture
from tests.serving import serving, until

NOT_CHECKED = (
    # "valid by the document" says nothing of rules between fields, such as prompt and max_tokens against the context
    "positive_data_acceptance",
    # null means the default, which the document says in words and not in every field's type
    "negative_data_rejection",
)


@pytest.mark.parametrize("keys", [{}, {"api_key": "client", "admin_api_key": "boss"}], ids=["open", "locked"])
def test_no_failure_and_nothing_undocumented(
    tmp_path: Path, tiny_checkpoints: dict[Architecture, Path], keys: dict[str, Any]
) -> None:
    with serving(tiny_checkpoints["setting2"], **keys) as served:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json"]
        options = ["--checks=all", f"--exclude-checks={','.join(NOT_CHECKED)}", "--phases=examples,coverage,fuzzing"]
        options += ["--max-examples=40", "--seed=1", "--request-timeout=20", "--no-color"]
        options += ["-HAuthorization: Bearer boss"] if keys else []
        # elsewhere, since it keeps a database of examples beside itself
        done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=550)
        assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
        until(served.idle)
