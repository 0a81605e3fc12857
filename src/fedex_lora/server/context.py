"""What a server and its rounds share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedex_lora.config import Rules
from fedex_lora.protocol.messages import Download
from fedex_lora.server.registry import ClientRegistry
from fedex_lora.types import LowRank, ServerState


@dataclass(frozen=True, eq=False)
class Unanswered:
    """The messages of a round that were not answered in it, and what the base has gained since they were sent."""

    downloads: Mapping[str, Download] = field(default_factory=dict)
    gained: Mapping[str, LowRank] = field(default_factory=dict)


@dataclass(eq=False)
class ServerContext:
    """Where a run is; a round that ends puts the next values in place.

    Attributes:
        rules: what server and clients agree on.
        clients: the names of all clients, sorted.
        ranks: client -> its rank, where they differ.
        run: one word that no other run of these clients has.
        state: after the last round.
        registry: what is remembered of the clients.
        unanswered: the messages of the round before that nobody answered.
        base: what its clients' models stand on, see `Server`; "" until it is known.
    """

    rules: Rules
    clients: Sequence[str]
    ranks: Mapping[str, int]
    run: str
    state: ServerState
    registry: ClientRegistry
    unanswered: Unanswered = field(default_factory=Unanswered)
    base: str = ""
