"""Random draws that stay the same: all from the doubles of PCG64, shaped here.

NumPy promises its bit generators for ever but not its distributions, and its `exp` and `log` differ in the last bit
between processors. So shapes are made by the standard library, and whatever enters a workload is rounded to whole
tokens and milliseconds at once, where a last bit is lost.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import exp, log
from math import pow as power
from statistics import NormalDist
from typing import Final, TypeVar

from numpy.random import PCG64, Generator

T = TypeVar("T")
SECOND_MS: Final = 1000
MINUTE_MS: Final = 60 * SECOND_MS
_LEAST_UNIT: Final = 2.0**-54  # half of the least double that PCG64 gives: never 0, for logarithms
_NORMAL: Final = NormalDist()


class Draws:
    """One stream of draws. Parts of one seed are independent of each other."""

    __slots__ = ("_generator",)

    def __init__(self, seed: int, part: int = 0) -> None:
        self._generator = Generator(PCG64((seed, part)))

    def unit(self) -> float:
        """Between 0 and 1, neither included."""
        return float(self._generator.random()) or _LEAST_UNIT

    def chance(self, share: float) -> bool:
        """True in that share of draws."""
        return self.unit() < share

    def below(self, bound: int) -> int:
        """0 to bound - 1, each as often."""
        return int(self.unit() * bound)

    def between(self, least: int, most: int) -> int:
        """least to most, each as often."""
        return least + self.below(most - least + 1)

    def pick(self, things: Sequence[T]) -> T:
        """One of them, each as often."""
        return things[self.below(len(things))]

    def lognormal(self, median: float, sigma: float, *, least: int = 1, most: int) -> int:
        """A whole number; `sigma` is that of its logarithm. What lies outside is drawn to the end."""
        value = median * exp(sigma * _NORMAL.inv_cdf(self.unit()))
        return min(max(round(value), least), most)

    def pareto(self, least: float, alpha: float, *, most: int) -> int:
        """A whole number whose tail falls with the power of -alpha."""
        return min(round(least * power(self.unit(), -1 / alpha)), most)

    def exponential(self, mean: float) -> int:
        """A whole number: the gaps of a Poisson process."""
        return round(-mean * log(self.unit()))

    def geometric(self, mean: float) -> int:
        """0, 1, 2 and so on, each further one with the same chance."""
        return int(log(self.unit()) / log(mean / (mean + 1))) if mean > 0 else 0

    def arrivals(self, until_ms: int, per_minute: float) -> Iterator[int]:
        """Moments of a Poisson process, in ms."""
        at_ms = self.exponential(MINUTE_MS / per_minute)
        while at_ms < until_ms:
            yield at_ms
            at_ms += self.exponential(MINUTE_MS / per_minute)


class Zipf:
    """Ranks 0 to count - 1, of which rank r is drawn in proportion to 1 / (r + 1) ** exponent."""

    __slots__ = ("_totals",)

    def __init__(self, count: int, exponent: float) -> None:
        self._totals = list(accumulate(power(rank + 1, -exponent) for rank in range(count)))

    def draw(self, draws: Draws) -> int:
        """A rank."""
        return bisect_left(self._totals, draws.unit() * self._totals[-1])
