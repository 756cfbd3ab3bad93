"""Between host and device: a step's arrays go over in one copy, and results come back without a wait in between."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16  # bytes: of every array in a parcel


class Parcel:
    """Arrays that go to the device together, in one copy."""

    def __init__(self) -> None:
        self._arrays: list[NDArray[Any]] = []

    def add(self, array: NDArray[Any]) -> int:
        """The array's place in what `send` returns."""
        self._arrays.append(np.ascontiguousarray(array))
        return len(self._arrays) - 1

    def send(self, device: torch.device) -> list[Tensor]:
        """The arrays on the device, in the order in which they were added. From page-locked memory to a GPU, without
        waiting for it: the allocator keeps that memory until the copy is done."""
        ends = np.cumsum([0] + [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in self._arrays]).tolist()
        if not ends[-1]:
            return [torch.from_numpy(array).to(device) for array in self._arrays]
        staging = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        there, tensors = staging.numpy(), []
        for array, start in zip(self._arrays, ends, strict=False):
            there[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        sent = staging.to(device, non_blocking=True)
        for array, start in zip(self._arrays, ends, strict=False):
            dtype = torch.from_numpy(np.zeros(0, array.dtype)).dtype
            tensors.append(sent[start : start + array.nbytes].view(dtype).view(array.shape))
        return tensors


class Fetch:
    """A tensor on its way to the host; made without waiting for the device."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._arrived = tensor, None
        if tensor.device.type == "cpu":
            self._host = tensor.clone()  # a later step may write to it before this one's result is read
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def result(self) -> NDArray[Any]:
        """The numbers; waits until they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.numpy()
