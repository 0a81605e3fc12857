"""What a party says of its failures: a code and a number of rows, never a text. Who hears of it has the words.

Texts of errors quote what they are about: a cell, a column, a file. They stay in the party's own log.
"""

import errno
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from fedex_lora.errors import FedexLoraError, counted

WORDS: Final[Mapping[str, str]] = {
    "unexpected": "an error that was not foreseen",
    "adapter": "the adapter does not fit its model",
    "base": "its base model or tokenizer is not the server's: give both the same revision of the model",
    "busy": "another process of this party is at work",
    "client": "its node is registered as another client",
    "column": "its rows lack a column that the task reads",
    "config": "the run's configuration does not work there",
    "dealt": "the run deals it no rows: give its node its own data",
    "disk": "its disk is full or read-only",
    "diverged": "training diverged: lower training.learning_rate",
    "empty": "rows without a value in a column that the task reads",
    "encoding": "text that is not UTF-8",
    "file": "a file is not there",
    "image": "an image that cannot be used",
    "label": "a label outside the set",
    "labels-unset": "task.labels is not set: name all classes in the run's configuration, since a party may lack one",
    "lacks": "it lacks what the message counts on",
    "long": "prompts that leave no room for what is to be learnt: raise task.max_length",
    "memory": "out of memory: lower training.per_device_train_batch_size",
    "message": "the message is not what it expects: is fedex-lora the same version everywhere?",
    "model": "its model cannot be used",
    "no-data": "its node has not said where its rows are: give its node data = 'FOLDER'",
    "no-rows": "a file without rows",
    "package": "a package that the run needs is not installed there",
    "privacy": "its privacy does not allow an answer, or its private training failed: it says no more",
    "rows": "its rows do not fit the task",
    "score": "scores that are no numbers",
    "settings": "its own settings and the run's do not fit together",
    "size": "the message is larger than its node takes",
    "storage": "its own files cannot be read or written",
    "table": "its rows cannot be read",
    "trainer": "its own trainer does not work, or changed what it may not change",
    "training": "local training failed",
    "worker": "its worker does not answer",
}
"""Code -> public words: the same for everybody, whatever the party's rows, columns, classes and files are called."""

OF_THE_RUN: Final = ("config", "labels-unset")
"""Faults of the run's configuration: whoever is asked again says the same."""

BESIDE_ROWS: Final = frozenset("base busy client config labels-unset lacks message model no-data package privacy settings size".split())
"""Faults of which no row can be the reason: all that a private party tells of, before any row is read. (A row can end a worker.)"""

ENGINES = ("flwr", "nvflare")  # packages whose handlers of signals end a process by SystemExit


@dataclass(frozen=True)
class Failure:
    """Why a party has no answer, as it may be told to others.

    Attributes:
        code: of `WORDS`.
        rows: how many rows are concerned; 0: it does not say.

    Example:
        >>> str(Failure("label", 3))
        "a label outside the set: 3 rows; the details are in the party's log"
    """

    code: str
    rows: int = 0

    def __post_init__(self) -> None:
        if self.code not in WORDS:  # a text, by mistake: it stays here
            object.__setattr__(self, "code", "unexpected")

    def __str__(self) -> str:
        rows = f": {counted(self.rows, 'row')}" if self.rows else ""
        return f"{WORDS[self.code]}{rows}; the details are in the party's log"

    @property
    def private(self) -> "Failure":
        """What a private party tells in its place: nothing that one of its rows could be the reason for, and no number of rows.

        Example:
            >>> Failure("label", 3).private, Failure("base").private
            (Failure(code='privacy', rows=0), Failure(code='base', rows=0))
        """
        return Failure(self.code if self.code in BESIDE_ROWS else "privacy")


def told_to_end(error: BaseException) -> bool:
    """Is this process to end? An interrupt says so, and an engine's exit; one that a party's own code calls is a failure of that code.

    Example:
        >>> told_to_end(KeyboardInterrupt()), told_to_end(SystemExit(1))
        (True, False)
    """
    if not isinstance(error, SystemExit):
        return isinstance(error, KeyboardInterrupt)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).partition(".")[0] in ENGINES


def in_one_line(error: BaseException) -> str:
    """The type and the text of an error, for the party's own log; also of one whose text raises.

    Example:
        >>> in_one_line(ValueError("two\\nlines"))
        'ValueError: two lines'
    """
    return " ".join(traceback.format_exception_only(error)[-1].split())[:300]


@contextmanager
def ignored_failures(reasons: list[str] | None = None) -> Iterator[None]:
    """Whatever is raised inside ends the block and nothing else: a panic of a library, too, which is no `Exception`.

    Args:
        reasons: gets it, `in_one_line`.

    Example:
        >>> with ignored_failures():
        ...     raise BaseException("a panic")
    """
    try:
        yield
    except BaseException as error:
        if told_to_end(error):
            raise
        if reasons is not None:
            reasons.append(in_one_line(error))


def failure_of(error: BaseException) -> Failure:
    """What may be told of an error, whoever raised it: nothing of its text, and of foreign ones not even the name of their class."""
    if isinstance(error, FedexLoraError):
        return Failure(error.code, error.rows)
    if "OutOfMemoryError" in {kind.__name__ for kind in type(error).__mro__}:
        return Failure("memory")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT):
        return Failure("disk")
    codes = {MemoryError: "memory", UnicodeError: "encoding", ImportError: "package", FileNotFoundError: "file", OSError: "storage"}
    return Failure(next((code for kind, code in codes.items() if isinstance(error, kind)), "unexpected"))
