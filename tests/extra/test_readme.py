"""The documents of `tests.test_readme.HEAVY`, typed as that file types the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents import name
from tests.terminal import Terminals, check, walked
from tests.test_readme import HEAVY


@pytest.fixture(scope="module")
def terminals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminals]:
    with walked(tmp_path_factory.mktemp("clone"), HEAVY) as found:
        yield found


@pytest.mark.parametrize("path", HEAVY, ids=name)
def test_what_is_typed_works(path: Path, terminals: Terminals) -> None:
    check(HEAVY[path], terminals[path].result())
