"""The runs of a comparison: each in its folder, done once, several at a time."""

import multiprocessing
import os
import threading
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedex_lora.aggregation import get_method
from fedex_lora.client.training import silence_libraries
from fedex_lora.config import Config, parse_config, write_config
from fedex_lora.errors import ConfigError, StorageError, TrainingError, UnreadableError, UnwritableError, UsageError
from fedex_lora.experiments.compare._statistics import Curve, curve
from fedex_lora.runs.run import run
from fedex_lora.storage.events import Event, RoundDone, RunDone, Started, of_kind, read_events
from fedex_lora.storage.files import ROUNDS
from fedex_lora.storage.run_folder import CONFIG, EVENTS, barely_begun, remove, strays

RESTORE = "put the file back, or remove its folder and the run is made again"


@dataclass(frozen=True)
class RunJob:
    """One run: its configuration and its folder."""

    config: Config
    folder: Path


@dataclass(frozen=True)
class RunOutcome:
    """What a job came to: a curve, or why training failed."""

    job: RunJob
    curve: Curve | None
    reason: str = ""


def done(job: RunJob) -> bool:
    """Has this run been finished, with this configuration?"""
    return _outcome(job) is not None


def outcomes(jobs: Iterable[RunJob], at_once: int) -> Iterator[RunOutcome]:
    """Every job's outcome, as they come; those that are done already first.

    A run counts as done when its folder has the same configuration and its last event. One that an interrupted comparison left half done
    goes on; one that is broken, or has another configuration, is removed and run again.

    Raises:
        FedexLoraError: whatever stops a run but training itself; or the folder of a run holds what no run wrote.
    """
    waiting = []
    for job in jobs:
        finished = _outcome(job)
        if finished:
            _slim(job)
            yield finished
        else:
            waiting.append(job)
    if at_once == 1 or len(waiting) < 2:
        yield from map(_perform, waiting)
        return
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn"), _end_with, (os.getpid(),)) as pool:
        try:
            for future in as_completed([pool.submit(_perform, job) for job in waiting]):
                yield future.result()
        except BrokenProcessPool:
            raise TrainingError(
                "a worker process died, killed or out of memory: what is done is kept, the same command goes on; --jobs 1 needs less memory"
            ) from None
        except (KeyboardInterrupt, GeneratorExit):  # nobody waits for the rest
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _end_with(parent: int) -> None:
    """A worker whose comparison was killed must not go on writing where the next one writes, nor wait for ever for work."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _slim(job: RunJob) -> None:
    """Of a finished run's files the configuration, the events and the final model stay."""
    if (job.folder / ROUNDS).is_dir() and not strays(job.folder, ROUNDS):
        remove(job.folder, ROUNDS)


def _is_of(job: RunJob) -> bool:
    """Has the folder the job's configuration?"""
    config = job.folder / CONFIG
    return config.is_file() and is_config(config.read_text(encoding="utf-8"), job.config)


def is_config(text: str, config: Config) -> bool:
    """Is a file's text this configuration, by whatever version it was written?"""
    try:
        return text == write_config(config) or write_config(parse_config(tomllib.loads(text))) == write_config(config)
    except (tomllib.TOMLDecodeError, ConfigError):
        return False


def _outcome(job: RunJob) -> RunOutcome | None:
    """What a finished run came to; None where it is not finished."""
    if not _is_of(job):
        return None
    recorded = _recorded(job)
    if not recorded or not isinstance(recorded[-1], RunDone) or not _without_gaps(recorded, job.config.rounds):
        return None
    begun = of_kind(recorded, Started)[0]
    if begun.method != job.config.method or begun.seed not in (None, job.config.seed):
        raise UsageError(f"{job.folder / EVENTS} is of another run ({begun.method}, seed {begun.seed}): {RESTORE}")
    return RunOutcome(job, curve(recorded))


def require_own(found: Iterable[RunOutcome]) -> None:
    """Has each run events of its own, and have all that begin with one base the same?

    Raises:
        UsageError: they have not.
    """
    texts, names, bases = dict[bytes, Path](), dict[Path, str](), dict[tuple[Any, ...], Path]()
    for job in {outcome.job.folder: outcome.job for outcome in found if outcome.curve}.values():
        events, config = job.folder / EVENTS, job.config
        if (other := texts.setdefault(events.read_bytes(), events)) != events:
            raise UsageError(f"{other} and {events} are the same: {RESTORE}")
        names[events] = of_kind(read_events(events), Started)[0].base_fingerprint
        kind = [table.model_dump_json() for table in (config.base, config.lora, config.task)]
        drawn = config.seed if config.base.random_weights else None
        other = bases.setdefault((*kind, get_method(config.method).lora, drawn), events)
        if names[other] != names[events]:
            raise UsageError(f"{other} and {events} are of two bases: {RESTORE}")


def _recorded(job: RunJob) -> list[Event]:
    """A run's events; none where a line of them is damaged."""
    events = job.folder / EVENTS
    try:
        return read_events(events) if events.is_file() else []
    except StorageError:
        return []


def _without_gaps(events: Sequence[Event], rounds: int | None = None) -> bool:
    """Do events say how a run began, and every round from the first to the last one there is, or to `rounds`?"""
    numbers = {event.round for event in of_kind(events, RoundDone)}
    return bool(of_kind(events, Started)) and numbers == set(range(1, 1 + (len(numbers) if rounds is None else rounds)))


def _perform(job: RunJob) -> RunOutcome:
    """Run a job, from where it was left."""
    silence_libraries()
    if job.folder.exists() and not _goes_on(job):
        remove(job.folder)
    try:
        try:
            run(job.config, job.folder, nobody, resume=True)
        except (UnreadableError, UnwritableError):  # what is there is whole
            raise
        except StorageError:  # what was left is broken
            remove(job.folder)
            run(job.config, job.folder, nobody)
    except TrainingError as error:
        return RunOutcome(job, None, str(error))
    outcome = _outcome(job)
    if outcome is None:
        return RunOutcome(job, None, "its folder was changed while it ran")
    _slim(job)
    return outcome


def _goes_on(job: RunJob) -> bool:
    """Is the folder this very run's, as far as it came?"""
    return barely_begun(job.folder) or (_is_of(job) and (job.folder / ROUNDS).is_dir() and _without_gaps(_recorded(job)))


def nobody(event: Event) -> None:
    """Told of steps."""
