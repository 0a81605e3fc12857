"""The events of a run as they are written."""

import time
from collections.abc import Iterator
from pathlib import Path

from fedex_lora.errors import UsageError
from fedex_lora.storage.events import Event, is_over, read_event


def tail_events(path: Path, every: float | None) -> Iterator[Event | None]:
    """The events of a run as they are written, until it is over; None each time that there is nothing new.

    Args:
        path: `events.jsonl`.
        every: seconds between looks; None: only what there is now.

    Raises:
        UsageError: the file is not there.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist: give the folder of a run that has begun")
    read, seen = 0, list[Event]()
    while True:
        whole = path.read_bytes()[read:].rpartition(b"\n")[0]
        read += len(whole) + 1 if whole else 0
        seen += (found := [event for line in whole.splitlines() if (event := read_event(line)) is not None])
        yield from found
        if every is None or is_over(seen):
            return
        yield None
        time.sleep(every)
