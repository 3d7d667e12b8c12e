"""Tensors of the emulation, with as much of torch's interface as taking them needs: no test needs a GPU for that."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from kvkernels import libc
from kvkernels.device.emulation import Emulation
from kvkernels.device.port import EMULATION, Via


@dataclass(frozen=True, slots=True)
class Place:
    """What `tensor.device` is."""

    port: Emulation
    index: int
    type: str = EMULATION

    def __str__(self) -> str:
        return f"{self.type}:{self.index}"


class EmulatedTensor:
    """Memory of the emulation with a shape. Nothing computes with it; `array` is what a test looks at."""

    is_cpu = False

    def __init__(self, array: "np.ndarray[Any, Any]", place: Place, owner: object) -> None:
        self.array = array
        self.device = place
        self._owner = owner

    @classmethod
    def zeros(cls, device: Emulation, shape: tuple[int, ...], dtype: str = "uint8", share: Via = Via.NOTHING) -> Self:
        """In memory of its own, which lives as long as the device."""
        kind = np.dtype(dtype)
        length = int(np.prod(shape)) * kind.itemsize
        made = device.allocate(max(1, length), share)
        array = libc.bytes_at(made.address, length).view(kind).reshape(shape)
        array[...] = 0
        return cls(array, Place(device, device.properties.number), made)

    @property
    def shape(self) -> tuple[int, ...]:
        """In elements."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> Any:  # as torch's: only compared
        """Of an element."""
        return self.array.dtype

    def data_ptr(self) -> int:
        """Address of the first element."""
        return int(self.array.__array_interface__["data"][0])

    def numel(self) -> int:
        """How many elements."""
        return self.array.size

    def element_size(self) -> int:
        """In bytes."""
        return self.array.itemsize

    def stride(self, dimension: int | None = None) -> Any:  # as torch: one, or all
        """In elements."""
        strides = tuple(each // self.array.itemsize for each in self.array.strides)
        return strides if dimension is None else strides[dimension]

    def is_contiguous(self) -> bool:
        """In one piece, in order?"""
        return bool(self.array.flags.c_contiguous)

    def is_neg(self) -> bool:
        """Never: see torch."""
        return False

    def is_conj(self) -> bool:
        """Never: see torch."""
        return False

    def permute(self, *dimensions: int) -> "EmulatedTensor":
        """The same memory, looked at in another order."""
        return EmulatedTensor(self.array.transpose(dimensions), self.device, self._owner)

    def __getitem__(self, index: Any) -> "EmulatedTensor":
        return EmulatedTensor(self.array[index], self.device, self._owner)

    def __len__(self) -> int:
        return self.shape[0]
