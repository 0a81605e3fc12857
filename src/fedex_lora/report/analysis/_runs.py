"""Run folders as records: the only reading that the analysis does by itself."""

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedex_lora.config import flat
from fedex_lora.errors import StorageError, UsageError
from fedex_lora.storage.events import Event, HeldOut, Resumed, RoundStarted, Started, Unreadable, is_over, of_kind, read_events
from fedex_lora.storage.run_folder import CONFIG, EVENTS

QUIET = ("seed", "keep_rounds", "torch_threads", "trackers")  # settings that do not make two runs different ones


@dataclass(frozen=True, eq=False)
class Run:
    """One run.

    Attributes:
        folder: where it is.
        name: what to call it.
        events: all of its events, in the order of their times.
        config: its resolved configuration, as plain values; empty where the folder has none.
    """

    folder: Path
    name: str
    events: Sequence[Event]
    config: Mapping[str, Any]

    @cached_property
    def started(self) -> Started:
        """The first event."""
        return of_kind(self.events, Started)[0]

    @property
    def finished(self) -> bool:
        return is_over(self.events)


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UsageError: it is no run folder.
        StorageError: its events say nothing yet.
    """
    path = folder / EVENTS
    if not path.is_file():
        raise UsageError(f"{folder} has no {EVENTS}: give a run folder, as `fedex-lora run` leaves it")
    try:
        events = read_events(path)
        config = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8")) if (folder / CONFIG).is_file() else {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StorageError(f"{folder} cannot be read: {error}: copy the folder again") from None
    if odd := next((event for event in of_kind(events, Unreadable) if event.complaint), None):
        raise StorageError(f"{path} has a `{odd.event}` event without {', '.join(odd.complaint)}: copy the folder again, or leave it out")
    if not of_kind(events, Started):
        raise StorageError(f"{path} has no `started` event: the run has not begun, or the file is no run's; leave it out")
    return Run(folder=folder, name=folder.name, events=_last_of_each_round(events), config=config)


def _last_of_each_round(events: Sequence[Event]) -> list[Event]:
    """A resumed run begins its unfinished round anew: what it said of that round before it was killed does not count."""
    kept: list[Event] = []
    begun = set()
    for event in events:
        if isinstance(event, RoundStarted):
            if event.round in begun:
                kept = [old for old in kept if getattr(old, "round", None) != event.round or isinstance(old, HeldOut | Resumed)]
            begun.add(event.round)
        kept.append(event)
    return kept


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in folders: each a run folder, or a folder with run folders anywhere in it (a comparison's, the demo's). Each once.

    Raises:
        UsageError: a folder holds no run.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"{path} is no folder: give a run folder, or a folder of runs")
        found = [path] if (path / EVENTS).is_file() else sorted(file.parent for file in path.rglob(EVENTS))
        if not found:
            raise UsageError(f"{path} holds no run (no {EVENTS} in it): give a run folder, as `fedex-lora run` leaves it")
        runs |= {folder.resolve(): read_run(folder) for folder in found if folder.resolve() not in runs}
    return list(runs.values())


def labels(runs: Sequence[Run]) -> list[str]:
    """What tells runs apart, one label a run: the method, and the settings that differ; runs that differ in their seed only share one.

    Of files and folders that differ only the end of the path is named. Runs that differ in nothing at all are told apart by their folders.

    Example:
        >>> runs = [Run(Path(), "", [], {"method": name, "seed": seed}) for name, seed in (("fedex", 0), ("fedex", 1), ("fedit", 0))]
        >>> labels(runs)
        ['fedex', 'fedex', 'fedit']
    """
    plain = [{key: value for key, value in flat(run.config).items() if key not in QUIET} for run in runs]
    differing = sorted({key for one in plain for key in one if any(other.get(key) != one[key] for other in plain)} - {"method"})
    shown = {key: _endings([str(one[key]) for one in plain if key in one]) for key in differing}
    found = []
    for run, one in zip(runs, plain, strict=True):
        method = str(one.get("method") or next((event.method for event in of_kind(run.events, Started)), run.name))
        found.append(", ".join([method, *(f"{key.rpartition('.')[2]} {shown[key][str(one[key])]}" for key in differing if key in one)]))
    times = Counter((label, run.config.get("seed")) for label, run in zip(found, runs, strict=True))
    folders = _endings([str(run.folder.absolute()) for run in runs])
    return [
        f"{label}, {folders[str(run.folder.absolute())]}" if times[label, run.config.get("seed")] > 1 else label
        for label, run in zip(found, runs, strict=True)
    ]


def _endings(values: Sequence[str]) -> dict[str, str]:
    """Paths by the shortest endings that tell them apart; other values as they are."""
    paths = {value: Path(value).parts for value in values}
    if not all(Path(value).is_absolute() for value in values):
        return {value: value for value in values}
    depths = range(1, max(map(len, paths.values()), default=0) + 1)
    depth = next((depth for depth in depths if len({parts[-depth:] for parts in paths.values()}) == len(paths)), 1)
    return {value: "/".join(parts[-depth:]) for value, parts in paths.items()}
