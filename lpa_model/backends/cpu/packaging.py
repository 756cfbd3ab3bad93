"""What setuptools does for the C kernels: compiles them into the package, and names the platform in the wheel's tag.

Loaded by setuptools alone, from pyproject.toml, without the package around it. A wheel is for any Python, since the
library is called through ctypes, and for Linux with the glibc that the library asks for. Where there are no kernels the
wheel is for any platform, and torch computes.
"""

from __future__ import annotations

import platform
import runpy
from pathlib import Path
from typing import ClassVar

from setuptools import Command
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

_build = runpy.run_path(str(Path(__file__).with_name("build.py")))


class BuildKernels(Command):
    """Compiles the kernels beside their source, for an editable installation as for a wheel."""

    description = "compile the C kernels"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        if _build["compiles_here"]():
            _build["build"]()
        else:
            self.announce(f"no kernels for {platform.machine()}: torch computes", level=3)

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """Python files are gathered once the library is among them."""

    sub_commands = [("build_kernels", None), *build.sub_commands]  # noqa: RUF012  # as setuptools has it


class BuildWheel(bdist_wheel):
    """py3-none-manylinux_2_28_x86_64, for instance."""

    def initialize_options(self) -> None:
        super().initialize_options()
        if _build["compiles_here"]():
            self.distribution.has_ext_modules = lambda: True  # type: ignore[method-assign]  # what is installed belongs to a platform

    def get_tag(self) -> tuple[str, str, str]:
        if self.root_is_pure:
            return super().get_tag()
        glibc = _build["GLIBC"].replace(".", "_")
        return "py3", "none", f"manylinux_{glibc}_{platform.machine()}"
