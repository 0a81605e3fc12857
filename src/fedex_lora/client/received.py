"""What a client makes of a message: `Client.receive` gives one of these."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from fedex_lora.protocol.records import Request
from fedex_lora.types import Adapter, Delta


@dataclass(frozen=True, eq=False)
class Asking:
    """What a message asks for.

    Attributes:
        round: that is going on.
        start: the factors that the model starts with.
        delta: module path -> what its frozen base has gained: the common delta, and what this client alone holds beside it.
        other: the other trained tensors.
        moments: Adam's of the client's last round, where they are kept.
        request: the message's envelope.
        method: the run's.
    """

    round: int
    start: Adapter
    delta: Mapping[str, Delta]
    other: Mapping[str, Tensor]
    moments: Mapping[str, Any] | None
    request: Request
    method: str


@dataclass(frozen=True, eq=False)
class Train(Asking):
    """Measure the model on the client's own rows, then train it, then `Client.reply`."""


@dataclass(frozen=True, eq=False)
class Evaluate(Asking):
    """Measure the model on the client's own rows, then `Client.reply` with the metrics."""


@dataclass(frozen=True, eq=False)
class StoredAnswer:
    """The round was answered already: send the same bytes again (none where the driver keeps them)."""

    reply: bytes


@dataclass(frozen=True, eq=False)
class NeedsFull:
    """The message counts on something that this client does not have: send `reply`, and the server sends everything."""

    reply: bytes
    reason: str


Received: TypeAlias = Train | Evaluate | StoredAnswer | NeedsFull
