"""From events to a table: pure functions of numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedex_lora.exactness.algebra import worst
from fedex_lora.experiments.compare._tests import MetricBySeed, interval, paired
from fedex_lora.report.analysis import sent
from fedex_lora.storage.events import Evaluated, Event, HeldOut, RoundDone, Started, of_kind


@dataclass(frozen=True)
class Curve:
    """One run as a comparison sees it.

    Attributes:
        metric: the headline on the evaluation rows, for rounds 0..T (for a personalised method: on the clients' held-out rows); NaN where
            it was not finite.
        held_out: the headline on the clients' held-out rows, round -> value.
        held_out_loss: likewise.
        bytes_down, bytes_up: of all clients and messages (`analysis.sent`), divided by the rounds.
        exactness: the worst round's relative error, NaN where one could not be computed; None where there is no global model.
        seconds: of all rounds.
        trainable: parameters that a client trains.
    """

    metric: list[float]
    held_out: dict[int, float]
    held_out_loss: dict[int, float]
    bytes_down: float
    bytes_up: float
    exactness: float | None
    seconds: float
    trainable: int


def curve(events: Sequence[Event]) -> Curve:
    """A run's events as one record. Of a round that was done twice, the last time counts."""
    started = of_kind(events, Started)[0]
    rounds = list({event.round: event for event in of_kind(events, RoundDone)}.values())
    held = {event.round: event.metrics for event in of_kind(events, HeldOut)}
    held_out, losses = ({round: metrics[name] for round, metrics in held.items() if name in metrics} for name in (started.headline, "loss"))
    if all(started.headline in event.metrics for event in rounds):
        metric = [metrics.get(started.headline, math.nan) for metrics in (started.metrics, *(event.metrics for event in rounds))]
    else:  # no global model: what the clients measure on their own rows
        metric = [held_out.get(round, math.nan) for round in range(len(rounds) + 1)]
    down, up = sent([*rounds, *of_kind(events, Evaluated)])
    errors = [event.exactness_error for event in rounds if event.exactness_error is not None]
    return Curve(
        metric=metric,
        held_out=held_out,
        held_out_loss=losses,
        bytes_down=down / len(rounds),
        bytes_up=up / len(rounds),
        exactness=worst(errors) if errors else None,
        seconds=math.fsum(event.seconds or 0.0 for event in rounds),
        trainable=started.trainable_parameters or 0,
    )


def later_half(held_out: Mapping[int, Any], rounds: int) -> list[Any]:
    """What was measured on the clients' held-out rows in the later half of the rounds, which settings are chosen by."""
    return [value for round, value in held_out.items() if round > rounds // 2]


def held_out_score(run: Curve, sign: int) -> tuple[float, float]:
    """What a learning rate is chosen by: the mean held-out headline over the later half of the rounds, then minus the loss there.

    Larger is better. A mean, because a few hundred held-out rows after one round are too noisy to choose by. What is not finite is worst.
    """
    found = [later_half(values, len(run.metric) - 1) for values in (run.held_out, run.held_out_loss)]
    means = [factor * float(np.mean(values)) if values else -math.inf for factor, values in zip((sign, -1), found, strict=True)]
    return tuple(mean if math.isfinite(mean) else -math.inf for mean in means)  # type: ignore[return-value]


def rounds_to(metric: Sequence[float], target: float, sign: int) -> int | None:
    """The first round after which the metric (of rounds 0..T) is at least as good as `target`; None if there is none."""
    return next((number for number, value in enumerate(metric) if number and sign * value >= sign * target), None)


def summary(
    runs: Mapping[str, Mapping[int, Curve]], reference: str, target: float | None, sign: int, apart: Sequence[str] = ()
) -> tuple[float, list[dict[str, Any]]]:
    """One record a variant, paired by seed with the reference.

    Args:
        runs: variant -> seed -> run.
        reference: the variant that the differences are from.
        target: of "rounds to"; None: the reference's mean at the end.
        sign: 1 where larger is better, -1 otherwise.
        apart: variants that are measured on other rows, and have no difference.

    Returns:
        The target, and the records.
    """
    ends = {name: {seed: run.metric[-1] for seed, run in by_seed.items()} for name, by_seed in runs.items()}
    goal = target if target is not None else float(np.mean(list(ends[reference].values())))
    rows = []
    for name, by_seed in runs.items():
        reached = [rounds_to(run.metric, goal, sign) for run in by_seed.values()]
        first, errors = next(iter(by_seed.values())), [run.exactness for run in by_seed.values() if run.exactness is not None]
        rows.append(
            {
                "name": name,
                **_beside(ends[name], ends[reference], name in (reference, *apart)),
                "over_rounds": float(np.mean([np.mean(run.metric[1:]) for run in by_seed.values()])),
                "rounds_to_target": reached,
                "exactness_error": worst(errors) if errors else None,
                "bytes_down": float(np.mean([run.bytes_down for run in by_seed.values()])),
                "bytes_up": float(np.mean([run.bytes_up for run in by_seed.values()])),
                "trainable_parameters": first.trainable,
                "seeds": {str(seed): run.metric for seed, run in by_seed.items()},
                "held_out": {str(seed): {str(number): value for number, value in run.held_out.items()} for seed, run in by_seed.items()},
            }
        )
    return goal, rows


def at_rounds(metrics: MetricBySeed, reference: str, rounds: Sequence[int], apart: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every variant after each of some rounds, and its difference to the reference there.

    Returns:
        A record a round: `round`; `methods`: variant -> mean, half_width, difference, difference_half_width, p.
    """
    records = []
    for round in rounds:
        there = {name: {seed: metric[round] for seed, metric in by_seed.items()} for name, by_seed in metrics.items()}
        methods = {name: _beside(values, there[reference], name in (reference, *apart)) for name, values in there.items()}
        records.append({"round": round, "methods": methods})
    return records


def _beside(values: Mapping[int, float], others: Mapping[int, float], not_asked: bool) -> dict[str, float | None]:
    """The mean, and the mean difference paired by seed; of each the half-width of its interval, and p of Student's paired test."""
    mean, half_width = interval(list(values.values()))
    row: dict[str, float | None] = {"mean": mean, "half_width": half_width}
    if not_asked:
        return row | dict.fromkeys(("difference", "difference_half_width", "p"))
    differences = [value - others[seed] for seed, value in values.items()]
    difference, width = interval(differences)
    return row | {"difference": difference, "difference_half_width": width, "p": None if width is None else paired(differences).p}
