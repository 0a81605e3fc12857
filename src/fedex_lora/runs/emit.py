"""Who is told of what happens."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from fedex_lora.storage.events import Event, Finished, Step, append_event

Emit: TypeAlias = Callable[[Event], None]
"""Told of everything that happens."""


def log_to(path: Path, *others: Emit) -> Emit:
    """An `Emit` that appends to `events.jsonl` and tells the others; training steps are told only."""

    def emit(event: Event) -> None:
        if not isinstance(event, Step | Finished):
            append_event(path, event)
        for other in others:
            other(event)

    return emit
