"""A message as bytes: a checksummed envelope of small JSON, then a body of tensors; read with distrust.

    "FXL2" | envelope's length, 4 bytes | its blake3, 32 bytes | envelope | body

The envelope is one client's and names the body's digest. The body is safetensors, so the same bytes serve every client of one version.
Reading goes from what is cheap to what is not: bounds first, then the envelope, then the body's table of tensors, then its digest; only
then is a tensor made. Everything is refused that a plain reader could take in two ways: keys that come twice, gaps, overlaps, bytes that
belong to nothing. What these checks allocate is bounded by the size of a header, which is bounded before its JSON is parsed.
"""

import json
import math
import struct
from typing import Any, NamedTuple

from blake3 import blake3

from fedex_lora.errors import WireError

MAGIC = b"FXL2"
PREFIX = 40  # bytes before the envelope
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
NAME = 1000  # characters of a tensor's name


class BodyEntry(NamedTuple):
    """What a body says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def shown(value: object, limit: int = 120) -> str:
    """Anything that arrived, for an error line: control characters escaped, and cut."""
    text = repr(value[: limit + 1] if isinstance(value, str | list) else value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def printable(client: str) -> str:
    """The name of somebody who was not asked, safe to print."""
    return client if client.isprintable() and len(client) < 200 else shown(client)


def digest(body: bytes | memoryview) -> str:
    """`blake3:HEX` of a body."""
    return f"blake3:{blake3(body).hexdigest()}"


def join(envelope: str, body: bytes = b"") -> bytes:
    """One message from its envelope and its body."""
    text = envelope.encode()
    return b"".join([MAGIC, struct.pack("<I", len(text)), blake3(text).digest(), text, body])


def split(payload: bytes, envelope_limit: int) -> tuple[str, memoryview]:
    """The inverse of `join`: the text of the envelope, as it was sent, and the bytes of the body, which are not looked at.

    Args:
        payload: the whole message.
        envelope_limit: bytes of JSON, at most.

    Raises:
        WireError: it is no message of this version, truncated, or its envelope was altered.
    """
    if len(payload) < PREFIX:
        raise WireError(f"a message of {len(payload)} bytes is too short")
    if payload[:4] != MAGIC:
        raise WireError("it is no message of this version: use one version of fedex-lora everywhere")
    (size,) = struct.unpack("<I", payload[4:8])
    if size > len(payload) - PREFIX:
        raise WireError("the message is truncated: its envelope is longer than the message")
    if size > envelope_limit:
        raise WireError(f"the message's envelope has {size} bytes where at most {envelope_limit} were expected")
    text = payload[PREFIX : PREFIX + size]
    if blake3(text).digest() != payload[8:PREFIX]:
        raise WireError("the checksum of the message's envelope is wrong: it was altered on the way; send it again")
    try:
        return str(text, "utf-8"), memoryview(payload)[PREFIX + size :]
    except UnicodeDecodeError:
        raise WireError("the message's envelope is not UTF-8") from None


def read_body_table(body: memoryview, header_limit: int) -> tuple[str, dict[str, BodyEntry]]:
    """The text of the body's own header, and name -> `BodyEntry`, after every check that needs no tensor.

    Args:
        body: all of it.
        header_limit: bytes of JSON, at most.

    Raises:
        WireError: with the first thing that is wrong, in one line.
    """
    if len(body) < 8:
        raise WireError(f"a message whose body has {len(body)} bytes is too short")
    (size,) = struct.unpack("<Q", body[:8])
    if size > len(body) - 8:
        raise WireError("the message is truncated: its header is longer than its body")
    if size > header_limit:
        raise WireError(f"the message's header has {size} bytes where at most {header_limit} were expected")
    table = _parsed(bytes(body[8 : 8 + size]))
    about = table.pop("__metadata__", None)
    if not isinstance(about, dict) or about.keys() != {"header"} or not isinstance(about["header"], str):
        raise WireError("the message has no header of this protocol")
    entries = {name: _entry(name, entry) for name, entry in table.items()}
    _require_covered(entries, len(body) - 8 - size)
    return about["header"], entries


def _parsed(header: bytes) -> dict[str, Any]:
    """The JSON, if it has no more brackets than its tensors need: so many small values cannot hide in it, nor deep nesting."""
    tensors = header.count(b'"data_offsets"')
    if header.count(b"{") > tensors + 8 or header.count(b"[") > 2 * tensors + 8:
        raise WireError(f"the message's header has more brackets than its {tensors} tensors need")
    try:
        table = strict_json(header)
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
    found = dict[str, Any]()
    for name, value in pairs:
        if name in found:
            raise WireError(f"the message's header has the key {shown(name)} twice")
        found[name] = value
    return found


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _entry(name: str, entry: Any) -> BodyEntry:
    if len(name) > NAME or not name.isprintable():
        raise WireError(f"tensor {shown(name)} has a name that is too long or not printable")
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        known = len(entry) == 3 and all(type(number) is int and 0 <= number < 2**48 for number in (*shape, begin, end))
        sound = known and len(shape) <= 8 and begin + math.prod(shape) * BYTES[dtype] == end
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise WireError(f"tensor {shown(name)} is described as {shown(entry)}, which is no known dtype, or shape and offsets disagree")
    return BodyEntry(dtype, shape, begin, end)


def _require_covered(entries: dict[str, BodyEntry], size: int) -> None:
    """The tensors lie one after the other and fill the body."""
    place = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != place:
            raise WireError(f"tensor {shown(name)} begins at byte {entry.begin} where {place} was due: a gap, or two that overlap")
        place = entry.end
    if place != size:
        raise WireError(f"{size} bytes of tensors arrived and {place} are described: the message is truncated, or has bytes to spare")
