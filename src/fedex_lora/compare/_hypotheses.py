"""From curves to the answers of a protocol's tests: pure functions of numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fedex_lora.compare._protocol import Hypothesis
from fedex_lora.compare._tests import Alternative, holm, paired, tost

Metrics = Mapping[str, Mapping[int, Sequence[float]]]
"""Variant -> seed -> the metric for rounds 0..T."""


def at_round(metric: Sequence[float], round: int, mean_of: int = 1) -> float:
    """The metric after a round, or its mean over so many rounds up to that one; NaN where one of them is."""
    return float(np.mean(metric[round - mean_of + 1 : round + 1]))


def differences(metrics: Metrics, hypothesis: Hypothesis, than: str) -> list[float]:
    """The first variant minus the other, seed by seed."""
    one, (here, there) = hypothesis.sides[0], hypothesis.rounds
    return [
        at_round(metric, here, hypothesis.mean_of) - at_round(metrics[than][seed], there, hypothesis.mean_of)
        for seed, metric in metrics[one].items()
    ]


def answers(
    metrics: Metrics, hypotheses: Sequence[Hypothesis], sign: int, scores: Mapping[str, tuple[float, float]] | None = None
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


def _answer(metrics: Metrics, hypothesis: Hypothesis, sign: int, scores: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
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
