"""`python -m lpa_model.backends.cpu.numba`: compile what this processor takes, so that no server
has to when it starts."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

from lpa_model.backends.cpu.numba import programs
from lpa_model.backends.cpu.numba.launch import compile_kernel
from lpa_model.backends.features import instruction_sets


def main() -> None:
    names = [programs.KERNELS[name] for name in instruction_sets() if name in programs.KERNELS][:1]
    with ProcessPoolExecutor() as processes:
        list(processes.map(_compile, names[::-1]))  # the longest first


def _compile(name: str) -> None:
    compile_kernel(name).result()


if __name__ == "__main__":
    main()
