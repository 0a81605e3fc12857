"""Images as rows: files or encoded bytes, checked when they are loaded, decoded batch by batch."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Value
from torch import Tensor

from fedex_lora.errors import DataError
from fedex_lora.models.processor import ImageProcessor
from fedex_lora.tasks._files import Rows
from fedex_lora.tasks._rows import Problem, found

FEATURES = Features({"image": {"bytes": Value("large_binary"), "path": Value("string")}, "labels": Value("int64")})


def _cell(value: Any, folder: Path | None) -> dict[str, Any]:
    """`{bytes, path}`, one of them None: a file, relative to `folder`, or the encoded image itself."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes | bytearray | memoryview):
        return {"bytes": bytes(value) or None, "path": None}
    empty = value is None or (isinstance(value, float) and value != value) or not str(value).strip()
    return {"bytes": None, "path": None if empty else str((folder or Path()) / str(value))}


def images_that_fail(rows: Rows, column: str, folder: Path | None) -> list[Problem]:
    """Rows without an image that opens: none, one that is missing, broken, or of more than 8 bits a channel."""
    cells = [_cell(value, folder) for value in rows[column]]
    without = [cell["bytes"] is None and cell["path"] is None for cell in cells]
    faults = [None if none else _fault(cell) for cell, none in zip(cells, without, strict=True)]
    problems = found("empty", f"no {column!r}", rows, without)
    for code in dict.fromkeys(fault.code for fault in faults if fault):
        bad = [fault is not None and fault.code == code for fault in faults]
        first = next(fault for fault in faults if fault and fault.code == code)
        problems += found(code, f"an image that cannot be used: {first}", rows, bad)
    return problems


def _fault(cell: Mapping[str, Any]) -> DataError | None:
    try:
        with _open(cell) as image:
            image.verify()
    except DataError as error:
        return error
    except Exception as error:  # every format raises its own
        return _broken(cell, error)
    return None


def _open(cell: Mapping[str, Any]) -> Any:
    """The image, its header read."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{cell['path']} does not exist: give files relative to task.data", "file") from None
    except Exception as error:  # every format raises its own
        raise _broken(cell, error) from None
    if image.mode[0] in "IF":  # Pillow would cut their values at 255
        raise DataError(f"{_name(cell)} has more than 8 bits a channel: save it with 8, scaled as the model shall see it", "image")
    return image


def decode(cell: Mapping[str, Any]) -> Any:
    """The image as Pillow has it, turned upright as its camera says.

    Raises:
        DataError: it cannot be decoded, though its header could be read.
    """
    from PIL import ImageOps

    with _open(cell) as image:
        try:
            image.load()
            return ImageOps.exif_transpose(image)
        except Exception as error:
            raise _broken(cell, error) from None


def _broken(cell: Mapping[str, Any], error: Exception) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return DataError(f"{_name(cell)} cannot be read as an image: save it again, or leave the row out ({reason})", "image")


def _name(cell: Mapping[str, Any]) -> str:
    return cell["path"] or f"its image of {len(cell['bytes'])} bytes"


def image_rows(rows: Rows, column: str, folder: Path | None, labels: list[int]) -> Dataset:
    """Rows as the collator takes them: still encoded, so that memory holds no pixels but those of one batch."""
    return Dataset.from_dict({"image": [_cell(value, folder) for value in rows[column]], "labels": labels}, features=FEATURES)


@dataclass(frozen=True, eq=False)
class ImageCollator:
    """Decodes and processes a batch."""

    processor: ImageProcessor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {
            "pixel_values": self.processor.pixels([decode(row["image"]) for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }
