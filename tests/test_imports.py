"""The direction of the arrows between the packages, read from the source without importing it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WEB = ("fastapi", "starlette", "uvicorn", "pydantic", "pydantic_settings")
HTTP = ("fastapi", "starlette", "uvicorn", "server.app", "server.cli", "server.routes")
OUTER = tuple(
    f"server.{name}"
    for name in (
        "app",
        "bench",
        "cli",
        "client",
        "keys",
        "llm",
        "metrics",
        "middleware",
        "openapi",
        "protocol",
        "ray_serve",
        "routes",
        "scoring",
        "settings",
    )
)

# a file or folder, and what nothing in it may import (modules and all below them)
RULES: list[tuple[str, tuple[str, ...]]] = [
    ("lpa_model", ("server", *WEB)),
    *((where, ("ziglang",)) for where in ("lpa_model", "server")),  # the compiler is for building alone
    # what a model is does not know how it is computed
    *(
        (f"lpa_model/{name}.py", ("lpa_model.backends",))
        for name in ("attention", "batch", "cache", "checkpoint", "compare", "config", "layers", "model", "perplexity")
    ),
    *((f"lpa_model/{name}.py", ("torch",)) for name in ("batch", "folder", "hf_keys")),
    ("lpa_model/backends/base.py", ("torch",)),
    ("lpa_model/backends/torch", ("lpa_model.backends.cpu", "lpa_model.backends.cuda", "lpa_model.backends.select")),
    ("lpa_model/backends/cpu", ("lpa_model.backends.cuda", "lpa_model.backends.select")),
    ("lpa_model/backends/cuda", ("lpa_model.backends.cpu", "lpa_model.backends.select")),
    ("server", ("lpa_model.backends.cpu",)),
    *(  # `lpa bench device` alone looks into it
        (f"server/{name}", ("lpa_model.backends.cuda",))
        for name in ("cli", "engine", "llm.py", "protocol", "routes", "scoring")
    ),
    ("server/engine", (*WEB, *OUTER)),
    ("server/errors.py", ("torch", "lpa_model", "server", *WEB)),
    ("server/engine/hidden_states.py", ("torch", "lpa_model", "server")),
    (
        "server/engine/request.py",
        ("torch", "lpa_model", *(f"server.{m}" for m in ("app", "errors", "protocol", "routes", "engine.engine"))),
    ),
    (
        "server/engine/block_manager.py",
        ("torch", "lpa_model", *(f"server.engine.{m}" for m in ("scheduler", "engine"))),
    ),
    ("server/engine/scheduler.py", ("torch", "lpa_model", *(f"server.engine.{m}" for m in ("engine", "model_runner")))),
    ("server/engine/scheduler.py", ("server.engine.async_engine",)),
    *((f"server/engine/{name}.py", ("torch", "lpa_model")) for name in ("step_cost", "waiting_queue")),
    ("server/protocol", ("torch", "server.app", "server.cli", "server.routes")),
    ("server/routes", ("torch", "server.app", "server.cli", "server.llm")),
    ("server/llm.py", (*HTTP, "server.bench")),
    ("server/scoring", (*HTTP, "server.bench")),
    ("server/scoring/perplexity.py", ("torch", "server.llm", "server.engine.engine")),
    ("server/scoring/loglikelihood.py", ("torch", "server.llm", "server.engine.engine")),
    ("server/client.py", ("torch", "lpa_model", "server", *WEB)),
    *((f"server/{name}.py", ("server.routes", "server.app")) for name in ("keys", "settings", "metrics")),
]


def files(where: str) -> list[Path]:
    path = ROOT / where
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@cache  # many rules hold for the same files
def imported(path: Path) -> tuple[str, ...]:
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, wherever in it; `from a import b` gives a and a.b."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("where", "forbidden"), RULES, ids=[where for where, _ in RULES])
def test_imports_point_inwards(where: str, forbidden: tuple[str, ...]) -> None:
    found = files(where)
    assert found, f"{where} is gone: the rule holds nothing"
    for path in found:
        for name in imported(path):
            for module in forbidden:
                assert name != module and not name.startswith(module + "."), f"{path.relative_to(ROOT)} imports {name}"


def test_the_reader_sees_every_form_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "server/engine/x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import torch.nn as n, json\nfrom server import app\nfrom . import request\nfrom ..routes.sse import y\n"
        "def f():\n    from fastapi.responses import Response\n"
    )
    assert set(imported(path)) == {
        "torch.nn",
        "json",
        "server",
        "server.app",
        "server.engine",
        "server.engine.request",
        "server.routes.sse",
        "server.routes.sse.y",
        "fastapi.responses",
        "fastapi.responses.Response",
    }
