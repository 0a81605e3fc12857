"""A round's answers: which count, which are refused and why, and whether enough are left."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from fedex_lora.aggregation import get_method
from fedex_lora.config import Config
from fedex_lora.errors import WireError
from fedex_lora.protocol.frame import shown
from fedex_lora.protocol.messages import Download, decode_update, round_of
from fedex_lora.server.checks import quorum
from fedex_lora.types import ClientUpdate

WAITING = 15.0  # seconds until it is said who is waited for, and again each time
TWICE = "its first answer counts"
NOISE = 100  # answers that do not count and that a round records, beyond one for each of its clients


@dataclass(frozen=True)
class Reply:
    """What came back from a client: bytes, or why there are none.

    Attributes:
        round: of the message that it answers, where the transport knows it; None: the one that is going on.
        lacks: the client does not have what the message counts on, so it could not even begin.
        hopeless: it says that the run's configuration is at fault, so it will fail whenever it is asked.
    """

    client: str
    payload: bytes | None
    error: str = ""
    round: int | None = None
    lacks: bool = False
    hopeless: bool = False


@dataclass(frozen=True)
class Refusal:
    """A client whose update is not part of a round's mean, and why: it failed, or what it sent was refused."""

    client: str
    reason: str


@dataclass(frozen=True, eq=False)
class Answers:
    """What came back in answer to a round's messages.

    Attributes:
        updates: client -> its update, valid by itself.
        late: the same, of clients without one of this round, in answer to messages of the round before.
        refused: who of those that were asked sent none that counts, and why.
        silent: the clients that have not answered at all.
        lacking: the clients that do not have what their message counts on.
        size: the bytes that came.
        hopeless: the clients that will fail whenever they are asked, by their own word.
    """

    updates: Mapping[str, ClientUpdate]
    late: Mapping[str, ClientUpdate] = field(default_factory=dict)
    refused: Sequence[Refusal] = ()
    silent: Collection[str] = ()
    lacking: Collection[str] = ()
    size: int = 0
    hopeless: Collection[str] = ()


class Emit(Protocol):
    """Told of everything that happens."""

    def __call__(self, event: str, **fields: Any) -> None: ...


def collect(
    replies: Iterable[Reply | None],
    downloads: Mapping[str, Download],
    config: Config,
    emit: Emit,
    spare: float = math.inf,
    earlier: Mapping[str, Download] | None = None,
    before: Answers | None = None,
) -> Answers:
    """What counts of the replies to `downloads`.

    One update of a client counts, its first valid one; what else it sends is ignored, with a warning. Once more than `spare` clients have
    failed, nobody is waited for.

    Args:
        replies: as they come; None now and then while there is none.
        downloads: the messages that were sent, by client, all of one round.
        config: says until when answers count, and what becomes of late ones.
        emit: told of each answer, and of who is waited for.
        spare: how many may fail.
        earlier: the messages of the round before that were not answered in time.
        before: what came of other messages of this round; then these bring everything, and a client that lacks something has failed.
    """
    round = next(iter(downloads.values())).round
    updates, late = dict[str, ClientUpdate](), dict[str, ClientUpdate]()
    refused, failed, lacking, size, again = list[Refusal](), set[str](), set[str](), 0, dict[str, str]()
    there, odd, hopeless = before or Answers({}), 0, set[str]()

    def expected() -> set[str]:
        """Those of whom nothing has come yet."""
        return downloads.keys() - updates.keys() - lacking - {refusal.client for refusal in refused}

    for reply in _heard(replies, expected, config.clients.deadline, lambda **fields: emit("waiting", round=round, **fields)):
        if reply.client not in expected() and odd > len(downloads) + NOISE:
            continue
        size += len(reply.payload or b"")
        found = _judged(reply, downloads, {*updates, *there.updates}, config, earlier or {}, {*late, *there.late})
        odd += found.update is None
        if reply.lacks and reply.client in expected() and before is None:
            lacking.add(reply.client)
            emit("warning", round=round, client=reply.client, message=f"{reply.client} is sent everything, because: {_cut(reply.error)}")
        elif found.update is not None:
            (updates if found.round == round else late)[reply.client] = found.update
            _tell(found.update, round, found.round, len(reply.payload or b""), emit)
        elif found.again:
            again.setdefault(reply.client, found.reason)
            emit("warning", round=round, client=_name(reply.client), message=f"an answer came again, and is ignored: {_cut(found.reason)}")
        elif found.round != round:
            refuse(found.round, reply.client, found.reason, emit)
        else:
            refused.append(refuse(round, reply.client, found.reason, emit))
            failed |= {reply.client} if reply.payload is None else set()
            hopeless |= {reply.client} if reply.hopeless and reply.client in downloads else set()
        if len(failed) > spare:
            break
    silent = sorted(downloads.keys() - updates.keys() - lacking - {refusal.client for refusal in refused})
    if len(failed) <= spare:
        within = "" if config.clients.deadline is None else f" within clients.deadline = {config.clients.deadline:g} seconds"
        refused += [refuse(round, client, again.get(client, f"it did not answer{within}"), emit) for client in silent if client not in late]
    late = {client: update for client, update in late.items() if client not in updates}
    refused = [refusal for refusal in refused if refusal.client in downloads and refusal.client not in updates]
    return Answers(updates, late, refused, silent, lacking if len(failed) <= spare else (), size, hopeless - updates.keys())


def _heard(
    replies: Iterable[Reply | None], expected: Callable[[], set[str]], deadline: float | None, say: Callable[..., None]
) -> Iterator[Reply]:
    """The replies until the deadline; whoever is expected may still answer while others do. Says now and then who is waited for."""
    since, began = time.time(), time.monotonic()
    said = began
    for reply in replies:
        now = time.monotonic()
        if reply is None or reply.client not in expected():
            if deadline is not None and now - began >= deadline:
                return
            if now - said >= WAITING:
                said = now
                say(clients=sorted(expected()), since=since)
        if reply is not None:
            yield reply


class _Judged(NamedTuple):
    """What a reply is.

    Attributes:
        round: that it answers.
        update: in it, if it is one.
        reason: why there is none.
        again: an answer of its client to that round is there already.
    """

    round: int
    update: ClientUpdate | None = None
    reason: str = ""
    again: bool = False


def _judged(
    reply: Reply,
    downloads: Mapping[str, Download],
    before: Collection[str],
    config: Config,
    earlier: Mapping[str, Download],
    late: Collection[str],
) -> _Judged:
    """What a reply is, after the updates `before` of this round, and those of the round before that came `late`."""
    round = next(iter(downloads.values())).round
    if reply.payload is None and reply.round not in (None, round):
        return _Judged(reply.round or 0, reason=f"it failed, too late to matter: {reply.error}")
    missed = earlier.get(reply.client)
    if missed is not None and reply.payload is not None:
        try:
            update = decode_update(reply.payload, missed, get_method(missed.method).withheld(missed.round), config.messages.max_examples)
            if reply.client in late:
                return _Judged(missed.round, reason=TWICE, again=True)
            if config.clients.late == "next":
                return _Judged(missed.round, update)
            return _Judged(missed.round, reason=f"it answered in round {round} only: too late (clients.late = 'refuse')")
        except WireError:
            pass  # then it answers this round, or nothing
    if reply.client in before:
        return _Judged(round, reason=TWICE, again=True)
    sent = downloads.get(reply.client)
    if sent is None:
        claimed = round_of(reply.payload or b"", next(iter(downloads.values())))
        return _Judged(round, reason="it was not asked in this round", again=claimed is not None and claimed < round)
    if reply.payload is None:
        return _Judged(round, reason=f"it failed: {reply.error}")
    try:
        return _Judged(
            round, decode_update(reply.payload, sent, get_method(sent.method).withheld(sent.round), config.messages.max_examples)
        )
    except WireError as error:
        return _Judged(round, reason=str(error), again=0 < sent.accepted == round_of(reply.payload, sent))


def _tell(update: ClientUpdate, round: int, answered: int, size: int, emit: Emit) -> None:
    training = {name: value for name, value in update.metrics.items() if not name.startswith("held_out_")}
    late = {} if answered == round else {"late": round - answered}
    emit("client_done", round=round, client=update.client_id, num_examples=update.num_examples, bytes_up=size, **late, **training)


def refuse(round: int, client: str, reason: str, emit: Emit) -> Refusal:
    """Record and tell that a client's update is not part of the mean; what it sent is shown safely, and cut."""
    refusal = Refusal(client=_name(client), reason=_cut(reason))
    emit("refused", round=round, client=refusal.client, reason=refusal.reason)
    return refusal


def _name(client: str) -> str:
    return client if client.isprintable() and len(client) < 200 else shown(client)


def _cut(reason: str) -> str:
    """What somebody else said, on one line of at most 500 characters."""
    return " ".join(reason.split())[:500]


def below_quorum(round: int, updates: int, asked: int, refused: Sequence[Refusal], config: Config) -> str:
    """Why a round has too few updates, with who is missing and why; "" when there are enough."""
    needed = quorum(config, asked)
    if updates >= needed:
        return ""
    who = "; ".join(f"client {refusal.client}: {refusal.reason}" for refusal in refused[:5]) or "the others did not answer"
    more = f" (and {len(refused) - 5} more)" if len(refused) > 5 else ""
    return f"round {round} has {updates} updates of {asked} clients and needs {needed}: {who}{more}"
