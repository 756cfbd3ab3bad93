"""Kernels compiled beside everything else, and run in the threads that torch runs in.

Nothing here or in what calls it imports numba but the thread that compiles: the import takes time, and may fail.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

Kernel = Callable[[bytes, int], None]
"""Takes the bytes of a call, and into how many pieces its work falls: it returns when all are done."""

_one_at_a_time = threading.Lock()


@cache
def compile_kernel(name: str) -> Future[Kernel | None]:
    """Start to compile `module.function`, or to load it from numba's cache; None in the end if that is not possible.

    It takes seconds without a cache. Whoever needs the kernel waits for it, so that results do not depend on when it
    was ready.
    """
    future: Future[Kernel | None] = Future()

    def run() -> None:
        try:
            future.set_result(_load(name))
        except Exception as error:  # whatever numba cannot do here, torch can
            logger.warning("%s: not compiled, so that plain torch does its work: %s", name, error)
            future.set_result(None)

    if find_spec("numba") is None:
        future.set_result(None)
    else:
        threading.Thread(target=run, name=f"compile {name}", daemon=True).start()
    return future


def _load(name: str) -> Kernel:
    module_name, function = name.rsplit(".", 1)
    with _one_at_a_time:
        import numba

        logging.getLogger("numba").setLevel(logging.WARNING)  # at DEBUG it writes down every step of a compilation
        numba.config.CACHE_DIR = str(_cache_folder())
        module = importlib.import_module(module_name)
        compiled = numba.cfunc(module.SIGNATURE, cache=True)(getattr(module, function))
    kernel = compiled.ctypes  # holds on to the code
    kernel.argtypes = [ctypes.c_void_p]
    parallel = _openmp()

    def start(call: bytes, pieces: int) -> None:
        threads = torch.get_num_threads()
        if pieces == 1 or threads == 1 or parallel is None:
            kernel(call)
        else:
            parallel(kernel, call, threads, 0)

    return start


@cache
def _cache_folder() -> Path:
    """Where numba keeps what it has compiled: it is told apart by all of the kernels' source, and can be written to."""
    here = Path(__file__).parent
    source = b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))
    folder = Path(os.environ.get("NUMBA_CACHE_DIR") or here / "__pycache__") / hashlib.sha256(source).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:  # numba reads nothing where it may not write: what was compiled at installation is copied
        copy = Path(tempfile.mkdtemp(prefix="lpa-kernels-"))
        return Path(shutil.copytree(folder, copy, dirs_exist_ok=True)) if folder.is_dir() else copy
    return folder


@cache
def _openmp() -> Any:
    """The start of a parallel region in the OpenMP library that torch runs on; None if there is none to be found.

    Its threads are there already, and two libraries' threads would get into each other's way.
    """
    return getattr(ctypes.CDLL(None), "GOMP_parallel", None) if sys.platform == "linux" else None
