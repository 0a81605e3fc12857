"""What makes rows into a model's input: the tokenizer or the image processor that belongs to a base."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers.models.auto.image_processing_auto import get_image_processor_config

from fedex_lora.config import IMAGES, Base
from fedex_lora.errors import ModelError, require_extra
from fedex_lora.models.loading import Kind, load_tokenizer, quiet_loading, why_not_loaded
from fedex_lora.models.pristine import cached_folder

TOKENIZER = "tokenizer_config.json"
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names for so many channels of 8 bits


@dataclass(frozen=True, eq=False)
class ImageProcessor:
    """A transformers image processor, and the channels that the model takes.

    Attributes:
        processor: resizes, rescales and normalises; on Pillow, so that every machine gives the same pixels.
        mode: Pillow's name of the channels.
    """

    processor: Any
    mode: str

    def pixels(self, images: Sequence[Any]) -> Tensor:
        """Pillow images -> `pixel_values`, `images x channels x height x width`."""
        values: Tensor = self.processor(images=[image.convert(self.mode) for image in images], return_tensors="pt")["pixel_values"]
        return values

    def save_pretrained(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)


def load_processor(base: Base, kind: Kind) -> Any:
    """The tokenizer of the base, or for images its `ImageProcessor`.

    A base without `preprocessor_config.json` gets what the first ViTs have: the size of the model's config, mean and deviation 0.5.

    Raises:
        UsageError: images without Pillow.
        ModelError: it is not there, or takes images of a kind that files do not hold.
    """
    if kind != IMAGES:
        return load_tokenizer(base)
    require_extra("PIL", "images", "images")
    options = {"trust_remote_code": base.trust_remote_code}
    try:
        with quiet_loading():
            config = transformers.AutoConfig.from_pretrained(base.source, **options)
            channels, height, width = image_shape(config)
            if get_image_processor_config(base.source):
                processor = transformers.AutoImageProcessor.from_pretrained(base.source, backend="pil", **options)
            else:
                halves = [0.5] * channels
                size = {"height": height, "width": width}
                processor = transformers.ViTImageProcessorPil(size=size, image_mean=halves, image_std=halves)
    except Exception as error:  # transformers, huggingface_hub and the file system each raise their own
        raise ModelError(why_not_loaded(base.model, error)) from error
    if channels not in MODES:
        raise ModelError(f"{base.model} takes images of {channels} channels, and image files have 1, 3 or 4: use another base")
    return ImageProcessor(processor, MODES[channels])


def save_processor(processor: Any, base: Base, folder: Path) -> None:
    """Write a tokenizer or image processor beside a model.

    A tokenizer's class stays what the base calls it: transformers 5 writes names that no earlier version, nor what builds on one, knows.
    """
    processor.save_pretrained(folder)
    source, target = cached_folder(base.source), folder / TOKENIZER
    if source is None or not (source / TOKENIZER).is_file() or not target.is_file():
        return
    said = json.loads((source / TOKENIZER).read_text(encoding="utf-8"))
    written = json.loads(target.read_text(encoding="utf-8"))
    kept = {key: value for key, value in written.items() if key in said or key not in ("backend", "is_local", "local_files_only")}
    named = {"tokenizer_class": said["tokenizer_class"]} if "tokenizer_class" in said else {}
    target.write_text(json.dumps(kept | named, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def image_shape(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model with this config takes (224 x 224 where it says nothing)."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return int(getattr(vision, "num_channels", None) or 3), int(height), int(width)
