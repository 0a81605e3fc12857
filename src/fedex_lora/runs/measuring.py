"""What is said of a round and of a run: exactness of factors and layers, the clients' own held-out rows, the best round."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from fedex_lora.exactness import algebra, measure
from fedex_lora.exactness.measure import Realised
from fedex_lora.runs.emit import Emit
from fedex_lora.server.result import Result
from fedex_lora.storage.events import HeldOut, Warned
from fedex_lora.types import Delta, ServerState

MeasureLayers = Callable[[ServerState, Mapping[str, Delta]], tuple[Realised, dict[str, float]]]


def round_numbers(result: Result, realised: MeasureLayers, emit: Emit) -> dict[str, Any]:
    """The fields of `round_done` that a round achieved, from the factors and from the model's own layers; nothing without a global model.

    Args:
        result: of the round.
        realised: see `Federation.realised`.
        emit: told of what is odd.
    """
    number = result.state.round
    if useless := measure.useless_truncation(result.aggregate):
        emit(Warned(round=number, message=useless, tail=measure.tail(result.aggregate)))
    if result.exactness is None:
        return {}
    layers, side = realised(result.state, result.ideal)
    error, floor = layers.worst
    errors = {
        "exactness_error": result.exactness.max_relative_error,
        "exactness_error_total": result.exactness.total_relative_error,
        "realised_error": error,
    }
    numbers = {**result.numbers, **side}
    checked = {**errors, **{name: numbers[name] for name in ("change_error", *side) if name in numbers}}
    odd = [name for name, value in checked.items() if algebra.failed(value, floor if name == "realised_error" else 0.0)]
    if odd:
        words = f"{', '.join(odd)} cannot be computed, so this round is not shown to be exact: does the base overflow in its base.dtype?"
        emit(Warned(round=number, message=words))
    return {**numbers, **errors, **({"not_finite": odd} if odd else {}), "floor": floor}


def held_out_event(version: int, metrics: Mapping[str, Mapping[str, float]], emit: Emit) -> dict[str, float]:
    """The mean over the clients' own held-out rows of the model that they received (after round `version`).

    A number that some have is NaN where one lacks it: numbers that are not finite do not travel.

    Args:
        version: of the model.
        metrics: client -> what it reported.
        emit: told of it.
    """
    own = {
        client: {name.removeprefix("held_out_"): value for name, value in found.items() if name.startswith("held_out_")}
        for client, found in metrics.items()
    }
    measured = [one for one in own.values() if one.get("rows")]
    if not measured:
        return {}
    total, names = math.fsum(one["rows"] for one in measured), set[str]().union(*measured) - {"rows"}
    mean = {name: math.fsum(one.get(name, math.nan) * one["rows"] for one in measured) / total for name in sorted(names)} | {"rows": total}
    emit(HeldOut(round=version, metrics=mean, clients=own))
    return mean


def best_of(held_out: Mapping[int, Mapping[str, float]], facts: Mapping[str, Any]) -> int | None:
    """The round whose model was best on the held-out rows of all clients; ties go to the smaller loss, then to the earlier one.

    A round that only some clients measured (`clients.fraction` below one) is not compared: its rows were other rows. None is best where no
    number is finite.
    """
    headline, sign = facts["headline"], 1 if facts["greater_is_better"] else -1
    rows = max((metrics.get("rows", 0) for metrics in held_out.values()), default=0)
    found = {number: one.get(headline, math.nan) for number, one in held_out.items() if number > 0 and one.get("rows") == rows}
    compared = len(found) == len(held_out.keys() - {0}) and any(headline in one for one in held_out.values())
    worth = {number: sign * value for number, value in found.items() if math.isfinite(value)}
    losses = {number: loss if math.isfinite(loss := held_out[number].get("loss", math.inf)) else math.inf for number in worth}
    return max(worth, key=lambda number: (worth[number], -losses[number], -number)) if worth and compared else None


def learnt_nothing(held_out: Mapping[int, Mapping[str, float]], facts: Mapping[str, Any]) -> str:
    """What to say where the clients' own held-out rows are predicted no better after the last round than before the first; "" elsewhere."""
    headline, sign = facts["headline"], 1 if facts["greater_is_better"] else -1
    before, after = held_out.get(0, {}), held_out[max(held_out)]
    if not before.get("rows") or before["rows"] != after.get("rows") or not {headline, "loss"} <= before.keys():
        return ""
    worth, loss = after.get(headline, math.nan), after.get("loss", math.nan)
    if math.isfinite(loss) and (sign * worth > sign * before[headline] or loss < 0.99 * before["loss"]):
        return ""
    numbers = f"{headline} {before[headline]:.3g} on the clients' own rows before, {worth:.3g} after"
    if not loss <= 1.5 * before["loss"]:  # NaN, too
        rose = f"loss {before['loss']:.3g}, then {loss:.3g}; {numbers}"
        return f"training diverged, or the rate is too high ({rose}): lower training.learning_rate"
    return f"the model learnt nothing ({numbers}): raise training.learning_rate or rounds, and look at the rows by fedex-lora check"
