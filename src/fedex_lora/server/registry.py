"""What the server remembers of its clients from round to round: which base and adapter version each client holds."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fedex_lora.aggregation.flatten import flatten_adapter, flatten_deltas
from fedex_lora.config import Rules
from fedex_lora.protocol.delta_sync import CatchUp, Log, lacking, pruned
from fedex_lora.protocol.dumps import tensors_digest
from fedex_lora.protocol.messages import Download
from fedex_lora.types import Adapter, Aggregate, LowRank, ServerState


@dataclass(frozen=True, eq=False)
class ClientRegistry:
    """A value, never changed in place.

    Attributes:
        log: what the base gained in past rounds, as far as some client may need it.
        version: client -> the round after which it has base and adapter.
        last_changed: "A" and "B" (U and C, of cores) -> the last round that changed those factors of the global adapter.
        unknown_state: the clients that gave no valid answer when last asked: what they hold is not known.
        last_accepted: client -> the last round in which its update was part of the mean.
        pending_rejection: client -> why its last update was rejected, until it is told.
        history: version -> a digest of all that made it, of the versions that some client may have.
    """

    log: Log = field(default_factory=Log)
    version: Mapping[str, int] = field(default_factory=dict)
    last_changed: Mapping[str, int] = field(default_factory=lambda: {"A": 0, "B": 0})
    unknown_state: frozenset[str] = frozenset()
    last_accepted: Mapping[str, int] = field(default_factory=dict)
    pending_rejection: Mapping[str, str] = field(default_factory=dict)
    history: Mapping[int, str] = field(default_factory=dict)

    def record_replies(self, version: int, asked: Collection[str], valid: Collection[str], rejected: Mapping[str, str]) -> "ClientRegistry":
        """After messages that bring base and adapter of `version`: who answered validly has them; what the others hold is not known."""
        return replace(
            self,
            version={client: has for client, has in self.version.items() if client not in asked} | dict.fromkeys(valid, version),
            unknown_state=(self.unknown_state | set(asked)) - set(valid),
            pending_rejection={client: why for client, why in self.pending_rejection.items() if client not in asked}
            | {client: why for client, why in rejected.items() if client in asked},
        )

    def after_round(
        self, before: ServerState, after: ServerState, result: Aggregate, accepted: Iterable[str], clients: Collection[str], rules: Rules
    ) -> "ClientRegistry":
        """After a round: what it changed, and who was part of its mean.

        Args:
            before, after, result: of the round.
            accepted: the clients whose updates are part of the mean.
            clients: all of them.
            rules: what may travel, and whether the server has momentum.
        """
        log = replace(self.log, gains={**self.log.gains, after.round: result.residual}, adapters=self._adapters(before, rules))
        return replace(
            self,
            log=self._pruned(log, after, clients, rules),
            last_changed=self._changed(before, after),
            last_accepted={**self.last_accepted, **dict.fromkeys(accepted, after.round)},
            history=self._history(before, after, result),
        )

    def after_skip(self, before: ServerState, after: ServerState, clients: Collection[str], rules: Rules) -> "ClientRegistry":
        """After a round without a mean, which ends what momentum there was."""
        if not rules.server.through_base:
            return replace(self, history=self._history(before, after))
        log = replace(self.log, halts=[*self.log.halts, after.round], adapters=self._adapters(before, rules))
        return replace(self, log=self._pruned(log, after, clients, rules), history=self._history(before, after))

    def _history(self, before: ServerState, after: ServerState, result: Aggregate | None = None) -> dict[int, str]:
        """With the new version's: the one before, and what the round changed. Of a skipped round only its number."""
        made = flatten_adapter("adapter", after.adapter) | dict(after.other) | flatten_deltas("residual", result.residual if result else {})
        digest = tensors_digest(made if result else {}, f"{self.history.get(before.round, '')} {after.round}")
        known = {version: found for version, found in self.history.items() if version in self.version.values()}
        return {**known, after.round: digest}

    def _changed(self, before: ServerState, after: ServerState) -> dict[str, int]:
        found = dict(self.last_changed)
        for module, pair in after.adapter.items():
            for part, tensor in pair.parts.items():
                same = found.get(part) != after.round and torch.equal(before.adapter[module].parts[part], tensor)
                found[part] = found.get(part, 0) if same else after.round
        return found

    def _pruned(self, log: Log, after: ServerState, clients: Collection[str], rules: Rules) -> Log:
        oldest = min(self.version.get(client, 0) for client in clients)
        return pruned(log, after.base_delta, oldest, rules.messages, rules.server.through_base)

    def _adapters(self, before: ServerState, rules: Rules) -> dict[int, Adapter]:
        """Under momentum also the adapter that is the present one no more, where its product is not zero."""
        now = {module: pair for module, pair in before.adapter.items() if bool(pair.B.any())}
        return {**self.log.adapters, before.round: now} if rules.server.through_base else {}

    def unchanged_factors(self, client: str) -> str:
        """The factors of the global adapter that a client has as they are."""
        return "".join(part for part, last in self.last_changed.items() if client in self.version and last <= self.version[client])

    def sync_for(self, since: int, state: ServerState, rules: Rules) -> CatchUp:
        """What a client with the base of version `since` lacks."""
        return lacking(self.log, state.base_delta, since, state.round, rules.messages, rules.server.through_base)

    def with_clients(self, clients: Collection[str]) -> "ClientRegistry":
        """Only of these clients: who is gone for good is forgotten, and no log is kept for it."""
        return replace(
            self,
            version={client: has for client, has in self.version.items() if client in clients},
            unknown_state=self.unknown_state & set(clients),
            last_accepted={client: number for client, number in self.last_accepted.items() if client in clients},
            pending_rejection={client: why for client, why in self.pending_rejection.items() if client in clients},
        )


@dataclass(frozen=True, eq=False)
class Unanswered:
    """The messages of a round that were not answered in it, and what the base has gained since they were sent."""

    downloads: Mapping[str, Download] = field(default_factory=dict)
    gained: Mapping[str, LowRank] = field(default_factory=dict)


@dataclass(eq=False)
class ServerContext:
    """Where a run is; a round that ends puts the next values in place.

    Attributes:
        rules, ranks, run: see `Server`.
        clients: the names of all clients, sorted.
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
