"""The sending side of a round: who is asked for what, and the bytes of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from fedex_lora.aggregation import get_method
from fedex_lora.aggregation import server_state as states
from fedex_lora.protocol.delta_sync import CatchUp
from fedex_lora.protocol.envelopes import Encoded, message
from fedex_lora.protocol.messages import Body, Download, encode_body
from fedex_lora.protocol.records import Request
from fedex_lora.server.registry import ServerContext
from fedex_lora.types import Adapter, LowRank

Phase: TypeAlias = Literal["train", "evaluate"]
_Version: TypeAlias = tuple[int, int | None]  # of a body: since which base, and of which rank where only so much travels


@dataclass(frozen=True)
class Asked:
    """What one client was asked, as far as it cannot be worked out again.

    Attributes:
        request: its envelope.
        since: the version of the base that it counts from.
        omit: the factors that do not travel to it.
    """

    request: Request
    since: int
    omit: str


class LazyMessages(Mapping[str, bytes]):
    """Client -> its message, which becomes bytes when it is asked for: k messages at once would be most of what the server holds."""

    def __init__(self, requests: "Requests", clients: Sequence[str]) -> None:
        self._requests, self._clients, self._sizes = requests, list(clients), dict[str, int]()

    def __getitem__(self, client: str) -> bytes:
        if client not in self._clients:
            raise KeyError(client)
        payload = self._requests.message(client)
        self._sizes[client] = len(payload)
        return payload

    def __iter__(self) -> Iterator[str]:
        return iter(self._clients)

    def __len__(self) -> int:
        return len(self._clients)

    @property
    def size(self) -> int:
        """Bytes of those that were asked for."""
        return sum(self._sizes.values())


class Requests:
    """What a round asked of each client.

    Args:
        server: whose state and registry the messages are made from; both stay as they are while the round asks nobody again.
        phase: of the round.
    """

    def __init__(self, server: ServerContext, phase: Phase) -> None:
        self._server, self._phase = server, phase
        self.asked = dict[str, Asked]()
        self._syncs = dict[int, CatchUp]()
        self._bodies, self._encoded = dict[_Version, Body](), dict[tuple[_Version, str], Encoded]()

    def ask(self, clients: Sequence[str]) -> LazyMessages:
        """Ask clients for what they lack now."""
        server, registry = self._server, self._server.registry
        for client in clients:
            request = Request(
                kind=self._phase,
                run=server.run,
                round=server.state.round + 1,
                client=client,
                rank=server.ranks.get(client),
                full=client in registry.unknown_state,
                accepted=registry.last_accepted.get(client, 0),
                rejected=registry.pending_rejection.get(client, ""),
                history=registry.history.get(server.state.round, ""),
                base_history=registry.history.get(registry.version.get(client, 0), ""),
                base=server.base,
                rules=server.rules.agreed,
            )
            omit = "AB" if self._drawn else registry.unchanged_factors(client)
            self.asked[client] = Asked(request, registry.version.get(client, 0), omit)
        return LazyMessages(self, sorted(clients, key=self._key))  # those of one body after one another: it is encoded once

    def _key(self, client: str) -> tuple[int, int, str, str]:
        asked = self.asked[client]
        return asked.since, asked.request.rank or 0, asked.omit, client

    @property
    def _drawn(self) -> bool:
        return get_method(self._server.state.method).reinitialises and self._server.state.round > 0

    def _body(self, asked: Asked) -> tuple[_Version, Body]:
        state, rank = self._server.state, asked.request.rank
        version = asked.since, None if get_method(state.method).holds_tail or self._drawn else rank
        if version not in self._bodies:
            if asked.since not in self._syncs:
                self._syncs[asked.since] = self._server.registry.sync_for(asked.since, state, self._server.rules)
            adapter = state.adapter if version[1] is None else states.start_of(state.method, state.adapter, rank, None)[0]
            self._bodies[version] = Body(state.method, adapter, state.other, self._syncs[asked.since], state.seed if self._drawn else None)
        return version, self._bodies[version]

    def message(self, client: str) -> bytes:
        """A client's message. Its body is encoded once for all clients that are sent the same."""
        asked = self.asked[client]
        version, body = self._body(asked)
        key = version, asked.omit
        if key not in self._encoded:
            self._encoded = {key: encode_body(body, asked.omit)}  # only the last one is kept: all would be most of what the server holds
        return message(asked.request, self._encoded[key])

    def download(self, client: str) -> Download:
        """What a client was asked."""
        asked = self.asked[client]
        return Download(asked.request, self._body(asked)[1])

    def start(self, sent: Download) -> tuple[Adapter, Mapping[str, LowRank]]:
        """What a client starts from, and what it holds beside the common base."""
        own = self._server.state.personal.get(sent.request.client)
        return states.start_of(sent.body.method, sent.body.adapter, sent.request.rank, own)

    def table(self) -> list[list[Any]]:
        """What was asked, as JSON."""
        return [[one.request.model_dump(), one.since, one.omit] for one in self.asked.values()]

    def take(self, table: Sequence[Sequence[Any]]) -> None:
        """The inverse of `table`."""
        self.asked = {request["client"]: Asked(Request(**request), since, omit) for request, since, omit in table}
