"""Which settings each variant gets: those that are best on the clients' held-out rows, over the tuning seeds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedex_lora.errors import TrainingError
from fedex_lora.experiments.compare._plan import Plan, label, numeric
from fedex_lora.experiments.compare._runs import RunOutcome
from fedex_lora.experiments.compare._statistics import held_out_score
from fedex_lora.experiments.compare._variants import Settings, Variant

Ran = Mapping[tuple[str, str, int], RunOutcome]
"""(variant, label of its settings, seed) -> outcome."""
WORST = (-math.inf, -math.inf)


@dataclass(frozen=True)
class Choice:
    """What a variant runs with.

    Attributes:
        settings: key -> value.
        score: see `held_out_score`; the worst where nothing was tried.
        at_edge: the keys whose best value is the first or last of its numbers.
        tried: every point of the grid, for the record.
    """

    settings: Settings
    score: tuple[float, float]
    at_edge: list[str]
    tried: list[dict[str, Any]]


def best_point(plan: Plan, variant: Variant, ran: Ran, sign: int) -> Choice:
    """The best point of the grid: by the mean over the tuning seeds of `held_out_score`; the first of equal ones.

    A point at which training fails with one of the seeds is no candidate, nor is one of several whose score is not finite.

    Raises:
        TrainingError: it fails at every point.
    """
    points = plan.points(variant)
    if not plan.tuned(variant):
        return Choice(points[0], WORST, [], [])
    runs = [[ran[variant.name, label(point), seed] for seed in plan.tuning_seeds] for point in points]
    scores = [_mean([held_out_score(run.curve, sign) if run.curve else None for run in at]) for at in runs]
    candidates = [index for index, score in enumerate(scores) if score is not None and (len(points) == 1 or math.isfinite(score[0]))]
    if not candidates:
        reason = next((run.reason for run in runs[0] if run.curve is None), "what the clients measured on held-out rows is not finite")
        raise TrainingError(f"{variant.name} fails at every point of the grid: {label(points[0])}: {reason}")
    best = max(candidates, key=lambda index: scores[index] or WORST)
    tried = [
        {
            "settings": dict(point),
            "score": None if score is None else sign * score[0],
            "loss": None if score is None else -score[1],
            "seeds": {
                str(seed): sign * held_out_score(run.curve, sign)[0] if run.curve else None
                for seed, run in zip(plan.tuning_seeds, at, strict=True)
            },
        }
        for point, score, at in zip(points, scores, runs, strict=True)
    ]
    return Choice(points[best], scores[best] or WORST, edges(plan.grid, points[best]), tried)


def _mean(scores: list[tuple[float, float] | None]) -> tuple[float, float] | None:
    """Of each part; None where one is missing."""
    there = [score for score in scores if score is not None]
    if len(there) < len(scores):
        return None
    return sum(score[0] for score in there) / len(there), sum(score[1] for score in there) / len(there)


def edges(grid: Mapping[str, Any], settings: Settings) -> list[str]:
    """The keys of a grid whose value is the least or largest of several numbers; zero is no edge, because nothing is below it."""
    numbers = {key: grid[key] for key in settings if len(grid[key]) > 1 and numeric(grid[key])}
    return [key for key, values in numbers.items() if settings[key] in (values[0], values[-1]) and settings[key] != 0]
