"""Data frames of rounds, clients, bytes and rejections: pure functions of events."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from fedex_lora.storage import events as told
from fedex_lora.storage.events import Event, of_kind

Events: TypeAlias = Sequence[Event]
NESTED = {"metrics", "modules", "drift", "accepted", "not_finite", "time"}
ERRORS = ("exactness_error", "exactness_error_total", "realised_error", "side_error")


def _left_out(events: Events) -> dict[int, dict[str, str]]:
    """Round -> client that was asked and whose update is not part of the mean -> why it was rejected."""
    asked = {event.round: event.clients for event in of_kind(events, told.RoundStarted)}
    accepted = {event.round: event.accepted or () for event in of_kind(events, told.RoundDone)}
    found: dict[int, dict[str, str]] = {}
    for one in refusals(events).itertuples():
        if one.when == "round" and one.client in asked.get(one.round, ()) and one.client not in accepted.get(one.round, ()):
            found.setdefault(one.round, {})[one.client] = one.reason
    return found


def rounds(events: Events) -> pd.DataFrame:
    """A row a round, with round 0 (the untrained model) where it was measured.

    Columns: `round`; the metrics on the evaluation set; `exactness_error`, `realised_error`, `floor`, `deviation` and the other numbers of
    `round_done`; `bytes_down`, `bytes_up` of all clients, their sum over the rounds so far `bytes_total` (the one that brings the final
    model belongs to no round: `sent` counts it); `seconds`; `participants`, `accepted`, `refused`: how many clients; the clients' own
    rows as `held_out_METRIC`; `not_finite`: which errors could not be computed, in words (one that is not named there and missing was
    not asked for).
    """
    asked = {event.round: len(event.clients) for event in of_kind(events, told.RoundStarted)}
    left_out = _left_out(events)
    held = {event.round: event.metrics for event in of_kind(events, told.HeldOut)}
    rows: list[dict[str, Any]] = [{"round": 0, **event.metrics} for event in of_kind(events, told.Started)[:1] if event.metrics]
    for event in of_kind(events, told.RoundDone):
        odd = [name for name in ERRORS if math.isnan(getattr(event, name) or 0.0)]
        row = {"round": event.round, **event.metrics, **event.model_dump(exclude=NESTED, exclude_unset=True)}
        row |= {"not_finite": ", ".join(odd)} if odd else {}
        if event.round in asked:
            refused = len(left_out.get(event.round, ()))
            accepted = 0 if event.skipped else asked[event.round] - refused
            row |= {"participants": asked[event.round], "refused": refused, "accepted": accepted}
        rows.append(row)
    for row in rows:
        row |= {f"held_out_{name}": value for name, value in held.get(row["round"], {}).items()}
    frame = pd.DataFrame(rows, columns=None if rows else ["round", "bytes_down", "bytes_up"])
    for column in ("bytes_down", "bytes_up"):
        if column not in frame:
            frame[column] = 0
    frame = frame.apply(_numbers)
    total = frame["bytes_down"].fillna(0) + frame["bytes_up"].fillna(0)
    return frame.assign(bytes_total=total.cumsum().astype("int64"))


def _numbers(column: pd.Series) -> pd.Series:
    """A column of numbers as floats, where some are missing; without the infinite ones, which nothing can be drawn or averaged with."""
    if column.dtype.kind == "O" and column.map(lambda value: value is None or isinstance(value, int | float)).all():
        column = column.astype(float)
    return column.replace([np.inf, -np.inf], np.nan) if column.dtype.kind == "f" else column


def participation(events: Events) -> pd.DataFrame:
    """A row a round and client: `round`, `client`, `outcome` (accepted, refused, skipped with the whole round, not asked), `reason`.

    A round that is not done yet is left out.
    """
    skipped = {event.round: event.skipped for event in of_kind(events, told.RoundDone)}
    left_out = _left_out(events)
    rows = []
    for event in of_kind(events, told.RoundStarted):
        if event.round in skipped:
            asked, why = set(event.clients), skipped[event.round]
            for client in of_kind(events, told.Started)[0].clients:
                reason = left_out.get(event.round, {}).get(client)
                taken = "skipped" if why else "accepted"
                outcome = "not asked" if client not in asked else taken if reason is None else "refused"
                rows.append((event.round, client, outcome, reason or (why if outcome == "skipped" else "")))
    return pd.DataFrame(rows, columns=["round", "client", "outcome", "reason"])


def refusals(events: Events) -> pd.DataFrame:
    """A row a rejected answer: `round`, `client`, `reason`, `when` (in the round, or in the final measurement)."""
    rows, finished = [], set()
    for event in events:
        if isinstance(event, told.RoundDone):
            finished.add(event.round)
        elif isinstance(event, told.ClientRejected):
            rows.append((event.round, event.client, event.reason, "final measurement" if event.round in finished else "round"))
    return pd.DataFrame(rows, columns=["round", "client", "reason", "when"])


def messages(events: Events) -> pd.DataFrame:
    """Warnings, and where a run was resumed: `round`, `event`, `message`."""
    rows = [(event.round, event.name, getattr(event, "message", "")) for event in events if isinstance(event, told.Warned | told.Resumed)]
    return pd.DataFrame(rows, columns=["round", "event", "message"])


def clients(events: Events) -> pd.DataFrame:
    """A row a round and client that answered.

    Columns: `round`, `client`, `num_examples`, `bytes_up`, `late` (rounds), `train_loss`, `steps`, `seconds`, its own metrics on the model
    that it received (`held_out_METRIC`), and `drift`: `|s_i B_i A_i - M| / |M|`, how far its update is from the participants' mean.
    """
    held = {(event.round + 1, name): own for event in of_kind(events, told.HeldOut) for name, own in event.clients.items()}
    drifts = {event.round: event.drift for event in of_kind(events, told.RoundDone)}
    rows = []
    for event in of_kind(events, told.ClientDone):
        own = {f"held_out_{metric}": value for metric, value in held.get((event.round, event.client), {}).items()}
        rows.append(event.model_dump(exclude={"time"}, exclude_unset=True) | own | {"drift": drifts.get(event.round, {}).get(event.client)})
    return pd.DataFrame(rows, columns=None if rows else ["round", "client", "drift"])


def communication(runs: Mapping[str, Events], reference: str | None = None) -> pd.DataFrame:
    """A row a run: bytes down and up of all clients and messages, and in relation to a reference (paper, table 6).

    Args:
        runs: name -> events.
        reference: the run that is 1; by default the first whose method is `fedex`, or the first.

    Returns:
        Columns `run`, `method`, `rounds`, `bytes_down`, `bytes_up`, `bytes_total`, `base_bytes` (the base, once to each client),
        `relative` (of the messages), `relative_with_base` (with the one-time download of the base, which is how the paper
        seems to count).
    """
    return relative(pd.DataFrame([{"run": name, **traffic(events)} for name, events in runs.items()]), reference)


def sent(events: Events) -> tuple[int, int]:
    """Bytes down and up of a run's messages: of every round, and of the one after it, which brings the final model to all clients."""
    counted: list[told.RoundDone | told.Evaluated] = [*of_kind(events, told.RoundDone), *of_kind(events, told.Evaluated)[-1:]]
    return sum(event.bytes_down for event in counted), sum(event.bytes_up for event in counted)


def traffic(events: Events) -> dict[str, Any]:
    """A run's row of `communication`, in absolute numbers."""
    started, (down, up) = of_kind(events, told.Started)[0], sent(events)
    return {
        "method": started.method,
        "rounds": len(of_kind(events, told.RoundDone)),
        "bytes_down": down,
        "bytes_up": up,
        "bytes_total": down + up,
        "base_bytes": (started.base_bytes or 0) * len(started.clients),
    }


def relative(frame: pd.DataFrame, reference: str | None = None) -> pd.DataFrame:
    """Rows of `traffic` with a column `run`, in relation to one of them; see `communication`."""
    exact = frame.loc[frame["method"] == "fedex", "run"]
    one = frame.set_index("run").loc[reference or (exact.iloc[0] if len(exact) else frame["run"].iloc[0])]
    whole = frame["bytes_total"] + frame["base_bytes"]
    return frame.assign(
        relative=frame["bytes_total"] / (one["bytes_total"] or float("nan")),
        relative_with_base=whole / ((one["bytes_total"] + one["base_bytes"]) or float("nan")),
    )
