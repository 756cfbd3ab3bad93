"""`lpa run-batch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli.command import Dtype, Model, Weights, ends_at_once, progress_bar, user_errors


def run_batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Requests, as OpenAI's Batch API has them.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Where the answers go, in the same order.")],
    model: Model = None,
    dtype: Dtype = None,
    weights: Weights = None,
) -> None:
    """Answer a file of requests without a server; ^C and a kill lose nothing, the same command goes on.

    Each line of IN is {"custom_id": ..., "method": "POST", "url": "/v1/completions", "body": {...}}; of OUT,
    {"custom_id": ..., "response": {"status_code": 200, "body": {...}}}. A line that fails has its error there.
    """
    import asyncio

    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    from server.settings import load_settings

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed"), TimeRemainingColumn())
    with user_errors():
        settings = load_settings(model=model, dtype=dtype, weights=weights, log_requests=False)
        from server.batches import local
        from server.engine.engine import build_engine

        if output.is_dir() or not output.parent.is_dir():
            raise ValueError(f"{output}: is no place for a file")
        total = local.check(source, settings)
        with ends_at_once():
            engine = build_engine(settings.model, settings.engine_options())
        with progress_bar(*columns) as bar:
            task = bar.add_task("", total=total, failed=0)

            def show(done: int, failed: int) -> None:
                bar.update(task, completed=done, failed=failed)

            failed = asyncio.run(local.run(source, output, engine, settings, show))
    typer.echo(f"{output}: {total} lines" + (f", {failed} of them failed" if failed else ""))
