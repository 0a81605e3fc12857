"""Catching up: the base delta has a version (rounds completed), and a message brings a client from its own to the round's.

`D_v = D_{v-1} + s R_v` per module. A client at version u is sent, for each module, one of three forms of what it lacks, whichever has the
fewest numbers:

- log: the gains of rounds u+1 .. v, added one by one as the server did, so that D has the server's bits;
- snapshot: the server's own `D_v`, which replaces the client's: the server's bits too;
- gain: `D_v - D_u` recompressed to its numerical rank: within the tolerance.

A client of the last round can do with less of it (`of_the_others`, `with_own`), because it knows its own factors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedex_lora.aggregation import aggregate, on_scaling
from fedex_lora.aggregation.lowrank import concatenate
from fedex_lora.aggregation.truncation import truncate, without_blocks
from fedex_lora.config import Messages, Truncation
from fedex_lora.errors import LacksError, WireError
from fedex_lora.server import advance
from fedex_lora.types import Adapter, ClientUpdate, Delta, LoRAPair, LowRank, ServerState

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


def of_the_others(
    client: str, updates: Sequence[ClientUpdate], weights: Mapping[str, float], state: ServerState, messages: Messages
) -> tuple[Adapter, CatchUp]:
    """What a client that took part in the last FedEx round lacks, given that it knows its own factors: (k-1) r ranks instead of k r.

    With `q = 1 - p_i`, A' and B' the means of the others' factors with weights `p_j / q`, and their covariance
    `R' = sum_{j != i} (p_j / q) (B_j - B')(A_j - A')` of rank (k-2) r, the message carries A', B', `s q R'` (as a gain) and p_i.

    Args:
        client: one of the participants, with a weight below one.
        updates: of the last round.
        weights: client id -> p_j.
        state: after that round.
        messages: whether a module's snapshot may be sent where it is smaller.
    """
    others = [update for update in updates if update.client_id != client]
    shares = [weights[update.client_id] for update in others]
    result, q = aggregate(others, "fedex", shares, state=state), math.fsum(shares)
    gain = {module: without_blocks(LowRank(U=q * part.U, V=part.V)) for module, part in result.residual.items()}
    snapshot = {
        module: state.base_delta[module]
        for module, part in gain.items()
        if messages.catch_up == "smallest" and module in state.base_delta and state.base_delta[module].numel < part.numel
    }
    gain = {module: part for module, part in gain.items() if module not in snapshot}
    return result.adapter, CatchUp(state.round - 1, state.round, {state.round: {}}, gain, snapshot)


def with_own(adapter: Adapter, message: CatchUp, share: float, own: Adapter | None) -> tuple[dict[str, LoRAPair], CatchUp]:
    """The global adapter and the whole gain, from what `of_the_others` sent and the client's own factors of the round.

    `Abar = A' + p_i (A_i - A')`, `Bbar = B' + p_i (B_i - B')` and `R = q R' + q p_i (B_i - B')(A_i - A')`, because
    `R = sum_j p_j B_j A_j - Bbar Abar = q (R' + B' A') + p_i B_i A_i - (q B' + p_i B_i)(q A' + p_i A_i)`, where
    `q - q^2 = p_i - p_i^2 = q p_i` (the law of total covariance). That is an identity in A' and B', so rounding them moves the
    client's model by no more than `q s B' A'` itself is rounded, however near the clients are to each other.

    Args:
        adapter: module path -> A', B', on the scaling s of the global adapter.
        message: with `s q R'` as gain.
        share: p_i.
        own: what this client trained in the round; any scaling.

    Raises:
        LacksError: the client has no such factors, or they do not fit.
    """
    merged: dict[str, LoRAPair] = {}
    gain = dict(message.gain)
    for module, others in adapter.items():
        mine = own.get(module) if own is not None else None
        if mine is None or mine.shape != others.shape or mine.rank != others.rank:
            raise LacksError(
                f"the message counts on what this client trained in round {message.version} in {module}, and it has no such factors: "
                "ask the server for the whole message"
            )
        mine = on_scaling(mine, others.scaling)
        dA, dB = mine.A - others.A, mine.B - others.B
        merged[module] = LoRAPair(A=others.A + share * dA, B=others.B + share * dB, scaling=others.scaling)
        if module not in message.snapshot and dA.any() and dB.any():
            part = LowRank(U=(others.scaling * share * (1 - share)) * dB, V=dA)
            gain[module] = concatenate([gain[module], part]) if module in gain else part
    return merged, replace(message, gain=gain)
