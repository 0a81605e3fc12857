"""The log of a party whose node config says where it is."""

import logging
from collections.abc import Mapping
from typing import Any

from fedex_lora.engines.flower._settings import NodeSettings, node_settings
from fedex_lora.errors import ConfigError
from fedex_lora.runs.party_log import party_log


def log_of(node: Mapping[str, Any]) -> logging.Logger:
    """The log of the party whose node config this is; in the default folder where its settings are wrong."""
    try:
        return party_log(node_settings(node).folder)
    except (ConfigError, RuntimeError):
        return party_log(NodeSettings().folder)
