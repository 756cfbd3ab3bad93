"""Clients for Node: what `make test-extra` has installed for it lies below this environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run_node(script: str, *arguments: str, timeout: float = 300) -> None:
    """Run a script of this folder to its end, which it reaches if all that it asserts holds. It is given the arguments
    and the folder of the packages."""
    command = ["node", str(Path(__file__).with_name(script)), *arguments, sys.prefix]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr
