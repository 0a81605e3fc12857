"""The transport: messages to Flower's nodes, and their replies, for the round loop."""

import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from httpx import HTTPError

from fedex_lora.engines.flower._messages import from_record, to_record
from fedex_lora.protocol.envelopes import envelope_of
from fedex_lora.protocol.records import Request
from fedex_lora.runs.listening import Reply

PAUSE = 0.5  # seconds between two looks for replies
JOIN, RETURN = 900.0, 120.0  # seconds that a node may be away: before it was ever there, and after
GONE = {
    ErrorCode.NODE_UNAVAILABLE: "its node went away before it answered",
    ErrorCode.MESSAGE_UNAVAILABLE: "its message did not get through: the node went away",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "its answer did not get through: the node went away",
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "its node cannot load the app: is fedex-lora installed there, in the same version?",
}


class NodeDirectory:
    """Which node is which client: by the name that it was registered under; nodes without any name (in simulations) take the clients left.

    A node of another name has no part in the run; a name that two nodes have is nobody's, until one of them is unregistered.

    Args:
        grid: Flower's.
        clients: all ids.
    """

    def __init__(self, grid: Grid, clients: Sequence[str]) -> None:
        self._grid, self._clients = grid, sorted(clients)
        self._unnamed = dict[int, str]()
        self.doubled = set[str]()

    def present(self) -> dict[str, "NodeRef"]:
        """Client -> its node, of those that are there."""
        nodes = {node.node_id: node for node in self._grid.get_nodes()}
        count = Counter(node.name for node in nodes.values())
        self.doubled = {client for client in self._clients if count[client] > 1}
        here = {node.name: node.node_id for node in nodes.values() if node.name in self._clients and count[node.name] == 1}
        for node in sorted(number for number, node in nodes.items() if not node.name):
            taken = {client for other, client in self._unnamed.items() if other in nodes and other != node} | here.keys()
            free = [client for client in self._clients if client not in taken]
            if self._unnamed.get(node) not in free:
                self._unnamed.pop(node, None)
                if not free:
                    continue
                self._unnamed[node] = free[0]
            here[self._unnamed[node]] = node
        return {client: NodeRef(node, nodes[node].last_activated_at) for client, node in here.items()}


@dataclass(frozen=True)
class NodeRef:
    """A node that is there, and since when."""

    node: int
    since: str


@dataclass(frozen=True)
class _PendingRequest:
    """A message that is out; nobody is asked `again` what an earlier call asked."""

    client: str
    round: int
    seat: NodeRef
    again: bool = True


class GridExchange:
    """`exchange` over Flower's Grid: who is not there is waited for a while; what comes after its round is handed out in a later call.

    Args:
        grid: Flower's.
        clients: all ids.
        about: words that go with every message (which run, which base).
    """

    def __init__(self, grid: Grid, clients: Sequence[str], about: Mapping[str, str]) -> None:
        self._grid, self._about = grid, about
        self._roster = NodeDirectory(grid, clients)
        self._asked = dict[str, _PendingRequest]()  # by the message's id
        self._seen = set[str]()

    def __call__(self, messages: Mapping[str, bytes], deadline: float | None = None) -> Iterator[Reply | None]:
        """See `listening.Exchange`."""
        began, unsent, open = time.monotonic(), set(messages), dict[str, int]()
        since = dict.fromkeys(messages, began)  # when a client that has not been asked yet was last there
        self._asked = {identity: replace(asked, again=False) for identity, asked in self._asked.items()}
        while (unsent or open) and (deadline is None or time.monotonic() - began < deadline):
            here = self._roster.present()
            self._seen |= here.keys()
            for client in [client for client in messages if client in unsent & here.keys()]:
                since[client] = time.monotonic()
                if (round := self._send(client, here[client], messages)) is not None:
                    open[client] = round
                    unsent.remove(client)
            self._send_again(here, messages)
            replies = [*self._replies(), *self._away(unsent, since)]
            for reply in replies:
                if reply.round is None:  # it was never asked
                    unsent.remove(reply.client)
                elif reply.round == open.get(reply.client):
                    del open[reply.client]
                yield reply
            if (unsent or open) and not replies:
                yield None
                time.sleep(PAUSE)

    def _away(self, unsent: Collection[str], since: Mapping[str, float]) -> Iterator[Reply]:
        """Failures of those who are not there: nobody waits for ever, however the deadline is set."""
        now = time.monotonic()
        for client in sorted(unsent):
            patience = RETURN if client in self._seen else JOIN
            if now - since[client] >= patience:
                why = (
                    "two nodes are registered under its name: unregister one" if client in self._roster.doubled else "its node is not there"
                )
                yield Reply(client, None, f"{why} (waited {patience:g} seconds)")

    def _send(self, client: str, seat: NodeRef, messages: Mapping[str, bytes]) -> int | None:
        """The message's round, if Flower took it. Its bytes are held no longer than this takes."""
        payload = messages[client]
        round = envelope_of(payload, Request, len(payload))[0].round
        content = to_record(payload, {**self._about, "client": client})
        message = Message(content=content, dst_node_id=seat.node, message_type="train", group_id=str(round))
        taken = [identity for identity in self._grid.push_messages([message]) if identity]
        self._asked |= {identity: _PendingRequest(client, round, seat) for identity in taken}
        return round if taken else None

    def _send_again(self, here: Mapping[str, NodeRef], messages: Mapping[str, bytes]) -> None:
        """A node that was started anew has lost what it was asked, and nobody would ever say so."""
        for identity, asked in list(self._asked.items()):
            seat = here.get(asked.client)
            if seat and seat.node == asked.seat.node and seat.since != asked.seat.since:
                del self._asked[identity]
                if asked.again and self._send(asked.client, seat, messages) is None:
                    self._asked[identity] = asked  # next time

    def _replies(self) -> Iterable[Reply]:
        for identity, asked in list(self._asked.items()):
            try:
                messages = list(self._grid.pull_messages([identity]))
            except (OSError, HTTPError, MemoryError):
                raise  # the link's or the server's, and not this answer's
            except Exception as error:  # Flower's, of objects that are none of its own
                del self._asked[identity]
                yield Reply(asked.client, None, f"its answer cannot be unpacked ({type(error).__name__})", asked.round)
                continue
            for message in messages:
                del self._asked[identity]
                yield _reply(asked.client, asked.round, message)


def _reply(client: str, round: int, message: Message) -> Reply:
    if message.has_error():
        words = GONE.get(message.error.code, "its app failed outside of fedex-lora: see that node's own log")  # its text may quote rows
        return Reply(client, None, words, round)
    packet = from_record(message)
    if packet is None:
        return Reply(client, None, "its answer is not of this protocol: is fedex-lora there the same version?", round)
    return Reply(client, packet[0], round=round)
