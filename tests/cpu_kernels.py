"""The C kernels of every instruction set that runs here: this processor's own, and newer ones' computed in C."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from lpa_model.backends.cpu import build
from lpa_model.backends.cpu.library import Kernel, Library


@functools.cache
def _own() -> Library:
    return Library(build.build(build.library_path()))


@functools.cache
def _emulated() -> Library:
    target = build.HERE / "__pycache__" / "emulated.so"
    target.parent.mkdir(exist_ok=True)
    return Library(build.build(target, instruction_sets=build.EMULATED))


@functools.cache
def names() -> tuple[str, ...]:
    """What `kernels` takes, this processor's best first."""
    own = _own().supported()
    return own + (tuple(f"emulated {flavour.name}" for flavour in build.EMULATED) if "avx2" in own else ())


@functools.cache
def kernels(name: str) -> Mapping[str, Kernel]:
    if name.startswith("emulated "):
        return _emulated().kernels(name.removeprefix("emulated "))
    return _own().kernels(name)
