"""Our bytes in Flower's messages: one array of bytes, and a few words beside it. (Flower's own arrays do not take bfloat16.)"""

from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

PAYLOAD, ABOUT = "fedex-lora", "about"


def to_record(payload: bytes, about: Mapping[str, str]) -> RecordDict:
    """A Flower record with the bytes of a message, and words beside them."""
    array = Array(dtype="uint8", shape=(len(payload),), stype=PAYLOAD, data=payload)
    return RecordDict({PAYLOAD: ArrayRecord({PAYLOAD: array}), ABOUT: ConfigRecord(dict(about))})


def from_record(message: Message) -> tuple[bytes, dict[str, str]] | None:
    """The bytes and words in a Flower message; None if it is not ours."""
    arrays, about = message.content.array_records.get(PAYLOAD), message.content.config_records.get(ABOUT)
    if arrays is None or about is None or PAYLOAD not in arrays or not all(isinstance(value, str) for value in about.values()):
        return None
    return arrays[PAYLOAD].data, {key: str(value) for key, value in about.items()}
