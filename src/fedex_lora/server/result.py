"""What a round came to: the server's next state, its exactness by the factors alone, and the folder that it is kept in."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedex_lora import __version__
from fedex_lora.aggregation import get_method
from fedex_lora.aggregation import server_state as states
from fedex_lora.config import ServerOptimizer
from fedex_lora.exactness import algebra, measure
from fedex_lora.exactness.measure import Exactness, Held
from fedex_lora.storage.adapter_folder import Format
from fedex_lora.storage.result import write_result
from fedex_lora.types import Aggregate, ClientUpdate, Delta, Motion, ServerState

NAME = re.compile(r"(?P<fingerprint>[0-9a-f]{64}) (?P<dtype>float32|bfloat16|float16) (?P<quantization>none|nf4|fp4|int8)")
"""What a base is called: see `models.base_weights.FrozenBase.name`; another name says nothing that `load_model` could compare."""


@dataclass(frozen=True, eq=False)
class Result:
    """A round that is closed.

    Attributes:
        before, state: the server before and after.
        updates: that the round was closed with.
        aggregate: what the updates were averaged to.
        held: client -> what its base had beside the common one.
        motion: what the server's momentum made the round start from; None without momentum.
        ideal: module path -> `E - W0`, the mean of the participants' models, or what momentum makes of it, in fp64 and made when it is
            asked for; empty where there is no global model.
        exactness: of the state's factors against it; None where there is no ideal.
        numbers: more of the round: deviation, drift, what a truncation dropped.
        base: the name of the base, see `Server`; "" where it is not known.
    """

    before: ServerState
    state: ServerState
    updates: Sequence[ClientUpdate]
    aggregate: Aggregate
    held: Held
    motion: Motion | None
    ideal: Mapping[str, Delta]
    exactness: Exactness | None
    numbers: Mapping[str, Any]
    base: str = ""


def result_of(
    before: ServerState,
    state: ServerState,
    aggregate: Aggregate,
    updates: Sequence[ClientUpdate],
    held: Held,
    pace: ServerOptimizer,
    base: str = "",
) -> Result:
    """The result of a round, measured: from what the participants sent, never from what the server made of it. See `Result`."""
    motion = states.motion_of(before, pace)
    if not state.adapter or get_method(state.method).exactness == "personalised":
        return Result(before, state, updates, aggregate, held, motion, {}, None, {}, base)
    ideal = measure.ideal_update(before.base_delta, updates, aggregate.weights, held)
    if motion:
        ideal = measure.moved_ideal(ideal, before.base_delta, motion)
    exactness, deviation = measure.exactness(ideal, state.adapter, state.base_delta), measure.deviation(aggregate, updates)
    numbers = {
        "deviation": deviation.total_relative_error,
        "modules": measure.per_module(deviation, aggregate.adapter),
        "drift": measure.drift(updates, aggregate.weights),
    }
    if get_method(state.method).exactness in ("truncated", "rank-r-optimal"):
        numbers["dropped"] = algebra.relative_error(math.hypot(*aggregate.dropped.values()), math.hypot(*exactness.ideal.values()))
    if motion and motion.momentum:
        start, end = (measure.effective_update(one.adapter, one.base_delta) for one in (before, state))
        numbers["change_error"] = algebra.worst(measure.change_error(start, end, states.last_changes(state, pace)).values())
    return Result(before, state, updates, aggregate, held, motion, ideal, exactness, numbers, base)


def save_result(folder: str | Path, result: Result, format: Format) -> None:
    """Write a closed round as a result folder: `load_model` opens it, `fedex-lora verify` checks it, `fedex-lora export` makes it servable.

    It holds the updates of all participants, so it is the server's own; a party gets what `load_model` needs by `for_parties`.

    Args:
        folder: must not exist, or be empty.
        result: what `Round.close` gave.
        format: how the adapter is written: `AdaptedModel.format`, or that of an adapter folder.

    Raises:
        UsageError: the folder is not empty.
        AggregationError: a result that is not finite.

    Example:
        >>> save_result("trained", round.close(updates), model.format)                    # doctest: +SKIP
    """
    named, motion = {"base_model": "base_model_name_or_path", "task_type": "task_type"}, result.motion
    facts: dict[str, Any] = {fact: format.config.get(key) for fact, key in named.items()} | {"versions": {"fedex-lora": __version__}}
    if found := NAME.fullmatch(result.base):
        facts |= {f"base_{key}": value for key, value in found.groupdict().items()}
    if motion is not None:
        facts["momentum"] = {"momentum": motion.momentum, "learning_rate": motion.learning_rate}
    before, weights = result.before.base_delta, result.aggregate.weights
    write_result(Path(folder), result.state, result.updates, weights, format, facts, before, result.held, motion=motion)
