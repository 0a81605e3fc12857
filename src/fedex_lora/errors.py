"""The error tree. Every message is one line that says what is wrong and how to mend it.

FedexLoraError              exit 1: the work failed
|- AggregationError         updates that cannot be averaged: names, shapes, scalings, weights, values
|- AdapterError             an adapter folder or model that the algebra does not cover
|- StorageError             a file or folder that is missing, truncated or altered
|  |- UnreadableError       the system does not let a file be read now; it may be whole
|  `- UnwritableError       the system does not let a file be written now: the disk is full or read-only
|- WireError                a message that is not what the round declared
|  `- LacksError            a message that counts on something that this client does not have
|- DataError                rows, columns, labels, partitions
|- ModelError               a base model that cannot be loaded or is not the right one
|- TrainingError            local training that failed
|- PrivacyError             what a party's ledger, budget or stated numbers do not allow
`- UsageError               exit 2: wrong usage
   `- ConfigError           a configuration that says something impossible
"""

import importlib.util
import sys
from collections.abc import Sequence


class FedexLoraError(Exception):
    """Base of all errors that this package raises on purpose.

    Args:
        message: for the user of this process: it may quote rows, columns and files.
        code: of `fedex_lora.protocol.failures.WORDS`, all that a party tells others of it; by default its class's.
        rows: how many rows are concerned, told beside the code; 0: it does not say.
    """

    exit_status = 1
    code = "unexpected"
    rows = 0

    def __init__(self, message: str = "", code: str = "", rows: int = 0) -> None:
        super().__init__(message)
        if code:
            self.code = code
        self.rows = rows


class AggregationError(FedexLoraError):
    """The updates cannot be averaged."""

    code = "adapter"


class AdapterError(FedexLoraError):
    """An adapter that the algebra does not cover, or that does not fit."""

    code = "adapter"


class StorageError(FedexLoraError):
    """A file or folder that is missing, truncated or altered."""

    code = "storage"


class UnreadableError(StorageError):
    """The system does not let a file be read now; nothing says that it is broken."""


class UnwritableError(StorageError):
    """The system does not let a file be written now; what is there is whole."""


class WireError(FedexLoraError):
    """A message that is not what the round declared."""

    code = "message"


class LacksError(WireError):
    """A message counts on a base, an adapter or factors that this client does not have: it must be sent everything."""

    code = "lacks"


class DataError(FedexLoraError):
    """Rows, columns, labels or partitions that do not fit the task."""

    code = "rows"


class ModelError(FedexLoraError):
    """A base model that cannot be loaded, or is not the one that the adapters belong to."""

    code = "model"


class TrainingError(FedexLoraError):
    """Local training failed."""

    code = "training"


class PrivacyError(FedexLoraError):
    """A party's ledger, budget or stated numbers do not allow it; or private training failed, of which no more is told."""

    code = "privacy"


class UsageError(FedexLoraError):
    """Wrong usage: the command line exits with status 2."""

    exit_status = 2
    code = "settings"


class ConfigError(UsageError):
    """A configuration that says something impossible."""

    code = "config"


def counted(count: int, name: str) -> str:
    """A number of things in words.

    >>> counted(1, "row"), counted(2, "row")
    ('1 row', '2 rows')
    """
    return f"{count} {name}{'' if count == 1 else 's'}"


def first_of(names: Sequence[str]) -> str:
    """The first of names, and how many there are."""
    return names[0] + (f" ({len(names)} such)" if len(names) > 1 else "")


def require_system(platform: str = sys.platform) -> None:
    """This is a system on which folders can be locked, synced and renamed as runs need it.

    Raises:
        UsageError: it is not.
    """
    if platform == "win32":
        raise UsageError("fedex-lora runs on Linux and macOS, and this is Windows: use it in WSL 2", "package")


def installed() -> tuple[dict[str, str], list[str]]:
    """Package -> its version here, of those that this one needs; and which of them are missing or of another version than it needs."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement
    from packaging.version import Version

    found, problems = dict[str, str](), list[str]()
    for needed in map(Requirement, requires("fedex-lora") or []):
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found[needed.name] = here = version(needed.name)
        except PackageNotFoundError:
            problems.append(f"{needed.name} is not installed: pip install '{needed}'")
            continue
        if not needed.specifier.contains(Version(here).base_version):  # containers have torch 2.6.0a0+somebody's
            problems.append(f"{needed.name} {here} does not satisfy {needed.specifier}: pip install '{needed}'")
    return found, problems


def require_versions() -> None:
    """What this package needs is here, in versions that it works with.

    Raises:
        UsageError: it is not; all of it in one line.
    """
    if problems := installed()[1]:
        raise UsageError("; ".join(problems), "package")


def require_extra(module: str, extra: str, what: str) -> None:
    """A package that only an extra of this project brings is installed.

    Raises:
        UsageError: it is not.
    """
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"{what} need {module}, which is not installed: pip install '.[{extra}]'", "package")
