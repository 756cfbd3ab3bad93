"""The `lpa` command: a file per sub-command. Whatever is heavy is imported by the command that needs it, so that
`lpa --help` is quick.

A mistake of the user ends a command with one line on stderr and exit status 2.
"""

from __future__ import annotations

import typer

from server.cli.bench import bench
from server.cli.command import PASS_THROUGH, spin_briefly
from server.cli.convert import convert
from server.cli.export import export
from server.cli.generate import generate
from server.cli.info import info
from server.cli.init import init
from server.cli.score import score
from server.cli.serve import serve
from server.cli.train import train

app = typer.Typer(
    name="lpa",
    help="Train, convert, inspect and serve LPA (low-dimensional projected attention) language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(context_settings=PASS_THROUGH)(serve)
app.command()(generate)
app.command()(score)
app.command(context_settings=PASS_THROUGH)(train)
app.command()(init)
app.add_typer(convert, name="convert")
app.add_typer(export, name="export")
app.add_typer(bench, name="bench")
app.command()(info)


def main() -> None:
    """The entry point of the `lpa` command."""
    spin_briefly()
    app()
