"""Envelopes of messages, and messages that are nothing else. Nothing here needs torch: a party's failure is told wherever it happens."""

from typing import NamedTuple, TypeVar

from fedex_lora.errors import WireError
from fedex_lora.protocol.failures import Failure
from fedex_lora.protocol.frame import join, split
from fedex_lora.protocol.records import Answer, Apology, Envelope, Request, parse_envelope

ENVELOPE = 16384  # bytes, at most, of an answer's
REQUEST = 2**20  # of a request's
EnvelopeT = TypeVar("EnvelopeT", Request, Answer, Apology)


class Encoded(NamedTuple):
    """A body as bytes, and their digest."""

    payload: bytes
    digest: str


NOTHING = Encoded(b"", "")


def message(envelope: Envelope, body: Encoded = NOTHING) -> bytes:
    """The bytes of a message."""
    return join(envelope.model_copy(update={"body": body.digest}).model_dump_json(), body.payload)


def envelope_of(payload: bytes, kind: type[EnvelopeT], limit: int = ENVELOPE) -> tuple[EnvelopeT, memoryview]:
    """The envelope of a message, and the bytes of its body, which are not looked at.

    Raises:
        WireError: see `split`; or it is a message of another kind.
    """
    text, body = split(payload, limit)
    envelope = parse_envelope(text)
    if not isinstance(envelope, kind):
        raise WireError(f"expected {kind.__name__.lower()}, got {envelope.kind}: is this message going the wrong way?")
    return envelope, body


def answer_in(payload: bytes) -> Answer | Apology | None:
    """What an answer says of itself; None where it says nothing that can be read."""
    try:
        envelope = parse_envelope(split(payload, ENVELOPE)[0])
    except WireError:
        return None
    return None if isinstance(envelope, Request) else envelope


def encode_failure(failure: Failure, client: str, sent: Request | None = None) -> bytes:
    """The bytes of a failure: nothing of an error's text is in them.

    Args:
        failure: what may be told.
        client: who failed.
        sent: the request that it answers; None: it could not be read.
    """
    run, round = (sent.run, sent.round) if sent else ("", 0)
    return message(Apology(run=run, round=round, client=client, code=failure.code, rows=failure.rows))


def answer_of(payload: bytes, client: str, failure: Failure) -> bytes:
    """The bytes of a failure to answer a request, which may itself be unreadable."""
    try:
        return encode_failure(failure, client, envelope_of(payload, Request, REQUEST)[0])
    except WireError:
        return encode_failure(failure, client)
