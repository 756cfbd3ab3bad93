"""Op lists: GEMMs, norms and attention of a step, one after another, on torch's tensors.

A row's result depends on the row alone, to the bit: neither on the other rows nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpa_model.backends.cpu.args import ATTENTION, OP, OP_LIST, Dtype, Epilogue, OpKind
from lpa_model.backends.cpu.library import Kernel, address_of
from lpa_model.backends.cpu.packing import PackedWeight

DTYPES = {torch.float32: Dtype.FLOAT32, torch.bfloat16: Dtype.BFLOAT16}


class OpList:
    """Operations on the rows of a step, each on all rows.

    Activations are of one dtype, float32 or bfloat16; the residual stream is float32. Tensors may have more rows than a
    run has, and any stride from row to row.
    """

    def __init__(
        self, kernels: Mapping[str, Kernel], dtype: torch.dtype, attentions: NDArray[np.void] | None = None
    ) -> None:
        """`kernels`: of one instruction set, from `Library.kernels`. `attentions`: a record of `args.ATTENTION` for
        each call of `attention`, in their order; filled in before the list runs.

        Raises:
            ValueError: a dtype that there are no kernels for.
        """
        if dtype not in DTYPES:
            raise ValueError(f"op lists compute in float32 or bfloat16, not {dtype}")
        self.dtype = dtype
        self.attentions = np.zeros(0, dtype=ATTENTION) if attentions is None else attentions
        self._kernel = kernels["run_op_list"]
        self._ops: list[dict[str, float]] = []  # fields of `args.OP` that are not 0
        self._marks = [0]  # operations before each mark
        self._array: NDArray[np.void] | None = None
        self._alive: list[Tensor] = []  # what the operations point to
        self._num_attentions = 0
        self._free: list[Tensor] = []
        self._in_use: list[Tensor] = []

    def workspace(self, rows: int, width: int) -> Tensor:
        """[rows, width] for what one operation writes and later ones read, until `free_workspaces`."""
        shape = (rows, width)
        found = next((tensor for tensor in self._free if tensor.shape == shape), None)
        if found is None:
            found = rows_apart(rows, width, self.dtype)
        else:
            self._free = [tensor for tensor in self._free if tensor is not found]
        self._in_use.append(found)
        return found

    def free_workspaces(self) -> None:
        """What operations have written so far will have been read: their workspaces may be used again."""
        self._free += self._in_use
        self._in_use = []

    def gemm(self, x: Tensor, weight: PackedWeight, out: Tensor, epilogue: Epilogue = Epilogue.STORE) -> None:
        """x [rows, groups * in_features] times the weight, plus its bias -> out [rows, at most out_features].

        Where `out` is narrower than the weight's outputs, padded for instance, the rest is not written. `out` is the
        float32 residual stream for RESIDUAL_ADD: with bfloat16 activations, sums are rounded before they are added.
        Weights may be of fewer bits than the activations.
        """
        self._check("x", x, weight.groups * weight.in_features)
        self._check("out", out, dtype=torch.float32 if epilogue is Epilogue.RESIDUAL_ADD else self.dtype)
        of_list = DTYPES[self.dtype]
        if weight.dtype < of_list or (weight.bias is not None and weight.bias.dtype is not self.dtype):
            bias = "" if weight.bias is None else f", its bias {weight.bias.dtype}"
            raise ValueError(f"the weight is {weight.dtype.name.lower()}{bias}, the op list {self.dtype}")
        if weight.gated is not (epilogue is Epilogue.SWIGLU_GATED) or out.shape[1] > weight.out_features:
            raise ValueError(f"the weight's outputs are not those of {epilogue.name} into {list(out.shape)}")
        self._add(
            OpKind.GEMM,
            x,
            out,
            weight=weight.panels,
            bias=weight.bias,
            weight_dtype=weight.dtype,
            width=weight.in_features,
            columns=out.shape[1],
            panels=weight.num_panels,
            group_panels=weight.num_panels // weight.groups,
            epilogue=epilogue,
        )

    def rms_norm(self, x: Tensor, weight: Tensor, out: Tensor, eps: float) -> None:
        """x float32 [rows, >= width] -> out [rows, >= width]; weight [width]. Zeros are written behind the width."""
        width = self._norm_width(weight, x, out)
        self._check("x", x, dtype=torch.float32)
        self._check("out", out)
        self._add(OpKind.RMS_NORM, x, out, weight=weight, width=width, columns=out.shape[1], eps=eps)

    def head_rms_norm(self, x: Tensor, weight: Tensor, out: Tensor, eps: float, heads: int) -> None:
        """x [rows, heads * head_size] -> out, each head by itself; weight [at most head_size], zeros behind it. `out`
        may be x."""
        head_size = x.shape[1] // heads
        if len(weight) > head_size or x.shape != out.shape:
            raise ValueError(f"{heads} heads of {len(weight)} are not those of {list(x.shape)} -> {list(out.shape)}")
        self._check("x", x)
        self._check("out", out)
        self._add(
            OpKind.HEAD_RMS_NORM,
            x,
            out,
            weight=weight,
            width=len(weight),
            columns=head_size,
            heads=heads,
            head_stride=head_size * x.itemsize,
            eps=eps,
        )

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None, eps: float
    ) -> None:
        """residual float32 [rows, >= width] += LayerNorm(x [rows, >= width]); out is the residual then, with zeros
        behind the width, if there is one."""
        width = self._norm_width(weight, x, residual, *(() if out is None else (out,)))
        self._check("x", x)
        self._check("residual", residual, dtype=torch.float32)
        if out is not None:
            self._check("out", out)
        self._add(
            OpKind.ADD_LAYER_NORM,
            x,
            out,
            weight=weight,
            bias=bias,
            residual=residual.data_ptr(),
            residual_stride=residual.stride(0) * 4,
            width=width,
            columns=width if out is None else out.shape[1],
            eps=eps,
        )
        self._alive.append(residual)

    def swiglu(self, gate: Tensor, up: Tensor, out: Tensor) -> None:
        """out [rows, width] = silu(gate) * up, for a gate and an up projection that are low-rank and so computed one by
        one. `out` may be one of the two."""
        width = self._norm_width(gate[0], up, out)
        for name, tensor in (("gate", gate), ("up", up), ("out", out)):
            self._check(name, tensor)
        stride = up.stride(0) * up.itemsize
        self._add(OpKind.SWIGLU, gate, out, weight=up, weight_stride=stride, width=width, columns=out.shape[1])

    def attention(self) -> None:
        """The next one of `attentions`: its decode rows and its prompt rows."""
        address = address_of(self.attentions[self._num_attentions :])
        self._num_attentions += 1
        for kind in (OpKind.ATTENTION_DECODE, OpKind.CACHE_WRITE, OpKind.PACK_VALUES, OpKind.ATTENTION_PROMPT):
            self._append(kind=kind, x=address)

    def mark(self) -> None:
        """`run_parts` may stop here."""
        self._marks.append(len(self._ops))

    def run(self, rows: int) -> None:
        """All operations on the first `rows` rows of their tensors.

        Raises:
            MemoryError: no thread got memory for its scratch.
        """
        self._run(rows, 0, len(self._ops))

    def run_parts(self, rows: int, stops: Sequence[int]) -> Iterator[int]:
        """As `run`, stopping after so many marks: each of `stops`, ascending, is yielded once what is before it ran."""
        done = 0
        for stop in stops:
            self._run(rows, done, done := self._marks[stop])
            yield stop
        self._run(rows, done, len(self._ops))

    def _run(self, rows: int, start: int, end: int) -> None:
        if self._array is None:
            values = [tuple(op.get(name, 0) for name in OP.names or ()) for op in self._ops]
            self._array = np.array(values, dtype=OP)
        if start == end:
            return
        ops, threads = self._array[start:end], torch.get_num_threads()
        counters = np.zeros(1 + len(ops) * (1 + threads), dtype=np.int64)
        record = np.array([(address_of(ops), len(ops), rows, threads, counters.ctypes.data)], dtype=OP_LIST)
        self._kernel(address_of(record), threads)
        if not counters[0]:
            raise MemoryError(f"no scratch for an op list of {rows} rows")

    def _norm_width(self, weight: Tensor, *tensors: Tensor) -> int:
        width = len(weight)
        if weight.dtype is not self.dtype or any(tensor.shape[1] < width for tensor in tensors):
            raise ValueError(f"{weight.dtype} [{width}] is not of rows {[list(tensor.shape) for tensor in tensors]}")
        return width

    def _check(self, name: str, tensor: Tensor, width: int | None = None, dtype: torch.dtype | None = None) -> None:
        expected = dtype or self.dtype
        if tensor.dtype is not expected or tensor.stride(1) != 1 or (width is not None and tensor.shape[1] != width):
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}, not {expected}"
                f" [rows, {'width' if width is None else width}] with its numbers side by side"
            )

    def _add(
        self,
        kind: OpKind,
        x: Tensor,
        out: Tensor | None,
        *,
        weight: Tensor,
        bias: Tensor | None = None,
        **fields: float,
    ) -> None:
        self._alive += [tensor for tensor in (x, out, weight, bias) if tensor is not None]
        self._append(
            kind=kind,
            x=x.data_ptr(),
            x_stride=x.stride(0) * x.itemsize,
            weight=weight.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            out=0 if out is None else out.data_ptr(),
            out_stride=0 if out is None else out.stride(0) * out.itemsize,
            **fields,
        )

    def _append(self, **fields: float) -> None:
        self._ops.append({"dtype": DTYPES[self.dtype], **fields})
        self._array = None


def rows_apart(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """[rows, width], not initialised.

    A GEMM reads a dozen rows at a time. Rows a multiple of 2 KB apart would share one or two sets of the first-level
    cache: they get a cache line between them.
    """
    size = dtype.itemsize
    gap = 64 // size if width * size % 2048 == 0 else 0
    return torch.empty(rows, width + gap, dtype=dtype)[:, :width]


def gemm(kernels: Mapping[str, Kernel], x: Tensor, weight: PackedWeight, out_features: int | None = None) -> Tensor:
    """x [rows, groups * in_features] times the weight, plus its bias -> [rows, out_features], of x's dtype; without
    `out_features` all of the weight's, padded ones included."""
    out = torch.empty(len(x), weight.out_features if out_features is None else out_features, dtype=x.dtype)
    ops = OpList(kernels, x.dtype)
    ops.gemm(x, weight, out)
    ops.run(len(x))
    return out
