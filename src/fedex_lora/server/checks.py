"""What single keys of a configuration cannot say: whether they go together."""

import math
from collections.abc import Collection, Sequence

import numpy as np

from fedex_lora.aggregation import METHODS, Method, derive_seed, get_method
from fedex_lora.aggregation.factorizations import ALIGNED
from fedex_lora.config import Config, Rules, ServerOptimizer, Truncation
from fedex_lora.errors import ConfigError
from fedex_lora.privacy.settings import require_private


def require_consistent(config: Config, clients: int) -> None:
    """What single keys cannot say: do method, ranks, precision, truncation, optimiser state and privacy go together?

    Raises:
        UsageError: unknown method or gauge.
        ConfigError: they do not.
    """
    method = get_method(config.method)
    require_private(config)
    require_epsilon(config)
    _require_ranks(config, method, clients)
    if not method.lora and (config.base.dtype != "float32" or config.base.quantization != "none"):
        raise ConfigError(f"{config.method} trains the base itself: set base.dtype = 'float32' and base.quantization = 'none'")
    require_rules(config, clients, bool(config.clients.ranks))


def require_epsilon(config: Config) -> None:
    """A run whose `[privacy]` says more than what nodes take of it (`clip_norm`) has an epsilon: or it would be plain, without a word.

    Raises:
        ConfigError: it has none.
    """
    said = [key for key in config.privacy.model_dump(exclude_defaults=True) if key != "clip_norm"]
    if said and not config.privacy.is_on:
        raise ConfigError(
            f"[privacy] says {', '.join(said)} and no epsilon, so this run would not be private: set privacy.epsilon, or remove the table"
        )


def require_rules(rules: Rules, clients: int, ranks: bool) -> None:
    """The part of it that needs no model.

    Args:
        rules: of the run.
        clients: how many.
        ranks: do they differ in rank?

    Raises:
        UsageError, ConfigError: see `require_consistent`.
    """
    method = get_method(rules.method)
    _require_pace(rules, method)
    if len(method.trained_schedule) > 1 and rules.local.optimizer_state == "keep":
        raise ConfigError(f"local.optimizer_state = 'keep' does not go with {rules.method}, which trains factors in turn: use 'reset'")
    if rules.local.head_rounds and (rules.local.optimizer_state == "keep" or not method.lora):
        key = "local.optimizer_state = 'keep'" if method.lora else rules.method
        raise ConfigError(f"local.head_rounds does not go with {key}, because it trains other tensors in later rounds: remove it")
    if rules.local.head_rounds % len(method.trained_schedule):
        turns = f"factors in turns of {len(method.trained_schedule)} rounds: give a multiple of that"
        raise ConfigError(f"local.head_rounds = {rules.local.head_rounds}, and {rules.method} trains {turns}")
    if rules.local.head_rounds and rules.server.momentum and rules.server.momentum_on == "all":
        raise ConfigError(
            "local.head_rounds does not go with server.momentum_on = 'all', which moves a head that is frozen: use 'adapters'"
        )
    if method.refactorises and rules.local.optimizer_state == "keep":
        raise ConfigError(
            f"local.optimizer_state = 'keep' does not go with {rules.method}, which re-writes the adapter's factors each round: "
            "Adam's moments would belong to other coordinates; use 'reset'"
        )
    asked = participants(rules.clients.fraction, clients)
    if rules.clients.min_clients > asked and not method.centralised:
        raise ConfigError(f"clients.min_clients = {rules.clients.min_clients} and {asked} clients take part in a round: lower it")
    _require_late(rules, method, ranks)
    if ranks:
        _require_ranks_that_differ(rules, method)
    if rules.truncation != Truncation() and method.residual_policy != "truncate":
        raise ConfigError(f"[truncation] is for fedex-svd, and the method is {rules.method}: remove it, or set method = 'fedex-svd'")


def _require_pace(rules: Rules, method: Method) -> None:
    """Momentum and a server's learning rate act on one global model that the base can make up for."""
    pace = rules.server
    if not pace.moves:
        if pace != ServerOptimizer():
            raise ConfigError("server.momentum_on and momentum_of say nothing without server.momentum: set that, or remove them")
        return
    if not method.momentum:
        able = ", ".join(name for name, row in METHODS.items() if row.momentum)
        raise ConfigError(f"server.momentum and server.learning_rate do not go with {rules.method}: remove them, or use one of {able}")
    if pace.momentum_of == "factors" and rules.method != "fedit":
        raise ConfigError(f"server.momentum_of = 'factors' is a control for fedit, and the method is {rules.method}: use 'products'")


def participants(fraction: float, clients: int) -> int:
    """How many of the clients take part in a round."""
    return max(1, math.ceil(fraction * clients - 1e-9))


def quorum(rules: Rules, asked: int) -> int:
    """How many of the clients that were asked must have an update accepted (a pooled method asks one only)."""
    return min(asked, max(rules.clients.min_clients, math.ceil(rules.clients.quorum * asked - 1e-9)))


def _require_late(rules: Rules, method: Method, ranks: bool) -> None:
    """An update of the round before can be part of a mean only where its factors are in the coordinates of that mean."""
    if rules.clients.late == "refuse":
        return
    other_coordinates = (
        method.client_state or len(method.trained_schedule) > 1 or (method.trained_schedule != ("AB",) and method.refactorises)
    )
    if other_coordinates or ranks:
        what = "clients.ranks" if ranks else f"method {rules.method}"
        raise ConfigError(f"clients.late = 'next' does not go with {what}: use 'refuse'")


def _require_ranks(config: Config, method: Method, clients: int) -> None:
    ranks = config.clients.ranks
    if ranks is None:
        return
    _require_ranks_that_differ(config, method)
    if len(ranks) != clients:
        raise ConfigError(f"clients.ranks has {len(ranks)} ranks for {clients} clients: give one a client, in the order of their names")
    if max(ranks) != config.lora.r:
        raise ConfigError(f"the largest of clients.ranks is {max(ranks)} and lora.r is {config.lora.r}: make them equal")


def _require_ranks_that_differ(rules: Rules, method: Method) -> None:
    if not method.per_client_ranks or method.centralised:
        able = ", ".join(name for name, row in METHODS.items() if row.per_client_ranks)
        raise ConfigError(f"method {rules.method} needs one rank for all clients: remove clients.ranks, or use one of {able}")
    if method.gauge in ALIGNED:
        raise ConfigError(f"clients.ranks needs components in falling order, and {method.gauge} turns them: use balanced or orthonormal-a")


def below_quorum(round: int, updates: int, asked: int, rejected: Sequence[tuple[str, str]], rules: Rules) -> str:
    """Why a round has too few updates, with who is missing and why; "" when there are enough."""
    needed = quorum(rules, asked)
    if updates >= needed:
        return ""
    who = "; ".join(f"client {client}: {reason}" for client, reason in rejected[:5]) or "the others did not answer"
    more = f" (and {len(rejected) - 5} more)" if len(rejected) > 5 else ""
    return f"round {round} has {updates} updates of {asked} clients and needs {needed}: {who}{more}"


def sample(clients: Collection[str], fraction: float, seed: int, round: int) -> list[str]:
    """This round's participants: `ceil(fraction * k)` of the clients, sorted."""
    wanted = participants(fraction, len(clients))
    rng = np.random.default_rng(derive_seed(seed, round, "sampling"))
    return sorted(str(client) for client in rng.choice(sorted(clients), wanted, replace=False))
