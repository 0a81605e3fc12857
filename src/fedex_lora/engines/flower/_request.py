"""What a party is asked, as bytes: from Flower's process to the one that holds the model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class NodeRequest:
    """What a party is asked, with all that the answer depends on.

    Attributes:
        payload: bytes of `protocol.messages`.
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
