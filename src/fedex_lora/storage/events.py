"""The events of a run: one JSON object a line of events.jsonl."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedex_lora.errors import UsageError
from fedex_lora.storage.files import cannot_write


def append_event(path: Path, event: str, **fields: Any) -> None:
    """One JSON object as one line at the end of `events.jsonl`."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(finite_json({"event": event, "time": time.time(), **fields}) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from None


def finite_json(value: Any) -> str:
    """JSON as the standard has it: numbers that are not finite become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of a run; a torn last line is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def tail_events(path: Path, every: float | None) -> Iterator[dict[str, Any] | None]:
    """The events of a run as they are written, until its last one; None each time that there is nothing new.

    Args:
        path: `events.jsonl`.
        every: seconds between looks; None: only what there is now.

    Raises:
        UsageError: the file is not there.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist: give the folder of a run that has begun")
    read = 0
    while True:
        text = path.read_bytes()[read:]
        whole = text[: text.rfind(b"\n") + 1]
        read += len(whole)
        for line in whole.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if not isinstance(event, dict) or "event" not in event:
                continue
            yield event
            if event["event"] == "run_done":
                return
        if every is None:
            return
        yield None
        time.sleep(every)
