"""Student's paired test, two one-sided tests for equivalence, and Holm's correction: pure functions of numbers.

A test that cannot be computed (one pair, a number that is not finite, differences that are all the same) has p NaN: it has failed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import t as student

Alternative = Literal["two-sided", "greater", "less"]
SAME = 1e-12  # differences of numbers about one that are equal but for their rounding


@dataclass(frozen=True)
class Paired:
    """The mean of n paired differences, its standard error, the half-width of its 95 % interval, t on n - 1 degrees of freedom, and p."""

    n: int
    mean: float
    standard_error: float
    half_width: float
    t: float
    p: float


def paired(differences: Sequence[float], alternative: Alternative = "two-sided", zero: float = 0.0) -> Paired:
    """Student's t-test of whether the mean of paired differences is `zero`: `t = (mean - zero) / (s / sqrt(n))`.

    Example:
        >>> round(paired([0.01, 0.02, 0.03]).p, 4)
        0.0742
    """
    values, n = np.asarray(differences, dtype=np.float64), len(differences)
    mean = float(values.mean()) if n else math.nan
    if n < 2 or not np.isfinite(values).all():
        return Paired(n, mean, math.nan, math.nan, math.nan, math.nan)
    error = float(values.std(ddof=1)) / math.sqrt(n)
    width = float(student.ppf(0.975, n - 1)) * error
    if float(np.ptp(values)) <= SAME * max(1.0, float(np.abs(values).max())):
        return Paired(n, mean, error, width, math.nan, math.nan)
    t = (mean - zero) / error
    tails = {"two-sided": 2 * student.sf(abs(t), n - 1), "greater": student.sf(t, n - 1), "less": student.cdf(t, n - 1)}
    return Paired(n, mean, error, width, t, float(tails[alternative]))


def tost(differences: Sequence[float], bound: float) -> float:
    """p of equivalence within +-bound: the larger p of two one-sided tests, that the mean is above -bound and below bound.

    Example:
        >>> round(tost([-0.001, 0.0, 0.002], 0.01), 4)
        0.0041
    """
    sides = (paired(differences, "greater", -bound).p, paired(differences, "less", bound).p)
    return math.nan if any(math.isnan(p) for p in sides) else max(sides)


def holm(ps: Sequence[float]) -> list[float]:
    """p after Holm's step-down correction for all of them together; one that is NaN counts as one that failed, and stays NaN.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted, least = [math.nan] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda index: (math.isnan(ps[index]), ps[index]))):
        least = max(least, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = math.nan if math.isnan(ps[index]) else least
    return adjusted
