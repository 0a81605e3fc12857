"""Waiting for a round's answers: until when, for whom, and what is said of it."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass

from fedex_lora.runs.emit import Emit
from fedex_lora.server.round import Round
from fedex_lora.server.verdicts import Accepted, Ignored, NeedsFull, Verdict
from fedex_lora.storage.events import ClientRejected, Waiting, Warned, record
from fedex_lora.types import ClientUpdate

WAITING = 15.0  # seconds until it is said who is waited for, and again each time
MAX_EXTRA_REJECTIONS = 100  # answers that do not count and that a round records, beyond one for each of its clients


@dataclass(frozen=True)
class Reply:
    """What came back from a client: bytes, or why there are none.

    Attributes:
        client: as the transport knows it.
        payload: its answer, which may say that it failed; None: the transport lost it.
        error: why there is none.
        round: of the message that it answers, where the transport knows it; None: the one that is going on.
    """

    client: str
    payload: bytes | None
    error: str = ""
    round: int | None = None


Exchange = Callable[[Mapping[str, bytes], float | None], Iterable[Reply | None]]
"""(client -> message, deadline in seconds) -> replies, in any order. A transport is one such function.

While it waits it yields None every second or so. It ends when all have answered; the loop stops it at the deadline. What arrives
afterwards it yields in a later call.
"""


def listen(
    round: Round,
    replies: Iterable[Reply | None],
    deadline: float | None,
    emit: Emit,
    updates: MutableMapping[str, ClientUpdate],
    spare: float = math.inf,
) -> int:
    """Give a round what comes, until nobody is missing, the deadline is over, or more than `spare` clients have failed.

    Args:
        round: that is going on.
        replies: as they come; None now and then while there is none.
        deadline: seconds.
        emit: told of each answer, and of who is waited for.
        updates: client -> its valid update; a late one only until it has one of this round.
        spare: how many may fail.

    Returns:
        The bytes that came.
    """
    size, odd = 0, 0
    for reply in _until(deadline, replies, round, emit):
        if reply.client not in round.missing and odd > len(round.participants) + MAX_EXTRA_REJECTIONS:
            continue
        size += len(reply.payload or b"")
        if reply.payload is None:
            verdict = round.lost(reply.client, reply.error, reply.round)
        else:
            verdict = round.receive(reply.client, reply.payload)
        if isinstance(verdict, Accepted) and (verdict.round == round.number or verdict.client not in round.receipts):
            updates[verdict.client] = verdict.update
        odd += not isinstance(verdict, Accepted)
        tell(verdict, round.number, len(reply.payload or b""), emit)
        if len(round.failed) > spare:
            round.give_up()
            return size
    within = "" if deadline is None else f" within clients.deadline = {deadline:g} seconds"
    for verdict in round.give_up(f"it did not answer{within}"):
        tell(verdict, round.number, 0, emit)
    return size


def _until(deadline: float | None, replies: Iterable[Reply | None], round: Round, emit: Emit) -> Iterator[Reply]:
    """The replies until the deadline; whoever is missing may still answer while others do. Says now and then who is waited for."""
    since, began = time.time(), time.monotonic()
    said = began
    for reply in replies:
        now = time.monotonic()
        if reply is None or reply.client not in round.missing:
            if deadline is not None and now - began >= deadline:
                return
            if now - said >= WAITING:
                said = now
                emit(Waiting(round=round.number, clients=sorted(round.missing), since=since))
        if reply is not None:
            yield reply


def tell(verdict: Verdict, round: int, size: int, emit: Emit) -> None:
    """Say what became of an answer of so many bytes."""
    if isinstance(verdict, Accepted):
        update = verdict.update
        training = {name: value for name, value in update.metrics.items() if not name.startswith("held_out_")}
        late = {} if verdict.round == round else {"late": round - verdict.round}
        emit(
            record("client_done", round=round, client=update.client_id, num_examples=update.num_examples, bytes_up=size, **late, **training)
        )
    elif isinstance(verdict, NeedsFull):
        emit(Warned(round=round, client=verdict.client, message=f"{verdict.client} is sent everything, because: {verdict.reason}"))
    elif isinstance(verdict, Ignored):
        emit(Warned(round=round, client=verdict.client, message=f"an answer is ignored: {verdict.reason}"))
    else:
        emit(ClientRejected(round=verdict.round, client=verdict.client, reason=verdict.reason))
