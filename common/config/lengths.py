"""Constants that belong to the length of a run: numbers of steps, and decays, which may be shares of the run.

`Steps` and `Decay` mark such fields in a paper's dataclass: `bank_start: Steps = 1000`. Besides a number they take a
share of the run as a string, e.g. "2%". A decay stated as a share is that of an average that lags so long.
"""

from typing import Union

from jsonargparse.typing import restricted_string_type

from common.config.types import ClosedUnitInterval, NonNegativeInt

Share = restricted_string_type("Share", r"^(100|\d{1,2}(\.\d+)?)%$", docstring='Share of the run, e.g. "2%".')
Steps = Union[NonNegativeInt, Share]
Decay = Union[ClosedUnitInterval, Share]


def in_steps(value: int | str, total: int) -> int:
    """Steps of a `Steps` constant in a run of `total` steps; a share is rounded, to at least one step."""
    return max(1, round(_fraction(value) * total)) if isinstance(value, str) else value


def decay_of(value: float | str, total: int) -> float:
    """Decay of a `Decay` constant in a run of `total` steps: an average of decay d lags 1 / (1 - d) steps."""
    return 1 - 1 / max(1.0, _fraction(value) * total) if isinstance(value, str) else value


def _fraction(share: str) -> float:
    return float(share.rstrip("%")) / 100
