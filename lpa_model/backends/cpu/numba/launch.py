"""Kernels as machine code, compiled once, and run in the threads that torch runs in.

Nothing here imports numba but the thread that compiles: the import takes time and memory, and may fail.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import logging
import os
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

Kernel = Callable[[bytes, int], None]
"""Takes the bytes of a call, and into how many pieces its work falls: it returns when all are done."""

ENTRY = "lpa_kernel"  # the function of an object file

_one_at_a_time = threading.Lock()
_engines: list[Any] = []  # that hold the kernels' code


@cache
def compile_kernel(name: str) -> Future[Kernel | None]:
    """Start to load `module.function`, compiled at installation or now; None in the end if that is not possible.

    Compiling takes seconds, and where numba is not installed there are no kernels. Whoever needs one waits for it, so
    that results do not depend on when it was ready.
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
    file = _folder() / name
    code = _kept(file)
    if code is None:
        with _one_at_a_time:
            code = importlib.import_module("lpa_model.backends.cpu.numba.build").object_code(name)
        _keep(code, file)
    kernel = _link(code)
    parallel = _openmp()

    def start(call: bytes, pieces: int) -> None:
        threads = torch.get_num_threads()
        if pieces == 1 or threads == 1 or parallel is None:
            kernel(call)
        else:
            parallel(kernel, call, threads, 0)

    return start


def _link(code: bytes) -> Any:
    """An object file's ENTRY in memory, where it stays."""
    import llvmlite.binding as llvm

    with _one_at_a_time:
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
        engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
        engine.finalize_object()
        _engines.append(engine)
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address(ENTRY))


def target_machine() -> Any:
    """LLVM's for this processor."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True)


@cache
def _folder() -> Path:
    """Where object files are kept: told apart by the kernels' source, the compilers and the processor.

    In the place where numba keeps what it compiles if the environment names one, else beside the source.
    """
    import llvmlite.binding as llvm

    here = Path(__file__).parent
    source = b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))
    compilers = " ".join(version(name) for name in ("numba", "llvmlite"))
    processor = f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
    key = hashlib.sha256(source + f"{compilers} {processor}".encode()).hexdigest()[:16]
    return Path(os.environ.get("NUMBA_CACHE_DIR") or here / "__pycache__") / key


def _keep(code: bytes, file: Path) -> None:
    """Write an object file behind its checksum: what is damaged would not be an error to the linker, but a crash."""
    part = file.with_suffix(f".{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(hashlib.sha256(code).digest() + code)
        part.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        logger.warning("%s: not kept, so that it will be compiled again: %s", file, error)


def _kept(file: Path) -> bytes | None:
    """What was written, if it is there and undamaged."""
    try:
        kept = file.read_bytes()
    except OSError:
        return None
    checksum, code = kept[: hashlib.sha256().digest_size], kept[hashlib.sha256().digest_size :]
    return code if hashlib.sha256(code).digest() == checksum else None


@cache
def _openmp() -> Any:
    """The start of a parallel region in the OpenMP library that torch runs on; None if there is none to be found.

    Its threads are there already, and two libraries' threads would get into each other's way.
    """
    return getattr(ctypes.CDLL(None), "GOMP_parallel", None) if sys.platform == "linux" else None
