"""The layout of the Hugging Face hub's cache."""

from __future__ import annotations

import shutil
from pathlib import Path


def hub_cache(folder: Path, name: str, files: Path, commit: str = "0123456789abcdef0123456789abcdef01234567") -> None:
    """Put a model's files into the cache `folder`, as the commit of the branch main."""
    at = folder / f"models--{name.replace('/', '--')}"
    shutil.copytree(files, at / "snapshots" / commit)
    (at / "refs").mkdir()
    (at / "refs" / "main").write_text(commit)
