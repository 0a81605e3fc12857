"""Messages taken apart and put together again, for tests that alter them."""

import json
import struct

from safetensors.torch import load, save

from fedex_lora.protocol.frame import PREFIX, digest, join, read_body_table, split


def parts(payload):
    """The envelope as JSON, and the bytes of the body."""
    text, body = split(payload, len(payload))
    return json.loads(text), bytes(body)


def told(payload):
    """What a message says of itself: its envelope, and the header of its body."""
    envelope, body = parts(payload)
    return {**(json.loads(read_body_table(memoryview(body), len(body))[0]) if body else {}), **envelope}


def tensors_of(payload):
    """The tensors of its body."""
    body = parts(payload)[1]
    return load(body) if body else {}


def sealed(envelope, body):
    """A message whose checksums are right, whatever else is wrong with it."""
    return join(json.dumps({**envelope, "body": digest(body)}), body)


def retold(payload, **changes):
    """The message that says other things of itself, in its envelope or in the header of its body."""
    envelope, body = parts(payload)
    header = json.loads(read_body_table(memoryview(body), len(body))[0])
    header |= {name: value for name, value in changes.items() if name in header}
    envelope |= {name: value for name, value in changes.items() if name not in header}
    return sealed(envelope, save(load(body), metadata={"header": json.dumps(header, separators=(",", ":"))}))


def with_tensors(payload, change):
    """The message with `change(its tensors)`; None leaves one out."""
    envelope, body = parts(payload)
    found = {name: tensor.contiguous() for name, tensor in change(load(body)).items() if tensor is not None}
    return sealed(envelope, save(found, metadata={"header": read_body_table(memoryview(body), len(body))[0]}))


def bounds(body):
    """Where the header of a body begins and ends, as far as it has one."""
    size = struct.unpack("<Q", body[:8])[0] if len(body) >= 8 else 0
    return 8, min(len(body), 8 + size)


def with_table(body, text):
    """The body with another text as its table, whose length is right."""
    return struct.pack("<Q", len(text)) + text + body[bounds(body)[1] :]


def split_roughly(payload):
    """The bytes of prefix, envelope and body, as far as a message has them."""
    size = struct.unpack("<I", payload[4:8])[0] if len(payload) >= 8 else 0
    end = min(len(payload), PREFIX + size)
    return payload[:PREFIX], payload[PREFIX:end], payload[end:]
