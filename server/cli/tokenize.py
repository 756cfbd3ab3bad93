"""`lpa tokenize`."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.command import bytes_bar, check_new, in_thread, sigterm_unwinds, user_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def tokenize(
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE...", help="Text: UTF-8 or JSONL, .gz too.")],
    folder: Annotated[Path, typer.Argument(help="Where to write tokenizer.json and tokens.safetensors.")],
    vocab_size: Annotated[int | None, typer.Option(min=257, help="Train a tokenizer of so many entries.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Or take this one: tokenizer.json, or a folder with one.")
    ] = None,
    field: Annotated[str, typer.Option(help="Field of a JSONL object that has the text.")] = "text",
    end_of_text: Annotated[
        str | None, typer.Option(help="Token between documents.", show_default="<|endoftext|>")
    ] = None,
) -> None:
    """Make a folder of tokens, which `lpa train` maps into memory, of texts of any size."""
    from lpa_model.checkpoint import read_tokenizer
    from lpa_model.train.data import tokenize as run
    from lpa_model.train.tokenizer import END_OF_TEXT

    partial = folder.resolve().with_name(f".{folder.name}.partial")
    with user_errors(), sigterm_unwinds():
        if (vocab_size is None) == (tokenizer is None):
            raise ValueError("vocab_size or tokenizer: one of them says which tokenizer it is")
        if end_of_text is not None and tokenizer is None:
            raise ValueError(f"end_of_text: a tokenizer that is trained has {END_OF_TEXT}")
        check_new(folder)
        total = sum(source.stat().st_size for source in sources)
        used: Tokenizer | int = vocab_size or 0
        if tokenizer is not None:
            used = read_tokenizer(tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            with bytes_bar(total) as report:
                found, tokens = in_thread(
                    lambda: run(
                        sources,
                        partial,
                        tokenizer=used,
                        end_of_text=end_of_text or END_OF_TEXT,
                        field=field,
                        report=report,
                    )
                )
            partial.replace(folder)
        except KeyboardInterrupt:
            typer.echo("stopped; nothing is left of it", err=True)
            raise typer.Exit(128 + signal.SIGINT) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    typer.echo(
        f"{folder}: {len(tokens.ids):,} tokens ({tokens.ids.dtype}) in documents: {tokens.documents:,}; "
        f"{tokens.num_bytes:,} bytes of text; a tokenizer of {found.get_vocab_size():,} entries"
    )
