"""A conversion that is ended leaves nothing beside its target."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lpa_model.convert.export import export_llama
from server.cli import lowrank
from tests.test_cli import lpa
from tests.test_lowrank import dense_config
from tests.tiny import CORPUS, write_checkpoint


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("source", ["llama", "lowrank"])
def test_a_signal_while_matrices_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, number: signal.Signals, status: int
) -> None:
    found: list[set[str]] = []

    @contextmanager
    def ended_at_the_first_layer() -> Iterator[Callable[[str, int, int], None]]:
        def tick(text: str, done: int, total: int) -> None:
            found.append({path.name for path in tmp_path.iterdir()})
            os.kill(os.getpid(), number)

        yield tick

    monkeypatch.setattr(lowrank, "counts_bar", ended_at_the_first_layer)
    config = dense_config(hidden_size=128, intermediate_size=256, num_key_value_heads=4, head_dim=32)
    write_checkpoint(tmp_path / "lowrank", config)
    export_llama(tmp_path / "lowrank", tmp_path / "llama", torch.float32)
    (tmp_path / "text.txt").write_text(CORPUS * 20, encoding="utf-8")
    before = {path.name for path in tmp_path.iterdir()}
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    given = ("--keep", 0.8, "--calibrate", tmp_path / "text.txt", "--calibrate-tokens", 512)
    result = lpa("convert", source, tmp_path / source, tmp_path / "new", *given)
    assert result.exit_code == status, result.output
    assert len(found) == 1 and any(name.startswith(".new.") for name in found[0] - before)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
