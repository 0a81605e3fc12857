"""Catching up: the base delta has a version (rounds completed), and a message brings a client from its own to the round's.

`D_v = D_{v-1} + s R_v` per module. A client at version u is sent, for each module, one of three forms of what it lacks, whichever has the
fewest numbers:

- log: the gains of rounds u+1 .. v, added one by one as the server did, so that D has the server's bits;
- snapshot: the server's own `D_v`, which replaces the client's: the server's bits too;
- gain: `D_v - D_u` recompressed to its numerical rank: within the tolerance.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedex_lora.aggregation.lowrank import concatenate
from fedex_lora.aggregation.truncation import truncate
from fedex_lora.config import Messages, Truncation
from fedex_lora.errors import LacksError, WireError
from fedex_lora.server import advance
from fedex_lora.types import Delta, LowRank

COLUMNS = 256  # of a module's log, up to which recompression is tried: its time grows with their square, and it seldom pays


@dataclass(frozen=True, eq=False)
class CatchUp:
    """What brings a base delta from version `since` to `version`; each module in one form only, none where nothing was gained.

    Attributes:
        since, version: rounds completed.
        log: round -> module path -> what the base gained in it; every round from since + 1 to version, be it empty.
        gain: module path -> `D_version - D_since`, to be added.
        snapshot: module path -> `D_version`, which replaces the client's.
    """

    since: int
    version: int
    log: Mapping[int, Mapping[str, LowRank]] = field(default_factory=dict)
    gain: Mapping[str, LowRank] = field(default_factory=dict)
    snapshot: Mapping[str, Delta] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class BaseCopy:
    """A client's base delta.

    Attributes:
        version: rounds completed.
        delta: module path -> D.
        lossy: the modules whose D is the server's within rounding or the tolerance only, not bit for bit.
    """

    version: int = 0
    delta: Mapping[str, Delta] = field(default_factory=dict)
    lossy: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Log:
    """What a server keeps of past gains.

    Attributes:
        gains: round -> module path -> what the base gained in it.
        whole: module path -> the version from which all its gains are here; absent: from the start.
    """

    gains: Mapping[int, Mapping[str, LowRank]] = field(default_factory=dict)
    whole: Mapping[str, int] = field(default_factory=dict)

    def since(self, version: int, module: str) -> list[LowRank] | None:
        """The gains of a module after `version`, in order; None if some of them were dropped."""
        if version < self.whole.get(module, 0):
            return None
        return [gain[module] for number, gain in sorted(self.gains.items()) if number > version and module in gain]


def pruned(log: Log, base_delta: Mapping[str, Delta], oldest: int, messages: Messages) -> Log:
    """The log without what can no longer be the smallest form for any client, so that it does not grow for ever with those who never come.

    A module's log serves as it is while it has no more numbers than the snapshot, and to be recompressed up to `COLUMNS`.

    Args:
        log: up to the version of `base_delta`.
        base_delta: the server's D.
        oldest: the lowest version that some client has.
        messages: with `catch_up = "log"` everything that a client may ask for is kept.
    """
    whole = {module: max(oldest, log.whole.get(module, 0)) for module in base_delta}
    for module, delta in base_delta.items() if messages.catch_up == "smallest" else ():
        columns = 0
        for number in sorted(log.gains, reverse=True):
            columns += log.gains[number][module].rank if module in log.gains[number] else 0
            if columns > COLUMNS and columns * sum(delta.shape) > delta.numel:
                whole[module] = max(whole[module], number)
                break
    gains = {
        number: {module: gain for module, gain in gains.items() if number > whole[module]}
        for number, gains in log.gains.items()
        if number > oldest
    }
    return Log(gains=gains, whole=whole)


def lacking(log: Log, base_delta: Mapping[str, Delta], since: int, version: int, messages: Messages) -> CatchUp:
    """What a client at version `since` lacks of `base_delta`, the D of `version`.

    Each module in its smallest form (ties: log, snapshot, gain), or as log where it is still whole, by `messages.catch_up`.
    """
    rounds = range(since + 1, version + 1)
    snapshot = {module: delta for module, delta in base_delta.items() if log.since(since, module) is None}
    gain: dict[str, LowRank] = {}
    if messages.catch_up == "smallest":
        pieces = {module: log.since(since, module) for module in base_delta}
        sizes = {module: math.inf if parts is None else _numel(parts) for module, parts in pieces.items()}
        snapshot = {module: delta for module, delta in base_delta.items() if delta.numel < sizes[module]}
        summed = {module: concatenate(parts) for module, parts in pieces.items() if parts is not None and len(parts) > 1}
        summed = {module: whole for module, whole in summed.items() if whole.rank <= COLUMNS}
        shorter, _ = truncate(summed, Truncation(energy=1 - messages.tolerance**2), default_rank=1)
        gain = {module: part for module, part in shorter.items() if part.numel < min(sizes[module], base_delta[module].numel)}
        snapshot = {module: delta for module, delta in snapshot.items() if module not in gain}
    kept = {
        number: {module: part for module, part in log.gains.get(number, {}).items() if module not in gain and module not in snapshot}
        for number in rounds
    }
    return CatchUp(since=since, version=version, log=kept, gain=gain, snapshot=snapshot)


def _numel(parts: Sequence[LowRank]) -> int:
    return sum(part.numel for part in parts)


def caught_up(base: BaseCopy, message: CatchUp) -> BaseCopy:
    """The client's base after a message.

    Raises:
        LacksError: the message does not begin at the client's version.
        WireError: its log has a hole.
    """
    if message.since != base.version:
        raise LacksError(
            f"the base is at version {base.version}, and the message counts from version {message.since}: "
            f"ask the server for what came after round {base.version}"
        )
    require_whole(message)
    delta = base.delta
    for number in sorted(message.log):
        delta = advance(delta, message.log[number])
    delta = {**advance(delta, message.gain), **message.snapshot}
    return BaseCopy(version=message.version, delta=delta, lossy=(base.lossy | message.gain.keys()) - message.snapshot.keys())


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
    logged = {module for gains in message.log.values() for module in gains}
    twice = (logged & message.gain.keys()) | (logged & message.snapshot.keys()) | (message.gain.keys() & message.snapshot.keys())
    if twice:
        raise WireError(f"module {min(twice)} comes in two forms, and its base can gain from one only: send log, gain or snapshot")
