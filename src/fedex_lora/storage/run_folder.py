"""What a run folder holds, and how it is locked, swept and removed: nothing in it is touched that no run wrote."""

import fcntl
import os
import re
import shutil
import tempfile
import tomllib
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from fedex_lora.errors import StorageError, UsageError
from fedex_lora.storage.events import RunDone, of_kind, read_events
from fedex_lora.storage.files import FINAL, MANIFEST, ROUNDS, TEMPORARY, read_manifest, write_text

CONFIG, EVENTS, CLIENTS, TRACKERS, REPORT = "config.toml", "events.jsonl", "clients", "trackers", "report.html"
WORD, ROWS = "run-id", "rows-digest"
_PEFT = r"(README\.md|adapter_config\.json|adapter_model\.safetensors)"
_TENSORS = r"(updates|held)/[^/]+\.safetensors|(base_delta|previous_delta|motion|model|server)\.safetensors"
_RESULT = rf"(/(manifest\.json|(trainable|adapter)/{_PEFT}|{_TENSORS}))?"
_OURS = re.compile(
    rf"{CONFIG}|{EVENTS}|{WORD}|{ROWS}|{FINAL}{_RESULT}|{ROUNDS}(/\d+(\.broken\d*)?{_RESULT})?"
    rf"|{CLIENTS}(/[^/]+(/((memory|reference)\.safetensors(\.broken)?|adapter/{_PEFT}))?)?|(.*/)?{re.escape(TEMPORARY)}.*"
)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time works on a run folder; the lock goes with the process, however that ends.

    Raises:
        UsageError: another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UsageError(f"another process is at work on {folder}: wait for it, or give another out") from None
    try:
        yield
    finally:
        os.close(descriptor)


def word_of(out: Path, make: bool = True) -> str:
    """By which parties know a run, and no other under the same name; "" where it has none yet, and none is to be made."""
    path = out / WORD
    if make and not path.exists():
        write_text(path, f"{out.name}-{uuid.uuid4().hex[:12]}\n")
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def require_rows(out: Path, digest: str) -> None:
    """The rows of a run are those that it began with; of one that began without their digest, nobody knows.

    Raises:
        UsageError: they are others.
    """
    path = out / ROWS
    if path.exists() and path.read_text(encoding="utf-8").strip() != digest:
        raise UsageError(f"the rows are not those that the run in {out} began with, or in another order: give those, or another --out")


def barely_begun(out: Path) -> bool:
    """Does a folder hold only what a run writes before it has anything in its place? An empty one does."""
    return out.is_dir() and all(path.name.startswith(TEMPORARY) for path in out.iterdir())


@contextmanager
def not_begun_removed(out: Path, before: Collection[str] | None) -> Iterator[None]:
    """Where something is raised before anything happened that a run could go on from, what the run wrote is gone again.

    Args:
        out: the folder.
        before: names of what was in it before; None: it was not there.
    """
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if {path.name for path in out.iterdir()} <= (ours := {CONFIG, WORD, ROWS}):
                for name in ours.difference(before or ()):
                    (out / name).unlink(missing_ok=True)
                if before is None:
                    out.rmdir()
        raise


def remove_temporaries(out: Path) -> None:
    """A run folder without what a killed process left half-written: what has a temporary's name, where a run writes."""
    for folder in (out, out / ROUNDS, *(out / CLIENTS).glob("*")):
        for stray in folder.glob(f"{TEMPORARY}*") if folder.is_dir() else ():
            shutil.rmtree(stray) if stray.is_dir() and not stray.is_symlink() else stray.unlink()
    events = out / EVENTS
    if events.exists() and (text := events.read_bytes()) and not text.endswith(b"\n"):
        os.truncate(events, text.rfind(b"\n") + 1)


def strays(out: Path, part: str = "") -> list[Path]:
    """What a run folder, or a part of it, holds that no run writes: files, links and empty folders."""
    leaves = (path for path in sorted((out / part).rglob("*")) if path.is_symlink() or not path.is_dir() or not any(path.iterdir()))
    listed = cache(_listed)
    return [path for path in leaves if not _is_ours(path, out, listed)]


def _listed(result: Path) -> set[Path]:
    """What the manifest of a result says that was written there; nothing where it cannot be read."""
    with suppress(StorageError):
        return {result / name for name in (*read_manifest(result, check=False)["files"], MANIFEST)}
    return set()


def _is_ours(path: Path, out: Path, listed: Callable[[Path], set[Path]]) -> bool:
    """Has a file below `out` the name of one that a run writes, and is it in its result's manifest, where that can be read?

    Of trackers, a run that has some; and a report says that it is one.
    """
    name = path.relative_to(out)
    if name.parts[0] == TRACKERS:
        return _has_trackers(out)
    if name.as_posix() == REPORT:
        return path.is_file() and not path.is_symlink() and is_report(path)
    depth = {FINAL: 1, ROUNDS: 2}.get(name.parts[0], len(name.parts))
    written = listed(out.joinpath(*name.parts[:depth])) if depth < len(name.parts) and TEMPORARY not in name.as_posix() else set()
    return bool(_OURS.fullmatch(name.as_posix())) and (not written or path in written)


def _has_trackers(out: Path) -> bool:
    try:
        return bool(tomllib.loads((out / CONFIG).read_text(encoding="utf-8")).get("trackers"))
    except (OSError, ValueError):
        return False


def is_report(path: Path) -> bool:
    """Does a file say of itself that it is a report?"""
    with path.open("rb") as file:
        return b'<meta name="generator" content="fedex-lora ' in file.read(4096)


def remove(out: Path, part: str = "") -> None:
    """Remove a run folder, or a part of it, in one step as others see it: it gets a temporary's name first.

    Raises:
        UsageError: it holds something that no run writes; nothing is touched then.
    """
    folder = out / part
    if odd := strays(out, part):
        raise UsageError(f"{odd[0]} was not written by a run, so {folder} is not removed: move that away, or give another folder")
    aside = tempfile.mkdtemp(prefix=f"{TEMPORARY}{folder.name}.", dir=folder.parent)
    shutil.rmtree(folder.rename(aside))


def best_round(path: Path) -> int | None:
    """The round that did best on the clients' held-out rows, of a run that is done; None where there is none."""
    events = path / EVENTS
    done = of_kind(read_events(events), RunDone) if events.exists() else []
    return done[-1].best_round if done else None


def folder_after(run: Path, round: int | str | None) -> Path:
    """Where the model of a run is as it was after a round.

    Args:
        run: its folder.
        round: a number; "best", the round that did best on the clients' held-out rows; None, the last, in `final/`.

    Raises:
        UsageError: no such round is there, or none is called best.
    """
    if round is None:
        return run
    if not (run / EVENTS).is_file():
        raise UsageError(f"{run} is no run folder, so it has no rounds to choose of: leave the round out")
    number = best_round(run) if round == "best" else int(round) if str(round).isdecimal() else 0
    if number is None:
        raise UsageError(
            f"no round of {run} is called best: it is not done, some rounds were not measured by all, or none is finite: give a number"
        )
    there = [int(folder.name) for folder in reversed(run_rounds_of(run))]
    if number not in there:
        raise UsageError(f"{run} has no folder of round {round}: give best, or one of {', '.join(map(str, there))}")
    return round_folder(run, number)


def run_rounds_of(out: Path) -> list[Path]:
    """The round folders of a run, the newest first."""
    there = [folder for folder in (out / ROUNDS).glob("*") if folder.name.isdigit()]
    return sorted(there, key=lambda folder: int(folder.name), reverse=True)


def round_folder(out: Path, number: int) -> Path:
    """Where a round's result is."""
    return out / ROUNDS / f"{number:04d}"
