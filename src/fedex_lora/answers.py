"""A round's answers: which count, which are refused and why, and whether enough are left."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedex_lora.aggregation import method_named
from fedex_lora.config import Config
from fedex_lora.consistency import quorum
from fedex_lora.errors import TrainingError, WireError
from fedex_lora.framing import shown
from fedex_lora.types import ClientUpdate
from fedex_lora.wire import Download, decode_update


@dataclass(frozen=True)
class Reply:
    """What came back from a client: bytes, or why there are none.

    Attributes:
        round: of the message that it answers, where the transport knows it; None: the one that is going on.
    """

    client: str
    payload: bytes | None
    error: str = ""
    round: int | None = None


@dataclass(frozen=True)
class Refusal:
    """A client whose update is not part of a round's mean, and why: it failed, or what it sent was refused."""

    client: str
    reason: str


class Emit(Protocol):
    """Told of everything that happens."""

    def __call__(self, event: str, **fields: Any) -> None: ...


def collect(
    replies: Iterable[Reply | None], downloads: Mapping[str, Download], config: Config, emit: Emit, spare: float = math.inf
) -> tuple[list[ClientUpdate], list[Refusal], int]:
    """The valid updates in the order of client ids, who sent none and why, and the bytes that came.

    One update of a client counts, its first valid one. Once more than `spare` clients have failed, nobody is waited for.
    """
    updates: dict[str, ClientUpdate] = {}
    refused, received, failed = list[Refusal](), 0, set[str]()
    for reply in replies:
        if reply is None:
            continue
        received += len(reply.payload or b"")
        round = next(iter(downloads.values())).round
        update = _accepted(reply, downloads, updates, config)
        if isinstance(update, str):
            refused.append(refuse(round, reply.client, update, emit))
            failed |= {reply.client} if reply.payload is None and reply.client not in updates else set()
            if len(failed) > spare:
                break
            continue
        updates[reply.client] = update
        training = {name: value for name, value in update.metrics.items() if not name.startswith("held_out_")}
        examples, size = update.num_examples, len(reply.payload or b"")
        emit("client_done", round=round, client=reply.client, num_examples=examples, bytes_up=size, **training)
    return [updates[client] for client in sorted(updates)], refused, received


def _accepted(reply: Reply, downloads: Mapping[str, Download], before: Collection[str], config: Config) -> ClientUpdate | str:
    """The update in a reply, or why there is none."""
    if reply.client not in downloads:
        return "it was not asked in this round"
    if reply.client in before:
        return "it answered twice: its first answer counts"
    if reply.payload is None:
        return f"it failed: {reply.error}"
    sent = downloads[reply.client]
    try:
        return decode_update(reply.payload, sent, stays(sent.method, sent.round), config.messages.max_examples)
    except WireError as error:
        return str(error)


def refuse(round: int, client: str, reason: str, emit: Emit) -> Refusal:
    """Record and tell that a client's update is not part of the mean; what it sent is shown safely, and cut."""
    refusal = Refusal(client=client if client.isprintable() and len(client) < 200 else shown(client), reason=" ".join(reason.split())[:500])
    emit("refused", round=round, client=refusal.client, reason=refusal.reason)
    return refusal


def require_quorum(round: int, updates: Sequence[ClientUpdate], asked: Sequence[str], refused: Sequence[Refusal], config: Config) -> None:
    """Enough updates to go on.

    Raises:
        TrainingError: else; it names who is missing and why.
    """
    needed = quorum(config, len(asked))
    if len(updates) >= needed:
        return
    who = "; ".join(f"client {refusal.client}: {refusal.reason}" for refusal in refused[:5]) or "the others did not answer"
    more = f" (and {len(refused) - 5} more)" if len(refused) > 5 else ""
    raise TrainingError(
        f"round {round} has {len(updates)} updates of {len(asked)} clients and needs {needed}: {who}{more}: "
        "mend that, or lower clients.quorum and clients.min_clients"
    )


def stays(method: str, round: int) -> str:
    """The factors that do not travel up in a round."""
    return "".join(part for part in "AB" if part not in method_named(method).sent(round))
