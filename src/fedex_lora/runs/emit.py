"""Who is told of what happens."""

from pathlib import Path
from typing import Any, Protocol

from fedex_lora.storage.events import append_event

SHOWN = ("step", "finished")  # events that are no part of the record


class Emit(Protocol):
    """Told of everything that happens."""

    def __call__(self, event: str, **fields: Any) -> None: ...


def log_to(path: Path, *others: Emit) -> Emit:
    """An `Emit` that appends to `events.jsonl` and tells the others; what is `SHOWN` is not kept."""

    def emit(event: str, **fields: Any) -> None:
        if event not in SHOWN:
            append_event(path, event, **fields)
        for other in others:
            other(event, **fields)

    return emit
