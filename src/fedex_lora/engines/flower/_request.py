"""What a party is asked, as bytes: from Flower's process to the one that holds the model; and its log."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedex_lora.engines.flower._settings import NodeSettings, node_settings
from fedex_lora.errors import ConfigError
from fedex_lora.runs.party_log import party_log


@dataclass(frozen=True)
class NodeRequest:
    """What a party is asked, with all that the answer depends on.

    Attributes:
        payload: bytes of a message.
        client: whom the server means.
        run: which run, as one word that no other run has.
        base: the fingerprint of the server's base; "" where it is not known.
        config: the run's configuration, as TOML.
        node: this party's node config.
    """

    payload: bytes
    client: str
    run: str
    base: str
    config: str
    node: Mapping[str, str | int | float | bool]

    def to_bytes(self) -> bytes:
        """For a worker's socket."""
        words = {key: value for key, value in vars(self).items() if key != "payload"}
        return json.dumps({**words, "node": dict(self.node)}).encode() + b"\n" + self.payload

    @classmethod
    def from_bytes(cls, message: bytes) -> "NodeRequest":
        """The inverse of `to_bytes`."""
        words, _, payload = message.partition(b"\n")
        return cls(payload=payload, **json.loads(words))


def log_of(node: Mapping[str, Any]) -> logging.Logger:
    """The log of the party whose node config this is; in the default folder where its settings are wrong."""
    try:
        return party_log(node_settings(node).folder)
    except (ConfigError, RuntimeError):
        return party_log(NodeSettings().folder)
