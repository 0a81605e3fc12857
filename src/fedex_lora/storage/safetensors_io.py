"""safetensors files: opened and checked by their library, read in ranges into memory that is there already, written tensor by tensor."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedex_lora.errors import StorageError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Shapes: TypeAlias = Mapping[str, tuple[torch.dtype, Sequence[int]]]
"""Name -> dtype and shape, in the order in which the tensors lie in the file."""


class Entry(NamedTuple):
    """Where a tensor lies in its file: from byte `start` on."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class TensorTable(NamedTuple):
    """What a safetensors file holds. `raw` is its header: files with equal headers have equal tables."""

    raw: bytes
    entries: Mapping[str, Entry]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file as `safe_open` gives it, which has compared its header with its size.

    Raises:
        StorageError: missing, truncated, or not safetensors.
    """
    if not path.is_file():
        raise StorageError(f"{path} is missing: copy the folder again")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise StorageError(f"{path} is truncated or not safetensors ({str(error).splitlines()[0]}): copy it again") from None


def read_table(path: Path, known: dict[bytes, TensorTable] | None = None) -> TensorTable:
    """The table of a safetensors file, without its tensors.

    Args:
        path: the file.
        known: tables by header, which files that look alike share: a thousand clients' adapters then cost one table.

    Raises:
        StorageError: as `opened`; or a tensor in fewer bits than are read here.
    """
    with opened(path), path.open("rb") as file:  # whose header is sound, then
        raw = file.read(int.from_bytes(file.read(8), "little"))
    if known and raw in known:
        return known[raw]
    header, entries = json.loads(raw), dict[str, Entry]()
    header.pop("__metadata__", None)
    for name, about in header.items():
        if about["dtype"] not in DTYPES:
            raise StorageError(f"{path}: {name} is {about['dtype']}, which is not read here: save the adapter in 16 or 32 bits")
        entries[name] = Entry(DTYPES[about["dtype"]], tuple(about["shape"]), 8 + len(raw) + about["data_offsets"][0])
    table = TensorTable(raw, entries)
    if known is not None:
        known[raw] = table
    return table


def file_identity(path: Path) -> tuple[int, ...] | None:
    """What changes when somebody writes to a file, or puts another in its place; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def readable(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, for `read_into`.

    Raises:
        StorageError: the file has gone, or cannot be read to the end of a tensor.
    """
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}: copy it again") from None


def read_into(file: BinaryIO, entry: Entry, out: Tensor) -> None:
    """Read one tensor of an open file into contiguous memory of as many numbers, in another floating-point dtype where `out` has one.

    Raises:
        OSError: the file ends early.
    """
    read = out if out.dtype == entry.dtype else torch.empty(entry.shape, dtype=entry.dtype)
    memory = _bytes(read)
    file.seek(entry.start)
    if file.readinto(memory) != memory.nbytes:  # type: ignore[attr-defined]
        raise OSError("the file ends early")
    if read is not out:
        out.view(entry.shape).copy_(read)


def read_tensor(path: Path, entry: Entry) -> Tensor:
    """One tensor, in memory."""
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    with readable(path) as file:
        read_into(file, entry, tensor)
    return tensor


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    numbers: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(numbers)


class TensorWriter:
    """Writes a safetensors file from its first byte to its last: the header from the shapes, then the tensors in pieces.

    Its checksum is taken on the way.

    Args:
        path: of the file; its folder is made.
        shapes: of all tensors, in the order in which they will be written.
        metadata: of the file.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> path = Path(tempfile.mkdtemp()) / "ones.safetensors"
        >>> with TensorWriter(path, {"a": (torch.float32, (2, 3))}) as file:
        ...     file.write(torch.ones(1, 3))
        ...     file.write(torch.zeros(1, 3))
        >>> load_file(path)["a"].sum().item()
        3.0
    """

    def __init__(self, path: Path, shapes: Shapes, metadata: Mapping[str, str] | None = None) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
        position = 0
        for name, (dtype, shape) in shapes.items():
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
            position += size
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._left = path, 8 + len(raw) + position
        self._file, self._sum = path.open("wb", buffering=0), blake3()
        self._write(memoryview(len(raw).to_bytes(8, "little") + raw))

    def write(self, piece: Tensor) -> None:
        """The next numbers of the file."""
        self._write(_bytes(piece.contiguous()))

    def _write(self, data: memoryview) -> None:
        if self._left < data.nbytes:
            raise AssertionError(f"{self.path}: more is written than its header says")
        self._left -= data.nbytes
        self._sum.update(data)
        while data.nbytes:
            data = data[self._file.write(data) :]

    @property
    def checksum(self) -> str:
        """Of what has been written: see `storage.files.checksum`."""
        return f"blake3:{self._sum.hexdigest()}"

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        if kind is None and self._left:
            raise AssertionError(f"{self.path}: {self._left} bytes fewer are written than its header says")
