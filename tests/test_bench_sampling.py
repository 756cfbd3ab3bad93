"""`lpa bench sampling` on a tiny model: every feature is measured against the plain step of the same rounds."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from lpa_model.config import Architecture
from server.bench.sampling import features
from server.cli import app
from server.engine.request import SamplingParams
from tests.tiny import tiny_config, write_checkpoint


def test_every_feature_is_measured(architecture: Architecture, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tiny_config(architecture))
    arguments = [
        "bench",
        "sampling",
        str(folder),
        "--streams",
        "3",
        "--input-len",
        "9",
        "--steps",
        "3",
        "--rounds",
        "2",
    ]
    result = CliRunner().invoke(app, [*arguments, "--dtype", "float32", "--threads", "1", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["feature"] for row in rows] == list(features(300, 1))
    assert rows[0]["ratio"] == 1
    for row in rows:
        assert row["ms"] > 0 and row["ratio"] > 0
        assert row["deferred"] == 0 or "JSON" in row["feature"]
    if architecture == "setting1":  # once
        table = CliRunner().invoke(app, [*arguments, "--dtype", "float32", "--threads", "1"])
        assert "to greedy" in table.stdout


def test_each_feature_asks_for_something_else() -> None:
    asked = list(features(32000, 5).values())
    assert len(set(asked)) == len(asked)
    assert all(isinstance(params, SamplingParams) for pair in asked for params in pair)
    assert sum(params.grammar is not None for pair in asked for params in pair) == 3


def test_steps_that_do_not_fit_the_context_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tiny_config())
    result = CliRunner().invoke(app, ["bench", "sampling", str(folder), "--input-len", "120", "--threads", "1"])
    assert result.exit_code == 2
    assert "exceed the context of 128" in result.stderr
