"""What is wrong with single rows: found all at once, then refused in one line, or left out and counted."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar

from fedex_lora import config
from fedex_lora.errors import DataError, counted
from fedex_lora.tasks._files import HALF, Rows
from fedex_lora.tasks._templates import text_of

T = TypeVar("T")
SHOWN = 5  # lines, or values, that a complaint names


@dataclass(frozen=True)
class Problem:
    """One kind of fault in some rows.

    Attributes:
        code: of `fedex_lora.protocol.failures.WORDS`: what others may be told.
        words: what is wrong with each of them, for whoever has the rows.
        rows: their labels in the frame's index: lines of the file.
    """

    code: str
    words: str
    rows: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class RowTable:
    """A file's rows, with what is wrong with single ones.

    Attributes:
        source: its name.
        rows: with lines as index.
        problems: in the order in which they are told.
        inputs: columns that say what a row is about, for comparing rows; none where that cannot be told.
        label: the column with the answer, where one input has only one right answer.
        notes: what is to be said of the file.
        classes: all that there are, in their order; none of rows without classes.
    """

    source: str
    rows: Rows
    problems: Sequence[Problem]
    inputs: Sequence[str] = ()
    label: str | None = None
    notes: Sequence[str] = ()
    classes: Sequence[str] = ()


def each(work: Iterable[Callable[[], T]]) -> list[T]:
    """What each of them gives; what is wrong with any of them is said at once.

    Raises:
        DataError: in one line; its code is the first one's.
    """
    given, wrong = list[T](), list[DataError]()
    for one in work:
        try:
            given.append(one())
        except DataError as error:
            wrong.append(error)
    if wrong:
        raise DataError("; ".join(dict.fromkeys(map(str, wrong))), wrong[0].code, wrong[0].rows)
    return given


def found(code: str, words: str, rows: Rows, bad: Iterable[bool]) -> list[Problem]:
    """One problem, if some rows have it."""
    lines = tuple(int(line) for line, is_bad in zip(rows.index, bad, strict=True) if is_bad)
    return [Problem(code, words, lines)] if lines else []


def empty(rows: Rows, columns: Sequence[str]) -> list[Problem]:
    """Rows without a value in one of the columns."""
    return [
        problem
        for column in columns
        for problem in found("empty", f"no {column!r}", rows, (not text_of(cell).strip() for cell in rows[column]))
    ]


def halved(rows: Rows) -> list[Problem]:
    """Rows with text that no tokenizer takes and no file can be written with."""
    return found("encoding", "text that is not Unicode: half a character", rows, map(_is_halved, rows.to_numpy().tolist()))


def _is_halved(value: Any) -> bool:
    if isinstance(value, str):
        return not value.isascii() and HALF.search(value) is not None
    if isinstance(value, Mapping):
        return any(_is_halved(name) or _is_halved(inner) for name, inner in value.items())
    return isinstance(value, list | tuple) and any(map(_is_halved, value))


def outside(rows: Rows, column: str, classes: Sequence[str]) -> list[Problem]:
    """Rows with a label that is none of the classes."""
    known = set(classes)
    bad = [bool(text_of(cell).strip()) and not (isinstance(cell, str) and cell in known) for cell in rows[column]]
    values = list(dict.fromkeys(str(cell) for cell, is_bad in zip(rows[column], bad, strict=True) if is_bad))
    folded = {name.strip().casefold(): name for name in classes}
    near = {value: config.nearest(value.strip().casefold(), list(folded), 0.7) for value in values}
    shown = [f"{value!r}, did you mean {folded[like]!r}?" if (like := near[value]) else repr(value) for value in values]
    return found("label", f"a label outside {list(classes)} ({some(shown)})", rows, bad)


def usable_rows(rows: Rows, source: str, problems: Sequence[Problem], on_bad_row: str) -> tuple[Rows, list[str]]:
    """The rows that can be used, and what is to be said of the others.

    Args:
        rows: with lines as index.
        source: the file.
        problems: of its rows.
        on_bad_row: "refuse" or "drop".

    Raises:
        DataError: there are problems and they are to be refused, or no row is left.
    """
    if problems and on_bad_row == "refuse":
        raise refusal(source, problems, "mend these rows, leave them out, or set task.on_bad_row = 'drop'")
    bad = {line for problem in problems for line in problem.rows}
    kept = rows.loc[[line not in bad for line in rows.index]]
    words = f"{source}: {'; '.join(map(told, problems))}"
    if kept.empty:
        raise DataError(f"{words}: no row is left: mend them", "no-rows", len(bad))
    return kept, [f"{len(bad)} of {len(rows)} rows are left out: {words}"] if bad else []


def refusal(source: str, problems: Sequence[Problem], mend: str) -> DataError:
    """All problems of a file's rows in one line; what others may be told is the first kind, and how many rows have it."""
    first = problems[0].code
    lines = {line for problem in problems if problem.code == first for line in problem.rows}
    return DataError(f"{source}: {'; '.join(map(told, problems))}: {mend}", first, len(lines))


def told(problem: Problem) -> str:
    """A problem in words, with some of its lines."""
    return f"{counted(len(problem.rows), 'row')} with {problem.words} {lines_of(problem.rows)}"


def lines_of(rows: Sequence[int]) -> str:
    """Some of a file's lines, in brackets."""
    return f"(line {some([str(row) for row in rows])})"


def some(values: Sequence[str]) -> str:
    """The first of the values, and how many more there are."""
    return ", ".join(values[:SHOWN]) + (f" and {len(values) - SHOWN} more" if len(values) > SHOWN else "")


def require_columns(rows: Rows, columns: Sequence[str], where: str) -> None:
    """Every column is there.

    Raises:
        DataError: one is not; the nearest is named.
    """
    for column in columns:
        if column not in rows.columns:
            near = config.nearest(column, [str(name) for name in rows.columns])
            hint = f"did you mean {near!r}?" if near else f"it has {', '.join(map(str, rows.columns))}"
            raise DataError(f"{where} has no column {column!r}: {hint}", "column")


def require_values(rows: Rows, columns: Sequence[str], where: str) -> None:
    """Every column is there, with a value in every row, and all text is Unicode.

    Raises:
        DataError: else.
    """
    require_columns(rows, columns, where)
    if problems := [*halved(rows), *empty(rows, columns)]:
        raise refusal(where, problems, "mend them, or leave these rows out")


def classes_of(labels: Iterable[str]) -> list[str]:
    """The classes that labels name: numbers in their order, else as text.

    >>> classes_of(["10", "9", "10"]), classes_of(["no", "10", "9"])
    (['9', '10'], ['10', '9', 'no'])
    """
    names = sorted(set(labels))
    return sorted(names, key=Decimal) if all(name.isdecimal() for name in names) else names


def alike(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Classes that differ in case and outer spaces only: most likely one, misspelt.

    >>> alike(["Hardware ", "hardware", "network"])
    [('Hardware ', 'hardware')]
    """
    first: dict[str, str] = {}
    return [(first[key], name) for name in classes if (key := name.strip().casefold()) in first or first.setdefault(key, name) is not name]
