"""Number types of config values: a value outside its bounds is refused when the config is read.

The name of a type is what error messages and `--help` show. Upper bounds are sanity limits that only a typo exceeds.
"""

import math

from jsonargparse.typing import restricted_number_type

LARGEST = 2**31 - 1
FINITE = ((">", -math.inf), ("<", math.inf))


def whole_number(least: int, most: int) -> type[int]:
    """Type of the whole numbers from `least` to `most`, both included."""
    return restricted_number_type(f"whole number between {least} and {most}", int, [(">=", least), ("<=", most)])


def number(least: float, most: float) -> type[float]:
    """Type of the numbers from `least` to `most`, both included."""
    return _finite(f"between {least:g} and {most:g}", (">=", least), ("<=", most))


def _finite(bounds: str, *restrictions: tuple[str, float]) -> type[float]:
    return restricted_number_type(f"finite number {bounds}", float, [*restrictions, *FINITE])


PositiveInt = whole_number(1, LARGEST)
NonNegativeInt = whole_number(0, LARGEST)
PositiveFloat = _finite("above 0", (">", 0))
NonNegativeFloat = _finite("of at least 0", (">=", 0))
NonPositiveFloat = _finite("of at most 0", ("<=", 0))
ClosedUnitInterval = number(0, 1)
Scale = number(2**-10, 2**6)  # of an image
Size = whole_number(1, 2**14)  # pixels, channels, samples
BatchSize = whole_number(1, 2**16)
Seed = whole_number(0, 2**32 - 1)
