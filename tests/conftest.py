"""What every test has: settings of libraries, and fixtures over the tiny models of `tests.tiny`.

torch is imported by fixtures: the process that hands tests to others has no use for it."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# before torch and NumPy are there: threads that wait do not spin beside the other worker's
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import typer.testing
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lpa_model.config import Architecture

gc.disable()  # until all tests are collected: what is imported stays
# clients read whom they trust, in half a request's time each: one authority that signs nothing, not a hundred and fifty
os.environ["SSL_CERT_FILE"] = str(Path(__file__).with_name("authority.pem"))
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder is looked up in the hub's cache alone
# from an application's functions to its commands takes longer than most commands: once, not for each that is run.
# typer's runner has no public way to it: it takes applications, no commands that are made already
typer.testing._get_command = functools.cache(typer.testing._get_command)  # type: ignore[attr-defined]

# of random examples; make test-long takes `--hypothesis-profile thorough`. No machine is too slow
WITHOUT_TIME: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=25, **WITHOUT_TIME)
settings.register_profile("thorough", max_examples=200, **WITHOUT_TIME)
settings.load_profile("quick")

LONGEST = (
    "test_backends.py",
    "test_readme.py",
    "test_processes.py",
    "test_reproducible.py",
    "test_engine.py",
    "test_cli.py",
    "test_tools.py",
    "test_wheel.py",
)


def pytest_collection() -> None:
    """Each of several workers compiles its part of the tests first: all would compile all of them at the same time."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker:
        files = sorted(Path(__file__).parent.glob("test_*.py"))
        for file in files[int(worker.removeprefix("gw")) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]:
            with contextlib.suppress(Exception):  # collecting it says what is wrong
                importlib.import_module(f"tests.{file.stem}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that two processes end at about the same time."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish() -> None:
    """The garbage collector passes over what lives as long as all tests: tests, modules and their tables."""
    gc.freeze()
    gc.set_threshold(10_000, *gc.get_threshold()[1:])
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Products this small lose by a second thread."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hugging Face hub, which nothing is fetched into, and our cache beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Asynchronous tests run on asyncio."""
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    from tests.tiny import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture(params=["setting1", "setting2"])
def architecture(request: pytest.FixtureRequest) -> Architecture:
    """Runs a test once per published setting."""
    return "setting1" if request.param == "setting1" else "setting2"


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Architecture, Path]:
    """A native folder of each setting; read only."""
    from tests.tiny import tiny_config, write_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "setting1": write_checkpoint(root / "setting1", tiny_config("setting1")),
        "setting2": write_checkpoint(root / "setting2", tiny_config("setting2")),
    }


@pytest.fixture
def tiny_checkpoint(architecture: Architecture, tiny_checkpoints: dict[Architecture, Path]) -> Path:
    """A native folder; a test that uses it runs for both settings."""
    return tiny_checkpoints[architecture]


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """What a command has set up for its own standard error does not outlive it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Products on two threads, where they would otherwise take one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
