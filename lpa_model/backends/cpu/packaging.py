"""What setuptools does for the C kernels: compiles them into the package, and names the platform in the wheel's tag.

Loaded by setuptools alone, from pyproject.toml, without the package around it. A wheel is for any Python, since the
library is called through ctypes, and for Linux with the glibc that the library needs. Where there are no kernels the
wheel is for any platform, and torch computes. The compiler knows every processor, so that bdist_wheel's own option
`--plat-name manylinux_2_28_aarch64` makes a wheel for ARM anywhere.
"""

from __future__ import annotations

import platform
import runpy
import shutil
from pathlib import Path
from typing import ClassVar

from setuptools import Command
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import OptionError

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


def _is_for_here(command: build) -> bool:
    return not (isinstance(command, Build) and command.machine)


class Build(build):
    """Python files are gathered once the library is among them; another machine's replaces it in the wheel alone."""

    sub_commands = [("build_kernels", _is_for_here), *build.sub_commands]  # noqa: RUF012  # as setuptools has it
    machine = ""  # another one than this

    def run(self) -> None:
        super().run()
        if self.machine:
            library: Path = _build["LIBRARY"]
            made = _build["build"](_build["objects_of"](library) / f"{self.machine}.so", self.machine)
            shutil.copy(made, Path(self.build_lib) / library.relative_to(Path(__file__).parents[3]))


class BuildWheel(bdist_wheel):
    """py3-none-manylinux_2_28_x86_64, for instance."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.machine = platform.machine()

    def finalize_options(self) -> None:
        if self.plat_name:
            tags = {_tag(machine): machine for machine in _build["INSTRUCTION_SETS"]}
            if self.plat_name not in tags:
                raise OptionError(f"--plat-name {self.plat_name}: there are kernels for {', '.join(tags)}")
            self.machine = tags[self.plat_name]
            if self.machine != platform.machine():
                command = self.distribution.get_command_obj("build")
                assert isinstance(command, Build)
                command.machine = self.machine
        if self.plat_name or _build["compiles_here"]():
            # setuptools puts what has extension modules under a platform's tag, and has no option that says so
            self.distribution.has_ext_modules = lambda: True  # type: ignore[method-assign]
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        return super().get_tag() if self.root_is_pure else ("py3", "none", _tag(self.machine))


def _tag(machine: str) -> str:
    return f"manylinux_{_build['GLIBC'].replace('.', '_')}_{machine}"
