"""The ledger of a party: what was ever trained on its rows, over all runs. A line is written before its training, and never again.

    {"time": ..., "kind": "begun", "version": 1}
    {"time": ..., "client": "north", "run": ..., "round": 1, "kind": "entry", "sigma": 1.2, "rate": 0.016, "steps": 63, "rows": DIGEST,
     "task": DIGEST}
    {"time": ..., "client": "north", "run": ..., "round": 1, "kind": "answered", "answer": DIGEST}
    {"time": ..., "client": "north", "run": ..., "round": 2, "kind": "again"} or "failed"

LedgerEntry, training, the answer on the disk, "answered", the answer on its way: whatever is killed in between, no less is in it than left.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from fedex_lora.errors import PrivacyError, StorageError, UsageError
from fedex_lora.privacy.accounting import Mechanism
from fedex_lora.storage.files import cannot_write, fsync


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    time: float = Field(default_factory=lambda: round(time.time()))


class Begun(_Line):
    """The first line."""

    kind: Literal["begun"] = "begun"
    version: Literal[1] = 1


class _OfRound(_Line):
    client: str
    run: str
    round: int = Field(ge=1)

    @property
    def question(self) -> tuple[str, str, int]:
        """Who was asked what."""
        return self.client, self.run, self.round


class LedgerEntry(_OfRound):
    """A round of a client is about to be trained.

    Attributes:
        sigma, rate, steps: see `Mechanism`.
        rows: a digest of the client's rows.
        task: a digest of what the run makes of them.
    """

    kind: Literal["entry"] = "entry"
    sigma: FiniteFloat = Field(gt=0)
    rate: FiniteFloat = Field(gt=0, le=1)
    steps: int = Field(ge=1)
    rows: str
    task: str = ""

    @property
    def mechanism(self) -> Mechanism:
        """What is accounted for."""
        return Mechanism(self.sigma, self.rate, self.steps)


class Answered(_OfRound):
    """Its answer is on the disk, and may leave: this one, and no other.

    Attributes:
        answer: a digest of its bytes.
    """

    kind: Literal["answered"] = "answered"
    answer: str


class FailedRound(_OfRound):
    """Its training failed, and whoever asked was told: the next one of this round has an entry of its own."""

    kind: Literal["failed"] = "failed"


class TrainedAgain(_OfRound):
    """It is trained again under its entry: whoever trained it was stopped, and told nobody anything."""

    kind: Literal["again"] = "again"


RoundLine: TypeAlias = LedgerEntry | TrainedAgain | Answered | FailedRound
LedgerLine: TypeAlias = Begun | RoundLine
_LINE: TypeAdapter[LedgerLine] = TypeAdapter(Annotated[LedgerLine, Field(discriminator="kind")])


def parse_ledger(payload: bytes, name: str) -> list[RoundLine]:
    """The lines of a ledger after the first; see `whole_lines`.

    Raises:
        StorageError: a line is none, or an answer has no entry.
    """
    found, entered = list[RoundLine](), set[tuple[str, str, int]]()
    whole = whole_lines(payload)
    for number, text in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            line = _LINE.validate_json(text)
        except ValidationError:
            if number == 1:
                raise StorageError(f"{name} is no ledger: give another path, or bring the ledger back from where it is whole") from None
            raise StorageError(f"{name}: line {number} is none of a ledger: bring the file back from where it is whole") from None
        if isinstance(line, Begun) != (number == 1) or (not isinstance(line, Begun | LedgerEntry) and line.question not in entered):
            raise StorageError(f"{name}: line {number} does not follow the lines before it: bring the file back from where it is whole")
        if not isinstance(line, Begun):
            found.append(line)
            entered.add(line.question)
    if not whole:
        raise StorageError(f"{name} is no ledger: give another path, or, if nothing was ever trained on these rows, remove it and begin it")
    return found


def whole_lines(payload: bytes) -> bytes:
    """A last line that is torn was never on the disk, so nothing followed it: it is left out. One that only lacks its end counts."""
    lines, end, last = payload.rpartition(b"\n")
    try:
        _LINE.validate_json(last)
    except ValidationError:
        return lines + end
    return payload + b"\n"


def read_ledger(path: Path) -> list[RoundLine]:
    """The lines of the ledger at a path; see `parse_ledger`.

    Raises:
        StorageError: it cannot be read, or is broken.
        PrivacyError: it is not there.
    """
    try:
        return parse_ledger(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, ValueError) as error:  # a path may hold what no path may
        reason = getattr(error, "strerror", error)
        raise StorageError(f"{path} cannot be read: {reason}: give the path of a ledger") from None


def _missing(path: Path) -> PrivacyError:
    return PrivacyError(
        f"there is no ledger {path}: if nothing was ever trained on these rows, begin one: fedex-lora ledger {quote(str(path))} --begin"
    )


def begin_ledger(path: Path) -> None:
    """A ledger in which nothing is written yet.

    Raises:
        UsageError: something is there already.
        StorageError: it cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            append_line(descriptor, Begun())
        finally:
            os.close(descriptor)
        fsync(path.parent)
    except FileExistsError:
        raise UsageError(f"{path} is there already, and a ledger begins once: give another path for rows that share no record") from None
    except (FileNotFoundError, NotADirectoryError):
        raise StorageError(f"cannot write {path}: there is no folder {path.parent}: make it first") from None
    except OSError as error:
        raise cannot_write(path, error) from None


def append_line(descriptor: int, line: LedgerLine) -> None:
    """A line at the end, on the disk; where that fails, the file is as it was."""
    text, size = line.model_dump_json().encode() + b"\n", os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, text) < len(text):
            raise OSError(0, "a line does not fit")
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


@contextmanager
def held_ledger(path: Path) -> Iterator[tuple[int, list[RoundLine]]]:
    """A ledger, open for another line, and its lines; other processes wait meanwhile.

    Raises:
        PrivacyError, StorageError: see `read_ledger`; or it cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
    except FileNotFoundError:
        raise _missing(path) from None
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        payload = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        lines = parse_ledger(payload, str(path))
        whole = whole_lines(payload)
        os.ftruncate(descriptor, min(len(whole), len(payload)))
        os.write(descriptor, whole[len(payload) :])
        yield descriptor, lines
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        os.close(descriptor)
