"""`lpa bench device` on a CPU: every part with tiny models, a part that fails, and time that runs out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lpa_model.backends.cuda import check
from lpa_model.backends.cuda.twins import TWINS
from server.bench.device import checks
from server.bench.device.parts import PARTS, bench_device
from server.bench.device.report import print_part
from server.bench.device.setup import Setup
from server.cli import app
from tests.tiny import random_model, tiny_config

TINY = Setup("cpu", True)


@pytest.mark.parametrize("name", [name for name in PARTS if name not in ("invariance", "steps", "transformers")])
def test_parts_find_what_they_look_for(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ)
    with torch.no_grad():
        found = PARTS[name].run(TINY)
    json.dumps(found)
    assert found.get("ok", True) and dict(os.environ) == before
    for row in found.get("rows", []):
        assert all(value > 0 for key, value in row.items() if key.startswith(("share", "tokens_per", "step_ms")))
    print_part(name, found)
    assert capsys.readouterr().out.startswith(f"{name}: ok")


@torch.no_grad()
def test_a_wrong_kernel_is_found() -> None:
    def linear(x: Any, matrix: Any) -> torch.Tensor:
        y: torch.Tensor = TWINS.linear(x, matrix)
        return y + 1e-2 * y.abs().max()

    model = random_model(tiny_config())
    found = check.differences(model, "mixed", 32, TWINS._replace(linear=linear))
    assert found["linear"] > 5e-3 and found["decode_attention"] == 0
    spoiled = check.differences(model, "mixed", 32, TWINS._replace(swiglu=lambda gate, up: gate * float("nan")))
    assert spoiled["swiglu"] == float("inf")


@torch.no_grad()
def test_wrong_numbers_fail_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    through = checks.through
    monkeypatch.setattr(checks, "checked_cases", lambda setup: [("setting 2", "mixed", torch.float32)])
    monkeypatch.setattr(checks, "through", lambda *arguments: through(*arguments) + 2e-4)
    assert not checks.contract(TINY)["ok"]


def test_what_fails_or_has_no_time_is_named(tmp_path: Path) -> None:
    """No torch here has CUDA: each part fails in its process, and the next one has a new one."""
    if torch.cuda.is_available():
        return
    out = tmp_path / "report.json"
    report = bench_device(Setup("cuda", True), ["environment", "prefill"], 1, out)
    assert all("CUDA" in report[name]["error"] for name in ("environment", "prefill"))
    assert report["steps"] == {"left_out": "it was not named"}
    assert json.loads(out.read_text()) == report
    report = bench_device(TINY, ["environment"], 0.01, None)
    assert report["environment"] == {"left_out": "the 0.01 minutes were used up"}


def test_the_command(tmp_path: Path) -> None:
    def lpa(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["bench", "device", *arguments])

    out = tmp_path / "report.json"
    result = lpa("--device", "cpu", "--part", "attention", "--out", str(out))
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert list(report) == list(PARTS) and len(report["attention"]["rows"]) == 6
    assert "none of environment, operations" in lpa("--device", "cpu", "--part", "speed").output
    if not torch.cuda.is_available():
        assert "device: cuda is not there" in lpa().output
