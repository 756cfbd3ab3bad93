"""`lpa serve`."""

from __future__ import annotations

import inspect
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import typer

from server.cli.command import command_of, ends_at_once, flag, user_errors

if TYPE_CHECKING:  # help must not wait for pydantic
    from server.settings import Settings


def serve() -> None:
    """Start the HTTP server on a model folder (`lpa serve --help` lists every setting)."""


def serve_command() -> Any:
    """`lpa serve` with a flag for every setting."""
    from server.settings import GROUPS, Settings

    folder = typer.Argument(None, metavar="MODEL", help="The same as --model.")
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("folder", positional, default=folder, annotation=str | None)]
    group = None
    for name, field in Settings.model_fields.items():
        group = GROUPS.get(name, group)
        # pydantic reads values of every kind from text, for flags as for variables
        several = get_origin(field.annotation) is tuple
        switch = field.annotation is bool or bool in get_args(field.annotation)
        kind = bool if switch else list[str] if several else str
        default = None if field.default_factory or several else field.default
        metavar = None if kind is bool else _metavar(field.annotation)
        parameters.append(flag(name, kind, field.description or "", default, metavar, group))
    return command_of(parameters, _serve, "Start the HTTP server. Every flag is also a variable: LPA_PORT=9000.")


def _metavar(annotation: Any) -> str:
    """What a flag's help calls its value: the choices of a Literal, else the type."""
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    kind = next(part for part in (*get_args(annotation), annotation) if part is not type(None))
    return {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(kind, "TEXT")


def _serve(given: dict[str, Any]) -> None:
    from server.settings import load_settings

    with user_errors():
        if "folder" in given:
            if "model" in given:
                raise ValueError("--model: the model folder is given twice")
            given["model"] = given.pop("folder")
        settings = load_settings(**given)

    with user_errors(), ends_at_once():  # the server's own handlers take over when it has started
        status = _serve_replicas(settings) if settings.ray_replicas is not None else _serve_here(settings)
    raise typer.Exit(status)


def _serve_here(settings: Settings) -> int:
    from lpa_model.folder import weights_hash

    hashing: Future[str] = Future()

    def run() -> None:
        try:
            hashing.set_result(weights_hash(settings.model))
        except Exception as error:  # whatever it is, the engine waits for an answer
            hashing.set_exception(error)

    # while torch is imported, on one processor; no executor, which would keep the process of a mistake until it is done
    Thread(target=run, name="hashing", daemon=True).start()
    from server.serve import serve

    return serve(settings, hashing)


def _serve_replicas(settings: Settings) -> int:
    from server.replicas import check_replicated

    check_replicated(settings)
    try:
        from server.ray_serve import serve_replicas
    except ModuleNotFoundError as error:
        missing = f"{error.name} is not installed; pip install 'lpa-server[ray]' brings it"
        raise ValueError(f"--ray-replicas (LPA_RAY_REPLICAS): {missing}") from None
    return serve_replicas(settings)
