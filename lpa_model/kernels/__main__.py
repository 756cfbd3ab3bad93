"""`python -m lpa_model.kernels`: compile all that this processor takes, so that no server has to when it starts."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

from lpa_model.kernels import attention, draws, masks, programs, rms_norm, row_scores
from lpa_model.kernels.instructions import paired_products
from lpa_model.kernels.launch import compile_kernel


def main() -> None:
    names = [name for module in (attention, draws, masks, row_scores) for name in module.KERNELS.values()]
    names.append(rms_norm.KERNEL)
    names += [programs.KERNELS[multiplies] for multiplies in paired_products()[:1]]
    with ProcessPoolExecutor() as processes:
        list(processes.map(_compile, names[::-1]))  # the longest first


def _compile(name: str) -> None:
    compile_kernel(name).result()


if __name__ == "__main__":
    main()
