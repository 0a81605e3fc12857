"""PEFT and Transformers models to our types and back: the only home of scale, orientation (`fan_in_fan_out`) and dtype."""

from fedex_lora.peft_io._base import FrozenBase
from fedex_lora.peft_io._folders import AdapterFolder, Format, adapter_config, read_adapter_folder, stacked, write_adapter_folder
from fedex_lora.peft_io._model import (
    add_lora,
    format_of,
    frozen_bytes,
    load_base,
    load_tokenizer,
    read_model,
    read_other,
    set_trained,
    trainable_parameters,
    write_model,
)
from fedex_lora.peft_io._plain import in_float32, logits, plain_model
from fedex_lora.peft_io._result import Result, base_for, load_model, open_model, read_result, result_folders, safe_name, write_result

__all__ = [
    "AdapterFolder",
    "Format",
    "FrozenBase",
    "Result",
    "adapter_config",
    "add_lora",
    "base_for",
    "format_of",
    "frozen_bytes",
    "in_float32",
    "load_base",
    "load_model",
    "load_tokenizer",
    "logits",
    "open_model",
    "plain_model",
    "read_adapter_folder",
    "read_model",
    "read_other",
    "read_result",
    "result_folders",
    "safe_name",
    "set_trained",
    "stacked",
    "trainable_parameters",
    "write_adapter_folder",
    "write_model",
    "write_result",
]
