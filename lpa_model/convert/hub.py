"""Models of the Hugging Face hub: fetched into its own cache, and converted once into ours where they are not LPA's.

The hub's variables hold: HF_TOKEN, HF_HOME, HF_HUB_OFFLINE (nothing but its cache is read).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from lpa_model.checkpoint import load_config, read_optional
from lpa_model.convert.hub_name import hub_name, no_model, unreachable
from lpa_model.convert.llama import convert_llama
from lpa_model.folder import CheckpointError
from lpa_model.hf_keys import LLAMA_TYPES, MODEL_TYPE

SAFETENSORS = ["*.json", "*.jinja", "tokenizer.model", "model*.safetensors"]
PICKLES = ["pytorch_model*.bin"]  # fetched where there is nothing else
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def fetched(name: str, *, revision: str | None = None, file: str | None = None) -> Path:
    """The folder in the hub's cache with the config, tokenizer and weights of a model; of a `file`, that file.

    Raises:
        CheckpointError: it cannot be fetched and is not in the cache; the message has the reason.
    """
    repository = hub_name(name) or name
    if file is not None:
        path = _snapshot(repository, revision, [file]) / file
        if not path.is_file():
            raise CheckpointError(f"{repository}: has no file {file}")
        return path
    folder = _snapshot(repository, revision, SAFETENSORS)
    if not any((folder / weights).is_file() for weights in WEIGHTS):
        folder = _snapshot(repository, revision, PICKLES)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{repository}: no config.json; `lpa convert llama --file NAME.gguf` takes a GGUF file")
    return folder


def _snapshot(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download

    away = None if constants.HF_HUB_OFFLINE else unreachable(constants.ENDPOINT)
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                local_files_only=away is not None,
            )
        )
    except Exception as error:  # HfHubHTTPError, LocalEntryNotFoundError, OSError, ...
        at = "" if revision is None else f" (revision {revision})"
        reason = away or next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(no_model(repository + at, reason)) from error


def model_folder(name: str, say: Callable[[str], None]) -> Path:
    """The native folder of a model of the hub: of an LPA model as it is, of another converted into our cache.

    Args:
        say: is told in a line what is converted, and where to.

    Raises:
        CheckpointError: it cannot be fetched or converted.
    """
    folder = fetched(name)
    if (kind := read_optional(folder / "config.json").get("model_type", MODEL_TYPE)) not in LLAMA_TYPES:
        load_config(folder)  # names what is wrong with any other type
        return folder
    # the hub's folder of a snapshot is called as its commit is
    own = cache() / f"{(hub_name(name) or name).replace('/', '--')}--{folder.name}"
    if not own.is_dir():
        say(f"{name} is a {kind} model, which is converted into {own}")
        convert_llama(folder, own)
    return own


def cache() -> Path:
    """The folder of converted models: lpa/models in XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lpa" / "models"
