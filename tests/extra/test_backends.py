"""The layouts of the cases that `tests.test_backends` leaves out."""

from __future__ import annotations

import pytest

from lpa_model.config import CacheLayout
from tests.test_backends import BACKENDS, LAYOUTS, cases_of, check_every_row, layouts_of


@pytest.mark.parametrize(
    ("name", "case", "layout"),
    [
        (name, case, layout)
        for name in BACKENDS
        for case in cases_of(name)
        for layout in LAYOUTS
        if layout not in layouts_of(name, case)
    ],
)
def test_every_row_equals_the_plain_forward(name: str, case: str, layout: CacheLayout) -> None:
    check_every_row(name, case, layout)
