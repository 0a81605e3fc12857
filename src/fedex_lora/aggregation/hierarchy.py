"""Partial aggregates merge exactly: regional servers between the clients and the global one change nothing but rounding."""

from collections.abc import Sequence

from fedex_lora.aggregation.engine import aggregate, normalised_weights
from fedex_lora.aggregation.lowrank import add_weighted, finite
from fedex_lora.aggregation.methods import get_method
from fedex_lora.errors import AggregationError, UsageError
from fedex_lora.types import Aggregate, ClientUpdate


def merge(parts: Sequence[Aggregate], weights: Sequence[float]) -> Aggregate:
    """The aggregate of all clients from those of regions, in any order and over any tree.

    A region's aggregate stands for its clients' models, `W0 + D + s R_j + s Bbar_j Abar_j`, so the mean of all is
    `M = sum_j w_j (s Bbar_j Abar_j + s R_j)`: the mean factors of the regions' adapters, with the covariance between the regions and
    `sum_j w_j s R_j` as the residual (Chan, Golub and LeVeque 1979, for a covariance of matrices). The rank for `fedex` stays at most
    (k-1) r for k clients in all: `(J-1) r` between J regions, `(k_j-1) r` within each.

    Args:
        parts: aggregates of disjoint sets of clients, of one method and round.
        weights: the total weight of each region (its examples, say), >= 0; normalised to sum one.

    Raises:
        UsageError: a method whose partial aggregates do not add up.
        AggregationError: parts that do not fit together, a client in two of them, or impossible weights.

    Example:
        >>> import torch
        >>> update = lambda name: ClientUpdate(name, {"q": LoRAPair(A=torch.randn(4, 16), B=torch.randn(8, 4))}, 10)
        >>> from fedex_lora.types import LoRAPair
        >>> north, south = aggregate([update("a"), update("b")]), aggregate([update("c")])
        >>> result = merge([north, south], weights=[20, 10])
        >>> result.residual["q"].rank, {client: round(p, 3) for client, p in result.weights.items()}
        (8, {'a': 0.333, 'b': 0.333, 'c': 0.333})
    """
    if not parts:
        raise AggregationError("no aggregates to merge: give at least one")
    methods = sorted({part.method for part in parts})
    if len(methods) > 1:
        raise AggregationError(f"aggregates of different methods ({', '.join(methods)}) have no common mean: use one")
    row = get_method(methods[0])
    means = row.is_factor_mean or row.reinitialises  # the adapter is the mean factors, or new, and the base gains all of the rest
    if not means or row.gauge != "as-is" or row.client_state or not row.lora:
        raise UsageError(f"partial aggregates of {row.name} do not add up to the aggregate of all clients: use fedex in every region")
    clients = [client for part in parts for client in part.weights]
    if len(set(clients)) < len(clients):
        twice = sorted(client for client in set(clients) if clients.count(client) > 1)
        raise AggregationError(f"client {twice[0]} is in more than one aggregate: count every client once")
    for module, gain in ((module, gain) for part in parts for module, gain in part.residual.items()):
        if not finite(gain.U, gain.V):
            raise AggregationError(f"an aggregate holds NaN or infinity in the residual of {module}: make that one again")
    regions = [ClientUpdate(f"region {index:06d}", part.adapter, 1, part.other) for index, part in enumerate(parts)]
    between = aggregate(regions, "fedex" if row.residual_policy == "base" else row.name, weights)
    w = normalised_weights(regions, weights)
    return Aggregate(
        adapter=between.adapter,
        residual=add_weighted(between.residual, [(share, part.residual) for share, part in zip(w, parts, strict=True)]),
        other=between.other,
        weights={client: share * p for share, part in zip(w, parts, strict=True) for client, p in part.weights.items()},
        method=row.name,
    )
