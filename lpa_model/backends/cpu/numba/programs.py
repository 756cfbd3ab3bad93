"""Programs of products, norms and attention on torch's tensors, for processors that multiply pairs of bfloat16."""

from __future__ import annotations

from struct import Struct

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpa_model.backends.cpu.numba import records
from lpa_model.backends.cpu.numba.launch import Kernel
from lpa_model.backends.features import AMX, AVX512_BF16

KERNELS = {
    AMX: "lpa_model.backends.cpu.numba.program.run_in_tiles",
    AVX512_BF16: "lpa_model.backends.cpu.numba.program.run_in_vectors",
}
PROGRAM = Struct(f"{len(records.PROGRAM.names or ())}q")
STRIP, DEPTH = 16, 32  # outputs and inputs of a tile
PAIR = 2 * STRIP  # outputs come in whole pairs of strips


def tiled(weight: Tensor) -> Tensor:
    """Weight bfloat16 [out, in] -> [out / 16, in / 32, 16, 16, 2]: strips of outputs, in each of whose tiles two
    inputs lie side by side for all outputs."""
    out, width = weight.shape
    return weight.view(out // STRIP, STRIP, width // DEPTH, DEPTH // 2, 2).permute(0, 2, 3, 1, 4).contiguous()


def tiled_gates(gate: Tensor, up: Tensor) -> Tensor:
    """Both weights bfloat16 [out, in], a strip of one after a strip of the other, as a GATED product takes them."""
    return torch.stack((tiled(gate), tiled(up)), dim=1).flatten(0, 1)


class Program:
    """Operations on the rows of a step, one after another, each on all rows.

    A row's result depends on nothing but the row: not on the others, nor on the number of threads.
    """

    def __init__(self, calls: NDArray[np.void]) -> None:
        """`calls`: a CALL for each attention, in their order; filled in before the program runs."""
        self.calls = calls
        self.operations: list[tuple[int | float, ...]] = []
        self.alive: list[object] = []  # what the operations point to
        self.widest = DEPTH
        self.attentions = 0
        self.free: list[Tensor] = []
        self.lent: list[Tensor] = []
        self.ops: NDArray[np.void] | None = None

    def room(self, rows: int, width: int) -> Tensor:
        """bfloat16 [rows, width] for what one operation writes and others read, until `clear`."""
        shape = (rows, width)
        room = next((tensor for tensor in self.free if tensor.shape == shape), None)
        if room is None:
            room = torch.empty(shape, dtype=torch.bfloat16)
        else:
            self.free = [tensor for tensor in self.free if tensor is not room]
        self.lent.append(room)
        return room

    def clear(self) -> None:
        """What operations have written so far will have been read: its room is lent again."""
        self.free += self.lent
        self.lent = []

    def product(
        self,
        x: Tensor,
        tiles: Tensor,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        then: int = records.BFLOAT16,
        groups: int = 1,
    ) -> None:
        """x bfloat16 [rows, in] times tiles -> out [rows, strips * 16], or half as wide if GATED.

        With `groups` > 1, x is [rows, groups * in] and each of its parts meets an equal share of the strips. A bias is
        bfloat16 [out]. `out` is float32 for ADDED, bfloat16 otherwise.
        """
        strips, width = tiles.shape[0], tiles.shape[1] * DEPTH
        assert x.shape[1] == groups * width and x.stride(1) == out.stride(1) == 1 and strips % (2 * groups) == 0
        self.widest = max(self.widest, x.shape[1])
        self._add(records.PRODUCT, x, out, tiles, bias, width=width, strips=strips, share=strips // groups, then=then)

    def rms_norm(self, x: Tensor, weight: Tensor, out: Tensor, eps: float) -> None:
        """x float32 [rows, width] -> out bfloat16 [rows, width]; weight bfloat16."""
        self._add(records.RMS_NORM, x, out, weight, width=x.shape[1], eps=eps)

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, out: Tensor, eps: float
    ) -> None:
        """residual float32 [rows, width] += LayerNorm(x bfloat16); out bfloat16 [rows, width] is the residual then."""
        self._add(records.ADD_LAYER_NORM, x, out, weight, bias, residual=residual, width=x.shape[1], eps=eps)

    def attention(self) -> None:
        """The next one of the calls, of decode rows and of prompt rows."""
        call = self.calls.ctypes.data + self.attentions * self.calls.itemsize
        self.attentions += 1
        for kind in (records.ATTENTION, records.WRITE, records.TILE_VALUES, records.ATTEND):
            self.operations.append((kind, call, *[0] * (len(records.OP.names or ()) - 2)))

    def _add(
        self,
        kind: int,
        x: Tensor,
        out: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        width: int,
        strips: int = 0,
        share: int = 1,
        then: int = 0,
        eps: float = 0,
    ) -> None:
        self.alive += [x, out, weight, bias, residual]
        self.operations.append(
            (
                kind,
                x.data_ptr(),
                weight.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                0 if residual is None else residual.data_ptr(),
                out.data_ptr(),
                x.stride(0) * x.itemsize,
                out.stride(0) * out.itemsize,
                width,
                strips,
                share,
                then,
                eps,
            )
        )

    def run(self, kernel: Kernel, rows: int, start: int = 0, end: int | None = None) -> None:
        """The operations from `start` to `end`, or to the last, on the first `rows` rows of their tensors."""
        if self.ops is None:
            self.ops = np.array(self.operations, dtype=records.OP)
        ops = self.ops[start:end]
        counters = np.zeros((len(ops), 2), dtype=np.int64)
        if len(ops):
            kernel(PROGRAM.pack(ops.ctypes.data, len(ops), rows, counters.ctypes.data, self.widest), 2)


def product(kernel: Kernel, x: Tensor, tiles: Tensor, bias: Tensor | None) -> Tensor:
    """x bfloat16 [rows, in] times tiles -> bfloat16 [rows, strips * 16], as a program's products are."""
    program = Program(np.zeros(0, dtype=records.CALL))
    out = torch.empty(len(x), tiles.shape[0] * STRIP, dtype=torch.bfloat16)
    program.product(x, tiles, out, bias=bias)
    program.run(kernel, len(x))
    return out
