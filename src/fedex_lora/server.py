"""The server as pure functions: `init`, then `step` once a round. State goes in, state comes out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedex_lora.aggregation import WeightRule, aggregate, method_named, on_scaling
from fedex_lora.aggregation.lowrank import add
from fedex_lora.errors import AggregationError
from fedex_lora.types import Adapter, Aggregate, ClientUpdate, Delta, LowRank, ServerState


def init(adapter: Adapter, other: Mapping[str, Tensor], method: str = "fedex") -> ServerState:
    """The state before the first round: the initial adapter, and a base that has gained nothing."""
    method_named(method)
    return ServerState(method=method, round=0, adapter=dict(adapter), base_delta={}, other=dict(other))


def step(state: ServerState, updates: Sequence[ClientUpdate], weights: WeightRule = "num_examples") -> tuple[ServerState, Aggregate]:
    """One round: aggregate the updates and put the residual into the base.

    `D_v = D_{v-1} + s R_v`, so that `W0 + D_v + s Bbar Abar = sum_i p_i (W0 + D_{v-1} + s_i B_i A_i)`, the mean of the
    participants' models (FedEx-LoRA, eq. 5-9 and 13-14).

    Args:
        state: as left by `init` or the previous `step`; not changed.
        updates: this round's participants, in any order.
        weights: see `aggregate`.

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
    result = aggregate([_continuing(state, update) for update in updates], state.method, weights)
    following = ServerState(
        method=state.method,
        round=state.round + 1,
        adapter=result.adapter,
        base_delta=advance(state.base_delta, result.residual),
        other=result.other,
    )
    return following, result


def advance(base_delta: Mapping[str, Delta], residual: Mapping[str, LowRank]) -> dict[str, Delta]:
    """`D_v` from `D_{v-1}` and the round's residual; server and clients share it, so they hold the same bits."""
    return {**base_delta, **{module: add(base_delta.get(module), gain) for module, gain in residual.items()}}


def _continuing(state: ServerState, update: ClientUpdate) -> ClientUpdate:
    """The update on the scalings of the global adapter, if it continues that adapter."""
    frozen_a = method_named(state.method).trains == "B"
    for module, pair in state.adapter.items():
        sent = update.adapter.get(module)
        if sent is None or (sent.shape, sent.rank) != (pair.shape, pair.rank):
            raise AggregationError(
                f"client {update.client_id} does not continue module {module} of the global adapter: same names, shapes and rank"
            )
        if frozen_a and not torch.equal(sent.A, pair.A):
            raise AggregationError(f"client {update.client_id} changed A of {module}, which method {state.method} freezes")
    kept = {module: on_scaling(pair, state.adapter[module].scaling) for module, pair in update.adapter.items() if module in state.adapter}
    if len(kept) < len(update.adapter):
        raise AggregationError(f"client {update.client_id} sent modules that the global adapter does not have")
    return replace(update, adapter=kept)
