"""The configuration: pydantic models read from TOML."""

from fedex_lora.config.privacy import Privacy
from fedex_lora.config.reading import flat, located, nearest, overridden, parse_config, plain_config, plain_value, read_config, write_config
from fedex_lora.config.run import Config, Messages, Rules, ServerOptimizer, Truncation, is_ours, method_name, trainer_parts
from fedex_lora.config.tables import CHAT, DEMO, IMAGES, MEMORY, Base, Clients, Lora, TaskSettings, base_folder

__all__ = [
    "CHAT",
    "DEMO",
    "IMAGES",
    "MEMORY",
    "Base",
    "Clients",
    "Config",
    "Lora",
    "Messages",
    "Privacy",
    "Rules",
    "ServerOptimizer",
    "TaskSettings",
    "Truncation",
    "base_folder",
    "flat",
    "is_ours",
    "located",
    "method_name",
    "nearest",
    "overridden",
    "parse_config",
    "plain_config",
    "plain_value",
    "read_config",
    "trainer_parts",
    "write_config",
]
