"""Student's paired test and interval, two one-sided tests for equivalence, Holm's correction, and a protocol's answers: pure functions.

A test that cannot be computed (one pair, a number that is not finite, differences that are all the same) has p NaN: it has failed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import stdtr, stdtrit

from fedex_lora.experiments.compare._protocol import Hypothesis

Alternative = Literal["two-sided", "greater", "less"]
MetricBySeed = Mapping[str, Mapping[int, Sequence[float]]]
"""Variant -> seed -> the metric for rounds 0..T."""
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
    width = float(stdtrit(n - 1, 0.975)) * error
    if float(np.ptp(values)) <= SAME * max(1.0, float(np.abs(values).max())):
        return Paired(n, mean, error, width, math.nan, math.nan)
    t = (mean - zero) / error
    tails = {"two-sided": 2 * stdtr(n - 1, -abs(t)), "greater": stdtr(n - 1, -t), "less": stdtr(n - 1, t)}
    return Paired(n, mean, error, width, t, float(tails[alternative]))


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and the half-width of Student's 95 % confidence interval for it; no width for one value.

    Example:
        >>> [round(number, 3) for number in interval([0.70, 0.72, 0.74])]
        [0.72, 0.05]
    """
    found = paired(values)
    return found.mean, found.half_width if found.n > 1 else None


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


def at_round(metric: Sequence[float], round: int, mean_of: int = 1) -> float:
    """The metric after a round, or its mean over so many rounds up to that one; NaN where one of them is."""
    return float(np.mean(metric[round - mean_of + 1 : round + 1]))


def differences(metrics: MetricBySeed, hypothesis: Hypothesis, than: str) -> list[float]:
    """The first variant minus the other, seed by seed."""
    one, (here, there) = hypothesis.sides[0], hypothesis.rounds
    return [
        at_round(metric, here, hypothesis.mean_of) - at_round(metrics[than][seed], there, hypothesis.mean_of)
        for seed, metric in metrics[one].items()
    ]


def answers(
    metrics: MetricBySeed, hypotheses: Sequence[Hypothesis], sign: int, scores: Mapping[str, tuple[float, float]] | None = None
) -> list[dict[str, Any]]:
    """A record of each test; the primary ones corrected together by Holm's method.

    Args:
        metrics: of every variant, with the same seeds.
        hypotheses: settled.
        sign: 1 where larger is better, -1 otherwise.
        scores: of the variants on the tuning seeds, larger is better: by these "the best of" is chosen.
    """
    records = [_answer(metrics, hypothesis, sign, scores or {}) for hypothesis in hypotheses]
    primary = [record for record in records if record["primary"]]
    for record, p in zip(primary, holm([record["p"] for record in primary]), strict=True):
        record["p_holm"] = p
    return records


def _answer(metrics: MetricBySeed, hypothesis: Hypothesis, sign: int, scores: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    one, others = hypothesis.sides
    than = others[0] if len(others) == 1 else max(others, key=lambda name: scores[name])
    found = differences(metrics, hypothesis, than)
    better: Alternative = "greater" if sign > 0 else "less"
    test = paired(found, "two-sided" if hypothesis.alternative == "two-sided" else better)
    record = {
        "name": hypothesis.name,
        "kind": "difference" if hypothesis.equivalent is None else "equivalence",
        "variants": [one, than],
        "best_of": others if len(others) > 1 else None,
        "rounds": list(hypothesis.rounds),
        "mean_of": hypothesis.mean_of,
        "primary": hypothesis.primary,
        "alternative": hypothesis.alternative,
        "bound": hypothesis.bound,
        "differences": found,
        **asdict(test),
        "p_holm": None,
    }
    if hypothesis.bound is not None:
        record["p"] = tost(found, hypothesis.bound)
    return record | {"computable": not math.isnan(record["p"])}
