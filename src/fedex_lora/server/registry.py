"""What the server remembers of its clients from round to round: who has which base and adapter."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fedex_lora.config import Config
from fedex_lora.protocol.delta_sync import CatchUp, Log, lacking, pruned
from fedex_lora.server.replies import Refusal
from fedex_lora.types import Adapter, Aggregate, ClientUpdate, ServerState


@dataclass(frozen=True, eq=False)
class Books:
    """A value, never changed in place.

    Attributes:
        log: what the base gained in past rounds, as far as some client may need it.
        version: client -> the round after which it has base and adapter.
        changed: "A" and "B" -> the last round that changed those factors of the global adapter.
        lost: the clients that gave no valid answer when last asked: what they hold is not known.
        accepted: client -> the last round in which its update was part of the mean.
        told: client -> why its last update was refused, until it is told.
    """

    log: Log = field(default_factory=Log)
    version: Mapping[str, int] = field(default_factory=dict)
    changed: Mapping[str, int] = field(default_factory=lambda: {"A": 0, "B": 0})
    lost: frozenset[str] = frozenset()
    accepted: Mapping[str, int] = field(default_factory=dict)
    told: Mapping[str, str] = field(default_factory=dict)

    def answered(self, version: int, asked: Collection[str], valid: Collection[str], refused: Iterable[Refusal]) -> "Books":
        """After messages that bring base and adapter of `version`: who answered validly has them; what the others hold is not known."""
        return replace(
            self,
            version={client: has for client, has in self.version.items() if client not in asked} | dict.fromkeys(valid, version),
            lost=(self.lost | set(asked)) - set(valid),
            told={client: why for client, why in self.told.items() if client not in asked}
            | {refusal.client: refusal.reason for refusal in refused if refusal.client in asked},
        )

    def judged(self, refused: Iterable[Refusal]) -> "Books":
        """After valid updates were refused for what is in them: these clients are told why."""
        return replace(self, told={**self.told, **{refusal.client: refusal.reason for refusal in refused}})

    def stepped(
        self,
        before: ServerState,
        after: ServerState,
        result: Aggregate,
        updates: Sequence[ClientUpdate],
        clients: Collection[str],
        config: Config,
    ) -> "Books":
        """After a round: what it changed, and who was part of its mean.

        Args:
            before, after, result: of the round.
            updates: that are part of the mean.
            clients: all of them.
            config: what may travel, and whether the server has momentum.
        """
        log = replace(self.log, gains={**self.log.gains, after.round: result.residual}, adapters=self._adapters(before, config))
        return replace(
            self,
            log=pruned(log, after.base_delta, self._oldest(clients), config.messages, config.server.through_base),
            changed={part: after.round if _changed(part, before.adapter, after.adapter) else last for part, last in self.changed.items()},
            accepted={**self.accepted, **{update.client_id: after.round for update in updates}},
        )

    def skipped(self, before: ServerState, after: ServerState, clients: Collection[str], config: Config) -> "Books":
        """After a round without a mean, which ends what momentum there was."""
        log = replace(self.log, halts=[*self.log.halts, after.round], adapters=self._adapters(before, config))
        return replace(self, log=pruned(log, after.base_delta, self._oldest(clients), config.messages, config.server.through_base))

    def _adapters(self, before: ServerState, config: Config) -> dict[int, Adapter]:
        """Under momentum also the adapter that is the present one no more, where its product is not zero."""
        now = {module: pair for module, pair in before.adapter.items() if bool(pair.B.any())}
        return {**self.log.adapters, before.round: now} if config.server.through_base else {}

    def _oldest(self, clients: Collection[str]) -> int:
        return min(self.version.get(client, 0) for client in clients)

    def known(self, client: str) -> str:
        """The factors of the global adapter that a client has as they are."""
        return "".join(part for part, last in self.changed.items() if client in self.version and last <= self.version[client])

    def lacking(self, since: int, state: ServerState, config: Config) -> CatchUp:
        """What a client with the base of version `since` lacks."""
        return lacking(self.log, state.base_delta, since, state.round, config.messages, config.server.through_base)


def _changed(part: str, before: Adapter, after: Adapter) -> bool:
    return any(not torch.equal(getattr(before[name], part), getattr(pair, part)) for name, pair in after.items())
