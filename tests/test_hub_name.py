"""Names that are no folders: answered at once where the hub cannot be reached."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lpa_model.convert import hub_name
from lpa_model.convert.hub_name import check_available, unreachable
from tests.hub_cache import hub_cache


def test_what_is_in_the_cache_or_a_path_needs_no_hub(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    hub_cache(hub, "someone/small", tmp_path / "theirs")
    for name in ("someone/small", "theirs", "theirs/none", "none", "a/b/c"):
        check_available(name)
    with pytest.raises(ValueError, match=r"modles/x: no such folder; .* HF_HUB_OFFLINE is set"):
        check_available("modles/x")


def test_a_hub_that_cannot_be_reached_is_said(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert unreachable(f"http://127.0.0.1:{port}") is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    message = "modles/x: no such folder; as a name of the Hugging Face hub it could not be fetched: 127.0.0.1 cannot be"
    with pytest.raises(ValueError, match=message):
        check_available("modles/x")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    check_available("modles/x")  # what a proxy reaches is not known


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def silent(address: tuple[str, int], timeout: float) -> None:
        over.wait(60)
        raise TimeoutError("timed out")

    monkeypatch.setattr(hub_name.socket, "create_connection", silent)
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2")
    began = time.perf_counter()
    assert unreachable("https://hub.invalid") == "hub.invalid does not answer within 0.2 s (HF_HUB_ETAG_TIMEOUT)"
    assert time.perf_counter() - began < 30
    over.set()


def test_nothing_heavy_is_imported_for_it(tmp_path: Path) -> None:
    check = (
        "import sys\nfrom server.cli import app\n"
        "for command in ('info modles/x', 'serve modles/x', 'score a --model modles/x'):\n"
        "    try:\n        app(command.split())\n"
        "    except SystemExit as error:\n        assert error.code == 2\n"
        "    assert not {'torch', 'huggingface_hub.hf_api'} & set(sys.modules), command"
    )
    (tmp_path / "a").write_text("text")
    root = Path(__file__).parent.parent
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", check]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    line = "modles/x: no such folder; as a name of the Hugging Face hub it could not be fetched"
    assert done.stderr.count(line) == 3, done.stderr
