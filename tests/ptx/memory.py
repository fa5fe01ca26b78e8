"""The memory of a GPU, for which the memory of this process stands in: addresses are those of the tensors."""

import ctypes

import numpy as np


# All addresses that a process of 64 bits can have, but for the lowest, of which a view would be one of nothing.
FIRST, END = 1 << 16, (1 << 47) - (1 << 16)


class GlobalMemory:
    """What a kernel may read and write: the tensors that it was given, and nothing else."""

    def __init__(self):
        everything = (ctypes.c_uint8 * (END - FIRST)).from_address(FIRST)
        one_byte = np.frombuffer(everything, dtype=np.uint8)
        self.views = {size: one_byte.view(f"u{size}") for size in (1, 2, 4, 8)}
        self.starts = self.ends = np.empty(0, np.uint64)

    def allow(self, ranges: set[tuple[int, int]]) -> None:
        """Sets the ranges `(start, end)` of addresses that may be used."""
        table = np.array(sorted(ranges), np.uint64)
        self.starts, self.ends = table[:, 0], table[:, 1]

    def places(self, addresses: np.ndarray, size: int, count: int) -> np.ndarray:
        """Indices in `views[size]` of `count` elements from each address on: `(addresses, count)`."""
        width = np.uint64(size * count)
        owner = np.searchsorted(self.starts, addresses, side="right") - 1
        outside = (owner < 0) | (addresses + width > self.ends[owner])
        if outside.any():
            raise MemoryError(f"{width} bytes at {addresses[outside][0]:#x} are of no tensor of the kernel.")
        if (addresses % width).any():
            raise MemoryError(f"An access to {width} bytes is not aligned.")
        return ((addresses - np.uint64(FIRST)) // np.uint64(size)).astype(np.int64)[:, None] + np.arange(count)
