"""A safetensors message read with distrust: bounds first, then the table of tensors, then the checksum; only then is a tensor made.

Everything is refused that a plain reader could take in two ways: keys that come twice, gaps, overlaps, bytes that belong to nothing.
What these checks allocate is bounded by the size of the header, which is bounded before its JSON is parsed.
"""

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from fedex_lora.errors import WireError

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
UNSEALED = "0" * 64  # what stands in place of the checksum while it is computed
MARK = rb"\"sha256\":\""  # before the checksum, in the header's JSON inside the JSON of safetensors
NAME = 1000  # characters of a tensor's name


class Entry(NamedTuple):
    """What a message says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def shown(value: object, limit: int = 120) -> str:
    """Anything that arrived, for an error line: control characters escaped, and cut."""
    text = repr(value[: limit + 1] if isinstance(value, str | list) else value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def read_table(payload: bytes, header_limit: int) -> tuple[str, dict[str, Entry]]:
    """The text of the message's own header, and name -> `Entry`, after every check that needs no tensor.

    Args:
        payload: the whole message.
        header_limit: bytes of JSON, at most.

    Raises:
        WireError: with the first thing that is wrong, in one line.
    """
    table = _parsed(payload, _header_size(payload, header_limit))
    about = table.pop("__metadata__", None)
    if not isinstance(about, dict) or about.keys() != {"header"} or not isinstance(about["header"], str):
        raise WireError("the message has no header of this protocol")
    entries = {_safe(name): _entry(name, entry) for name, entry in table.items()}
    _require_covered(entries, len(payload) - 8 - _header_size(payload, header_limit))
    return about["header"], entries


def _header_size(payload: bytes, limit: int) -> int:
    if len(payload) < 8:
        raise WireError(f"a message of {len(payload)} bytes is too short")
    (size,) = struct.unpack("<Q", payload[:8])
    if size > len(payload) - 8:
        raise WireError("the message is truncated, or its header is a lie")
    if size > limit:
        raise WireError(f"the message's header has {size} bytes where at most {limit} were expected")
    return int(size)


def _parsed(payload: bytes, size: int) -> dict[str, Any]:
    """The JSON, if it has no more brackets than its tensors need: so many small values cannot hide in it, nor deep nesting."""
    tensors = payload.count(b'"data_offsets"', 8, 8 + size)
    if payload.count(b"{", 8, 8 + size) > tensors + 8 or payload.count(b"[", 8, 8 + size) > 2 * tensors + 8:
        raise WireError(f"the message's header has more brackets than its {tensors} tensors need")
    try:
        table = strict_json(payload[8 : 8 + size])
    except (ValueError, RecursionError):
        raise WireError("the message has no readable header") from None
    if not isinstance(table, dict):
        raise WireError("the message has no header of this protocol")
    return table


def strict_json(text: bytes | str) -> Any:
    """JSON whose objects have no key twice (readers differ in which one they take), and no NaN or infinity.

    Raises:
        ValueError: it is not that.
        WireError: a key comes twice.
    """
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise WireError(f"the message's header has the key {shown(next(name for name in names if names.count(name) > 1))} twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _safe(name: str) -> str:
    if len(name) > NAME or not name.isprintable():
        raise WireError(f"tensor {shown(name)} has a name that is too long or not printable")
    return name


def _entry(name: str, entry: Any) -> Entry:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        known = len(entry) == 3 and all(type(number) is int and 0 <= number < 2**48 for number in (*shape, begin, end))
        sound = known and len(shape) <= 8 and begin + math.prod(shape) * BYTES[dtype] == end
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise WireError(f"tensor {shown(name)} is described as {shown(entry)}, which is no known dtype, or shape and offsets disagree")
    return Entry(dtype, shape, begin, end)


def _require_covered(entries: dict[str, Entry], size: int) -> None:
    """The tensors lie one after the other and fill the message."""
    place = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != place:
            raise WireError(f"tensor {shown(name)} begins at byte {entry.begin} where {place} was due: a gap, or two that overlap")
        place = entry.end
    if place != size:
        raise WireError(f"{size} bytes of tensors arrived and {place} are described: the message is truncated, or has bytes to spare")


def seal(payload: bytes) -> bytes:
    """The message with its checksum in place: sha256 of all its bytes, with zeros where the checksum stands."""
    place = _place(payload)
    return b"".join([payload[:place], _sum(payload, place).encode(), payload[place + len(UNSEALED) :]])


def require_sealed(payload: bytes) -> None:
    """What arrived is what was sent. (Against accidents: who alters a message on purpose can seal it again.)

    Raises:
        WireError: else.
    """
    place = _place(payload)
    if payload[place : place + len(UNSEALED)] != _sum(payload, place).encode():
        raise WireError("the message's checksum is wrong: it was altered on the way; send it again")


def _place(payload: bytes) -> int:
    place = payload.find(MARK, 8, 8 + _header_size(payload, len(payload)))
    if place < 0:
        raise WireError("the message has no checksum")
    return place + len(MARK)


def _sum(payload: bytes, place: int) -> str:
    view = memoryview(payload)
    digest = hashlib.sha256(view[:place])
    digest.update(UNSEALED.encode())
    digest.update(view[place + len(UNSEALED) :])
    return digest.hexdigest()


def require_same_names(here: Sequence[str], there: Sequence[str]) -> None:
    """The tensors that arrived are those that were declared.

    Raises:
        WireError: with one that is odd.
    """
    for what, names in (("not declared", set(here) - set(there)), ("missing", set(there) - set(here))):
        if names:
            raise WireError(f"tensor {shown(min(names))} is {what} ({len(names)} such in all)")
