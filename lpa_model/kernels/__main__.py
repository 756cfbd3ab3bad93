"""`python -m lpa_model.kernels`: compile all that this processor takes, so that no server has to when it starts."""

from __future__ import annotations

from lpa_model.kernels import attention, draws, programs, rms_norm, row_scores
from lpa_model.kernels.launch import compile_kernel


def main() -> None:
    names = [*attention.KERNELS.values(), *row_scores.KERNELS.values(), *draws.KERNELS.values(), rms_norm.KERNEL]
    if attention.has_tiles():
        names += [attention.TILES_KERNEL, programs.KERNEL]
    for kernel in [compile_kernel(name) for name in names]:
        kernel.result()


if __name__ == "__main__":
    main()
