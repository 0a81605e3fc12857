"""What a message makes of a client that has only what it was sent before: pure, without a model; `docs/participation.md`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedex_lora.aggregation import get_method
from fedex_lora.aggregation import server_state as server
from fedex_lora.client.state import ClientMemory
from fedex_lora.config import Config, Server
from fedex_lora.errors import WireError
from fedex_lora.protocol.delta_sync import BaseCopy, caught_up
from fedex_lora.protocol.messages import Download, decode_download, encode_update
from fedex_lora.types import Adapter, ClientUpdate, Delta, LowRank


@dataclass(frozen=True, eq=False)
class Begun:
    """A client that has taken in a message.

    Attributes:
        message: with the factors that did not travel.
        memory: what the client has now: base and global adapter of the message's version.
        start: the factors that it trains.
        held: module path -> what it alone holds frozen beside the common base.
    """

    message: Download
    memory: ClientMemory
    start: Adapter
    held: Mapping[str, LowRank]

    @property
    def delta(self) -> dict[str, Delta]:
        """Module path -> what the client's frozen base has gained: `D + held`."""
        return server.advance(self.memory.base.delta, self.held)

    def answer(self, update: ClientUpdate) -> bytes:
        """The bytes of what the client says to the message."""
        sent, stays = self.message, get_method(self.message.method).withheld(self.message.round)
        return encode_update(update, sent.run, sent.round, sent.method, stays, self.memory.base.version)

    def remembered(self, update: ClientUpdate, reply: bytes, optimizer: Mapping[str, Any] | None, config: Config) -> ClientMemory:
        """The client's memory after it trained `update` and answered with `reply`."""
        return replace(
            self.memory,
            trained={**self.memory.trained, self.message.round: update.adapter} if get_method(self.message.method).client_state else {},
            optimizer=optimizer if config.local.optimizer_state == "keep" else None,
            round=self.message.round,
            reply=reply,
        )


def read(payload: bytes, memory: ClientMemory, first: Adapter) -> Download:
    """A message, with the factors that did not travel from the client's own copy of the global adapter.

    Args:
        payload: the bytes.
        memory: of this client, and of no other.
        first: the initial adapter, which everyone has who has the configuration: the copy of a client that was sent nothing yet.

    Raises:
        WireError: see `decode_download`; a `LacksError` where factors did not travel and the client has no copy.
    """
    pristine = first if memory.base.version == 0 else {}
    return decode_download(payload, memory.adapter or pristine)


def begin(message: Download, memory: ClientMemory, first: Adapter, pace: Server) -> Begun:
    """Bring base and adapter to the message's version, and say what is trained.

    Args:
        message: as `read`.
        memory, first: see `read`.
        pace: momentum and learning rate of the server.

    Raises:
        WireError: the message does not fit what the client has; a `LacksError` where it can be sent everything instead.
    """
    base = BaseCopy() if message.anew else memory.base
    before = memory.adapter if base.version and memory.adapter is not None else first
    base = caught_up(base, message.catch_up, before, message.adapter, pace)
    kept = _counted(memory, message.accepted) if get_method(message.method).client_state else {}
    start, held = server.start_of(message.method, message.adapter, message.rank, kept.get(message.accepted))
    return Begun(message, replace(memory, base=base, adapter=message.adapter, trained=kept), start, held)


def _counted(memory: ClientMemory, accepted: int) -> dict[int, Adapter]:
    """The client's own factors of the last round in which its update counted; what it trained since is forgotten.

    Raises:
        WireError: it has none of that round.
    """
    kept = {round: own for round, own in memory.trained.items() if round == accepted}
    if accepted and not kept:
        raise WireError(f"the server counts on this client's own factors of round {accepted}, and it has none: start the run anew")
    return kept
