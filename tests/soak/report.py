"""What a soak has found, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.soak.checks import Check
from tests.soak.driver import Driver


def print_report(driver: Driver, checks: Sequence[Check]) -> None:
    """The kinds of clients with their outcomes, and the checks."""
    console = Console(width=150)
    kinds = Table("client", "done", "longest", "outcomes", title="Clients")
    for name, tally in driver.tallies.items():
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in tally.outcomes.most_common())
        kinds.add_row(name, str(tally.outcomes.total()), f"{tally.longest:.1f} s", outcomes)
    console.print(kinds)
    longest = Table("longest wait", "", title="Measured by clients")
    for name, seconds in driver.longest.items():
        longest.add_row(name, f"{seconds:.2f} s")
    console.print(longest)
    found = Table("check", "", "found", title="Checks", show_lines=True)
    for check in checks:
        found.add_row(check.name, "holds" if check.passed else "FAILS", check.found)
    console.print(found, markup=False)


def as_json(driver: Driver, checks: Sequence[Check], settings: dict[str, Any]) -> dict[str, Any]:
    """All of it."""
    return {
        **settings,
        "passed": all(check.passed for check in checks),
        "clients": {
            name: {"outcomes": dict(tally.outcomes), "longest_s": tally.longest}
            for name, tally in driver.tallies.items()
        },
        "longest_s": driver.longest,
        "memory_mb": [(round(at, 1), round(size / 1e6, 1)) for at, size in driver.memory],
        "checks": [check._asdict() for check in checks],
        "faults": driver.faults,
        "hung": driver.hung,
    }
