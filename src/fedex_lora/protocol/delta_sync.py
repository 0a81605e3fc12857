"""Catching up: the base delta has a version (rounds completed), and a message brings a client from its own to the round's.

`D_v = D_{v-1} + s R_v` per module. A client at version u is sent, for each module, one of three forms of what it lacks, whichever has the
fewest numbers:

- log: the gains of rounds u+1 .. v, added one by one as the server did, so that D has the server's bits;
- snapshot: the server's own `D_v`, which replaces the client's: the server's bits too;
- gain: `D_v - D_u` recompressed to its numerical rank: within the tolerance.

Under server momentum the base also gains what repeats the last change of the effective weight (`aggregation.momentum`). Who was there in
the last two rounds works that out; a log brings the adapters of its rounds too, a snapshot the velocity, and there is no gain.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from fedex_lora.aggregation.lowrank import concatenate
from fedex_lora.aggregation.momentum import halted
from fedex_lora.aggregation.server_state import PLAIN, advance, grown
from fedex_lora.aggregation.truncation import truncate
from fedex_lora.config import Messages, ServerOptimizer, Truncation
from fedex_lora.errors import LacksError, WireError
from fedex_lora.types import Adapter, Delta, LoRAPair, LowRank

Kept = TypeVar("Kept")
COLUMNS = 256  # of a module's log, up to which recompression is tried: its time grows with their square, and it seldom pays


@dataclass(frozen=True, eq=False)
class CatchUp:
    """What brings a base delta from version `since` to `version`; each module in one form only, none where nothing was gained.

    Attributes:
        since, version: rounds completed.
        log: round -> module path -> what the base gained in it; every round from since + 1 to version, be it empty.
        gain: module path -> `D_version - D_since`, to be added.
        snapshot: module path -> `D_version`, which replaces the client's.
        adapters: under momentum: round -> module path -> the global adapter after it, of the rounds before `version` that are in the log.
        halts: the rounds among them that were skipped, which end what momentum there was.
    """

    since: int
    version: int
    log: Mapping[int, Mapping[str, LowRank]] = field(default_factory=dict)
    gain: Mapping[str, LowRank] = field(default_factory=dict)
    snapshot: Mapping[str, Delta] = field(default_factory=dict)
    adapters: Mapping[int, Adapter] = field(default_factory=dict)
    halts: Sequence[int] = ()


@dataclass(frozen=True, eq=False)
class ModelCopy:
    """A client's copy of the global model.

    Attributes:
        version: rounds completed.
        delta: module path -> D.
        adapter: the global adapter; at version 0 the initial one.
        lossy: the modules whose D is the server's within rounding or the tolerance only, not bit for bit.
        history: what it came from, as the server said.
    """

    version: int = 0
    delta: Mapping[str, Delta] = field(default_factory=dict)
    adapter: Adapter = field(default_factory=dict)
    lossy: frozenset[str] = frozenset()
    history: str = ""


@dataclass(frozen=True, eq=False)
class Log:
    """What a server keeps of past gains.

    Attributes:
        gains: round -> module path -> what the base gained in it.
        whole: module path -> the version from which all its gains are here; absent: from the start.
        adapters: under momentum: round -> the global adapter after it, but for the present one (modules whose product is not zero).
        halts: the rounds that were skipped.
    """

    gains: Mapping[int, Mapping[str, LowRank]] = field(default_factory=dict)
    whole: Mapping[str, int] = field(default_factory=dict)
    adapters: Mapping[int, Adapter] = field(default_factory=dict)
    halts: Sequence[int] = ()

    def since(self, version: int, module: str) -> list[LowRank] | None:
        """The gains of a module after `version`, in order; None if some of them were dropped."""
        if version < self.whole.get(module, 0):
            return None
        return [gain[module] for number, gain in sorted(self.gains.items()) if number > version and module in gain]

    def past(self, version: int, module: str) -> list[LoRAPair]:
        """The global adapters of a module after `version`, where the log has them."""
        return [adapter[module] for number, adapter in self.adapters.items() if number > version and module in adapter]


def pruned(log: Log, base_delta: Mapping[str, Delta], oldest: int, messages: Messages, moving: bool = False) -> Log:
    """The log without what can no longer be the smallest form for any client, so that it does not grow for ever with those who never come.

    A module's log serves as it is while it has no more numbers than the snapshot, and to be recompressed up to `COLUMNS`; never under
    momentum (`moving`), where the adapters of its rounds count as well.

    Args:
        log: up to the version of `base_delta`.
        base_delta: the server's D.
        oldest: the lowest version that some client has.
        messages: with `catch_up = "log"` everything that a client may ask for is kept.
    """
    whole = {module: max(oldest, log.whole.get(module, 0)) for module in base_delta}
    for module, delta in base_delta.items() if messages.catch_up == "smallest" else ():
        numbers, columns = 0, 0
        for number in sorted({*log.gains, *log.adapters}, reverse=True):
            gain, past = log.gains.get(number, {}).get(module), log.adapters.get(number, {}).get(module)
            columns += gain.rank if gain else 0
            numbers += (gain.numel if gain else 0) + (past.A.numel() + past.B.numel() if past else 0)
            if numbers > delta.numel and (moving or columns > COLUMNS):
                whole[module] = max(whole[module], number)
                break

    def kept(log: Mapping[int, Mapping[str, Kept]]) -> dict[int, dict[str, Kept]]:
        return {
            number: {module: part for module, part in parts.items() if number > whole.get(module, 0)}
            for number, parts in log.items()
            if number > oldest
        }

    return Log(gains=kept(log.gains), whole=whole, adapters=kept(log.adapters), halts=[number for number in log.halts if number > oldest])


def lacking(log: Log, base_delta: Mapping[str, Delta], since: int, version: int, messages: Messages, moving: bool = False) -> CatchUp:
    """What a client at version `since` lacks of `base_delta`, the D of `version`.

    Each module in its smallest form (ties: log, snapshot, gain), or as log where it is still whole, by `messages.catch_up`. Under momentum
    (`moving`) the log brings the adapters of its rounds, a snapshot its velocity, and there is no gain: the velocity is none of it.
    """
    rounds = range(since + 1, version + 1)
    snapshot = {module: delta for module, delta in base_delta.items() if log.since(since, module) is None}
    gain: dict[str, LowRank] = {}
    if messages.catch_up == "smallest":
        pieces = {module: log.since(since, module) for module in base_delta}
        sizes = {module: math.inf if parts is None else _numel(parts, log.past(since, module)) for module, parts in pieces.items()}
        snapshot = {module: delta for module, delta in base_delta.items() if delta.numel < sizes[module]}
        summed = {module: concatenate(parts) for module, parts in pieces.items() if parts is not None and len(parts) > 1 and not moving}
        summed = {module: whole for module, whole in summed.items() if whole.rank <= COLUMNS}
        shorter, _ = truncate(summed, Truncation(energy=1 - messages.tolerance**2), default_rank=1)
        gain = {module: part for module, part in shorter.items() if part.numel < min(sizes[module], base_delta[module].numel)}
        snapshot = {module: delta for module, delta in snapshot.items() if module not in gain}
    kept = {
        number: {module: part for module, part in log.gains.get(number, {}).items() if module not in gain and module not in snapshot}
        for number in rounds
    }
    past = {
        number: {module: pair for module, pair in adapter.items() if module not in snapshot}
        for number, adapter in log.adapters.items()
        if number in rounds
    }
    halts = [number for number in log.halts if number in rounds]
    return CatchUp(since=since, version=version, log=kept, gain=gain, snapshot=snapshot, adapters=past, halts=halts)


def _numel(parts: Sequence[LowRank], past: Sequence[LoRAPair]) -> int:
    return sum(part.numel for part in parts) + sum(pair.A.numel() + pair.B.numel() for pair in past)


def require_next(copy: ModelCopy, message: CatchUp) -> None:
    """The message begins where the client's copy is.

    Raises:
        LacksError: else.
    """
    if message.since != copy.version:
        raise LacksError(
            f"the base is at version {copy.version}, and the message counts from version {message.since}: "
            f"ask the server for what came after round {copy.version}"
        )


def caught_up(copy: ModelCopy, message: CatchUp, adapter: Adapter, pace: ServerOptimizer = PLAIN) -> ModelCopy:
    """The client's copy after a message.

    Args:
        copy: what the client has.
        message: what it lacks.
        adapter: the global adapter of the message's version.
        pace: momentum and learning rate of the server.

    Raises:
        LacksError: the message does not begin at the client's version.
        WireError: its log has a hole.
    """
    require_next(copy, message)
    require_whole(message)

    def logged(parts: Mapping[str, Kept]) -> dict[str, Kept]:
        return {module: part for module, part in parts.items() if module not in message.snapshot}

    delta, before, last, halts = logged(copy.delta), logged(copy.adapter), logged(adapter), set(message.halts)
    for number in sorted(message.log):
        if number in halts:
            delta = halted(delta)
            continue
        after = last if number == message.version else dict(message.adapters.get(number, {}))
        delta, before = grown(delta, message.log[number], before, after, pace), after
    delta = {**advance(delta, message.gain), **message.snapshot}
    return ModelCopy(message.version, delta, adapter, (copy.lossy | message.gain.keys()) - message.snapshot.keys())


def require_whole(message: CatchUp) -> None:
    """Every round from `since + 1` to `version` is in the log, no other, and no module comes in two forms.

    Raises:
        WireError: else.
    """
    span = f"the delta log from version {message.since} to {message.version}"
    if message.since > message.version:
        raise WireError(f"{span} goes backwards: the server has lost rounds that this client has; start the run anew")
    for number in message.log:
        if not message.since < number <= message.version:
            raise WireError(f"{span} holds round {number}, which is not between them: ask the server for rounds {message.since + 1} on")
    if len(message.log) < message.version - message.since:
        missing = next(number for number in range(message.since + 1, message.version + 1) if number not in message.log)
        raise WireError(f"{span} has a hole: round {missing} is missing; ask the server for rounds {message.since + 1} on")
    if odd := sorted(number for number in [*message.adapters, *message.halts] if number not in message.log):
        raise WireError(f"{span} has an adapter, or a skipped round, of round {odd[0]}, which is not in it: ask the server for all of it")
    if odd := [number for number in message.halts if message.log[number]]:
        raise WireError(f"{span} has gains of round {odd[0]}, which it calls skipped: ask the server for all of it")
    logged = {module for gains in message.log.values() for module in gains}
    twice = (logged & message.gain.keys()) | (logged & message.snapshot.keys()) | (message.gain.keys() & message.snapshot.keys())
    if twice:
        raise WireError(f"module {min(twice)} comes in two forms, and its base can gain from one only: send log, gain or snapshot")
