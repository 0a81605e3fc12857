"""Our bytes in Flower's messages: one array of bytes, and a few words beside it. (Flower's own arrays do not take bfloat16.)"""

from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

PAYLOAD, ABOUT = "fedex-lora", "about"


@dataclass(frozen=True)
class Envelope:
    """What travels one way.

    Attributes:
        payload: bytes of `protocol.messages`; empty where there is nothing but words.
        about: words.
    """

    payload: bytes
    about: Mapping[str, str]


def to_record(packet: Envelope) -> RecordDict:
    """A Flower record with our bytes."""
    array = Array(dtype="uint8", shape=(len(packet.payload),), stype=PAYLOAD, data=packet.payload)
    return RecordDict({PAYLOAD: ArrayRecord({PAYLOAD: array}), ABOUT: ConfigRecord(dict(packet.about))})


def from_record(message: Message) -> Envelope | None:
    """What is in a Flower message; None if it is not ours."""
    arrays, about = message.content.array_records.get(PAYLOAD), message.content.config_records.get(ABOUT)
    if arrays is None or about is None or PAYLOAD not in arrays or not all(isinstance(value, str) for value in about.values()):
        return None
    return Envelope(arrays[PAYLOAD].data, {key: str(value) for key, value in about.items()})
