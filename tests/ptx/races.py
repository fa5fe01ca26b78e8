"""Whether warps meet in shared memory without a barrier between them."""

import numpy as np


class RaceError(RuntimeError):
    """The result depends on which warp comes first."""


class SharedAccesses:
    """
    Who read and wrote each two bytes of shared memory since when. Threads of one warp do not race, as they are at the
    same instruction. Times are counted in barriers.
    """

    def __init__(self, warps: int, size: int):
        places = size // 2 + 1
        self.time = 0
        self.writer, self.written = np.full(places, -1), np.full(places, -1)
        self.read = np.full((warps, places), -1)
        # Written by ordinary instructions, which the matrix products of sm_90 do not see before a fence.
        self.unfenced = np.zeros(places, bool)

    def note_read(self, places: np.ndarray, warp: np.ndarray) -> None:
        """Places `(threads, n)` read by the threads' warps `(threads,)`."""
        warp = np.broadcast_to(warp[:, None], places.shape)
        if ((self.written[places] == self.time) & (self.writer[places] != warp)).any():
            raise RaceError("A warp reads what another one wrote, with no barrier between them.")
        self.read[warp, places] = self.time

    def note_write(self, places: np.ndarray, warp: np.ndarray, visible: bool = False) -> np.ndarray:
        """
        Places written; `visible` also to the matrix products of sm_90.

        Returns:
            `np.ndarray` of bool, one for each thread: whether another warp writes to its place at the same time.
        """
        warp = np.broadcast_to(warp[:, None], places.shape)
        met = (self.written[places] == self.time) & (self.writer[places] != warp)
        for other, read in enumerate(self.read):
            met |= (read[places] == self.time) & (warp != other)
        if met.any():
            raise RaceError("A warp writes over what another one read or wrote, with no barrier between them.")
        self.writer[places], self.written[places], self.unfenced[places] = warp, self.time, not visible
        return (self.writer[places] != warp).any(1)
