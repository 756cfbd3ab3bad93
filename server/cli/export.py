"""`lpa export`."""

from __future__ import annotations

import typer

export = typer.Typer(
    help="Write models in the formats of other servers.", no_args_is_help=True, pretty_exceptions_enable=False
)


@export.callback()
def _export() -> None:
    """Keeps `hf-llama` a sub-command while it is the only one."""
