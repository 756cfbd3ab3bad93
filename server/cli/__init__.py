"""The `lpa` command: a file per sub-command. Heavy modules are imported by the commands that need them, so that
`lpa --help` is quick.

A mistake of the user ends a command with one line on stderr and exit status 2.
"""

from __future__ import annotations

from typing import Annotated

import typer

from server.cli.bench import bench
from server.cli.chat import chat
from server.cli.command import collect_rarely, lazy, spin_briefly
from server.cli.convert import convert
from server.cli.export import export
from server.cli.generate import generate
from server.cli.info import info
from server.cli.init import init
from server.cli.quantize import quantize
from server.cli.run_batch import run_batch
from server.cli.score import score
from server.cli.serve import serve, serve_command
from server.cli.tokenize import tokenize
from server.cli.train import train, train_command

app = typer.Typer(
    name="lpa",
    help="Train, convert, inspect and serve LPA (low-dimensional projected attention) language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 1000},  # help is as wide as the terminal
)
app.command(cls=lazy(serve_command))(serve)
app.command()(generate)
app.command()(chat)
app.command()(score)
app.command("run-batch")(run_batch)
app.command(cls=lazy(train_command))(train)
app.command()(tokenize)
app.command()(init)
app.add_typer(convert, name="convert")
app.add_typer(export, name="export")
app.command()(quantize)
app.add_typer(bench, name="bench")
app.command()(info)


def _show_version(wanted: bool) -> None:
    if wanted:
        from server.version import package_version

        typer.echo(f"lpa {package_version()}")
        raise typer.Exit


@app.callback()
def _lpa(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point of the `lpa` command."""
    spin_briefly()
    collect_rarely()
    app()
