"""Rows from files and from the hub, as they are written: a cell is text, and nobody guesses what it might mean.

============  =====================================  ==============================================================
file          read as                                a cell that is not text there
============  =====================================  ==============================================================
.csv, .tsv    a header, then a row a line (RFC 4180  (all cells are text: 007, 2.50, TRUE, NA stay what they are)
              quotes in csv, none in tsv)
.jsonl .json  an object a line, or one array of      a number as it is written; true and false; null and NaN are no
              objects, whatever the name says        value; lists and objects stay
.parquet      columns                                a number, a date as JSON writes them; bytes, lists stay
============  =====================================  ==============================================================

Names may be in capitals and end in .gz, .bz2 or .xz; a byte order mark is no part of the text. The frame's index is the line of the file
(in an array or in parquet, the number of the row), so that complaints name it.
"""

import bz2
import codecs
import csv
import gzip
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from datasets import load_dataset

from fedex_lora.config import MEMORY
from fedex_lora.errors import DataError

Rows: TypeAlias = pd.DataFrame
OPENERS: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}  # type: ignore[dict-item]
HALF = re.compile("[\ud800-\udfff]")  # a character of two halves, such as an emoji, of which JSON can have one alone
Numbered: TypeAlias = Iterator[tuple[int, dict[str, Any]]]


class _Written(str):
    """A number of JSON, as it is written."""


def read_rows(source: str, data: Path | None = None) -> Rows:
    """The rows of a file, or of HUB_NAME:SPLIT.

    Args:
        source: the file's name, or the hub's.
        data: the folder that a file is in.

    Raises:
        DataError: not there, not readable, or a hub that cannot be reached; or rows that a run was given in memory.
    """
    if source.startswith(MEMORY):
        raise DataError(f"{source}: its rows were in memory: go on from Python, or give --file", "file")
    path = data / source if data else Path(source)
    endings = [ending.lower() for ending in path.suffixes if len(ending) < 9]
    packed = endings.pop() if endings and endings[-1] in OPENERS else ""
    ending = endings[-1] if endings else ""
    if ending in READERS:
        if not path.is_file():
            raise DataError(f"{path} does not exist: give the path of a file, or HUB_NAME:SPLIT", "file")
        return _read(path, READERS[ending], OPENERS.get(packed, open))
    if path.is_file():
        raise DataError(f"{path} has an ending that is not read: give {', '.join(READERS)}, or HUB_NAME:SPLIT", "table")
    name, _, split = source.partition(":")
    return as_text(read_hub(name, None, split or "train"))


def _read(path: Path, reader: Callable[..., Numbered], opener: Callable[..., IO[str]]) -> Rows:
    limit = csv.field_size_limit(sys.maxsize)  # of this process
    try:
        rows = list(reader(path, opener))
    except UnicodeError as error:
        coding = "utf-16" if getattr(error, "object", b"")[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin1"
        how = f"save it as UTF-8 (in Excel: CSV UTF-8; or: iconv -f {coding} -t utf-8)"
        raise DataError(f"{path} is not UTF-8 (line {_line_of(path, opener)}): {how}", "encoding") from error
    except (ValueError, OSError, EOFError, csv.Error, RecursionError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}: mend the file, or save it anew", "table") from None
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise DataError(f"{path} has no rows: give a file that has some", "no-rows")
    return _frame([row for _, row in rows], [line for line, _ in rows])


def _line_of(path: Path, opener: Callable[..., IO[str]]) -> int:
    """The first line that is not UTF-8."""
    with opener(path, "rt", encoding="utf-8", errors="surrogateescape") as file:
        return next((number for number, line in enumerate(file, start=1) if re.search("[\udc80-\udcff]", line)), 1)


def _frame(rows: Sequence[Mapping[str, Any]], index: Sequence[int] | None = None) -> Rows:
    """Cells as they are; a column that a row lacks has no value there."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pd.DataFrame([[row.get(name) for name in names] for row in rows], columns=names, index=index, dtype=object)


def _separator(header: str, tabs: bool) -> str:
    """What is there most often outside of quotes, a mark before a space counting least: it may be of the text.

    >>> _separator("note;urgency, final", False), _separator('"text, free";label', False)
    (';', ';')
    """
    bare = re.sub('"[^"]*"?', "", header)
    counts = {mark: (len(re.findall(f"{mark}(?! )", bare)), bare.count(mark)) for mark in (",", ";", "\t")}
    return "\t" if tabs and "\t" in header else max(counts, key=lambda mark: counts[mark])


def _table(path: Path, opener: Callable[..., IO[str]]) -> Numbered:
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        first, tabs = file.readline(), ".tsv" in path.name.lower()
        said = re.fullmatch(r'sep=([^\w"\r\n])[\r\n]*', first)  # for Excel, before the header
        separator, before = (said[1], 1) if said else (_separator(first, tabs), 0)
        if not said:
            file.seek(0)
        reader = csv.reader(file, delimiter=separator, quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL, strict=not tabs)
        line = before + 1
        try:
            header = next(reader, [])
            if twice := next((name for name in header if header.count(name) > 1), None):
                raise ValueError(f"its header has the column {twice!r} twice")
            line = before + reader.line_num + 1
            for cells in reader:
                if len(cells) > len(header):
                    raise ValueError(f"line {line} has more fields than its header: quote fields that hold the separator {separator!r}")
                if cells:
                    yield line, dict(zip(header, [*cells, *[None] * (len(header) - len(cells))], strict=True))
                line = before + reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"the row of line {line}: {error}") from None


def _json(path: Path, opener: Callable[..., IO[str]]) -> Numbered:
    """An array, or an object a line: told apart by what the file begins with."""
    with opener(path, "rt", encoding="utf-8-sig") as file:
        start = next((line for line in file if line.strip()), "").lstrip()
        file.seek(0)
        if start.startswith("["):
            found = _parsed(file.read())
            for number, row in enumerate(found, start=1):
                yield number, _record(row, f"row {number}")
        else:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        row = _parsed(line)
                    except ValueError as error:
                        raise ValueError(f"line {number}: {error}") from None
                    yield number, _record(row, f"line {number}")


def _parsed(text: str) -> Any:
    return json.loads(text, parse_int=_Written, parse_float=_Written, parse_constant=_constant, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(made := dict(pairs)) < len(pairs):
        raise ValueError("an object has one key twice")
    return made


def _constant(word: str) -> _Written | None:
    """NaN is no value, as in a frame or in parquet."""
    return None if word == "NaN" else _Written(word)


def _record(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no object: write a row as {{{chr(34)}column{chr(34)}: value}}")
    if HALF.search("".join(row)):
        raise ValueError(f"{where} has a column name that is not Unicode: half a character")
    return {name: _cell(value) for name, value in row.items()}


def _parquet(path: Path, _: object) -> Numbered:
    for number, row in enumerate(pq.read_table(path).to_pylist(), start=1):
        yield number, {name: _cell(value) for name, value in row.items()}


def _cell(value: Any) -> Any:
    """A cell as text; no value as None; bytes, lists and objects as they are, with numbers in them."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, np.ndarray):  # a list, as the hub's frames have it
        return _number(value)
    if isinstance(value, bool | int | float):
        return None if value != value else json.dumps(value)  # not a number: what a frame has for no value
    if isinstance(value, dict):
        return {name: _number(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_number(inner) for inner in value]
    if isinstance(value, date | time):  # a datetime is a date
        return None if value is pd.NaT else value.isoformat()
    return str(value) if isinstance(value, Decimal) else value


def _number(value: Any) -> Any:
    if isinstance(value, _Written):
        return json.loads(value)
    if isinstance(value, dict):
        return {name: _number(inner) for name, inner in value.items()}
    value = value.tolist() if isinstance(value, np.ndarray) else value
    return [_number(inner) for inner in value] if isinstance(value, list) else value


READERS: dict[str, Callable[..., Numbered]] = {
    ".csv": _table,
    ".tsv": _table,
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".parquet": _parquet,
}


def as_text(rows: Rows) -> Rows:
    """A frame with types, as a file without them would have it."""
    return _frame([{str(name): _cell(value) for name, value in row.items()} for row in rows.to_dict(orient="records")])


def published(data: Path | None, folder: str, name: str, layout: str, hub: Callable[[], Rows]) -> Rows:
    """A file of a published layout, in `data` or its `folder`; without `data`, what `hub` gives.

    Raises:
        DataError: it is not there (`layout` says what should be), or not readable.
    """
    if data is None:
        return hub()
    root = within(data, folder)
    if not (root / name).is_file():
        raise DataError(f"{root / name} does not exist: task.data must hold {layout}", "file")
    return read_rows(name, root)


def within(data: Path, name: str) -> Path:
    """The folder `name` in `data`, or `data` itself, where that is the folder."""
    return data / name if (data / name).is_dir() else data


def read_hub(name: str, subset: str | None, split: str, **options: Any) -> Rows:
    """A split of a data set on the Hugging Face hub (or, with `name` "json", of `data_files`, which may be addresses)."""
    try:
        table = load_dataset(name, subset, split=split, **options).with_format("arrow")[:]
    except Exception as error:  # datasets, hub and network each raise their own
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        source = options.get("data_files", name)
        raise DataError(
            f"data set {source} ({split}) cannot be had from the hub: go online, or give task.data as a local folder ({reason})", "table"
        ) from None
    return pd.DataFrame(table.to_pylist(), columns=table.column_names, dtype=object)  # to_pandas makes 1.0 of 1 where a row has none
