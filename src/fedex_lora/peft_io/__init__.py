"""PEFT and Transformers models to our types and back: the only home of scale, orientation (`fan_in_fan_out`) and dtype."""

from fedex_lora.peft_io._base import FrozenBase
from fedex_lora.peft_io._folders import AdapterFolder, Format, adapter_config, read_adapter_folder, stacked, write_adapter_folder
from fedex_lora.peft_io._layers import LINEAR, Layout
from fedex_lora.peft_io._model import (
    add_lora,
    format_of,
    frozen_bytes,
    load_base,
    read_model,
    read_other,
    set_trained,
    trainable_parameters,
    write_model,
)
from fedex_lora.peft_io._plain import in_float32, logits, plain_model
from fedex_lora.peft_io._processor import ImageProcessor, image_shape, load_processor, require_pillow
from fedex_lora.peft_io._result import (
    DELTA,
    IMAGE_TASK,
    Result,
    base_for,
    kind_of,
    load_model,
    open_model,
    read_result,
    result_folders,
    safe_name,
    write_result,
)

__all__ = [
    "DELTA",
    "IMAGE_TASK",
    "LINEAR",
    "AdapterFolder",
    "Format",
    "FrozenBase",
    "ImageProcessor",
    "Layout",
    "Result",
    "adapter_config",
    "add_lora",
    "base_for",
    "format_of",
    "frozen_bytes",
    "image_shape",
    "in_float32",
    "kind_of",
    "load_base",
    "load_model",
    "load_processor",
    "logits",
    "open_model",
    "plain_model",
    "read_adapter_folder",
    "read_model",
    "read_other",
    "read_result",
    "require_pillow",
    "result_folders",
    "safe_name",
    "set_trained",
    "stacked",
    "trainable_parameters",
    "write_adapter_folder",
    "write_model",
    "write_result",
]
