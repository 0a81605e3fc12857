"""The server as pure functions: `init`, then `step` once a round. State goes in, state comes out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedex_lora.aggregation.batching import rescaled
from fedex_lora.aggregation.engine import WeightRule, aggregate, require_continues
from fedex_lora.aggregation.factorizations import regauged
from fedex_lora.aggregation.factors import derive_seed, init_lora_a
from fedex_lora.aggregation.flatten import flatten_adapter, scalings_of, unflatten_adapter
from fedex_lora.aggregation.lowrank import add, add_weighted, concatenate, finite
from fedex_lora.aggregation.methods import get_method
from fedex_lora.aggregation.momentum import gained, halted, last_change, moved_base, moved_tensors
from fedex_lora.aggregation.truncation import without_blocks
from fedex_lora.config import ServerOptimizer, Truncation
from fedex_lora.errors import AggregationError
from fedex_lora.types import (
    Adapter,
    Aggregate,
    ClientUpdate,
    Delta,
    Dense,
    LoRAPair,
    LowRank,
    Motion,
    ServerState,
)

PLAIN = ServerOptimizer()


def init(adapter: Adapter, other: Mapping[str, Tensor], method: str = "fedex", seed: int = 0) -> ServerState:
    """The state before the first round: the initial adapter, and a base that has gained nothing."""
    get_method(method)
    return ServerState(method=method, round=0, adapter=dict(adapter), base_delta={}, other=dict(other), seed=seed)


def step(
    state: ServerState,
    updates: Sequence[ClientUpdate],
    weights: WeightRule = "num_examples",
    truncation: Truncation | None = None,
    behind: Mapping[str, Mapping[str, LowRank]] | None = None,
    pace: ServerOptimizer = PLAIN,
) -> tuple[ServerState, Aggregate]:
    """One round: aggregate the updates and put the residual into the base.

    `D_v = D_{v-1} + s R_v`. Under an exact method `W0 + D_v + s B A = sum_i p_i (W_i,start + s_i B_i A_i)`, the mean of the
    participants' models (FedEx-LoRA, eq. 5-9 and 13-14), whatever rank they train (`start_of`). With momentum or a learning rate the
    base also takes up what they add to it (`aggregation.momentum`).

    Args:
        state: as left by `init` or the previous `step`; not changed.
        updates: this round's participants, in any order.
        weights, truncation: see `aggregate`.
        behind: client -> module path -> what the base that it trained on had beside the state's, for updates that were asked for
            earlier: `D_u - D_v`. The base gains `sum_i p_i (D_u - D_v)` with the residual, so the mean is of the models as they are.
        pace: momentum and learning rate of the server.

    Returns:
        The next state, and this round's aggregate (its residual is what clients that were there must download).

    Raises:
        AggregationError: see `aggregate`; or the updates do not continue the state's adapter.

    Example:
        >>> from fedex_lora.types import LoRAPair
        >>> pair = lambda: LoRAPair(A=torch.randn(2, 6), B=torch.randn(4, 2))
        >>> state = init({"q": pair()}, other={})
        >>> state, result = step(state, [ClientUpdate("a", {"q": pair()}, 1), ClientUpdate("b", {"q": pair()}, 1)])
        >>> state.round, state.base_delta["q"].rank
        (1, 2)
    """
    row = get_method(state.method)
    require_continues(state, updates, row)
    updates = [_continuing(state, update) for update in updates]
    result = aggregate(updates, state.method, weights, truncation, state)
    shares = [(result.weights[client], gains) for client, gains in (behind or {}).items()]
    residual = {module: without_blocks(gain) for module, gain in add_weighted(result.residual, shares).items()}  # it travels
    result = replace(result, residual=residual)
    shared = "A" in row.shared and "B" in row.shared
    personal = {**state.personal, **{update.client_id: update.adapter for update in updates}} if row.client_state and shared else {}
    return replace(following(state, result, pace), personal=personal), result


def following(state: ServerState, result: Aggregate, pace: ServerOptimizer = PLAIN) -> ServerState:
    """The state after a round with this aggregate: of all participants, or merged from those of regional servers (`aggregation.merge`)."""
    adapter, other, velocity = result.adapter, result.other, dict[str, Tensor]()
    if pace.moves and pace.momentum_of == "factors":
        now, means = (flatten_adapter("factor", one) for one in (state.adapter, adapter))
        tensors, velocity = moved_tensors(now, means, state.velocity, pace)
        adapter = unflatten_adapter("factor", scalings_of(adapter), tensors)
    if pace.moves and pace.momentum_on == "all":
        other, change = moved_tensors(state.other, other, state.velocity, pace)
        velocity = {**velocity, **change}
    return replace(
        state,
        round=state.round + 1,
        adapter=adapter,
        base_delta=grown(state.base_delta, result.residual, state.adapter, adapter, pace),
        other=other,
        personal={},
        velocity=velocity,
    )


def grown(
    base_delta: Mapping[str, Delta], residual: Mapping[str, LowRank], before: Adapter, after: Adapter, pace: ServerOptimizer
) -> dict[str, Delta]:
    """`D_v` from `D_{v-1}`, the round's residual and the global adapter before and after it; server and clients share it.

    Raises:
        AggregationError: see `advance`.
    """
    return moved_base(base_delta, residual, before, after, pace) if pace.through_base else advance(base_delta, residual)


def gained_in(before: ServerState, after: ServerState, result: Aggregate, pace: ServerOptimizer) -> Mapping[str, LowRank]:
    """What the base gained in a round: the residual, and with momentum more."""
    return gained(before.base_delta, after.base_delta) if pace.through_base else result.residual


def motion_of(state: ServerState, pace: ServerOptimizer) -> Motion | None:
    """What momentum and learning rate make the next round start from; None without them."""
    if not pace.moves:
        return None
    everything = pace.momentum_on == "all"
    other = {name: tensor for name, tensor in state.velocity.items() if name in state.other}
    return Motion(pace.momentum, pace.learning_rate, state.adapter, last_changes(state, pace), state.other if everything else {}, other)


def last_changes(state: ServerState, pace: ServerOptimizer) -> dict[str, Delta]:
    """Module path -> `W_t - W_{t-1}`, the last change of the effective weights, as the server took it down."""
    if pace.momentum_of == "products":
        found = {module: last_change(delta) for module, delta in state.base_delta.items()}
        return {module: change for module, change in found.items() if change is not None}
    changes: dict[str, Delta] = {}
    for module, pair in state.adapter.items() if state.velocity else ():
        old = LoRAPair(
            A=pair.A - state.velocity[f"factor|{module}|A"], B=pair.B - state.velocity[f"factor|{module}|B"], scaling=-pair.scaling
        )
        changes[module] = concatenate([pair.low_rank(), old.low_rank()])
    return changes


def skip(state: ServerState) -> ServerState:
    """The state after a round without a mean: the same model, one round further, and no change to repeat."""
    number = state.round + 1
    adapter = fresh_adapter(state.adapter, state.seed, number) if get_method(state.method).reinitialises else state.adapter
    return replace(state, round=number, adapter=adapter, base_delta=halted(state.base_delta), velocity={})


def fresh_adapter(like: Adapter, seed: int, round: int) -> dict[str, LoRAPair]:
    """The adapter that a method with new factors goes on with after `round`, in the shapes of `like`: A drawn, B zero."""
    drawn = derive_seed(seed, round, "fresh")
    return {
        module: LoRAPair(
            A=init_lora_a(module, pair.rank, pair.shape[1], drawn).to(pair.A.dtype), B=torch.zeros_like(pair.B), scaling=pair.scaling
        )
        for module, pair in like.items()
    }


def advance(base_delta: Mapping[str, Delta], residual: Mapping[str, LowRank]) -> dict[str, Delta]:
    """`D_v` from `D_{v-1}` and the round's residual; server and clients share it, so they hold the same bits.

    Raises:
        AggregationError: a matrix that is not finite, of factors that are.
    """
    changed = {module: add(base_delta.get(module), gain) for module, gain in residual.items()}
    for module, delta in changed.items():
        if isinstance(delta, Dense) and not finite(delta.W):
            raise AggregationError(f"the base delta of {module} overflows: some client's factors are too large; leave it out")
    return {**base_delta, **changed}


def start_of(method: str, adapter: Adapter, rank: int | None, own: Adapter | None) -> tuple[Adapter, dict[str, LowRank]]:
    """What one client trains, and what it holds frozen beside the common base, from the global adapter.

    Its model is `W0 + D + held + s B A`. Under an exact method that is the same model for every client:

    - a client of lower rank trains the first components of the global adapter, and holds the others;
    - a client with factors of its own trains them, and its base lacks what they add: `held = - s B A`.

    Args:
        method: the run's.
        adapter: the global one.
        rank: the client's; None: the adapter's.
        own: the factors that the client kept from its last round, where the method has it keep some.

    Returns:
        (the factors to train, module path -> what is held frozen; nothing for most methods).
    """
    row = get_method(method)
    if own is not None and row.client_state == "AB":
        own = regauged(own, row.gauge)
        return own, {module: LowRank(U=-pair.scaling * pair.B, V=pair.A) for module, pair in own.items()}
    if own is not None and row.client_state:
        return {module: pair.with_part(row.client_state, own[module].parts[row.client_state]) for module, pair in adapter.items()}, {}
    if rank is None or all(pair.rank <= rank for pair in adapter.values()):
        return adapter, {}
    first = {module: pair.first(rank) for module, pair in adapter.items()}
    held = {module: pair.after(rank) for module, pair in adapter.items() if row.holds_tail and pair.rank > rank}
    return first, held


def _continuing(state: ServerState, update: ClientUpdate) -> ClientUpdate:
    """The update on the scalings of the global adapter, if it has changed nothing that the method freezes."""
    trained = get_method(state.method).trained(state.round + 1)
    kept: dict[str, LoRAPair] = {}
    for module, pair in state.adapter.items():
        kept[module] = rescaled(update.adapter[module], pair.scaling)
        for part in (part for part in pair.parts if part not in trained):
            ours, theirs = pair.parts[part], kept[module].parts[part]
            if not (
                torch.equal(ours, theirs) or torch.allclose(ours.to(theirs.dtype), theirs, rtol=1e-6, atol=0)
            ):  # another scaling rounds
                raise AggregationError(f"client {update.client_id} changed {part} of {module}, which {state.method} freezes: freeze it too")
            kept[module] = kept[module].with_part(part, ours)
    return replace(update, adapter=kept)
