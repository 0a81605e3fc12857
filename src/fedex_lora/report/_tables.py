"""Tables of a report: cells as people read them, with the values that they are sorted by."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.filesize import decimal

Formatter = Callable[[Any], str]
NOT_FINITE = "not finite"


@dataclass(frozen=True)
class Sortable:
    """A table.

    Attributes:
        caption: what it holds.
        columns: the headings.
        rows: for each cell its text, and what it is sorted by where that is not the text.
        numeric: which columns hold numbers.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[tuple[str, float | None]]]
    numeric: Sequence[bool]


def size(count: float) -> str:
    """Bytes for people, in powers of ten."""
    return decimal(int(count), precision=2)


def sortable(
    caption: str, frame: pd.DataFrame, formats: Mapping[str, Formatter] | None = None, names: Mapping[str, str] | None = None
) -> Sortable:
    """A data frame as a table; columns with a format are numbers, the others text or small numbers."""
    formats, names = formats or {}, names or {}
    numeric = [bool(pd.api.types.is_numeric_dtype(frame[column])) for column in frame]
    rows = [
        [_cell(value, formats.get(str(column), _plain)) for column, value in zip(frame.columns, row, strict=True)]
        for row in frame.itertuples(index=False, name=None)
    ]
    return Sortable(caption, [names.get(str(column), str(column)) for column in frame], rows, numeric)


def _cell(value: Any, show: Formatter) -> tuple[str, float | None]:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–", None
    if isinstance(value, float) and math.isinf(value):
        return NOT_FINITE, None
    text = show(value)
    return text, None if isinstance(value, str) or text == str(value) else float(f"{float(value):.6g}")


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e9 else significant(value)
    return str(value)


def significant(value: float) -> str:
    """Four significant digits."""
    return f"{value:.3e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e6) else f"{value:.4g}"


def percent(value: float) -> str:
    """A share as a percentage, of two significant digits where it is small."""
    if abs(value) < 1e-9:
        return "0 %"
    return f"{100 * value:.1f} %" if abs(value) >= 0.1 else f"{100 * value:.2g} %"


def scientific(value: float) -> str:
    """As 1.2e-07."""
    return f"{value:.1e}" if math.isfinite(value) else NOT_FINITE


def fixed(value: float) -> str:
    """Four decimals."""
    return f"{value:.4f}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"
