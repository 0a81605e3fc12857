"""Who is told of what happens."""

from collections.abc import Callable
from logging import INFO, WARNING
from pathlib import Path
from typing import TypeAlias

from fedex_lora.storage import events

Emit: TypeAlias = Callable[[events.Event], None]
"""Told of everything that happens."""


def log_to(path: Path, *others: Emit) -> Emit:
    """An `Emit` that appends to `events.jsonl` and tells the others; training steps are told only."""

    def emit(event: events.Event) -> None:
        if not isinstance(event, events.Step | events.Finished):
            events.append_event(path, event)
        for other in others:
            other(event)

    return emit


def log_line(event: events.Event) -> tuple[int, str] | None:
    """An event as a line of an engine's log, with its level; None: it is not worth one."""
    match event:
        case events.Warned(message=message):
            return WARNING, message
        case events.ClientRejected(client=client, reason=reason):
            return WARNING, f"client {client} is rejected: {reason}"
        case events.Waiting(clients=clients, reason=reason):  # without a reason a round takes its time, which is no trouble
            return WARNING if reason else INFO, f"waiting for {', '.join(clients)}"
        case events.Started(method=method, rounds=rounds, clients=clients):
            return INFO, f"{method}: {rounds} rounds, clients {', '.join(clients)}"
        case events.Finished():
            return INFO, "all rounds are there: nothing is left to do"
        case events.Resumed(round=number, rounds=rounds):
            return INFO, f"resuming with round {number} of {rounds}"
        case events.ClientDone(round=number, client=client, bytes_up=size):
            return INFO, f"round {number}: {client} answered, {(size or 0) / 1e6:.2f} MB"
        case events.RoundDone(round=number, metrics=metrics, exactness_error=error, seconds=seconds):
            numbers = ({} if error is None else {"exactness error": error}) | metrics
            said = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
            return INFO, f"round {number} done: {said}; {seconds:.1f} s"
    return None
