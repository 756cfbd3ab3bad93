"""The cases of backends and their layouts that `tests.test_backends` leaves out."""

from __future__ import annotations

import pytest

from lpa_model.config import CacheLayout
from tests.test_backends import (
    BACKENDS,
    BASIC,
    BITS,
    BRANCHES,
    LAYOUTS,
    ROWS,
    cases_of,
    check_bits,
    check_branches,
    check_every_row,
)


@pytest.mark.parametrize(
    ("name", "case", "layout"),
    [
        (name, case, layout)
        for name in BACKENDS
        for case in cases_of(name)
        for layout in LAYOUTS
        if (name, case, layout) not in ROWS
    ],
)
def test_every_row_equals_the_plain_forward(name: str, case: str, layout: CacheLayout) -> None:
    check_every_row(name, case, layout)


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name in BACKENDS for case in BASIC if (name, case) not in BRANCHES]
)
def test_branches_see_the_beginning_and_themselves(name: str, case: str) -> None:
    check_branches(name, case)


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in BACKENDS for case in (*BASIC, "setting2-per-layer") if (name, case) not in BITS],
)
def test_bits_do_not_depend_on_chunks_batches_or_threads(name: str, case: str, two_threads: None) -> None:
    check_bits(name, case)
