"""Random numbers that depend on seed, purpose and position in training, but not on workers, processes or restarts."""

import zlib
from collections.abc import Iterable

import numpy as np


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Derive a 32-bit seed for a `purpose`, e.g. "step", and `numbers` (step, rank, position, ...)."""
    return int(_sequence(seed, purpose, numbers).generate_state(1)[0])


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Create an independent NumPy generator for a `purpose` and `numbers`."""
    return np.random.default_rng(_sequence(seed, purpose, numbers))


def generators(seed: int, purpose: str, positions: Iterable[int]) -> list[np.random.Generator]:
    """Create one NumPy generator for each of `positions` in a stream."""
    return [generator(seed, purpose, position) for position in positions]


def _sequence(seed: int, purpose: str, numbers: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *numbers])
