"""A block of threads: what the instructions do that are more than an operation of numpy."""

from collections.abc import Sequence

import numpy as np

from .memory import GlobalMemory
from .races import RaceError, SharedAccesses
from .tensor_memory import TensorMemory
from .values import LANES, TO_FLOAT, Lanes, approximate, wobble


# What is not there yet, or never was: NaN in every type.
NOTHING = 0xFF


class Block:
    """
    One block of a grid, with what is its own: threads, shared memory, and copies on their way.

    Args:
        threads (`int`): their number.
        index (`int`): which block of the grid it is.
        parameters (`list[np.generic]`): of the kernel, unsigned integers of the width of each.
        shared (`int`): bytes of shared memory.
        memory ([`GlobalMemory`]): all else.
    """

    def __init__(self, threads: int, index: int, parameters: list[np.generic], shared: int, memory: GlobalMemory):
        self.parameters, self.memory, self.shared = parameters, memory, shared
        self.thread = np.arange(threads, dtype=np.uint32)
        self.index = np.full(threads, index, np.uint32)
        self.warp = self.thread.astype(np.int64) // LANES
        self.warps = threads // LANES
        room = -(-shared // 8) * 8 + 8
        one_byte = np.full(room, NOTHING, np.uint8)
        self.views = {size: one_byte.view(f"u{size}") for size in (1, 2, 4, 8)}
        self.accesses = SharedAccesses(self.warps, room)
        self.open: list[tuple] = []  # copies of the group that is not closed yet
        self.groups: list[list[tuple]] = []
        self.product_reads: list[tuple[np.ndarray, np.ndarray]] = []
        self.tensor_memory = TensorMemory(self)

    # ------------------------------------------------------------ memory

    def load_global(self, address: Lanes, size: int, old: Sequence[Lanes], where: Lanes | None = None) -> list[Lanes]:
        """`len(old)` elements of `size` bytes from each address on; `old` where `where` does not hold."""
        chosen = slice(None) if where is None else where
        got = self.memory.views[size][self.memory.places(address[chosen], size, len(old))]
        return merge(got, old, chosen)

    def store_global(self, address: Lanes, size: int, values: Sequence[Lanes], where: Lanes | None = None) -> None:
        chosen = slice(None) if where is None else where
        places = self.memory.places(address[chosen], size, len(values))
        self.memory.views[size][places] = np.stack([value[chosen] for value in values], 1)

    def add_global(self, address: Lanes, values: Lanes, where: Lanes | None = None) -> None:
        """Atomic additions of float32 or float64."""
        chosen = slice(None) if where is None else where
        size = values.dtype.itemsize
        everything = self.memory.views[size].view(values.dtype)
        for place, value in zip(self.memory.places(address[chosen], size, 1)[:, 0], values[chosen], strict=True):
            everything[place] += value

    def shared_places(self, address: Lanes, size: int, count: int) -> np.ndarray:
        """Indices in `views[size]` of `count` elements from each address on: `(addresses, count)`."""
        address = address.astype(np.int64)
        if (address + size * count > self.shared).any():
            raise MemoryError(f"An access beyond the {self.shared} bytes of shared memory.")
        if (address % (size * count)).any():
            raise MemoryError(f"An access to {size * count} bytes of shared memory is not aligned.")
        return address[:, None] // size + np.arange(count)

    def load_shared(self, address: Lanes, size: int, old: Sequence[Lanes], where: Lanes | None = None) -> list[Lanes]:
        chosen = slice(None) if where is None else where
        places = self.shared_places(address[chosen], size, len(old))
        self.accesses.note_read(places * size // 2, self.warp[chosen])
        return merge(self.views[size][places], old, chosen)

    def store_shared(self, address: Lanes, size: int, values: Sequence[Lanes], where: Lanes | None = None) -> None:
        chosen = slice(None) if where is None else where
        places = self.shared_places(address[chosen], size, len(values))
        values = np.stack([value[chosen] for value in values], 1)
        self.views[size][places] = values
        if size > 1:  # two warps may have a byte each of what is watched together
            halves = places[:, :1] * size // 2 + np.arange(size * values.shape[1] // 2)
            elsewhere = self.accesses.note_write(halves, self.warp[chosen])
            if (elsewhere & (self.views[size][places] != values).any(1)).any():
                raise RaceError("Two warps write different values to one place at once.")

    def copy_async(
        self, address: Lanes, source: Lanes, size: int, bytes_read: Lanes, where: Lanes | None = None
    ) -> None:
        """
        A copy to shared memory that is there when it has been waited for, and no sooner. Of `bytes_read` 0 it writes
        zeros.
        """
        chosen = slice(None) if where is None else where
        target, source, read = self.shared_places(address[chosen], 1, size), source[chosen], bytes_read[chosen] > 0
        if (read & (bytes_read[chosen] != size)).any():
            raise NotImplementedError("A copy of a part.")
        watched = target[:, ::2] // 2
        self.accesses.note_write(watched, self.warp[chosen])
        self.views[1][target] = NOTHING
        self.open.append((target, self.memory.places(source[read], 1, size), read, watched, self.warp[chosen]))

    def close_group(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait_for_groups(self, still_open: int) -> None:
        """Until no more groups of copies than these are on their way."""
        while len(self.groups) > still_open:
            for target, source, read, watched, warp in self.groups.pop(0):
                data = np.zeros(target.shape, np.uint8)
                data[read] = self.memory.views[1][source]
                self.views[1][target] = data
                self.accesses.note_write(watched, warp, visible=True)

    def barrier(self) -> None:
        self.accesses.time += 1

    def fence(self) -> None:
        """From here on the matrix products of sm_90 see what was written to shared memory."""
        self.accesses.unfenced[:] = False

    # ------------------------------------------------------------ between the lanes of a warp

    def shuffle(self, value: Lanes, kind: str, operand: Lanes) -> Lanes:
        """The value of another lane: that of number `operand` (`idx`), or of the lane's own XORed with it (`bfly`)."""
        operand = operand.astype(np.int64).reshape(self.warps, LANES)
        lane = np.arange(LANES) ^ operand if kind == "bfly" else operand % LANES
        return np.take_along_axis(value.reshape(self.warps, LANES), lane, 1).reshape(-1)

    def reduce(self, value: Lanes, kind: str) -> Lanes:
        """The sum, maximum or minimum over a warp, in all its lanes."""
        of_warp = value.reshape(self.warps, LANES)
        reduced = getattr(of_warp, {"add": "sum"}.get(kind, kind))(1).astype(value.dtype)
        return np.repeat(reduced, LANES)

    def permute_bytes(self, low: Lanes, high: Lanes, selector: Lanes) -> Lanes:
        """Each byte of the result is that byte of the eight of `low` and `high` which four bits of `selector` name."""
        eight = np.stack([low, high], 1).view(np.uint8)
        chosen = np.stack([selector >> np.uint32(4 * byte) & np.uint32(15) for byte in range(4)], 1)
        if (chosen > 7).any():
            raise NotImplementedError("A byte of signs.")
        return np.take_along_axis(eight, chosen.astype(np.int64), 1).view(np.uint32)[:, 0]

    # ------------------------------------------------------------ functions

    def multiply_add(self, a: Lanes, b: Lanes, c: Lanes) -> Lanes:
        """Rounded once."""
        return (a.astype(np.float64) * b + c).astype(np.float32)

    def divide(self, a: Lanes, b: Lanes) -> Lanes:
        return approximate(a, a.astype(np.float64) / b, 2.0**-22)

    def reciprocal(self, x: Lanes) -> Lanes:
        return approximate(x, 1.0 / x.astype(np.float64), 2.0**-23)

    def square_root(self, x: Lanes) -> Lanes:
        return approximate(x, np.sqrt(x.astype(np.float64)), 2.0**-23)

    def exp2(self, x: Lanes) -> Lanes:
        return approximate(x, np.exp2(x.astype(np.float64)), 2.0**-22)

    def log2(self, x: Lanes) -> Lanes:
        """Off by up to 2 ** -22, absolutely where it is small; what is not normal counts as 0."""
        x = np.where(np.abs(x) < np.finfo(np.float32).tiny, 0.0 * x, x)
        exact = np.log2(x.astype(np.float64))
        close = (x > 0.5) & (x < 2.0) & (x != 1.0)
        return (exact + 2.0**-22 * wobble(x) * np.where(close, 1.0, exact)).astype(np.float32)

    # ------------------------------------------------------------ matrices

    def load_matrices(self, address: Lanes, count: int, transposed: bool) -> list[Lanes]:
        """`ldmatrix`: 8 x 8 elements of 16 bits each. The lanes give the addresses of their rows, in turn."""
        rows = address.reshape(self.warps, LANES)[:, : 8 * count].reshape(-1)
        places = self.shared_places(rows, 2, 8)
        self.accesses.note_read(places, np.repeat(np.arange(self.warps), 8 * count))
        matrices = self.views[2][places].reshape(self.warps, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(-1, -2)
        pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(self.warps, count, LANES)
        return [pairs[:, matrix].reshape(-1) for matrix in range(count)]

    def store_matrices(self, address: Lanes, registers: Sequence[Lanes], transposed: bool) -> None:
        """`stmatrix`, the converse of `ldmatrix`."""
        count = len(registers)
        places = self.shared_places(address.reshape(self.warps, LANES)[:, : 8 * count].reshape(-1), 2, 8)
        self.accesses.note_write(places, np.repeat(np.arange(self.warps), 8 * count))
        pairs = np.stack([register.reshape(self.warps, LANES) for register in registers], 1)
        matrices = pairs.view(np.uint16).reshape(self.warps, count, 8, 8)
        self.views[2][places] = (matrices.swapaxes(-1, -2) if transposed else matrices).reshape(-1, 8)

    def multiply(
        self, a: Sequence[Lanes], b: Sequence[Lanes], accumulator: Sequence[Lanes], to_float: str
    ) -> list[Lanes]:
        """`mma.m16n8k16`: a product of each warp, of elements of 16 bits, added to an accumulator in float32."""
        # A lane, 4 g + t, holds pairs h of: row g + 8 i, columns 2 t + h + 8 j of `a` and rows of `b`, whose column is
        # g; and row g + 8 i, column 2 t + h of the accumulator.
        right = pairs_of(b, self.warps).reshape(self.warps, 8, 4, 2, 2).transpose(0, 3, 2, 4, 1)
        right = TO_FLOAT[to_float](np.ascontiguousarray(right)).reshape(self.warps, 16, 8)
        product = self.fragments(a, to_float) @ right
        product = product.reshape(self.warps, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)
        return [(old + new).view(np.uint32) for old, new in zip(accumulator, product.T, strict=True)]

    def fragments(self, registers: Sequence[Lanes], to_float: str) -> np.ndarray:
        """The left factor of each warp, 16 x 16, from its lanes; see `multiply`."""
        left = pairs_of(registers, self.warps).reshape(self.warps, 8, 4, 2, 2, 2).transpose(0, 4, 1, 3, 2, 5)
        return TO_FLOAT[to_float](np.ascontiguousarray(left)).reshape(self.warps, 16, 16)

    def described(
        self, descriptor: np.uint64, readers: np.ndarray, rows: int, transposed: bool, to_float: str
    ) -> np.ndarray:
        """
        A factor of the products of sm_90 and sm_100, `(rows, 16)`, that lies in shared memory as a descriptor says:
        the start, the steps between groups of elements, and which bits of an address are swapped with others. It is
        read by the warps `readers`.
        """
        bits = int(descriptor)
        start, leading, stride = ((bits >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        span = {1: 128, 2: 64, 3: 32}.get(bits >> 62)
        if span is None or bits >> 49 & 7:
            raise NotImplementedError(f"The layout of descriptor {bits:#x}.")
        row, column = np.arange(rows)[:, None], np.arange(16)
        if transposed:  # `span` bytes of a column lie together
            together = span // 2
            address = row // together * leading + column // 8 * stride + column % 8 * span + row % together * 2
        else:
            address = row // 8 * stride + row % 8 * span + column * 2
        address = start + address
        address ^= (address >> 7 & span // 16 - 1) << 4
        places = self.shared_places(address.reshape(-1), 2, 1).reshape(rows, 16)
        if self.accesses.unfenced[places].any():
            raise RuntimeError("A product reads what was written to shared memory without a fence since.")
        for warp in readers:
            self.accesses.note_read(places, np.full(rows, warp))
            self.product_reads.append((places, np.full(rows, warp)))
        return TO_FLOAT[to_float](self.views[2][places])

    def multiply_groups(
        self,
        accumulator: Sequence[Lanes],
        a: Sequence[Lanes] | Lanes,
        b: Lanes,
        keep: Lanes,
        transposed: tuple[bool, bool],
        to_float: str,
    ) -> list[Lanes]:
        """
        `wgmma.m64nNk16`: a product of each four warps, whose right factor a descriptor tells, and the left one a
        descriptor or registers. Where `keep` holds it is added to the accumulator.
        """
        columns = 2 * len(accumulator)
        products = []
        for group in np.arange(self.warps).reshape(-1, 4):
            if isinstance(a, np.ndarray):
                left = self.described(a[LANES * group[0]], group, 64, transposed[0], to_float)
            else:
                left = self.fragments(a, to_float)[group].reshape(64, 16)
            product = left @ self.described(b[LANES * group[0]], group, columns, transposed[1], to_float).T
            by_lane = product.reshape(4, 2, 8, columns // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5)
            products.append(by_lane.reshape(4 * LANES, columns // 2))
        return [
            (np.where(keep, old, np.float32(0)) + new).view(np.uint32)
            for old, new in zip(accumulator, np.concatenate(products).T, strict=True)
        ]

    def wait_for_products(self, still_open: int) -> None:
        """Until then the products of sm_90 may be reading shared memory."""
        if still_open == 0:
            for places, readers in self.product_reads:
                self.accesses.note_read(places, readers)
            self.product_reads = []


def pairs_of(registers: Sequence[Lanes], warps: int) -> np.ndarray:
    """The 16-bit halves of registers: `(warps, lanes, registers, 2)`."""
    together = np.stack([register.reshape(warps, LANES) for register in registers], -1)
    return together.view(np.uint16).reshape(warps, LANES, len(registers), 2)


def merge(got: np.ndarray, old: Sequence[Lanes], chosen: slice | Lanes) -> list[Lanes]:
    """`old`, with the columns of `got` in the place of what was chosen."""
    merged = []
    for column, value in zip(got.T, old, strict=True):
        value = value.copy()
        value[chosen] = column
        merged.append(value)
    return merged
