"""Values of the threads, and what a GPU rounds."""

import numpy as np


Lanes = np.ndarray  # a value of each thread
LANES = 32


def bfloat16_to_float32(bits: Lanes) -> Lanes:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: Lanes) -> Lanes:
    """Rounded to the nearest, to even between two."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def wobble(values: Lanes) -> Lanes:
    """A number in [-1, 1) for each value, always the same one for the same value."""
    return (values.view(np.uint32) * np.uint32(2654435761) >> np.uint32(8)) / 2.0**23 - 1.0


def approximate(argument: Lanes, exact: Lanes, error: float) -> Lanes:
    """A result, computed in float64, with a relative error of up to `error`, the largest that PTX allows."""
    return (exact * (1.0 + error * wobble(argument))).astype(np.float32)


TO_FLOAT = {"bf16": bfloat16_to_float32, "f16": lambda bits: bits.view(np.float16).astype(np.float32)}
