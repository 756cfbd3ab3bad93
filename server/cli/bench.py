"""`lpa bench`: a benchmark per sub-command; what each does is in its file in `server/bench`.

A benchmark reports ratios that were measured in one run: absolute figures move with whatever else a machine does.
"""

from __future__ import annotations

import typer

bench = typer.Typer(
    help="Measure servers and the engine; ratios come from one run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@bench.callback()
def _bench() -> None:
    """A group, however many sub-commands it has."""
