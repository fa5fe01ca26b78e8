"""The memory of the tensor cores of sm_100, and the products that go on beside the threads."""

from typing import Any, NamedTuple

import numpy as np

from .values import LANES, TO_FLOAT, Lanes


ROWS, COLUMNS = 128, 512  # of 32 bits each
READER = np.array([0])  # of shared memory, the warp that products are begun by


class Product(NamedTuple):
    """A matrix product on its way: where its result and its factors are, and how they lie there."""

    result: np.uint32
    left: np.uint64 | np.uint32  # a descriptor of shared memory, or a column of this one
    right: np.uint64
    instruction: int
    keep: bool


class TensorMemory:
    """
    What `tcgen05` reads and writes. A product is computed when somebody waits for the barrier that its results were
    promised to, which is the latest moment that a GPU may take: whoever does not wait finds nothing.
    """

    def __init__(self, block: Any):
        self.block = block
        self.words = np.full((ROWS, COLUMNS), 0xFFFFFFFF, np.uint32)
        self.pending: list[Product | int] = []  # and the barriers that what comes before was promised to

    def allocate(self, address: Lanes, where: Lanes | None) -> None:
        """All of it, so that it begins at 0."""
        self.block.store_shared(address, 4, [np.zeros_like(address)], where)

    def places(self, address: Lanes, count: int, split: int | None) -> tuple[np.ndarray, np.ndarray]:
        """
        Rows and columns of `count` words for each thread, whose rows are those of its warp: one each, or, with
        `split`, the first sixteen, of which the upper half of the warp takes what is `split` columns further.
        """
        lane = np.arange(len(address)) % LANES
        row, column = (address >> np.uint32(16)).astype(int), (address & np.uint32(0xFFFF)).astype(int)
        row, column = (row + lane, column) if split is None else (row + lane % 16, column + lane // 16 * split)
        of_warp = self.block.warp % (ROWS // LANES)
        if (row // LANES != of_warp).any():
            raise MemoryError("A warp reaches for rows of tensor memory that are another's.")
        return row[:, None], column[:, None] + np.arange(count)

    def matrix(self, address: np.uint32, rows: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
        """The places of a matrix that begins at an address."""
        return (rows + (int(address) >> 16))[:, None], (int(address) & 0xFFFF) + np.arange(columns)

    def load(self, address: Lanes, count: int, split: int | None = None) -> list[Lanes]:
        return [np.ascontiguousarray(column) for column in self.words[self.places(address, count, split)].T]

    def store(self, address: Lanes, values: list[Lanes], where: Lanes | None = None, split: int | None = None) -> None:
        chosen = slice(None) if where is None else where
        rows, columns = self.places(address, len(values), split)
        self.words[rows[chosen], columns[chosen]] = np.stack(values, 1)[chosen]

    def multiply(
        self, result: Lanes, left: Lanes, right: Lanes, instruction: Lanes, keep: Lanes, where: Lanes | None
    ) -> None:
        """A product of one thread's, to come."""
        for thread in threads(where, len(result)):
            product = Product(result[thread], left[thread], right[thread], int(instruction[thread]), keep[thread])
            self.pending.append(product)

    def promise(self, barrier: Lanes, where: Lanes | None) -> None:
        """What is on its way will arrive at a barrier."""
        self.pending += [int(barrier[thread]) for thread in threads(where, len(barrier))]

    def wait(self, barrier: Lanes, where: Lanes | None) -> None:
        """For all that was promised to a barrier, and what was begun before."""
        awaited = {int(barrier[thread]) for thread in threads(where, len(barrier))}
        last = max((n for n, entry in enumerate(self.pending) if entry in awaited), default=-1)
        for entry in self.pending[: last + 1]:
            if isinstance(entry, Product):
                self.compute(entry)
        self.pending = self.pending[last + 1 :]

    def compute(self, product: Product) -> None:
        """`kind::f16`: the instruction tells the types of the factors, which of them are transposed, and the shape."""
        bits = product.instruction
        rows, columns = (bits >> 24 & 31) << 4, (bits >> 17 & 63) << 3
        kinds = {bits >> 7 & 7, bits >> 10 & 7}
        if rows not in (64, 128) or bits >> 4 & 3 != 1 or kinds not in ({0}, {1}) or bits & 0x600F:
            raise NotImplementedError(f"A product {bits:#x} of {rows} rows.")
        # Of 128 rows each has one here; of 64 each sixteen are the first of a warp's.
        of_rows = np.arange(rows) if rows == ROWS else np.arange(rows) // 16 * LANES + np.arange(rows) % 16
        to_float = ("f16", "bf16")[kinds.pop()]
        if isinstance(product.left, np.uint32):  # in this memory, two to a word
            words = self.words[self.matrix(product.left, of_rows, 8)]
            left = TO_FLOAT[to_float](np.ascontiguousarray(words).view(np.uint16))
        else:
            left = self.block.described(product.left, READER, rows, bool(bits >> 15 & 1), to_float)
        right = self.block.described(product.right, READER, columns, bool(bits >> 16 & 1), to_float)
        place = self.matrix(product.result, of_rows, columns)
        old = self.words[place].view(np.float32) if product.keep else np.float32(0)
        self.words[place] = (old + left @ right.T).view(np.uint32)


def threads(where: Lanes | None, count: int) -> np.ndarray:
    """The numbers of the threads that a predicate chooses."""
    return np.arange(count) if where is None else np.flatnonzero(where)
