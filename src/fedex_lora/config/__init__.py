"""The configuration: pydantic models read from TOML."""

from fedex_lora.config.reading import nearest, overridden, parse_config, read_config, write_config
from fedex_lora.config.run import Config, Local, Messages, Rules, Server, Truncation, is_ours
from fedex_lora.config.tables import DEMO, IMAGES, Base, Clients, Lora, Task, base_folder

__all__ = [
    "DEMO",
    "IMAGES",
    "Base",
    "Clients",
    "Config",
    "Local",
    "Lora",
    "Messages",
    "Rules",
    "Server",
    "Task",
    "Truncation",
    "base_folder",
    "is_ours",
    "nearest",
    "overridden",
    "parse_config",
    "read_config",
    "write_config",
]
