"""`python -m lpa_model.backends.cpu.kernels`: compile what this processor takes, so that no server
has to when it starts."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

from lpa_model.backends.cpu.kernels import attention, draws, masks, programs, rms_norm, row_scores
from lpa_model.backends.cpu.kernels.launch import compile_kernel
from lpa_model.backends.features import instruction_sets


def main() -> None:
    names = [name for module in (attention, draws, masks, row_scores) for name in module.KERNELS.values()]
    names.append(rms_norm.KERNEL)
    names += [programs.KERNELS[name] for name in instruction_sets() if name in programs.KERNELS][:1]
    with ProcessPoolExecutor() as processes:
        list(processes.map(_compile, names[::-1]))  # the longest first


def _compile(name: str) -> None:
    compile_kernel(name).result()


if __name__ == "__main__":
    main()
