"""An estimate with its bounds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """An estimate with its bounds."""

    mean: float
    low: float
    high: float

    @property
    def shows_difference(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0
